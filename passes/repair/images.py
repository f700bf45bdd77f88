"""The images that a repair uses, and the division of their samples into two halves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.compat import pytree
from ...graph.errors import BadInput
from ...graph.program import Program
from ..base import Context
from ..common.feed import Feed, sample_dimension
from ..common.processes import summed
from ..common.samples import everywhere, sample_batches


@dataclass(frozen=True)
class Images:
    """The images of a repair. inputs: for each batch of this process, the leaves of the model's inputs. halves: for each
    batch, the half of each sample (see `halves`). count: number of samples in all processes."""

    inputs: list[list[Any]]
    halves: list[Tensor]
    count: int

    @property
    def vary(self) -> bool:
        """Whether a sample differs from another one of the same process."""
        columns = (
            [t for t in column if isinstance(t, Tensor) and t.dim()] for column in zip(*self.inputs, strict=True)
        )
        vary = any(bool((t != column[0][:1]).any()) for column in columns for t in column)
        return bool(summed(torch.tensor(float(vary))))


def halves(start: int, size: int, many: int) -> Tensor:
    """For each of the `size` samples of a batch, the half that it belongs to, 0 or 1 by turns, as `(size,)`; -1 for samples
    from `many` on, which do not count (padding, or more samples than asked for). start: the number of the batch's first
    sample."""
    half = torch.arange(start, start + size) % 2
    half[many:] = -1
    return half


def by_sample(value: Tensor, samples: int, node: fx.Node) -> Tensor:
    """A node's value with the samples in its first dimension, alone or together with positions, each sample's positions one
    after another. In some attentions the samples come after the positions. samples: their number."""
    meta = node.meta.get("val")
    sizes: Sequence[Any] = meta.shape if isinstance(meta, Tensor) and meta.dim() == value.dim() else ()
    symbols = _batch_symbols(node.graph)
    if symbols:
        dim = sample_dimension(sizes, symbols)
    else:  # the batch size is fixed
        dim = next((d for d in range(value.dim() - 1) if value.shape[d] == samples), None)
    return value.movedim(dim, 0) if dim else value


def _batch_symbols(graph: fx.Graph) -> set[Any]:
    """The symbols of the first dimensions of a graph's inputs."""
    values = (n.meta.get("val") for n in graph.nodes if n.op == "placeholder")
    sizes: list[Any] = [v.shape[0] for v in values if isinstance(v, Tensor) and v.dim()]
    return {symbol for size in sizes if not isinstance(size, int) for symbol in size.node.expr.free_symbols}


def spread(half: Tensor, entries: int) -> Tensor:
    """The half of each entry of a dimension that samples share with positions, such as windows of images: `(entries,)`.
    Where entries are no multiple of the samples, they belong to the halves by turns."""
    if entries % len(half):
        return torch.arange(entries, device=half.device) % 2
    return half.repeat_interleave(entries // len(half))


def take_images(program: Program, context: Context, samples: int) -> Images:
    """This many samples of the data, divided among processes. It must run under a seed. Raises BadInput where a process
    gets no batch."""
    inputs: list[list[Any]] = []
    parts: list[Tensor] = []

    def take() -> int:
        seen = 0
        for batch, many in sample_batches(Feed(program), context, samples, share=True):
            inputs.append(pytree.tree_leaves((batch.args, batch.kwargs)))
            parts.append(halves(seen, batch.size, many))
            seen += many
        if not inputs:
            raise BadInput("data: fewer batches of images than processes; take smaller batches, or more samples")
        return seen

    return Images(inputs, parts, int(summed(torch.tensor(float(everywhere(take))))))
