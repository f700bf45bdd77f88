"""The images that a repair looks at, and which half of them each sample belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...graph.compat import pytree
from ...graph.errors import BadInput
from ...graph.program import Program
from ..base import Context
from ..common.feed import Feed
from ..common.processes import summed
from ..common.samples import everywhere, sample_batches


@dataclass(frozen=True)
class Images:
    """inputs: of each batch of this process, as leaves. halves: of each batch, see `halves`. count: samples in all
    processes."""

    inputs: list[list[Any]]
    halves: list[Tensor]
    count: int


def halves(start: int, size: int, taken: int) -> Tensor:
    """0 or 1 for each of the `size` samples of a batch that begins with the sample number `start`; -1 for those beyond
    `taken`, which count nowhere: padding, or more samples than asked for."""
    half = torch.arange(start, start + size) % 2
    half[taken:] = -1
    return half


def take_images(program: Program, context: Context, samples: int) -> Images:
    """So many samples of the data, shared out over processes. Run it under a seed."""
    inputs: list[list[Any]] = []
    parts: list[Tensor] = []

    def take() -> int:
        seen = 0
        for batch, taken in sample_batches(Feed(program), context, samples, share=True):
            inputs.append(pytree.tree_leaves((batch.args, batch.kwargs)))
            parts.append(halves(seen, batch.size, taken))
            seen += taken
        if not inputs:
            raise BadInput("data: fewer batches of images than processes; take smaller batches, or more samples")
        return seen

    return Images(inputs, parts, int(summed(torch.tensor(float(everywhere(take))))))
