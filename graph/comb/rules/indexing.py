"""Rules of look-ups: the indexed axis is frozen, the others pass through."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...nodes import shape
from ..equations import Equations
from .elementwise import broadcast
from .registry import Arguments, NoRule, either, rule


@rule("index", "_unsafe_index")
def index(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    x, indices = a["self"], a["indices"]
    xs = c.axes[x]
    used = [d for d, i in enumerate(indices) if i is not None]
    tensors = [indices[d] for d in used]
    if any(t.meta["val"].dtype in (torch.bool, torch.uint8) for t in tensors):
        raise NoRule("a boolean mask selects by data")
    for d in used:
        c.freeze(xs[d], node, "indexed along the axis")
    rank = max(len(shape(t)) for t in tensors)
    adjacent = used == list(range(used[0], used[-1] + 1))
    at = used[0] if adjacent else 0
    sizes = shape(node)[at : at + rank]
    looked_up = broadcast(c, node, [(c.axes[t], shape(t)) for t in tensors], sizes)
    rest = [axis for d, axis in enumerate(xs) if d not in used]
    return rest[:at] + looked_up + rest[at:]


@rule("index_select")
def index_select(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs, d = c.axes[a["self"]], a["dim"] % len(c.axes[a["self"]])
    c.freeze(xs[d], node, "indexed along the axis")
    picked = c.axes[a["index"]]
    return [*xs[:d], picked[0] if picked else [], *xs[d + 1 :]]


@rule("gather", "take_along_dim")
def gather(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs, picks = c.axes[a["self"]], either(a, "index", "indices")
    d = a["dim"] % len(xs)
    c.freeze(xs[d], node, "gathered along the axis")
    result = list(c.axes[picks])
    for k, axis in enumerate(xs):
        if k != d and shape(a["self"])[k] == shape(picks)[k]:
            c.unify(result[k], axis)
        elif k != d:
            c.freeze(axis, node, "gathered along the axis")
            c.freeze(result[k], node, "gathered along the axis")
    return result


@rule("embedding")
def embedding(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    table = c.axes[a["weight"]]
    c.freeze(table[0], node, "looked up by index")
    c.role(table[1], "out", a["weight"])
    return [*c.axes[a["indices"]], table[1]]
