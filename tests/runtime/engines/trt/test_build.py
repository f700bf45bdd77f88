"""Builds of classic TensorRT, which cannot be installed without NVIDIA's own packages, and needs a GPU to build: `classic`
stands in for its module. It shows which calls are made to which version, not what TensorRT would answer."""

import hashlib
import sys
import types
import weakref

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphcomb.graph.errors import BadInput, MissingBackend, Refused
from graphcomb.runtime.devices.table import get_target
from graphcomb.runtime.engines.options import EngineOptions
from graphcomb.runtime.engines.trt import build as tensorrt
from graphcomb.runtime.engines.trt import library as tensorrt_library
from graphcomb.runtime.engines.trt.build import TensorRTEngine

from .toys import relu, small


def build(model, target, out, *, backend, **options):
    """What `build_engine` comes down to, whether or not the library is installed."""
    return tensorrt.build(model, target, out, EngineOptions(**options), backend=backend)


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingBackend, match=r"tensorrt_rtx is not installed.*pip install 'graphcomb\[rtx\]'"):
        build(relu(tmp_path / "net.onnx"), get_target("rtx-sm86"), None, backend="tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))  # what the package on PyPI leaves
    with pytest.raises(MissingBackend, match="tensorrt is installed without its libraries"):
        build(relu(tmp_path / "net.onnx"), get_target("agx-orin"), None, backend="tensorrt")


ORIN = get_target("agx-orin")


def test_classic_is_strongly_typed_where_it_can_be(classic, tmp_path):
    weight = [numpy_helper.from_array(np.ones(4, np.float16), "w")]
    spec = {"x": (TensorProto.FLOAT16, ("batch", 4))}
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"], name="mul")]
    model = small(tmp_path / "net.onnx", nodes, spec, {"y": spec["x"]}, weight)
    report = build(model, ORIN, None, backend="tensorrt", batch=(1, 2, 4), sparse=True, tf32=False)
    names = classic.module.NetworkDefinitionCreationFlag
    if classic.module.__version__.startswith("8"):
        assert classic.network_flags == 1 << int(names.EXPLICIT_BATCH)
        assert classic.flags == ["FP16", "SPARSE_WEIGHTS", "-TF32"]
        assert "no strongly typed networks" in report.warnings[0]
    else:
        assert classic.network_flags == 1 << int(names.STRONGLY_TYPED)
        assert classic.flags == ["SPARSE_WEIGHTS", "-TF32"]
        assert report.warnings == ["tactics were skipped"]
    assert classic.config.profiling_verbosity == classic.module.ProfilingVerbosity.DETAILED
    assert classic.profile == {"x": ((1, 4), (2, 4), (4, 4))}
    assert report.path == tmp_path / "net.engine"
    assert report.path.read_bytes() == b"engine"
    assert [k.kind for k in report.kernels] == ["Relu"]


def test_classic_builds_for_the_gpu_at_hand_only(classic, tmp_path, cudart):
    model = relu(tmp_path / "net.onnx")
    with pytest.raises(BadInput, match=r"target h100 \(SM90\): TensorRT .* builds for the GPU at hand, which is SM87"):
        build(model, get_target("h100"), None, backend="tensorrt")
    cudart.count = 0
    with pytest.raises(
        Refused, match=r"target agx-orin \(SM87\): TensorRT .* builds on the device itself; no NVIDIA GPU"
    ):
        build(model, ORIN, None, backend="tensorrt")


@pytest.mark.parametrize("fault", ["parser", "profile", "build"])
def test_a_failed_build_leaves_nothing_of_the_library(classic, tmp_path, monkeypatch, fault):
    """The error is still held here, and with it what its traceback holds."""
    builders = []

    class Builder(classic.module.Builder):
        def __init__(self, logger):
            super().__init__(logger)
            builders.append(weakref.ref(self))

    monkeypatch.setattr(classic.module, "Builder", Builder)
    monkeypatch.setattr(Builder, "build_serialized_network", lambda builder, network, config: None)
    model = relu(tmp_path / ("bad.onnx" if fault == "parser" else "net.onnx"))
    options = {"batch": (4, 2, 1)} if fault == "profile" else {}
    with pytest.raises((BadInput, Refused)) as error:
        build(model, ORIN, None, backend="tensorrt", **options)
    assert error.tb is not None
    assert [builder() for builder in builders] == [None]


def test_a_parser_error_names_the_node_in_every_version(classic, tmp_path):
    with pytest.raises(BadInput, match=r"bad\.onnx: TensorRT .* cannot parse it: node relu \(Relu\): no importer$"):
        build(relu(tmp_path / "bad.onnx"), ORIN, None, backend="tensorrt")


def test_an_opset_that_the_version_does_not_parse_is_refused(classic, tmp_path):
    limit = {"8.5.2": 17, "8.6.1": 17, "10.3.0": 20, "10.13.0": 20, "11.4.0": 25}[classic.module.__version__]
    build(relu(tmp_path / "net.onnx", opset=limit), ORIN, None, backend="tensorrt")
    with pytest.raises(
        BadInput, match=rf"new\.onnx: opset {limit + 1}; TensorRT .* parses up to {limit}: export it with"
    ):
        build(relu(tmp_path / "new.onnx", opset=limit + 1), ORIN, None, backend="tensorrt")


def test_the_timing_cache_is_reused_and_kept(classic, tmp_path):
    model, cache = relu(tmp_path / "net.onnx"), tmp_path / "cache"
    for expected in (b"+timings", b"+timings+timings"):
        build(model, ORIN, None, backend="tensorrt", timing_cache=cache)
        assert cache.read_bytes() == expected
    cache.write_bytes(b"foreign")
    with pytest.raises(BadInput, match=r"option timing_cache: .*cache was made by another version or device"):
        build(model, ORIN, None, backend="tensorrt", timing_cache=cache)


def test_layers_that_the_dla_cannot_run_are_named(classic, tmp_path):
    spec, weight = {"x": (TensorProto.FLOAT16, ("batch", 4))}, [numpy_helper.from_array(np.ones(4, np.float16), "w")]
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"], name="mul")]
    model = small(tmp_path / "net.onnx", nodes, spec, {"y": spec["x"]}, weight)
    report = build(model, ORIN, None, backend="tensorrt", dla=1, batch=2)
    assert "the DLA cannot run 1 of 2 layers: softmax (SOFTMAX)" in report.warnings
    assert classic.config.default_device_type == classic.module.DeviceType.DLA
    assert classic.config.DLA_core == 1
    assert "GPU_FALLBACK" in classic.flags
    with pytest.raises(BadInput, match=r"input x: axes \[0\] are dynamic"):
        build(model, ORIN, None, backend="tensorrt", dla=1)
    classic.cores = 0
    message = (
        "core 0 asked for, TensorRT .* finds 0 cores on this machine; agx-orin's DLA is driven by TensorRT 10.3, 11.4"
    )
    with pytest.raises(Refused, match=message):
        build(model, ORIN, None, backend="tensorrt", dla=0, batch=2)


def test_flags_that_a_version_lacks_are_refused(classic, tmp_path):
    model = relu(tmp_path / "net.onnx")
    if classic.module.__version__.startswith("8.5"):
        with pytest.raises(
            Refused, match=r"option version_compatible: TensorRT .* has no builder flag VERSION_COMPATI"
        ):
            build(model, ORIN, None, backend="tensorrt", version_compatible=True)
    else:
        build(model, ORIN, None, backend="tensorrt", version_compatible=True)
        assert "VERSION_COMPATIBLE" in classic.flags


def test_engines_for_other_gpus_are_of_a_level_that_the_version_has(classic, tmp_path):
    model = relu(tmp_path / "net.onnx")
    if classic.module.__version__.startswith("8"):
        with pytest.raises(Refused, match=r"option hardware_compatibility: TensorRT .* has no level same_compute_cap"):
            build(model, ORIN, None, backend="tensorrt", hardware_compatibility="same_compute_capability")
    if classic.module.__version__ != "8.5.2":
        build(model, ORIN, None, backend="tensorrt", hardware_compatibility="ampere_plus")
        assert classic.config.hardware_compatibility_level.name == "AMPERE_PLUS"


def test_a_library_that_does_not_load_is_not_missing(tmp_path, monkeypatch):
    def fail(name):
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(tensorrt_library.importlib, "import_module", fail)
    with pytest.raises(MissingBackend, match=r"tensorrt is installed and cannot be loaded: libnvinfer\.so\.10"):
        build(relu(tmp_path / "net.onnx"), ORIN, None, backend="tensorrt")


def test_plugins_are_loaded_to_build_and_to_run(classic, tmp_path):
    model, library = relu(tmp_path / "net.onnx"), tmp_path / "libplugin.so"
    if classic.module.__version__.startswith("8.5"):
        with pytest.raises(BadInput, match=r"option plugins: tensorrt .* takes no plugins"):
            build(model, ORIN, None, backend="tensorrt", plugins=[str(library)])
        return
    with pytest.raises(BadInput, match=r"option plugins: .*libplugin\.so: no such file"):
        build(model, ORIN, None, backend="tensorrt", plugins=[str(library)])
    library.write_bytes(b"")
    report = build(model, ORIN, None, backend="tensorrt", plugins=[str(library)])
    TensorRTEngine(report.path, "tensorrt", plugins=[str(library)]).close()
    assert classic.plugins == [str(library)] * 2
    (tmp_path / "bad.so").write_bytes(b"")
    with pytest.raises(BadInput, match=r"bad\.so: not a library of plugins"):
        build(model, ORIN, None, backend="tensorrt", plugins=[str(tmp_path / "bad.so")])


def test_a_renamed_capability_is_built_for(classic, tmp_path, cudart):
    cudart.capability = (10, 1)
    assert build(relu(tmp_path / "net.onnx"), get_target("drive-thor"), None, backend="tensorrt").path.is_file()
    with pytest.raises(BadInput, match="for the GPU at hand, which is SM110"):
        build(relu(tmp_path / "net.onnx"), ORIN, None, backend="tensorrt")


def later(classic, *versions):
    return not classic.module.__version__.startswith(versions)


def test_several_profiles_are_built_for_their_batches(classic, tmp_path):
    model = relu(tmp_path / "net.onnx")
    build(model, ORIN, None, backend="tensorrt", profiles=[[1, 1, 1], [8, 16, 32]])
    assert classic.profiles == [{"x": ((1, 4),) * 3}, {"x": ((8, 4), (16, 4), (32, 4))}]
    for wrong in ({"profiles": []}, {"profiles": [[1, 2]]}, {"profiles": [[1, 1, 1]], "batch": 2}):
        with pytest.raises(BadInput, match="option profiles: "):
            EngineOptions(**wrong)


def test_an_editable_cache_lies_beside_the_engine_and_its_digest_in_the_report(classic, tmp_path):
    model, out = relu(tmp_path / "net.onnx"), tmp_path / "x.engine"
    if not later(classic, "8", "10.3"):
        with pytest.raises(Refused, match=r"option editable_timing_cache: TensorRT .* has no builder flag EDITABLE"):
            build(model, ORIN, out, backend="tensorrt", editable_timing_cache=True)
        return
    report = build(model, ORIN, out, backend="tensorrt", editable_timing_cache=True)
    assert "EDITABLE_TIMING_CACHE" in classic.flags
    assert (tmp_path / "x.engine.timing").read_bytes() == b"+timings"
    assert report.timing_cache == hashlib.sha256(b"+timings").hexdigest()
    assert build(model, ORIN, out, backend="tensorrt").timing_cache is None


def test_inputs_are_taken_as_they_are_with_direct_io(classic, tmp_path):
    build(relu(tmp_path / "net.onnx"), ORIN, None, backend="tensorrt", direct_io=True, engine_capability="safety")
    assert "DIRECT_IO" in classic.flags
    assert classic.config.engine_capability is classic.module.EngineCapability.SAFETY


def test_a_file_for_the_dla_alone_has_no_layer_on_the_gpu(classic, tmp_path):
    spec, weight = {"x": (TensorProto.FLOAT16, (2, 4, 1, 1))}, [numpy_helper.from_array(np.ones(4, np.float16), "w")]
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"], name="mul")]
    model = small(tmp_path / "net.onnx", nodes, spec, {"y": spec["x"]}, weight)
    with pytest.raises(BadInput, match=r"dla_standalone needs dla, the number of a core"):
        build(model, ORIN, None, backend="tensorrt", engine_capability="dla_standalone")
    with pytest.raises(Refused, match=r"the DLA cannot run softmax \(SOFTMAX\), and alone it has no GPU"):
        build(model, ORIN, None, backend="tensorrt", engine_capability="dla_standalone", dla=0)
    classic.kernels = [("convolution", "CONVOLUTION")]
    classic.flags.clear()
    build(model, ORIN, None, backend="tensorrt", engine_capability="dla_standalone", dla=0)
    assert "GPU_FALLBACK" not in classic.flags
    assert classic.config.engine_capability is classic.module.EngineCapability.DLA_STANDALONE
    linear = 1 << int(classic.module.TensorFormat.DLA_LINEAR)
    assert [classic.network.get_input(0).allowed_formats, classic.network.get_output(0).allowed_formats] == [linear] * 2


def test_tensorrt_rtx_is_called_by_the_same_rules(rtx, tmp_path):
    model = relu(tmp_path / "net.onnx")
    report = build(model, get_target("rtx-sm89"), None, backend="tensorrt_rtx", profiles=[[1, 1, 1], [2, 4, 8]])
    assert report.path.read_bytes() == b"engine"
    assert rtx.capabilities == ("SM89",)
    assert len(rtx.profiles) == 2
    engine = TensorRTEngine(report.path, "tensorrt_rtx", graphs=True)
    assert np.array_equal(engine.run([np.ones((2, 4), np.float32)])[0], np.full((2, 4), 2, np.float32))
    engine.close()
