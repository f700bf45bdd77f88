"""Fake quantisation to FP8 as operators, since ATen has it for integers alone.

FP8 is E4M3 without infinities (`torch.float8_e4m3fn`): 4 bits of exponent, 3 of mantissa, numbers up to 448, the smallest
2^-9. Source: Micikevicius et al., arXiv 2209.05433. graphcomb loads programs with these operators; torch.export does after
`import graphcomb.graph.fp8`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST = 448.0
ROUNDS_TO_LARGEST = 464.0  # half a step above it, were there a next number


def e4m3(x: Tensor) -> Tensor:
    """The nearest numbers of E4M3 in the type of `x`, to even where two are equally near; larger ones become +-448."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(x.dtype)


@torch.library.custom_op("graphcomb::fake_quantize_per_tensor_e4m3", mutates_args=())
def fake_quantize_per_tensor(x: Tensor, scale: float) -> Tensor:
    """`scale * e4m3(x / scale)`, computed in fp32 at least. Gradients pass straight through where nothing saturates."""
    return _as(x.dtype, e4m3(_wide(x) / scale) * scale)


@torch.library.custom_op("graphcomb::fake_quantize_per_channel_e4m3", mutates_args=())
def fake_quantize_per_channel(x: Tensor, scale: Tensor, axis: int) -> Tensor:
    """The same with a scale `(size of the axis,)` for each index along an axis."""
    scale = _along(scale, x, axis)
    return _as(x.dtype, e4m3(_wide(x) / scale) * scale)


PER_TENSOR = torch.ops.graphcomb.fake_quantize_per_tensor_e4m3.default
PER_CHANNEL = torch.ops.graphcomb.fake_quantize_per_channel_e4m3.default


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else _as(torch.float32, x)


def _along(scale: Tensor, x: Tensor, axis: int) -> Tensor:
    return _as(_wide(x).dtype, scale).view([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])


def _same_shape(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def _save_tensor(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    x, scale = inputs
    ctx.save_for_backward((_wide(x) / scale).abs() <= ROUNDS_TO_LARGEST)


def _save_channels(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    x, scale, axis = inputs
    ctx.save_for_backward((_wide(x) / _along(scale, x, axis)).abs() <= ROUNDS_TO_LARGEST)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (inside,) = ctx.saved_tensors
    return grad * inside, *(None,) * (len(ctx.needs_input_grad) - 1)


fake_quantize_per_tensor.register_fake(_same_shape)
fake_quantize_per_channel.register_fake(_same_shape)
fake_quantize_per_tensor.register_autograd(_straight_through, setup_context=_save_tensor)
fake_quantize_per_channel.register_autograd(_straight_through, setup_context=_save_channels)
