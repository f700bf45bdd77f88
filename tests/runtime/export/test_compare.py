"""What is handed out of a quantised program: rounding that falls the other way is no fault, a wrong scale is one."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import graphcomb as g
import graphcomb.runtime.export.to_onnx as onnx_module
from graphcomb.graph.errors import Refused
from graphcomb.graph.program import Program
from graphcomb.passes import Quantize
from graphcomb.runtime import export_onnx
from graphcomb.runtime.engines.ort import OrtEngine
from graphcomb.runtime.export.compare import FURTHER, _further, _quantised, _wrong
from graphcomb.runtime.export.output_error import OutputError
from graphcomb.runtime.export.parity import Check


class Deep(nn.Module):
    """Residual convolutions and a block of attention, in which a value that rounds the other way takes others along."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.body = nn.ModuleList(nn.Conv2d(16, 16, 3, 1, 1) for _ in range(4))
        self.norm, self.qkv, self.head = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for conv in self.body:
            x = x + torch.nn.functional.gelu(conv(x))
        x = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head((x + torch.nn.functional.scaled_dot_product_attention(q, k, v)).mean(1))


@pytest.fixture(scope="module")
def quantised() -> Program:
    torch.manual_seed(0)
    program = g.capture(Deep().eval(), torch.randn(2, 3, 16, 16), dynamic_shapes="batch")
    return Quantize(samples=8, include="*")(program, data=[torch.randn(4, 3, 16, 16) for _ in range(2)]).program


class Residuals(nn.Module):
    """Convolutions that ONNX Runtime computes in integers when it may, and rounds otherwise than the graph says."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(16, 10)
        self.a, self.b = (nn.ModuleList(nn.Conv2d(16, 16, 3, 1, 1) for _ in range(6)) for _ in "ab")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for a, b in zip(self.a, self.b, strict=True):
            x = (x + b(a(x).relu())).relu()
        return self.head(x.mean((2, 3)))


def test_int8_is_judged_by_what_the_graph_says_and_not_by_fused_integer_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = g.capture(Residuals().eval(), torch.randn(2, 3, 16, 16), dynamic_shapes="batch")
    program = Quantize(samples=8, include="*")(program, data=[torch.randn(4, 3, 16, 16) for _ in range(2)]).program
    report = export_onnx(program, tmp_path / "q.onnx")
    assert report.parity is not None
    assert report.parity < 1e-5
    x = torch.randn(16, 3, 16, 16)
    wanted = program.module()(x).detach().numpy()
    errors = []
    for plain in (True, False):
        engine = OrtEngine(tmp_path / "q.onnx", plain=plain)
        off = abs(engine.run([x.numpy()])[0] - wanted).max(1) / abs(wanted).max()
        errors.append(float(np.median(off)))  # a value half-way between two steps may round either way in some sample
        engine.close()
    assert errors[0] < 1e-5
    if errors[1] < 1e-4:
        pytest.skip("ONNX Runtime rounds as the graph says here")


def checked(
    samples: tuple[float, ...], cosine: float = 1.0, distances: tuple[float, float] | None = None
) -> list[Check]:
    worst = max(samples)
    output = OutputError("scores", worst, 0.0, "", 1.0, "", cosine, samples, None, distances)
    return [Check("random", len(samples), worst, (output,))]


def test_int8_of_which_some_samples_round_the_other_way_is_right() -> None:
    some, all_off = (0.0, 0.0, 0.3, 0.3), (0.05, 0.3, 0.3, 0.3)
    assert not _wrong(checked(some), 1e-4, quantised=True, half=False)
    assert "for 0% of the samples only" in _quantised(checked(all_off), 1e-4)
    assert _wrong(checked(all_off), 1e-4, quantised=True, half=False)
    assert "has a cosine of 0.900" in _quantised(checked(some, cosine=0.9), 1e-4)
    assert not _further(checked(all_off, distances=(1.2, 1.0)), 1e-4, FURTHER["fp32"])
    assert "as far from the network without quantisation" in _further(
        checked(all_off, distances=(1.6, 1.0)), 1e-4, FURTHER["fp32"]
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_int8_that_is_right_is_handed_out(quantised: Program, precision: str, tmp_path: Path) -> None:
    report = export_onnx(quantised, tmp_path / "q.onnx", precision)
    assert report.opset == 20
    assert "Cast" not in report.nodes
    assert report.cosine is not None
    assert report.cosine > 0.98


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("wrong", ["scale", "channels"])
def test_int8_with_wrong_scales_is_refused(
    quantised: Program, precision: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    translate = onnx_module.translate

    def spoilt(*args: Any) -> onnx.ModelProto:
        model = translate(*args)
        scale = next(t for t in model.graph.initializer if t.name.startswith("body.2.weight") and "scale" in t.name)
        values = onnx.numpy_helper.to_array(scale).copy()
        values[:: 1 if wrong == "scale" else 2] *= 0.3 if wrong == "scale" else 0.1
        scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
        return model

    monkeypatch.setattr(onnx_module, "translate", spoilt)
    with pytest.raises(Refused, match=f"{precision} differs from the"):
        export_onnx(quantised, tmp_path / "q.onnx", precision)
    assert list(tmp_path.iterdir()) == []
