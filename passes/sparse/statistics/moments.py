"""Second moments of the inputs of layers over samples of the data."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ....graph.compat import exact_kernels
from ....graph.errors import BadInput
from ....graph.nodes import fetch
from ....graph.program import Program
from ....graph.trainable import TrainableModule
from ...base import Context
from ...common.feed import Feed
from ...common.observe import Observer
from ...common.processes import accelerator, placed, summed
from ...common.repeat import seeded
from ...common.samples import everywhere, sample_batches
from ...common.weights import WeightedLayer, named_layers, windows
from .unfold import check_finite, pieces


def input_moments(
    program: Program, names: Sequence[str], context: Context, count: int, full: bool = True, largest: int = 1 << 26
) -> tuple[dict[str, Tensor], int]:
    """`X Xᵀ / n` of the inputs of each named layer, and the number of samples.

    One matrix for each group: `(groups, c, c)`, where `c` counts the inputs of one output in the order of the flattened
    weight; without `full` only its diagonal, `(groups, c)`. count: of samples, in eval mode, divided among processes; the
    data may have fewer. largest: how many numbers a layer's unfolded inputs may hold at a time.

    Raises BadInput without data or batches, or for inputs whose squares are not finite.
    """
    if context.data is None:
        raise BadInput("Sparsify: needs data for its statistics; pass data=, or choose method magnitude")
    module, device = program.module().eval(), accelerator().device
    wanted = named_layers(program, names)
    readers = {node: layer for layer in wanted for node in layer.nodes}
    totals = {layer.name: _empty(module, layer, full, device) for layer in wanted}
    rows_seen = dict.fromkeys(totals, 0)

    def see(node: fx.Node, value: Tensor, values: dict[fx.Node, Any]) -> None:
        layer = readers[node]
        total = totals[layer.name]
        for samples, _ in pieces(windows(node, values[node.args[0]]), largest, 1, flat=False):  # type: ignore[index]
            for rows, _ in pieces(samples, largest, 2):
                rows = rows.to(total.dtype)
                total += rows.transpose(1, 2) @ rows if full else rows.square().sum(1)
                rows_seen[layer.name] += rows.shape[1]

    def add_up() -> int:
        show, seen = Observer(module, readers, see), 0
        for batch, many in sample_batches(Feed(program), context, count, share=True):
            show(batch)
            seen += many
        return seen

    with seeded(context.seed, context.data), placed(module, device), torch.no_grad(), exact_kernels():
        seen = everywhere(add_up)
    numbers = summed(torch.tensor([seen, *rows_seen.values()], dtype=torch.float64, device=device)).tolist()
    means = {}
    for (name, total), number in zip(totals.items(), numbers[1:], strict=True):
        means[name] = summed(total) / number
        check_finite(means[name], f"the statistics of {name} are")
    return means, int(numbers[0])


def _empty(module: TrainableModule, layer: WeightedLayer, full: bool, device: torch.device) -> Tensor:
    """Zeros to add a layer's moments to, at least in single precision, since squares of half-precision numbers overflow."""
    size = math.prod(layer.shape[1:])
    groups = 1 if layer.kind == "linear" else layer.groups
    dtype = torch.promote_types(fetch(module, layer.name).dtype, torch.float32)
    return torch.zeros((groups, size, *[size] * full), dtype=dtype, device=device)
