"""What a half-precision graph computes when every operator rounds, on a processor that hides it."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.runtime import export_onnx
from graphcomb.runtime.export.compare import session
from graphcomb.runtime.export.half_precision.emulation import emulate


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def emulated(function, x: torch.Tensor, tmp_path: Path) -> np.ndarray:
    report = export_onnx(g.capture(Function(function), x), tmp_path / "m.onnx", "fp16", tolerance=1e9)
    with session(emulate(onnx.load(report.path))) as engine:
        return engine.run([x.numpy()])[0]


@pytest.mark.parametrize("function", [lambda x: x + 100, lambda x: x * 1.5 + x, lambda x: torch.tanh(x) * x])
def test_it_rounds_after_every_operator(function, tmp_path: Path) -> None:
    x = torch.randn(3, 50)

    class Rounded(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **kwargs or {}).half().float()

    half = x.half().float()
    with Rounded():
        expected = function(half)
    found = emulated(function, x, tmp_path)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_movements_do_not_round_and_inputs_do(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    found = emulated(lambda x: torch.cat([x.t(), x.t()], 1), x, tmp_path)
    np.testing.assert_array_equal(found, torch.cat([x.half().t()] * 2, 1).float().numpy())


def test_infinite_and_huge_masks_are_no_overflow(tmp_path: Path) -> None:
    mask = torch.tensor([0.0, -torch.inf, 0.0, -1e30])
    x = torch.rand(3, 4)
    program = g.capture(Function(lambda x: torch.softmax(x + mask, -1)), x)
    report = export_onnx(program, tmp_path / "m.onnx", "fp16")
    assert report.float32 == {}
    assert report.parity is not None
    assert report.parity < 2e-3
