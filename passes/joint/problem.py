"""The choice to make: a size for every group and a fate for every block, each with its loss and its seconds.

The seconds of a layer are a table over the sizes of the groups it reads and writes, jointly. A layer may belong to a block:
then it counts only while the block stays, or (what a block is merged into) only once it is gone. Groups inside a block have
sizes only while it stays. Plain numbers, without programs: what the numbers are, `times` and `losses` know. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Axis:
    """The sizes that a group may have, smallest first, and what the result loses by each. block: the index of the block that
    takes the group with it; None for none. allowed: the places in `sizes` that may be chosen; None for all."""

    name: str
    sizes: tuple[int, ...]
    losses: tuple[float, ...]
    block: int | None = None
    allowed: tuple[int, ...] | None = None

    @property
    def choices(self) -> tuple[int, ...]:
        """The places in `sizes` that may be chosen."""
        return tuple(range(len(self.sizes))) if self.allowed is None else self.allowed


@dataclass(frozen=True)
class Removal:
    """A block that may go, and what the result loses by that. goes: decided by hand; None leaves it open."""

    name: str
    loss: float
    goes: bool | None = None


@dataclass(frozen=True)
class Term:
    """Seconds of a layer at every combination of the sizes of its axes, an array with one dimension an axis.

    block: the index of the block that it belongs to; gone: it counts when the block is gone, not while it stays.
    """

    axes: tuple[int, ...]
    seconds: np.ndarray
    block: int | None = None
    gone: bool = False


@dataclass(frozen=True)
class Choice:
    """The place in its `sizes` of every axis (-1 of one whose block is gone), and whether each block goes."""

    sizes: tuple[int, ...]
    gone: tuple[bool, ...]


@dataclass(frozen=True)
class Problem:
    """Everything there is to choose from. constant: seconds that no choice changes. apart: sets of blocks that may not all
    go."""

    axes: tuple[Axis, ...]
    blocks: tuple[Removal, ...]
    terms: tuple[Term, ...]
    constant: float = 0.0
    apart: tuple[frozenset[int], ...] = ()

    def seconds(self, choice: Choice) -> float:
        """What a run takes."""
        total = self.constant
        for term in self.terms:
            if term.block is None or choice.gone[term.block] == term.gone:
                total += float(term.seconds[tuple(choice.sizes[a] for a in term.axes)])
        return total

    def loss(self, choice: Choice) -> float:
        """What the result loses, as if losses added up."""
        widths = sum(axis.losses[k] for axis, k in zip(self.axes, choice.sizes, strict=True) if k >= 0)
        return widths + sum(block.loss for block, gone in zip(self.blocks, choice.gone, strict=True) if gone)

    def whole(self) -> Choice:
        """Nothing removed, whatever was decided by hand."""
        return Choice(tuple(len(axis.sizes) - 1 for axis in self.axes), (False,) * len(self.blocks))

    def scaled(self, widths: float = 1.0, blocks: float = 1.0) -> Problem:
        """The problem with the losses of all widths and of all blocks times a factor each."""
        axes = tuple(
            Axis(a.name, a.sizes, tuple(widths * loss for loss in a.losses), a.block, a.allowed) for a in self.axes
        )
        removals = tuple(Removal(b.name, blocks * b.loss, b.goes) for b in self.blocks)
        return Problem(axes, removals, self.terms, self.constant, self.apart)

    def only(self, widths: bool = False, blocks: bool = False) -> Problem:
        """The problem in which only widths, or only blocks, may change; what was decided by hand stays."""
        axes = tuple(
            a if widths or a.allowed is not None else Axis(a.name, a.sizes, a.losses, a.block, (len(a.sizes) - 1,))
            for a in self.axes
        )
        removals = tuple(b if blocks or b.goes else Removal(b.name, b.loss, False) for b in self.blocks)
        return Problem(axes, removals, self.terms, self.constant, self.apart)

    def joined(self) -> Problem:
        """The same problem with as few terms as can be: terms of the same block whose axes are among another's are added to
        that one."""
        merged: dict[tuple[int | None, bool], dict[tuple[int, ...], np.ndarray]] = {}
        for term in sorted(self.terms, key=lambda t: -len(t.axes)):
            tables = merged.setdefault((term.block, term.gone), {})
            order = tuple(sorted(term.axes))
            seconds = np.transpose(term.seconds, [term.axes.index(a) for a in order])
            host = next((axes for axes in tables if set(order) <= set(axes)), None)
            if host is None:
                tables[order] = seconds.astype(float)
            else:
                shape = [len(self.axes[a].sizes) if a in order else 1 for a in host]
                tables[host] = tables[host] + seconds.reshape(shape)
        constant, terms = self.constant, []
        for (block, gone), tables in merged.items():
            for axes, table in tables.items():
                if not axes and block is None:
                    constant += float(table)
                else:
                    terms.append(Term(axes, table, block, gone))
        return Problem(self.axes, self.blocks, tuple(terms), constant, self.apart)


def cells(problem: Problem) -> int:
    """How many entries the tables of a problem have: its size for the solver."""
    return sum(math.prod(term.seconds.shape) for term in problem.terms)


def apart(problem: Problem, sets: Iterable[frozenset[int]]) -> Problem:
    """The problem in which further sets of blocks may not all go."""
    return Problem(problem.axes, problem.blocks, problem.terms, problem.constant, (*problem.apart, *sets))
