"""The choice to make: a size for every group and whether every block goes, each with its loss and its seconds.

The seconds of a layer are a table over the sizes of all groups that it reads and writes. A layer may belong to a block:
then it counts only while the block stays; the layer that a block is merged into counts only if the block goes. Groups
inside a block have sizes only while it stays. All of this is plain numbers, without programs; `times` and `losses` compute
them. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Axis:
    """The sizes that a group may have, smallest first, and the loss of each. block: the index of the block that contains
    the group, or None. allowed: the indices in `sizes` that may be chosen; None for all. fixed: whether that was decided by
    hand. kind: "widths", or for a variant of layers "precision" or "sparsity"; a variant has two places, the changed layers
    and the layers as they are. members, option: the weights of a variant's layers, and its name, such as "int8"."""

    name: str
    sizes: tuple[int, ...]
    losses: tuple[float, ...]
    block: int | None = None
    allowed: tuple[int, ...] | None = None
    fixed: bool = False
    kind: str = "widths"
    members: tuple[str, ...] = ()
    option: str = ""

    @property
    def choices(self) -> tuple[int, ...]:
        """The indices in `sizes` that may be chosen."""
        return tuple(range(len(self.sizes))) if self.allowed is None else self.allowed


@dataclass(frozen=True)
class Removal:
    """A block that may go, and the loss of that. goes: a decision by hand; None leaves it open."""

    name: str
    loss: float
    goes: bool | None = None


@dataclass(frozen=True)
class Term:
    """Seconds of a layer at every combination of the sizes of its axes: an array with a dimension for each axis.

    block: the index of the layer's block, or None. gone: whether the layer counts if the block is gone, instead of while it
    stays.
    """

    axes: tuple[int, ...]
    seconds: np.ndarray
    block: int | None = None
    gone: bool = False


@dataclass(frozen=True)
class Choice:
    """For every axis the index in its `sizes` (-1 if its block is gone), and for every block whether it goes."""

    sizes: tuple[int, ...]
    gone: tuple[bool, ...]


@dataclass(frozen=True)
class Problem:
    """All options. constant: seconds that no choice changes. apart: sets of blocks, each of which must not go as a
    whole."""

    axes: tuple[Axis, ...]
    blocks: tuple[Removal, ...]
    terms: tuple[Term, ...]
    constant: float = 0.0
    apart: tuple[frozenset[int], ...] = ()

    def seconds(self, choice: Choice) -> float:
        """Seconds of a run."""
        total = self.constant
        for term in self.terms:
            if term.block is None or choice.gone[term.block] == term.gone:
                total += float(term.seconds[tuple(choice.sizes[a] for a in term.axes)])
        return total

    def loss(self, choice: Choice) -> float:
        """The loss of the result, as the sum of single losses."""
        sizes = sum(axis.losses[k] for axis, k in zip(self.axes, choice.sizes, strict=True) if k >= 0)
        return sizes + sum(block.loss for block, gone in zip(self.blocks, choice.gone, strict=True) if gone)

    def whole(self) -> Choice:
        """The choice that removes nothing, whatever was decided by hand."""
        return Choice(tuple(len(axis.sizes) - 1 for axis in self.axes), (False,) * len(self.blocks))

    def scaled(self, factors: Mapping[str, float]) -> Problem:
        """The problem with the losses of every kind of axis, and of "blocks", multiplied by a factor each; 1 where none is
        given."""
        axes = tuple(replace(a, losses=tuple(factors.get(a.kind, 1.0) * loss for loss in a.losses)) for a in self.axes)
        removals = tuple(replace(b, loss=factors.get("blocks", 1.0) * b.loss) for b in self.blocks)
        return replace(self, axes=axes, blocks=removals)

    def saving(self, factor: float) -> Problem:
        """The problem in which variants of layers save so many times the seconds that they save here."""
        if factor == 1.0:
            return self
        terms = []
        for term in self.terms:
            seconds = term.seconds
            for d, place in enumerate(term.axes):
                if self.axes[place].kind != "widths":
                    plain = seconds.take([-1], d)
                    seconds = plain + factor * (seconds - plain)
            terms.append(replace(term, seconds=seconds))
        return replace(self, terms=tuple(terms))

    def only(self, *kinds: str) -> Problem:
        """The problem in which only axes of these kinds, or "blocks", may change; decisions by hand stay."""
        axes = tuple(a if a.kind in kinds or a.fixed else replace(a, allowed=(len(a.sizes) - 1,)) for a in self.axes)
        removals = tuple(b if "blocks" in kinds or b.goes else replace(b, goes=False) for b in self.blocks)
        return replace(self, axes=axes, blocks=removals)

    def plain(self, choice: Choice) -> Choice:
        """A choice without its variants of layers."""
        last = [len(axis.sizes) - 1 for axis in self.axes]
        kept = [k if a.kind == "widths" or k < 0 else n for a, k, n in zip(self.axes, choice.sizes, last, strict=True)]
        return replace(choice, sizes=tuple(kept))

    def joined(self) -> Problem:
        """The same problem with fewer terms: a term is added to another of the same block that has all of its axes."""
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
    """Number of entries in the tables of a problem, which is its size for the solver."""
    return sum(math.prod(term.seconds.shape) for term in problem.terms)


def apart(problem: Problem, sets: Iterable[frozenset[int]]) -> Problem:
    """The problem with further sets of blocks that must not go as a whole."""
    return Problem(problem.axes, problem.blocks, problem.terms, problem.constant, (*problem.apart, *sets))
