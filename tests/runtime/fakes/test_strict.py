"""The stand-in has the members of a version and no other, and takes what they take."""

import gc

import pytest

from graphcomb.runtime.kit.trt import collector_off

from .strict import TABLE, Library
from .tensorrt import fake_tensorrt

VERSIONS = ["8.5.2", *TABLE]


@pytest.fixture(autouse=True)
def as_in_a_build():
    with collector_off():
        yield


@pytest.mark.parametrize("version", VERSIONS)
def test_a_member_that_a_version_lacks_does_not_exist(version, cudart):
    trt = fake_tensorrt(version, cudart).module
    old, new = version.startswith("8"), version in ("11.4.0", "rtx")
    assert hasattr(trt.BuilderFlag, "FP16") != new
    assert hasattr(trt.BuilderFlag, "EDITABLE_TIMING_CACHE") == (version not in ("8.5.2", "8.6.1", "10.3.0"))
    assert hasattr(trt, "OnnxParserRefitter") != old
    assert hasattr(trt.IBuilderConfig, "int8_calibrator") != new
    assert hasattr(trt.IBuilderConfig, "set_compute_capability") == (version == "rtx")
    config = trt.Builder(trt.Logger()).create_builder_config()
    with pytest.raises(AttributeError, match="has no attribute optimisation_level"):
        config.optimisation_level = 3


@pytest.mark.parametrize("version", VERSIONS)
def test_a_call_with_other_arguments_is_an_error(version, cudart):
    trt = fake_tensorrt(version, cudart).module
    config = trt.Builder(trt.Logger()).create_builder_config()
    for wrong in (
        lambda: config.set_flag(8),  # a number
        lambda: config.set_flag(trt.DeviceType.GPU),
        lambda: config.set_flag(),
        lambda: config.set_flag(trt.BuilderFlag.REFIT, True),
        lambda: config.set_flag(named=trt.BuilderFlag.REFIT),
        lambda: config.create_timing_cache("text"),
        lambda: setattr(config, "profiling_verbosity", 2),
        lambda: setattr(config, "default_device_type", "DLA"),
        lambda: trt.Builder(object()),
        lambda: trt.Runtime(),
        lambda: trt.BuilderFlag.REFIT << 1,
    ):
        with pytest.raises(TypeError):
            wrong()
    config.set_flag(flag=trt.BuilderFlag.REFIT)


def test_a_logger_whose_base_class_was_not_initialised_is_refused(cudart):
    trt = fake_tensorrt("10.3.0", cudart).module

    class Silent(trt.ILogger):
        def __init__(self):
            pass

    with pytest.raises(TypeError):
        trt.Builder(Silent())


def test_behaviour_that_no_version_has_is_a_mistake():
    class Config:
        def set_everything(self):
            pass

    with pytest.raises(AssertionError, match=r"IBuilderConfig\.set_everything"):
        Library("10.3.0").implement("IBuilderConfig", Config)


def test_garbage_is_not_collected_where_the_library_holds_its_locks(cudart):
    trt = fake_tensorrt("10.3.0", cudart).module
    builder = trt.Builder(trt.Logger())
    gc.enable()
    for locked in (lambda: trt.Runtime(trt.Logger()), builder.create_network):
        with pytest.raises(AssertionError, match="garbage may be collected"):
            locked()
