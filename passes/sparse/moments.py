"""Second moments of what layers read, over samples of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.compat import pytree
from ...graph.errors import BadInput
from ...graph.nodes import fetch
from ...graph.program import Program
from ...graph.trainable import TrainableModule
from ..base import Context
from ..common.feed import Feed
from ..common.processes import accelerator, placed, summed
from ..common.repeat import seeded
from ..common.samples import everywhere, sample_batches
from ..common.weights import Layer, layers
from .unfold import check_finite, pieces, windows


def input_moments(
    program: Program, names: Sequence[str], context: Context, count: int, full: bool = True, largest: int = 1 << 26
) -> tuple[dict[str, Tensor], int]:
    """`X Xᵀ / n` of the inputs of each named layer, one matrix per group: `(groups, c, c)`, `c` the inputs of one output
    in the order of the flattened weight; with `full` False its diagonal, `(groups, c)`. From `count` samples, eval mode,
    shared out over processes; returns how many of these the data has, too. largest: how many numbers a layer's unfolded
    inputs may hold at a time.

    Raises BadInput without data or batches, or for inputs whose squares are not finite.
    """
    if context.data is None:
        raise BadInput("Sparsify: needs data for its statistics; pass data=, or choose method magnitude")
    module, device = program.module().eval(), accelerator().device
    moments = _Moments(module, [layer for layer in layers(program)[0] if layer.name in names], full, largest, device)

    def add_up() -> int:
        seen = 0
        for batch, taken in sample_batches(Feed(program), context, count, share=True):
            moments.run(*pytree.tree_leaves((batch.args, batch.kwargs)), enable_io_processing=False)
            seen += taken
        return seen

    with seeded(context.seed, context.data), placed(module, device), torch.no_grad():
        seen = everywhere(add_up)
    numbers = summed(torch.tensor([seen, *moments.seen.values()], dtype=torch.float64, device=device)).tolist()
    found = {}
    for (name, total), rows in zip(moments.totals.items(), numbers[1:], strict=True):
        found[name] = summed(total) / rows
        check_finite(found[name], f"the statistics of {name} are")
    return found, int(numbers[0])


class _Moments(fx.Interpreter):
    """Runs a graph and sums up the second moments of the inputs of some layers."""

    def __init__(
        self, module: TrainableModule, wanted: Sequence[Layer], full: bool, largest: int, device: torch.device
    ):
        super().__init__(module)
        self.full, self.largest = full, largest
        self.layers = {node: layer for layer in wanted for node in layer.nodes}
        self.totals: dict[str, Tensor] = {}
        self.seen = {layer.name: 0 for layer in wanted}
        for layer in wanted:
            size = math.prod(layer.shape[1:])
            dtype = torch.promote_types(fetch(module, layer.name).dtype, torch.float32)  # squares of halves overflow
            form = (1 if layer.kind == "linear" else layer.groups, size, *[size] * full)
            self.totals[layer.name] = torch.zeros(form, dtype=dtype, device=device)

    def run_node(self, n: fx.Node) -> Any:
        if n in self.layers:
            layer = self.layers[n]
            total = self.totals[layer.name]
            every = windows(n, self.env[n.args[0]], layer)  # type: ignore[index]
            for samples, _ in pieces(every, self.largest, 1, flat=False):
                for rows, _ in pieces(samples, self.largest, 2):
                    rows = rows.to(total.dtype)
                    total += rows.transpose(1, 2) @ rows if self.full else rows.square().sum(1)
                    self.seen[layer.name] += rows.shape[1]
        return super().run_node(n)
