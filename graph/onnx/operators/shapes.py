"""Operators on host arrays: shape arithmetic and constant folding. Source: the ONNX specification."""

from __future__ import annotations

import math
import operator as python
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import Refused
from ..dtypes import numpy_dtype
from ..table import SYMBOLIC, Call, Value, array, axis_of, is_static, on_host, operator

LARGEST = 1 << 27  # most elements of a constant that a file may create


def slices(c: Call, shape: tuple[int, ...]) -> list[slice]:
    """For each axis, the slice that a Slice takes. Ends beyond an axis are clipped here, since they may not fit into a
    size."""
    rank = len(shape)
    starts, ends = c.list_of("starts", 1), c.list_of("ends", 2)
    axes = c.list_of("axes", 3) or range(len(starts))
    steps = c.list_of("steps", 4) or [1] * len(starts)
    result = [slice(None)] * rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = axis_of(axis, rank)
        far = not isinstance(end, SYMBOLIC) and (end >= 2**31 - 1 or (is_static([shape[axis]]) and end >= shape[axis]))
        before = not isinstance(end, SYMBOLIC) and step < 0 and is_static([shape[axis]]) and end < -shape[axis]
        result[axis] = slice(None if start == 0 and step > 0 else start, None if far or before else end, step)
    return result


def axes_of(c: Call, rank: int, index: int = 1) -> list[int] | None:
    """The axes of Squeeze, Unsqueeze and reductions; None if none are given."""
    axes = c.list_of("axes", index)
    return [axis_of(a, rank) for a in axes] if axes else None


def new_shape(c: Call, shape: tuple[Any, ...]) -> list[Any]:
    """The sizes that Reshape asks for, with copied sizes filled in."""
    wanted = c.list_of("shape", 1)
    if c.attribute("allowzero", 0):
        return wanted
    return [shape[i] if is_static([n]) and n == 0 and i < len(shape) else n for i, n in enumerate(wanted)]


def pieces(c: Call, size: Any) -> list[Any]:
    """The sizes of Split's pieces."""
    known = c.list_of("split", 1)
    if known:
        return known
    count = c.attribute("num_outputs", len(c.step.outputs))
    if not is_static([size]):
        return [size // count] * count
    size_of_piece = -(-size // count)
    return [min(size_of_piece, size - i * size_of_piece) for i in range(count)]


def _truncated(a: Any, b: Any) -> Any:
    """Division as ONNX defines it for whole numbers: rounded towards zero."""
    if a.dtype == object or b.dtype == object:
        fractions = any(isinstance(v, FRACTIONAL) for v in (*a.reshape(-1).tolist(), *b.reshape(-1).tolist()))
        return a / b if fractions else python.floordiv(a, b)  # sizes are not negative
    if a.dtype.kind not in "iu" or b.dtype.kind not in "iu":
        return a / b
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(np.result_type(a, b))


def _power(a: Any, b: Any) -> Any:
    return np.power(a, b) if a.dtype == object else np.power(a, b).astype(a.dtype)


FRACTIONAL = (float, torch.SymFloat)
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": python.add, "Sub": python.sub, "Mul": python.mul, "Div": _truncated, "Pow": _power,
    "Equal": python.eq, "Less": python.lt, "LessOrEqual": python.le, "Greater": python.gt, "GreaterOrEqual": python.ge,
    "And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor,
}  # fmt: skip
UNARY: dict[str, Callable[[Any], Any]] = {
    "Neg": python.neg, "Abs": np.abs, "Not": np.logical_not, "Identity": lambda x: x, "Sqrt": np.sqrt,
    "Floor": np.floor, "Ceil": np.ceil,
}  # fmt: skip
REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceProd": np.prod, "ReduceSum": np.sum, "ReduceMax": np.max, "ReduceMin": np.min,
}  # fmt: skip


@on_host(*BINARY)
def binary(c: Call) -> Any:
    return np.asarray(BINARY[c.step.op](c.host(0), c.host(1)))


@on_host("Min", "Max")
def extremum(c: Call) -> Any:
    function = np.minimum if c.step.op == "Min" else np.maximum
    result = c.host(0)
    for i in range(1, len(c.values)):
        result = function(result, c.host(i))
    return result


@on_host("Clip")
def host_clip(c: Call) -> Any:
    result = c.host(0)
    for name, index, function in (("min", 1, np.maximum), ("max", 2, np.minimum)):
        bound = c.one_of(name, index)
        result = result if bound is None else function(result, np.asarray(bound, dtype=result.dtype))
    return result


@on_host("Mod")
def mod(c: Call) -> Any:
    a, b = c.host(0), c.host(1)
    return np.fmod(a, b) if c.attribute("fmod", 0) else np.asarray(python.mod(a, b))


@on_host(*UNARY)
def unary(c: Call) -> Any:
    x = c.host(0)
    if x.dtype == object and c.step.op in ("Floor", "Ceil"):
        return _each(x, math.floor if c.step.op == "Floor" else math.ceil)
    return np.asarray(UNARY[c.step.op](x), dtype=None if x.dtype == object or c.step.op == "Not" else x.dtype)


