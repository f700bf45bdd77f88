"""Rules of reductions and normalisations: the pruned network reduces over the remaining indices. Operators that depend on
the order along an axis freeze it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ...facts import DEVIATIONS, REDUCTIONS, SOFTMAXES
from ...nodes import op_name, shape
from ..axes import Axis, fresh
from ..equations import Equations
from .elementwise import binary, broadcast
from .registry import Arguments, NoRule, either, rule


def dims_of(a: Arguments, rank: int, name: str = "dim") -> list[int]:
    dims = a.get(name)
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


def reduced(xs: list[Axis], dims: list[int], keep: bool) -> list[Axis]:
    """The axes of a result whose given dimensions were reduced; with `keep`, these have size 1."""
    return [[] if d in dims else axis for d, axis in enumerate(xs) if keep or d not in dims]


def operand(a: Arguments) -> Any:
    return either(a, "self", "input")


def unify_parameters(c: Equations, a: Arguments, axes: list[Axis]) -> None:
    """State that the parameters and statistics of a normalisation have these axes."""
    for key in ("weight", "bias", "running_mean", "running_var"):
        if a.get(key) is not None:
            c.unify_all(c.axes[a[key]], axes)


@rule("batch_norm", "instance_norm")
def batch_norm(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs = c.axes[a["input"]]
    unify_parameters(c, a, xs[1:2])
    c.sums(node, [xs[0], *xs[2:]])
    return xs


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs, k = c.axes[a["input"]], len(a["normalized_shape"])
    unify_parameters(c, a, xs[-k:])
    c.sums(node, xs[-k:])
    c.resize(node, "normalized_shape", xs[-k:])
    return xs if isinstance(node.meta["val"], torch.Tensor) else [xs, [*xs[:-k], *[[] for _ in range(k)]]]


@rule("group_norm")
def group_norm(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs, group = c.axes[a["input"]], fresh(a["num_groups"])
    c.unify(xs[1], group + fresh(shape(node)[1] // a["num_groups"]))
    unify_parameters(c, a, xs[1:2])
    c.role(group, "group")
    c.sums(node, xs[1:])
    c.rewrite(node, lambda s, m: s.assign(m, "num_groups", s.size(group)))
    return xs


@rule("_weight_norm")
def weight_norm(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    """g v / |v|: the norm is taken over all axes of v but `dim`, over which g extends."""
    vs, kept = c.axes[a["v"]], a.get("dim", 0)
    kept = kept if kept == -1 else kept % len(vs)
    if kept >= 0:
        c.unify(c.axes[a["g"]][kept], vs[kept])
    c.sums(node, [axis for d, axis in enumerate(vs) if d != kept])
    return vs


@rule(*SOFTMAXES)
def softmax(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs = c.axes[operand(a)]
    c.sums(node, [xs[a["dim"] % len(xs)]] if xs else [])
    return xs


@rule(*REDUCTIONS)
def reduce(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    x = operand(a)
    xs = c.axes[x]
    dims = dims_of(a, len(xs))
    c.sums(node, [xs[d] for d in dims])
    if op_name(node) in DEVIATIONS:
        correction = a.get("correction", 1) if "unbiased" not in a else a["unbiased"]
        c.at_least(node, [xs[d] for d in dims], math.floor(1 if correction is None else correction) + 1)
    result, value = reduced(xs, dims, a.get("keepdim", False)), node.meta["val"]
    return result if isinstance(value, torch.Tensor) else [result for _ in value]


@rule("max", "min", "mode", "median")
def extremum(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    """The largest or smallest entry. With a dimension the result includes positions along the axis, which is then frozen if
    they are used; with two tensors the operator acts on each entry."""
    if isinstance(a.get("other"), torch.fx.Node):
        return binary(c, node, a)
    x = operand(a)
    if a.get("dim") is None:
        c.sums(node, c.axes[x])
        return []
    d = a["dim"] % len(c.axes[x])
    c.sums(node, [c.axes[x][d]])
    if any(u.args[1] == 1 and u.users for u in node.users if op_name(u) == "getitem"):
        c.freeze(c.axes[x][d], node, f"{op_name(node)} returns positions along the axis")
    return [reduced(c.axes[x], [d], a["keepdim"])] * 2


@rule(
    "topk", "sort", "argsort", "argmax", "argmin", "cumsum", "cumprod", "logcumsumexp", "roll", "flip", "cummax", "kthvalue",
)  # fmt: skip
def ordered(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    """Operators that depend on positions along an axis: it is frozen, the others pass through."""
    x, name = operand(a), op_name(node)
    xs = c.axes[x]
    key = "dims" if "dims" in a else "dim"
    if a.get(key) is None or a[key] == []:
        raise NoRule(f"{name} of the flattened tensor")
    dims = dims_of(a, len(xs), key)
    for d in dims:
        c.freeze(xs[d], node, f"{name} depends on positions along the axis")

    def result(index: int | None = None) -> list[Axis]:
        if name in ("argmax", "argmin", "kthvalue"):
            return reduced(xs, dims, a["keepdim"])
        return [c.frozen(node, d, f"{name} along the axis", index) if d in dims else axis for d, axis in enumerate(xs)]

    value = node.meta["val"]
    return result() if isinstance(value, torch.Tensor) else [result(k) for k in range(len(value))]


@rule("cosine_similarity", "pairwise_distance")
def similarity(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    x, y = a["x1"], a["x2"]
    dim = a.get("dim", -1)
    rank = max(len(shape(x)), len(shape(y)))
    out = torch.broadcast_shapes(shape(x), shape(y))
    both = broadcast(c, node, [(c.axes[x], shape(x)), (c.axes[y], shape(y))], tuple(out))
    c.sums(node, [both[dim % rank]])
    return [axis for d, axis in enumerate(both) if d != dim % rank]


@rule("cdist", "_euclidean_dist")
def cdist(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs, ys = c.axes[a["x1"]], c.axes[a["x2"]]
    c.unify(xs[-1], ys[-1])
    c.unify_all(xs[:-2], ys[:-2])
    c.sums(node, [xs[-1]])
    return [*xs[:-1], ys[-2]]
