"""Nearly empty rows lose their last weights together, so that `Minimise` can remove them. Source: ours, after
Squeeze-Release (arXiv 2606.14346)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ...graph.comb.axes import Factor, atoms
from ...graph.comb.solve import Comb
from ...graph.program import Program
from ..common.weights import layers
from .ranking import joined


def sole_producers(program: Program) -> set[str]:
    """Names of the weights each of whose outputs only they write, so that an empty row makes a channel dead; weights that
    write to a residual trunk are not among them."""
    comb, makers = Comb(program), Counter[Factor]()
    candidates = [layer for layer in layers(program)[0] if layer.kind != "depthwise"]
    outputs = {layer.name: atoms([comb.parameters[layer.name][0]]) for layer in candidates}
    for made in outputs.values():
        makers.update(made.keys())
    return {name for name, made in outputs.items() if all(a.frozen is None and makers[a] == 1 for a in made)}


def finish_rows(
    ranked: Sequence[tuple[Tensor, Tensor]], gone: Tensor, columns: int, price: float, discount: float
) -> list[tuple[Tensor, Tensor]]:
    """New orders and losses of blocks, in which nearly empty rows lose their last weights together.

    ranked: for consecutive ranges of blocks, the entries of each block in the order they go and their `increments`, both
    `(b, s)`; the result has the same form. gone: bool `(all blocks, B)`, entries that are zero already. columns: weights of
    a row; the blocks are cut from the rows one after another. price: the highest increment among the entries that would go
    otherwise. discount: from 0 to under 1.

    The last weights of a row are those whose increment is above the price. Where their mean increment times `1 - discount`
    is below the price, that product becomes their increment, so that the whole row goes, without waiting for entries that
    would go before them.
    """
    order, losses = joined([o for o, _ in ranked], 0).long(), joined([x for _, x in ranked], math.inf)
    count, size = gone.shape
    place = order.masked_fill(losses.isinf(), size)  # what is no entry goes to an additional column
    costs = losses.new_zeros(count, size + 1).scatter_(1, place, losses)[:, :size].masked_fill(gone, 0)
    rows = torch.nn.functional.pad(costs.reshape(-1), (0, -costs.numel() % columns)).view(-1, columns)
    last = rows > price
    mean = (rows * last).sum(1, keepdim=True) / last.sum(1, keepdim=True).clamp(min=1) * (1 - discount)
    finished = last.any(1, keepdim=True) & (mean < price)
    rows = torch.where(finished, torch.minimum(rows, mean), rows)  # in such a row everything is below the price
    cheaper = torch.nn.functional.pad(rows.reshape(-1)[: costs.numel()].view(count, size), (0, 1), value=math.inf)
    losses, again = cheaper.gather(1, place).sort(dim=1, stable=True)
    counts = [len(o) for o, _ in ranked]
    return list(zip(order.gather(1, again).split(counts), losses.split(counts), strict=True))
