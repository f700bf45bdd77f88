"""Rules of operators that act on each entry by itself: broadcast axes unify, and size 1 imposes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...facts import UNTAGGED_BINARY, UNTAGGED_UNARY
from ...nodes import shape
from ..axes import Axis, normal
from ..equations import Equations
from .registry import Arguments, NoRule, rule


def broadcast(
    c: Equations, node: fx.Node, items: list[tuple[list[Axis], tuple[int, ...]]], out: tuple[int, ...]
) -> list[Axis]:
    """Unify axes under broadcasting to the shape `out`; returns the axes of the result. items: (axes, shape) of each
    operand."""
    result: list[Axis] = [[] for _ in out]
    for axes, sizes in items:
        shift = len(out) - len(sizes)
        if shift < 0:
            raise NoRule("an operand has more dimensions than the result")
        for d, axis in enumerate(axes):
            if sizes[d] == 1 or sizes[d] != out[shift + d]:
                continue
            if normal(result[shift + d]):
                c.unify(result[shift + d], axis)
            else:
                result[shift + d] = axis
    return result


@rule(*UNTAGGED_UNARY)
def unary(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    x = c.first(node)
    if shape(x) != shape(node):
        raise NoRule("the result has another shape")
    return c.axes[x]


@rule(*UNTAGGED_BINARY)
def binary(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    items = [(c.axes[i], shape(i)) for i in node.all_input_nodes if c.axes[i] is not None]
    return broadcast(c, node, items, shape(node))


def pointwise(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    """The rule of an operator without one of its own that PyTorch tags as acting on each entry by itself."""
    shapes = [shape(i) for i in node.all_input_nodes if c.axes[i] is not None]
    if not isinstance(node.meta["val"], torch.Tensor) or _broadcast_shape(shapes) != shape(node):
        raise NoRule("the result is not the operands' broadcast")
    return binary(c, node, a)


def _broadcast_shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape that shapes broadcast to, or None; many times faster than torch's function."""
    rank = max(map(len, shapes), default=0)
    columns = zip(*((1,) * (rank - len(s)) + tuple(s) for s in shapes), strict=True)
    sizes = [{n for n in column if n != 1} or {1} for column in columns]
    return tuple(n for size in sizes for n in size) if all(len(size) == 1 for size in sizes) else None


@rule("expand_as", "broadcast_to", "expand")
def expand(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    x, out = c.first(node), shape(node)
    before, shift = shape(x), len(out) - len(shape(x))
    result = []
    for d in range(len(out)):
        if d >= shift and before[d - shift] == out[d]:
            result.append(c.axes[x][d - shift])
        else:
            result.append(c.fresh(node, d))
            c.copies(node, result[-1:], "multiplier")
    if a.get("other") is not None:
        c.unify_all(result, c.axes[a["other"]])
    else:
        c.resize(node, "size", result)
    return result


@rule("prelu")
def prelu(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    x = c.axes[a["self"]]
    if shape(a["weight"])[0] > 1:
        c.unify(c.axes[a["weight"]][0], x[1] if len(x) > 1 else x[0])
    return x
