"""How many kernels a run launches before and after channels were removed, as predicted for the target's library, and which
nodes no longer matter.

Removing channels never lowers the number of kernels, but may raise it: a softmax over two branches is unrolled into the
kernel of its neighbours, while a softmax over the one branch that is left is a kernel that gives 1, whatever its branch
computes. Source: ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ...graph.comb.axes import Factor
from ...graph.comb.solve import Comb, Sizer
from ...graph.facts import SOFTMAXES
from ...graph.nodes import op_name, shape, source
from ...graph.workload.fusion import kernels
from ...graph.workload.libraries import Rules, Shape, library, single
from ..base import Context


def kernel_record(comb: Comb, sizes: Mapping[Factor, int], smaller: fx.Graph, context: Context) -> dict[str, Any]:
    """Predicted numbers of kernels `before` and `after`; if there are more, the nodes that begin the additional ones
    (`more`). `dead`: for each softmax that is left with a single entry, the nodes that compute something only for it.

    sizes: what is left of each group. smaller: the graph after removal; its shapes are computed from `sizes`, since
    computing them from the graph would take longer than the removal.
    """
    rules = library(getattr(context.target, "backend", None), context.dtype)
    kept = _kept_shapes(comb, sizes)
    old, new = _started(comb.module.graph, rules, shape), _started(smaller, rules, kept)
    counts = [started.total() for started in (old, new)]
    more = [source(node) for node in smaller.nodes if new[node.name] > old[node.name]]
    record: dict[str, Any] = {"before": counts[0], "after": counts[1], "more": more if counts[1] > counts[0] else []}
    known = {node.name for node in comb.module.graph.nodes if single(node)}
    dead = [n for n in smaller.nodes if op_name(n) in SOFTMAXES and single(n, kept) and n.name not in known]
    return record | {"dead": {source(n): [m.name for m in _only_for(n)] for n in dead}}


def _kept_shapes(comb: Comb, sizes: Mapping[Factor, int]) -> Shape:
    """A function that gives the shape of a node after the removal; nodes are found by name."""
    size = Sizer(sizes)
    tensors = {n: axes for n, axes in comb.axes.items() if isinstance(n.meta.get("val"), torch.Tensor)}
    shapes = {n.name: tuple(map(size, axes)) for n, axes in tensors.items() if axes is not None}
    return lambda node: shapes.get(node.name) or shape(node)


def _started(graph: fx.Graph, rules: Rules, shape: Shape) -> Counter[str]:
    """For each node, the number of kernels that begin with it or copy it into another layout."""
    return Counter(
        node.name
        for kernel in kernels(graph, rules, shape)
        for node in (kernel.nodes[0], *kernel.copied(rules.grain, shape))
    )


def _only_for(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values are used for this node alone."""
    nodes = {node}
    for other in reversed(node.graph.nodes):
        if other.op == "call_function" and other.users and set(other.users) <= nodes:
            nodes.add(other)
    return [n for n in node.graph.nodes if n in nodes and n is not node]
