"""What fp16 cannot hold is computed in fp32: norms written by hand, coordinates of boxes, values outside of its range."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import graphcomb.runtime.export.to_onnx as onnx_module
from graphcomb.graph.errors import BadInput, Refused
from graphcomb.graph.program import Program
from graphcomb.runtime import export_onnx, load_engine

from ..toys import captured, float_types


class Scaled(nn.Module):
    """A linear layer between two factors."""

    def __init__(self, before: float, after: float):
        super().__init__()
        self.linear, self.before, self.after = nn.Linear(4, 4), before, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * self.before) * self.after


def test_what_fp16_cannot_hold_stays_in_fp32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = export_onnx(captured(Scaled(6e4, 1e-4).eval(), 4), tmp_path / "s.onnx", "fp16")
    assert len(report.float32) == 3
    assert all("fp16 ends at 65504" in why for why in report.float32.values())
    assert report.clamped == {}
    assert report.parity is not None
    assert report.parity < 2e-3
    assert [(i.name, i.dtype) for i in (*report.inputs, *report.outputs)] == [("x", "float16"), ("output", "float16")]
    wide = export_onnx(captured(Scaled(1.0, 1e6).eval(), 4), tmp_path / "w.onnx", "fp16")
    assert [o.dtype for o in wide.outputs] == ["float32"]


def test_outputs_below_the_range_of_fp16_stay_in_fp32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = export_onnx(captured(Scaled(1.0, 1e-7).eval(), 4), tmp_path / "s.onnx", "fp16")
    assert [o.dtype for o in report.outputs] == ["float32"]
    assert report.parity is not None
    assert report.parity < 2e-3


class Cancelled(nn.Module):
    """Finite in fp16 and far off, since 2048.1 is 2048 there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + 2048) - 2048


def test_fp16_that_is_finite_and_far_off_is_refused_with_the_node(tmp_path: Path) -> None:
    program = captured(Cancelled(), 4)
    with pytest.raises(
        Refused, match=r"fp16 differs from the program by .*limit 0\.1.*first off in fp16: sub_\d \(Sub\) vanishes"
    ) as no:
        export_onnx(program, tmp_path / "c.onnx", "fp16")
    assert list(tmp_path.iterdir()) == []
    assert "keep_fp32 and tolerance are the options" in str(no.value)
    assert "\n" not in str(no.value)
    loose = export_onnx(program, tmp_path / "c.onnx", "fp16", tolerance=2.0)
    assert loose.parity is not None
    assert 0.1 < loose.parity < 2
    exact = export_onnx(program, tmp_path / "c.onnx", "fp16", keep_fp32=["*"])
    assert exact.parity is not None
    assert exact.parity < 1e-3
    assert set(exact.float32.values()) == {"Add: asked for", "Relu: asked for", "Sub: asked for"}
    with pytest.raises(BadInput, match="keep_fp32: bodi matches no node"):
        export_onnx(program, tmp_path / "c.onnx", "fp16", keep_fp32=["bodi"])


def test_modules_stay_in_fp32_by_name(program: Program, tmp_path: Path) -> None:
    report = export_onnx(program, tmp_path / "net.onnx", "fp16", keep_fp32=["body"])
    assert report.float32
    assert all(name.startswith("body") for name in report.float32)
    assert onnx.TensorProto.FLOAT in float_types(report.path)


class Norm(nn.Module):
    """A channel norm written by hand, as in many segmentation heads; squares of its inputs leave fp16 either way."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.conv, self.head, self.scale = nn.Conv2d(3, 16, 3), nn.Linear(16, 10), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x) * self.scale
        x = x - x.mean(1, True)
        x = x * torch.rsqrt((x * x).mean(1, True) + 1e-12)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_norms_written_by_hand_are_computed_in_fp32(scale: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = export_onnx(captured(Norm(scale).eval(), 3, 8, 8), tmp_path / "n.onnx", "fp16")
    assert report.parity is not None
    assert report.parity < 5e-3
    assert {why.split(":")[0] for why in report.float32.values()} >= {"Mul", "ReduceMean", "Add", "Sqrt"}
    assert report.types["fp16"] > 500
    assert "conv" not in "".join(report.float32)


def test_a_tiny_epsilon_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = captured(Norm(1.0).eval(), 3, 8, 8)
    with torch.no_grad():
        program.module().get_parameter("conv.weight").zero_()
        program.module().get_parameter("conv.bias").zero_()
    for precision in ("fp32", "fp16"):
        report = export_onnx(program, tmp_path / "n.onnx", precision)
        (found,) = load_engine(report.path).run([np.ones((1, 3, 8, 8), report.inputs[0].dtype)])
        assert np.isfinite(found).all(), "0 divided by the root of 1e-12, not of 0"


class Boxes(nn.Module):
    """Distances and scores of a grid, decoded to pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.register_buffer("places", torch.arange(400.0).reshape(1, 1, 20, 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return torch.cat([(x[:, :4].sigmoid() + self.places) * 8, x[:, 4:].sigmoid()], 1).flatten(2)


def test_box_coordinates_are_decoded_in_fp32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = export_onnx(captured(Boxes().eval(), 3, 20, 20), tmp_path / "b.onnx", "fp16")
    assert [(o.name, o.dtype) for o in report.outputs] == [("output", "float32")]
    assert not any("conv" in name for name in report.float32)
    assert all("misses whole numbers there" in why for why in report.float32.values())
    assert report.parity is not None
    assert report.parity < 2e-3


def test_wrong_scores_beside_boxes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    translate = onnx_module.translate

    def swapped(*args: Any) -> onnx.ModelProto:
        model = translate(*args)
        weight, bias = (next(t for t in model.graph.initializer if t.name == f"conv.{n}") for n in ("weight", "bias"))
        for tensor in (weight, bias):
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[[4, 5]] = values[[5, 4]]
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        return model

    torch.manual_seed(0)
    program = captured(Boxes().eval(), 3, 20, 20)
    monkeypatch.setattr(onnx_module, "translate", swapped)
    for precision, figure in (("fp32", "by 0.000"), ("fp16", "in channel [45] of axis 1 of output")):
        with pytest.raises(Refused, match=f"{precision} differs from the program {figure}"):
            export_onnx(program, tmp_path / "b.onnx", precision)
