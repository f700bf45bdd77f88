"""The pass that splits fused projections (qkv, kv), so that their parts can have widths of their own."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ..graph.edit import Editor
from ..graph.nodes import arguments, op_name, permutation, shape
from ..graph.program import Program
from .base import Change, Context, Pass, PassResult, Refusal

SIZES = {"view": "size", "reshape": "shape", "unflatten": "sizes"}


@dataclass(frozen=True)
class SplitFused(Pass):
    """Rewrite `view(x, …, 3, heads, width)` followed by `unbind` or `select` into one slice and view for each part.

    The dimension of size 3 makes q, k and v share one width; as slices of the projection, v is free to have its own:
    `(1 + 1 + 1)·h·d` becomes `h·d + h·d + h·d'`. Exact: only the way the same entries are read changes. Source: ours.

    Refused, with the reason in the record: a projection whose parts are not the outermost dimension of its features. A
    view that anything but `unbind` or `select` reads stays as it is, without a row in the record.
    """

    exact: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> PassResult:
        new = program.copy()
        edit = Editor(new.module())
        changed, refused = [], []
        for node in list(new.graph.nodes):
            if op_name(node) not in SIZES or not isinstance(node.meta["val"], torch.Tensor):
                continue
            fused = _fused(node)
            if fused is None:
                continue
            if fused.dim != len(shape(node.args[0])) - 1:
                why = f"dimension {fused.dim} of {node.name} is not the outermost of the projection"
                refused.append(Refusal(node.name, why))
                continue
            for index, taker in fused.takers:
                with edit.after(fused.chain[-1]):
                    part = _part(edit, fused, index)
                taker.replace_all_uses_with(part)
            changed.append(Change(node.name, {"parts": shape(node)[fused.dim]}))
        if changed:
            edit.finish()
        return PassResult(new, {"changed": changed, "refused": refused})


@dataclass(frozen=True)
class _Fused:
    """A fused projection, taken apart. chain: its view, and the permutes after it. dim: the dimension of the view that
    holds the parts. takers: the nodes that select a part, each with the part's index.
    """

    chain: tuple[fx.Node, ...]
    dim: int
    takers: tuple[tuple[int, fx.Node], ...]


def _fused(node: fx.Node) -> _Fused | None:
    """The fused projection that starts at this view, or None."""
    sizes, inner = shape(node), shape(node.args[0])  # type: ignore[arg-type]
    lead = len(inner) - 1
    chain, order = [node], list(range(len(sizes)))
    while len(chain[-1].users) == 1:
        user = next(iter(chain[-1].users))
        if (moved := permutation(user)) is None:
            break
        order = [order[d] for d in moved]
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
    return _Fused(tuple(chain), dim, tuple(takers))


def _part(edit: Editor, fused: _Fused, index: int) -> fx.Node:
    """The view and its permutes for one part, without the dimension of the parts."""
    view, dim = fused.chain[0], fused.dim
    x = view.args[0]
    width = shape(x)[-1] // shape(view)[dim]  # type: ignore[arg-type]

    def call(target: Any, *args: Any) -> fx.Node:
        return edit.call(target, args, like=view)

    part = call(torch.ops.aten.slice.Tensor, x, -1, index * width, (index + 1) * width)
    if op_name(view) == "unflatten":
        part = call(torch.ops.aten.unflatten.int, part, -1, list(arguments(view)["sizes"][1:]))
    else:
        sizes = list(arguments(view)[SIZES[op_name(view)]])
        part = call(torch.ops.aten.reshape.default, part, sizes[:dim] + sizes[dim + 1 :])
    at = dim  # where the dimension of the parts would be after the permutes so far
    for node in fused.chain[1:]:
        dims = permutation(node)
        assert dims is not None
        kept = [d - (d > at) for d in dims if d != at]
        at = dims.index(at)
        part = call(torch.ops.aten.permute.default, part, kept)
    return part
