"""What is handed out of a quantised program: rounding that falls the other way is no fault, a wrong scale is one."""

from pathlib import Path
from typing import Any

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

pytest.importorskip("torchao", reason="needs torchao (the quantize extra)")


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
    return Quantize(samples=8)(program, data=[torch.randn(4, 3, 16, 16) for _ in range(2)]).program


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
