"""Engines of TensorRT run on stand-ins: `classic` for its module, `cudart` for the CUDA runtime, on host memory."""

import ctypes
import dataclasses

import numpy as np
import pytest

import graphcomb
from graphcomb.graph.errors import BadInput, Refused
from graphcomb.runtime.devices import here
from graphcomb.runtime.engines import backends
from graphcomb.runtime.engines.trt import build as tensorrt
from graphcomb.runtime.engines.trt.build import TensorRTEngine

from ...standins import FakeCudart
from .toys import relu


def test_an_engine_binds_copies_and_runs(classic, tmp_path, cudart):
    (tmp_path / "net.engine").write_bytes(b"engine")
    engine = TensorRTEngine(tmp_path / "net.engine", "tensorrt")
    assert [dataclasses.astuple(s) for s in engine.inputs] == [("x", "float32", (None, 4))]
    assert [s.name for s in engine.outputs] == ["y"]
    for batch in (2, 8, 1):  # buffers grow, and are used again
        x = np.random.default_rng(batch).standard_normal((4, batch)).astype(np.float32).T  # not contiguous
        (y,) = engine.run([x])
        assert np.array_equal(y, 2 * x)
        assert len(cudart.blocks) == 2
    with pytest.raises(BadInput, match=r"input x: shape \(9, 4\) is outside of .* range \(1, 4\) to \(8, 4\)"):
        engine.run([np.zeros((9, 4), np.float32)])
    with pytest.raises(BadInput, match="input x: the engine takes float32, got float64"):
        engine.run([np.zeros((1, 4))])
    with pytest.raises(BadInput, match=r"takes 1 inputs \(x\), got 2"):
        engine.run([x, x])
    engine.close()
    assert cudart.blocks == {}


def numbers(batch):
    return np.random.default_rng(batch).standard_normal((batch, 4)).astype(np.float32)


def test_a_graph_is_recorded_once_for_shapes_and_buffers(engine, cudart):
    net = engine(graphs=True)
    for batch, launched in ((2, 1), (2, 2), (8, 3), (8, 4), (2, 5)):
        x = numbers(batch) + launched
        (y,) = net.run([x])
        assert np.array_equal(y, 2 * x)  # of this run's input, although an earlier one was recorded
        assert cudart.launched == launched
        assert len(cudart.graphs) == 1
    net.close()
    assert cudart.graphs == cudart.blocks == {}


@pytest.mark.filterwarnings("ignore:.*optimised for")
def test_a_prepared_run_leaves_the_data_on_the_device(engine, cudart, monkeypatch):
    for graphs in (False, True):
        call = engine(graphs).prepared([numbers(3)])
        with monkeypatch.context() as patch:
            patch.setattr(FakeCudart, "cudaMemcpyAsync", lambda *a: pytest.fail("a copy"))
            call()
        assert cudart.launched == (2 if graphs else 0)


def test_what_cannot_be_recorded_runs_without_a_graph(engine, classic, cudart):
    """The stream has left the capture, and no error is left for the next launch."""
    classic.recordable = False
    net, x = engine(graphs=True), numbers(2)
    with pytest.warns(UserWarning, match=r"net\.engine: runs without a CUDA graph: the engine did not run"):
        assert np.array_equal(net.run([x])[0], 2 * x)
    assert (cudart.recording, cudart.pending, cudart.graphs) == (None, 0, {})
    assert np.array_equal(net.run([x])[0], 2 * x)  # and is not tried again
    net.close()


@pytest.mark.filterwarnings("ignore:.*optimised for")
def test_a_second_prepared_run_leaves_the_first_as_it_was(engine):
    net = engine()
    first, second = net.prepared([numbers(3)]), net.prepared([numbers(5)])

    def result():
        return np.ctypeslib.as_array((ctypes.c_float * 12).from_address(net._buffers["y"][0]))

    second()
    first()
    assert np.array_equal(result(), 2 * numbers(3).ravel())


def test_another_shape_than_the_optimum_is_said(engine):
    with pytest.warns(UserWarning, match=r"measured with shape \(3, 4\), and the engine is optimised for \(1, 4\)"):
        engine().prepared([numbers(3)])


