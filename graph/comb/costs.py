"""What a program costs when its atoms have given sizes: the polynomials of `graph.cost` over solved axes."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from .. import cost
from . import axes as ax
from .axes import Axis, Reason
from .equations import Equations


class Sizer:
    """Sizes of axes when atoms have the given sizes; operators share their axes, so each is computed once."""

    def __init__(self, sizes: ax.Sizes):
        self.sizes = sizes
        self._known: dict[int, tuple[Axis, int]] = {}  # the axis too: an id is only good while its object lives

    def __call__(self, axis: Axis) -> int:
        known = self._known.get(id(axis))
        if known is None:
            known = self._known[id(axis)] = (axis, ax.kept_size(axis, self.sizes))
        return known[1]


class Costs:
    """The cost of a solved program as a function of the sizes of its atoms.

    terms: the MACs of every node as sums of products of axes.
    """

    def __init__(self, solved: Equations):
        self.terms: list[tuple[fx.Node, list[list[Axis]]]] = []
        self._parts: list[tuple[list[list[Axis]], dict[str, int]]] = []
        self._unknown = cost.unknowns(solved.module)
        for node, polynomial, units in cost.terms(solved.module):
            axes = [[_axis(solved, node, ref) for ref in monomial] for monomial in polynomial]
            self._parts.append((axes, units))
            if "macs" in units:
                self.terms.append((node, axes))

    def macs(self, sizes: ax.Sizes) -> int:
        """MACs for the example inputs when atoms have the given sizes."""
        size = Sizer(sizes)
        return sum(math.prod(map(size, m)) for _, axes in self.terms for m in axes)

    def cost(self, sizes: ax.Sizes) -> dict[str, Any]:
        """`Program.cost()` of the program in which atoms have the given sizes."""
        size = Sizer(sizes)
        found: dict[str, Any] = {"macs": 0, "weight_bytes": 0, "activation_bytes": 0, "params": 0}
        for axes, units in self._parts:
            amount = sum(math.prod(map(size, m)) for m in axes)
            for part, unit in units.items():
                found[part] += amount * unit
        return found | self._unknown


def _axis(solved: Equations, node: fx.Node, ref: cost.Ref) -> Axis:
    """The axis a monomial refers to; a plain number is an axis that nothing shrinks."""
    return ax.fresh(ref, Reason(node, "a number")) if isinstance(ref, int) else solved.axes[ref[0]][ref[1]]
