"""Inputs and outputs of layers as rows: an input and an output vector for each sample and position. Source: ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..common.weights import windows
from .consumers import Consumer
from .least_squares import BLOCK, Stack, Sums

MANY, ENOUGH = 1 << 14, 8  # up to `MANY` rows all are used; of more rows, `ENOUGH` for each unknown
CHECKED = 1 << 12  # of more than `MANY` rows, how many tell the error of a repaired layer
PIECE = 1 << 24  # numbers of unfolded inputs that are in memory at a time


def rows_of_inputs(consumer: Consumer, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """The numbers that each output value of a layer is computed from: `(groups, rows, u)`, with a row for each sample and
    position.

    positions: of each sample, those to use, `(samples, n)`; by default all.
    """
    if consumer.linear:
        return _at(x.reshape(len(x), -1, x.shape[-1]), positions).flatten(0, 1)[None]
    if not consumer.whole:
        return _at(x.flatten(2).mT, positions).flatten(0, 1)[None]
    rows = windows(consumer.node, x)
    rank = (rows.dim() - 3) // 2
    if positions is not None:
        sample = torch.arange(len(x), device=x.device)[:, None]
        at: tuple[Any, ...] = torch.unravel_index(positions, rows.shape[2 : 2 + rank])
        rows, rank = rows[(slice(None), sample, *at)], 1
    return rows.flatten(2 + rank).flatten(1, 1 + rank)


def rows_of_outputs(consumer: Consumer, y: Tensor, positions: Tensor | None = None) -> Tensor:
    """The output values in the order of `rows_of_inputs`: `(groups, rows, o)`. Of the dense layer's outputs, those that
    the layer still has."""
    rows = y.reshape(len(y), -1, y.shape[-1]) if consumer.linear else y.flatten(2).mT
    rows = consumer.left(_at(rows, positions), -1)
    return rows.unflatten(2, (consumer.groups, -1)).permute(2, 0, 1, 3).flatten(1, 2)


def _at(rows: Tensor, positions: Tensor | None) -> Tensor:
    return rows if positions is None else rows[torch.arange(len(rows), device=rows.device)[:, None], positions]


def some_positions(size: tuple[int, int], rows: int, wanted: int, generator: torch.Generator) -> Tensor | None:
    """For each sample, the positions to use, as indices `(samples, n)`; None for all.

    size: numbers of samples and of positions. rows: how many rows all samples together have. wanted: about how many of them
    to use; of up to `MANY`, all. Each sample gets positions of its own, so that rare ones, such as corners, occur in some
    samples.
    """
    if rows <= max(MANY, wanted):
        return None
    return torch.rand(size, generator=generator).argsort(1)[:, : max(1, round(size[1] * wanted / rows))]


def parts(half: Tensor, which: int, step: int) -> Iterator[slice | Tensor]:
    """Yield the samples of one half of a batch, at most `step` at a time; as a slice, which copies nothing, where they are
    evenly spaced."""
    for indices in (half == which).nonzero()[:, 0].split(max(1, step)):
        if not len(indices):
            return
        apart = indices.diff().unique().tolist()
        first, last = int(indices[0]), int(indices[-1])
        yield slice(first, last + 1, *(apart or [1])) if len(apart) < 2 else indices


class Rows:
    """Adds rows to sums in large blocks, since each addition costs as much as some hundred rows."""

    def __init__(self, sums: Sums | Stack):
        self.sums, self.count = sums, 0
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """See `Sums.add`."""
        self.waiting.append((x, y))
        self.count += x.shape[1]
        if self.count >= BLOCK or self.count * x.shape[0] * x.shape[2] >= PIECE:
            self.flush()

    def flush(self) -> None:
        """Add the rows that wait."""
        if self.waiting:
            self.sums.add(*(torch.cat(rows, 1) for rows in zip(*self.waiting, strict=True)))
        self.waiting, self.count = [], 0
