"""Each call of TensorRT and CUDA fails once while an engine is built, loaded and run.

An error is then one that a user can act on, and device memory, graphs, events and captures are released.
"""

import numpy as np
import pytest

from graphcomb.graph.errors import GraphcombError
from graphcomb.runtime.devices.table import get_target
from graphcomb.runtime.engines.options import EngineOptions
from graphcomb.runtime.engines.trt import build as tensorrt
from graphcomb.runtime.engines.trt.build import TensorRTEngine

from .toys import relu

ORIN = get_target("agx-orin")
TIMED_OUT = 702  # cudaErrorLaunchTimeout
QUERIES = ("get_tensor_name", "get_tensor_mode", "get_tensor_dtype", "get_tensor_shape", "get_tensor_profile_shape")
QUERIES += ("get_layer", "get_input", "get_output", "get_error", "desc", "node", "node_name", "node_operator")


def faults(classic, work):
    """Yield each call that can fail, and how it does: it raises an exception or returns what stands for a failure."""
    work()
    called = list(dict.fromkeys(classic.library.calls))
    assert len(called) > 5
    for name in called:
        failure = classic.library.failures.get(name)
        yield name, RuntimeError("it  broke")
        if name.rpartition(".")[2] not in QUERIES and not (failure is None and name in NOTHING):
            yield name, lambda *arguments, result=failure, **keywords: result


# They return nothing, so they can only raise.
NOTHING = ("IBuilderConfig.set_flag", "IBuilderConfig.clear_flag", "IBuilderConfig.set_memory_pool_limit")
NOTHING += ("IOptimizationProfile.set_shape",)


def build(folder, **options):
    given = EngineOptions(timing_cache=folder / "cache", workspace=64, batch=(1, 2, 4), progress=True, **options)
    return tensorrt.build(relu(folder / "net.onnx"), ORIN, folder / "net.engine", given, backend="tensorrt")


def run(folder):
    """Run an engine in every way and release it."""
    engine = TensorRTEngine(folder / "net.engine", "tensorrt", graphs=True)
    try:
        x = np.ones((2, 4), np.float32)
        engine.run([x])
        engine.prepared([x])()
        engine.inspect()
        engine.profile([x], 1)
        engine.run([x])
    finally:
        engine.close()


def test_a_build_whose_calls_fail_says_so(classic, tmp_path):
    for name, fault in list(faults(classic, lambda: build(tmp_path))):
        (tmp_path / "net.engine").unlink(missing_ok=True)
        classic.library.faults = {name: fault}
        try:
            build(tmp_path)
            failed = ""
        except GraphcombError as error:
            failed = str(error)
        assert "\n" not in failed
        assert (tmp_path / "net.engine").exists() != bool(failed)
        assert not list(tmp_path.glob("*.part"))


@pytest.mark.filterwarnings("ignore:.*optimised for", "ignore:.*without a CUDA graph")
def test_a_run_whose_calls_fail_says_so(classic, cudart, tmp_path):
    (tmp_path / "net.engine").write_bytes(b"engine")
    for name, fault in list(faults(classic, lambda: run(tmp_path))):
        classic.library.faults = {name: fault}
        try:
            run(tmp_path)
            failed = ""
        except GraphcombError as error:
            failed = str(error)
        assert "\n" not in failed
        assert cudart.recording is None
        assert cudart.blocks == cudart.graphs == {}, name


CUDA = (
    "cudaStreamCreateWithFlags cudaStreamSynchronize cudaMalloc cudaMemcpyAsync cudaStreamBeginCapture "
    "cudaStreamEndCapture cudaGraphInstantiateWithFlags cudaGraphLaunch cudaGetDeviceCount cudaDeviceGetAttribute"
).split()


@pytest.mark.filterwarnings("ignore:.*optimised for", "ignore:.*without a CUDA graph")
@pytest.mark.parametrize("name", CUDA)
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("classic", ["8.6.1", "11.4.0"], indirect=True)
def test_a_cuda_call_that_times_out_is_one_line(classic, cudart, tmp_path, monkeypatch, name, times):
    """The first calls succeed, and later ones report that a kernel took too long."""
    (tmp_path / "net.engine").write_bytes(b"engine")
    done, real = [], getattr(cudart, name)

    def call(*arguments):
        done.append(name)
        if len(done) < times or name == "cudaStreamEndCapture":  # CUDA does end a capture that it reports an error of
            status = real(*arguments)
        return cudart.fail(TIMED_OUT) if len(done) >= times else status

    monkeypatch.setattr(cudart, name, call, raising=False)
    try:
        build(tmp_path)
        run(tmp_path)
        failed = ""
    except GraphcombError as error:
        failed = str(error)
    assert "\n" not in failed
    assert cudart.recording is None
