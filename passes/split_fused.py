"""Split fused projections (qkv, kv) so that their parts can have widths of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ..graph.edit import infer
from ..graph.nodes import arguments, op_name, shape
from ..graph.program import Program
from .base import Change, Context, Pass, PassResult, Refusal

SIZES = {"view": "size", "reshape": "shape", "unflatten": "sizes"}


@dataclass(frozen=True)
class SplitFused(Pass):
    """Rewrite `view(x, …, 3, heads, width)` followed by `unbind` or `select` into one slice and view for each part.

    The dimension of size 3 makes q, k and v share one width; as slices of the projection, v is free to have its own:
    `(1 + 1 + 1)·h·d` becomes `h·d + h·d + h·d'`. Exact: only the way the same entries are read changes. Source: ours.

    Refused, and left as it is, where the part's dimension is not the outermost of the projection, or something else
    reads the view.
    """

    exact: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> PassResult:
        new = program.copy()
        graph = new.graph
        changed, refused = [], []
        for node in list(graph.nodes):
            if op_name(node) not in SIZES or not isinstance(node.meta["val"], torch.Tensor):
                continue
            found = _parts(node)
            if found is None:
                continue
            chain, dim, takers = found
            if isinstance(takers, str):
                refused.append(Refusal(node.name, takers))
                continue
            for index, taker in takers:
                with graph.inserting_before(chain[-1].next):
                    part = _part(graph, node, chain[1:], dim, index)
                taker.replace_all_uses_with(part)
            changed.append(Change(node.name, {"parts": shape(node)[dim]}))
        if changed:
            graph.eliminate_dead_code()
            new.module().recompile()
        return PassResult(new, {"changed": changed, "refused": refused})


def _parts(node: fx.Node) -> tuple[list[fx.Node], int, Any] | None:
    """(view and permutes, dimension of the parts in the view, [(index, node that takes the part)]), the last one a reason
    when it is a fused projection that cannot be split, or None when it is none."""
    x = node.args[0]
    sizes, inner = shape(node), shape(x)  # type: ignore[arg-type]
    lead = len(inner) - 1
    chain, order = [node], list(range(len(sizes)))
    while len(chain[-1].users) == 1:
        user = next(iter(chain[-1].users))
        if op_name(user) == "permute":
            order = [order[d] for d in arguments(user)["dims"]]
        elif op_name(user) == "transpose":
            i, j = (arguments(user)[k] for k in ("dim0", "dim1"))
            order[i], order[j] = order[j], order[i]
        else:
            break
        chain.append(user)
    dims, takers = set(), []
    for user in chain[-1].users:
        name = op_name(user)
        if name not in ("unbind", "select"):
            return None
        a = arguments(user)
        dims.add(order[a["dim"] % len(order)])
        if name == "select":
            takers.append((a["index"] % shape(chain[-1])[a["dim"]], user))
        else:
            takers += [(item.args[1], item) for item in user.users]
    if len(dims) != 1 or not all(op_name(t) in ("select", "getitem") for _, t in takers):
        return None
    dim = dims.pop()
    if sizes[dim] < 2 or dim < lead or sizes[:lead] != inner[:lead]:
        return None
    if dim != lead:
        return chain, dim, f"dimension {dim} of {node.name} is not the outermost of the projection"
    return chain, dim, takers


def _part(graph: fx.Graph, view: fx.Node, permutes: list[fx.Node], dim: int, index: int) -> fx.Node:
    """The view and its permutes for one part alone, without the dimension of the parts."""
    x, count = view.args[0], shape(view)[dim]
    width = shape(x)[-1] // count  # type: ignore[arg-type]

    def call(target: Any, args: tuple) -> fx.Node:
        new = graph.call_function(target, args)
        new.meta = {k: v for k, v in view.meta.items() if k in ("stack_trace", "nn_module_stack")}
        infer(new)
        return new

    part = call(torch.ops.aten.slice.Tensor, (x, -1, index * width, (index + 1) * width))
    if op_name(view) == "unflatten":
        part = call(torch.ops.aten.unflatten.int, (part, -1, list(arguments(view)["sizes"][1:])))
    else:
        sizes = list(arguments(view)[SIZES[op_name(view)]])
        part = call(torch.ops.aten.reshape.default, (part, sizes[:dim] + sizes[dim + 1 :]))
    at = dim
    for node in permutes:
        rank = len(shape(part)) + 1
        if op_name(node) == "permute":
            dims = [d % rank for d in arguments(node)["dims"]]
        else:
            i, j = (arguments(node)[k] % rank for k in ("dim0", "dim1"))
            dims = list(range(rank))
            dims[i], dims[j] = dims[j], dims[i]
        kept = [d - (d > at) for d in dims if d != at]
        at = dims.index(at)
        part = call(torch.ops.aten.permute.default, (part, kept))
    return part