@on_host(*REDUCTIONS)
def reduction(c: Call) -> Any:
    x = c.host(0)
    axes = axes_of(c, x.ndim)
    if not axes and c.attribute("noop_with_empty_axes", 0):
        return x
    keep = bool(c.attribute("keepdims", 1))
    result = REDUCTIONS[c.step.op](x, axis=tuple(axes) if axes else None, keepdims=keep)
    return np.asarray(result, dtype=x.dtype)


@on_host("Cast")
def cast(c: Call) -> Any:
    x = c.host(0)
    if x.dtype == object:  # symbolic sizes are not cast to float: what is divided and rounded again keeps its form
        return _each(x, math.trunc) if np.issubdtype(numpy_dtype(c.attribute("to")), np.integer) else x
    with np.errstate(invalid="ignore"):
        return x.astype(numpy_dtype(c.attribute("to")))


@on_host("Shape")
def host_shape(c: Call) -> Any:
    return array(c.host(0).shape[slice(c.attribute("start", 0), c.attribute("end"))])


@operator("Shape")
def shape(c: Call) -> Any:
    return array(list(c.tensor().shape)[slice(c.attribute("start", 0), c.attribute("end"))])


@operator("Size")
def size(c: Call) -> Any:
    count: Any = 1
    for n in c.tensor().shape:
        count = count * n
    return array([count]).reshape(())


@on_host("Concat")
def concat(c: Call) -> Any:
    return np.concatenate([c.host(i) for i in range(len(c.values))], c.attribute("axis", 1))


@on_host("Gather")
def gather(c: Call) -> Any:
    return np.asarray(np.take(c.host(0), c.host(1), c.attribute("axis", 0)))


@on_host("Slice")
def host_slice(c: Call) -> Any:
    x = c.host(0)
    return x[tuple(slices(c, x.shape))]


@on_host("Squeeze")
def squeeze(c: Call) -> Any:
    x = c.host(0)
    axes = axes_of(c, x.ndim)
    return np.squeeze(x, tuple(axes) if axes else None)


@on_host("Unsqueeze")
def unsqueeze(c: Call) -> Any:
    x = c.host(0)
    return np.expand_dims(x, tuple(axes_of(c, x.ndim + len(c.list_of("axes", 1))) or ()))


@on_host("Reshape")
def reshape(c: Call) -> Any:
    x = c.host(0)
    wanted = new_shape(c, x.shape)
    return x.reshape(wanted) if is_static(wanted) else NotImplemented


@on_host("Transpose")
def transpose(c: Call) -> Any:
    return np.transpose(c.host(0), c.attribute("perm"))


@on_host("Split")
def split(c: Call) -> Any:
    x, axis = c.host(0), c.attribute("axis", 0)
    ends = np.cumsum(pieces(c, x.shape[axis]))
    return list(np.split(x, ends[:-1], axis))


@on_host("Where")
def where(c: Call) -> Any:
    return np.where(*(c.host(i) for i in range(3)))


@on_host("Range")
def host_range(c: Call) -> Any:
    start, limit, delta = (c.number(i, None) for i in range(3))
    if not is_static([start, limit, delta]):
        return NotImplemented
    bounded([max(0, int(np.ceil((limit - start) / delta)))])
    return np.arange(start, limit, delta, dtype=c.host(0).dtype if c.host(0).dtype != object else np.int64)


@on_host("ConstantOfShape")
def constant_of_shape(c: Call) -> Any:
    wanted, value = c.numbers(0), c.attribute("value", np.zeros(1, np.float32))
    if not is_static(wanted):
        return NotImplemented
    return np.full(bounded(wanted), value.reshape(-1)[0], dtype=value.dtype)


@on_host("Expand")
def expand(c: Call) -> Any:
    x, wanted = c.host(0), c.numbers(1)
    if not is_static(wanted):
        return NotImplemented
    result = np.broadcast_shapes(x.shape, tuple(wanted))
    return np.broadcast_to(x, bounded(result))


def _each(x: np.ndarray, function: Callable[[Any], Any]) -> np.ndarray:
    """Apply a rounding function to the entries that are no whole numbers."""
    values = [function(v) if isinstance(v, FRACTIONAL) else v for v in x.reshape(-1).tolist()]
    return array(values).reshape(x.shape)


def bounded(sizes: Any) -> tuple[int, ...]:
    """The sizes of a constant. Raises Refused for more elements than a network can need."""
    if float(np.prod([float(n) for n in sizes])) > LARGEST:
        raise Refused(f"it asks for a constant of {' x '.join(map(str, sizes))} elements")
    return tuple(int(n) for n in sizes)


def on_host_alone(values: list[Value]) -> bool:
    """Whether no input is a tensor."""
    return not any(isinstance(v, Tensor) for v in values)
