"""OpenVINO, for real on the CPU."""

import numpy as np
import onnx
import pytest
import torch

import graphcomb
from graphcomb.graph.errors import BadInput
from graphcomb.runtime import bench, build_engine, load_engine
from graphcomb.runtime.engines.base import Engine
from graphcomb.runtime.engines.build import open_engine
from graphcomb.runtime.export.to_onnx import export_onnx

pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(1), torch.nn.Linear(288, 4))
    program = graphcomb.capture(net.eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes="batch")
    return export_onnx(program, tmp_path_factory.mktemp("onnx") / "net.onnx").path


def numbers(batch):
    return np.random.default_rng(batch).standard_normal((batch, 3, 8, 8)).astype(np.float32)


def test_it_computes_what_onnx_runtime_does(model, tmp_path):
    report = build_engine(model, "cpu", tmp_path / "net.xml", backend="openvino")
    assert (report.backend, report.target, report.precision) == ("openvino", "cpu", "fp32")
    weights = sum(np.prod(t.dims) for t in onnx.load(model).graph.initializer if t.data_type == 1) * 4
    assert report.memory["weights"] == pytest.approx(weights, rel=0.05)
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.bin", "net.xml"]
    assert any(k.kind == "Convolution" and "1/relu" in k.nodes for k in report.kernels)  # fused
    assert all(text.startswith("f32[") for k in report.kernels for text in k.outputs)
    reference = load_engine(model)
    for engine in (load_engine(report.path), load_engine(model, "openvino", threads=2), open_engine(model, "openvino")):
        assert isinstance(engine, Engine)
        assert [(i.name, i.dtype, i.shape) for i in engine.inputs] == [("input", "float32", (None, 3, 8, 8))]
        for batch in (1, 3):
            (found,), (wanted,) = engine.run([numbers(batch)]), reference.run([numbers(batch)])
            assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
        engine.close()


def test_it_is_measured_by_name(model):
    found = bench([model, model], engine="openvino", names=["a", "b"], seconds=1.0, min_runs=1)
    assert [t.name for t in found.timings] == ["a", "b"]
    assert "openvino" in found.environment["versions"]
    with pytest.raises(BadInput, match="backend openvin: not known; did you mean openvino"):
        bench([model, model], engine="openvin")


def test_mistakes_are_one_line(model, tmp_path):
    engine = load_engine(model, "openvino")
    with pytest.raises(BadInput, match="takes 1 inputs"):
        engine.run([])
    with pytest.raises(BadInput, match="takes float32, got float64"):
        engine.run([numbers(1).astype(np.float64)])
    with pytest.raises(BadInput, match="the inputs do not fit the engine: "):
        engine.run([numbers(1)[..., :5]])
    (tmp_path / "net.xml").write_text("no network")
    with pytest.raises(BadInput, match=r"net\.xml: OpenVINO refuses it \(.+\)"):
        load_engine(tmp_path / "net.xml")