def test_of_several_profiles_the_one_for_the_shapes_is_used(engine, monkeypatch, recwarn):
    net = engine()
    ranges = [[(1, 4), (1, 4), (8, 4)], [(4, 4), (5, 4), (8, 4)], [(16, 4), (16, 4), (16, 4)]]
    asked = []
    kind = type(net._engine)
    monkeypatch.setattr(kind, "num_optimization_profiles", 3)
    monkeypatch.setattr(kind, "get_tensor_profile_shape", staticmethod(lambda name, profile: ranges[profile]))
    choose = lambda context, profile, stream: asked.append(profile) or True  # noqa: E731
    monkeypatch.setattr(type(net._context), "set_optimization_profile_async", choose)
    for batch, wanted in ((5, [1]), (5, [1]), (2, [1, 0]), (1, [1, 0])):
        net.prepared([numbers(batch)])()
        assert asked == wanted
    assert len(recwarn) == 1  # about the batch of 2


def test_only_a_trusted_file_brings_code_of_its_own(classic, tmp_path):
    (tmp_path / "net.engine").write_bytes(b"engine")
    if classic.module.__version__.startswith("8.5"):
        with pytest.raises(Refused, match=r"option host_code: TensorRT .* knows no engines"):
            load_classic(tmp_path, host_code=True)
        return
    assert not load_classic(tmp_path)._runtime.engine_host_code_allowed
    assert load_classic(tmp_path, host_code=True)._runtime.engine_host_code_allowed


def load_classic(folder, **options):
    return tensorrt.load(folder / "net.engine", backend="tensorrt", **options)


def test_layers_are_timed_in_runs_of_their_own(engine):
    net = engine(graphs=True)
    assert net.profile([numbers(2)], runs=4) == [("first", 1.0), ("second", 0.5)]
    x = numbers(2)
    assert np.array_equal(net.run([x])[0], 2 * x)  # and it runs as before


def test_the_inspector_is_read(engine):
    assert engine().inspect() == [{"Name": "relu", "HasSparseWeights": 1}, {"Name": "plain"}]


def test_weights_are_replaced_where_the_version_can(engine, classic, tmp_path, monkeypatch):
    net, x = engine(), numbers(2)
    if classic.module.__version__.startswith("8"):
        with pytest.raises(Refused, match=r"TensorRT 8.\d.\d refits no ONNX files"):
            net.refit(tmp_path / "net.onnx")
        return
    with pytest.raises(BadInput, match=r"other.onnx: not the network of .*net.engine: weights are missing"):
        net.refit(tmp_path / "other.onnx")
    net.refit(tmp_path / "net.onnx")
    assert np.array_equal(net.run([x])[0], 3 * x)
    monkeypatch.setattr(type(net._engine), "refittable", False)
    with pytest.raises(Refused, match="not built with the option refit"):
        net.refit(tmp_path / "net.onnx")


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_an_engine_is_measured_on_a_profile_for_its_batch(classic, tmp_path, monkeypatch, recwarn, batch):
    """The stand-in's engine takes what its profile says."""
    model = relu(tmp_path / "net.onnx")
    of_profile = lambda engine, name, index: classic.profile["x"]  # noqa: E731
    monkeypatch.setattr(classic.module.ICudaEngine, "get_tensor_profile_shape", of_profile)
    context = classic.module.IExecutionContext

    def fits(self, name, shape):
        self._shape = shape
        smallest, _, largest = classic.profile["x"]
        return all(a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True))

    monkeypatch.setattr(context, "set_input_shape", fits)
    monkeypatch.setattr(here, "_machine_names", lambda: here._words("Jetson AGX Orin"))
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(
        "graphcomb.runtime.measure.bench.stolen", lambda: 0.0
    )  # what a hypervisor takes is no matter here
    result = graphcomb.runtime.bench([model, model], engine="tensorrt", batch=batch, seconds=0.1, min_runs=1)
    assert result.ratio is not None
    assert classic.profile == {"x": ((batch, 4),) * 3}
    assert not [str(warning.message) for warning in recwarn if "optimised for" in str(warning.message)]


def test_a_foreign_engine_file_is_one_line(classic, tmp_path):
    (tmp_path / "net.engine").write_bytes(b"of another version")
    with pytest.raises(BadInput, match=r"not an engine for TensorRT .* here: the engine plan is of version 8"):
        TensorRTEngine(tmp_path / "net.engine", "tensorrt")
