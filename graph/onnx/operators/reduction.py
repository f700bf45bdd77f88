"""Operators along axes: reductions, softmax, orderings, cumulative sums. Source: the ONNX specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import Refused
from ..dtypes import torch_dtype
from ..table import Call, axis_of, operator
from .shapes import axes_of

REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep, dtype=x.dtype),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axes, keep, dtype=x.dtype),
}


@operator(*REDUCTIONS)
def reduction(c: Call) -> Any:
    x = c.tensor()
    axes = axes_of(c, x.dim())
    if axes is None and c.attribute("noop_with_empty_axes", 0):
        axes_free = {"ReduceL1": torch.abs, "ReduceL2": torch.abs, "ReduceLogSum": torch.log}
        if c.step.op == "ReduceSumSquare":
            return x * x
        return axes_free.get(c.step.op, lambda x: x)(x)
    axes = list(range(x.dim())) if axes is None else axes
    return REDUCTIONS[c.step.op](x, axes, bool(c.attribute("keepdims", 1))) if axes else x


@operator("ReduceProd")
def reduce_prod(c: Call) -> Any:
    x = c.tensor()
    axes, keep = axes_of(c, x.dim()), bool(c.attribute("keepdims", 1))
    if axes is None and c.attribute("noop_with_empty_axes", 0):
        return x
    for axis in sorted(range(x.dim()) if axes is None else axes, reverse=True):
        x = x.prod(axis, keep, dtype=x.dtype)
    return x


@operator("Softmax", "LogSoftmax", "Hardmax")
def softmax(c: Call) -> Any:
    """Softmax; before opset 13 over all axes from `axis` on (by default 1) together, since then over one (by default the
    last)."""
    x, old = c.tensor(), c.opset < 13
    axis = axis_of(c.attribute("axis", 1 if old else -1), x.dim())
    if old and axis < x.dim() - 1 and any(n != 1 for n in x.shape[axis + 1 :]):
        return _along(c, x.flatten(axis), axis).reshape(x.shape)
    return _along(c, x, axis)


def _along(c: Call, x: Tensor, axis: int) -> Tensor:
    if c.step.op == "Softmax":
        return F.softmax(x, axis)
    if c.step.op == "LogSoftmax":
        return F.log_softmax(x, axis)
    return F.one_hot(x.argmax(axis), x.shape[axis]).movedim(-1, axis).to(x.dtype)


@operator("ArgMax", "ArgMin")
def arg(c: Call) -> Any:
    x, keep = c.tensor(), bool(c.attribute("keepdims", 1))
    axis = axis_of(c.attribute("axis", 0), x.dim())
    function = torch.argmax if c.step.op == "ArgMax" else torch.argmin
    if c.attribute("select_last_index", 0):
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keep)
    return function(x, axis, keep)


@operator("TopK")
def top_k(c: Call) -> Any:
    """The k largest or smallest entries; k is an attribute before opset 10, then an input."""
    values = torch.topk(
        c.tensor(),
        c.one_of("k", 1),
        c.attribute("axis", -1),
        bool(c.attribute("largest", 1)),
        bool(c.attribute("sorted", 1)),
    )
    return list(values)


@operator("CumSum")
def cumulative_sum(c: Call) -> Any:
    x = c.tensor()
    axis = axis_of(int(c.number(1, 0)), x.dim())
    reverse, exclusive = c.attribute("reverse", 0), c.attribute("exclusive", 0)
    x = x.flip(axis) if reverse else x
    total = x.cumsum(axis, dtype=x.dtype)
    total = total - x if exclusive else total
    return total.flip(axis) if reverse else total


@operator("OneHot")
def one_hot(c: Call) -> Any:
    depth, values = c.number(1, None), c.tensor(2)
    indices = c.tensor(0).long()
    indices = torch.where(indices < 0, indices + depth, indices)
    axis = axis_of(c.attribute("axis", -1), indices.dim() + 1)
    hot = indices.unsqueeze(-1) == torch.arange(depth, device=indices.device)
    return torch.where(hot, values[1], values[0]).movedim(-1, axis)


@operator("Trilu")
def triangle(c: Call) -> Any:
    k = int(c.number(1, 0))
    return torch.triu(c.tensor(), k) if c.attribute("upper", 1) else torch.tril(c.tensor(), k)


@operator("EyeLike")
def eye_like(c: Call) -> Any:
    x, k = c.tensor(), c.attribute("k", 0)
    dtype = torch_dtype(c.attribute("dtype")) if "dtype" in c.step.attributes else x.dtype
    if x.dim() != 2:
        raise Refused("EyeLike of a tensor that is no matrix")
    rows, columns = torch.arange(x.shape[0], device=x.device), torch.arange(x.shape[1], device=x.device)
    return (rows.unsqueeze(1) + k == columns).to(dtype)
