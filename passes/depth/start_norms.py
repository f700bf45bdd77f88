"""Initialisation of the batch norms that `relax` adds: each starts as the affine map nearest to what it stands for."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ...graph.edit import like, place_tensor
from ...graph.nodes import arguments, fetch, op_name
from ...graph.program import Program
from ..common.feed import Batch
from ..common.observe import Observer
from ..common.processes import accelerator, averaged, placed
from .relax import FOLDER


def start_norms(program: Program, batches: Iterable[Batch]) -> None:
    """Set statistics, scale and shift of every batch norm that `relax` added to the least-squares affine fit, channel by
    channel, from the norm's input in the dense network to the dense value that it is mixed with (ours).

    So a norm starts as the nearest map that can be merged, an activation as the nearest straight line, and a tail, which
    stands for nothing, as the identity in front of its activation.
    """
    module = program.module()
    pairs = {n: dense for n in module.graph.nodes if _added(n) and (dense := _stands_for(n)) is not None}
    sums: dict[fx.Node, list[Any]] = {}  # n, and sums per channel over batch and positions of x, y, x^2, x y

    def add_up(node: fx.Node, value: torch.Tensor, values: dict[fx.Node, Any]) -> None:
        x, y = values[arguments(node)["input"]], values[pairs[node]]
        (after,) = node.users
        if op_name(after) == "transpose":  # the norm has its channels in axis 1, and its output is transposed back
            y = y.transpose(*after.args[1:])
        x, y = (t.transpose(0, 1).flatten(1).double() for t in (x, y))
        new = [x.shape[1], x.sum(1), y.sum(1), (x * x).sum(1), (x * y).sum(1)]
        sums[node] = [a + b for a, b in zip(sums.get(node, [0] * 5), new, strict=True)]

    show, device = Observer(module, pairs, add_up), accelerator().device
    with placed(module, device), torch.no_grad():
        for batch in batches:
            show(batch.to(device))
    for node, (count, *parts) in sums.items():
        x, y, xx, xy = (torch.from_numpy(averaged((part / count).cpu().numpy())) for part in parts)
        variance, shared = (xx - x * x).clamp(min=0), xy - x * y
        a = arguments(node)
        scale = shared / (variance + float(a["eps"])).sqrt()
        for key, value in {"running_mean": x, "running_var": variance, "weight": scale, "bias": y}.items():
            name = str(a[key].target)
            old = fetch(module, name)
            place_tensor(module, name, like(old, value.to(old)))


def _added(node: fx.Node) -> bool:
    return op_name(node) == "batch_norm" and str(arguments(node)["running_mean"].target).startswith(f"{FOLDER}.")


def _stands_for(norm: fx.Node) -> fx.Node | None:
    """The dense value `dense` of the mixture `l dense + (1 - l) pruned` that a batch norm is part of; None for a norm of a
    block that was pruned before."""
    node = norm
    while op_name(node) != "add":
        if len(node.users) != 1:
            return None
        (node,) = node.users
    dense, pruned = node.args[:2]
    rest = pruned.args[1] if isinstance(pruned, fx.Node) and op_name(pruned) == "mul" else None
    mixes = isinstance(rest, fx.Node) and op_name(rest) == "rsub"
    return dense.args[0] if mixes else None  # type: ignore[union-attr,return-value]
