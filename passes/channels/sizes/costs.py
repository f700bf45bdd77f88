"""The cost of a program at any sizes of its groups, exactly: polynomials in the sizes, from the axes of every tensor."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from ....graph.comb import axes as ax
from ....graph.comb.axes import Axis, Factor
from ....graph.comb.groups import Group
from ....graph.comb.solve import Comb, Sizer
from ....graph.nodes import arguments, op_name

Units = Mapping[Factor, tuple[Factor, int]]
Polynomial = list[tuple[int, tuple[Factor, ...]]]  # a sum of coefficients times sizes


class Costs:
    """A cost (MACs or parameters) as a polynomial in the sizes of the groups' atoms.

    terms: the axes of each product that the cost adds up. groups: those whose sizes may change. units: for each tied atom,
    the atom that stands for its bundle, and how many indices the tied atom loses in a step of the bundle (`Ties.units`).

    Attributes: `sizes`, the present size of each group by its atom; `total`, the cost at these sizes.
    """

    def __init__(self, terms: Iterable[list[Axis]], groups: list[Group], units: Units = MappingProxyType({})):
        self.sizes: dict[Factor, int] = {g.atom: g.size for g in groups}
        self._units = units
        self.terms: list[list[Polynomial]] = []
        self.uses: dict[Factor, list[int]] = defaultdict(list)
        self.fixed = 0
        for axes in terms:
            constant, varying = 1, []
            for axis in axes:
                sums = self._polynomial(axis)
                if len(sums) == 1 and not sums[0][1]:
                    constant *= sums[0][0]
                else:
                    varying.append(sums)
            if not varying:
                self.fixed += constant
                continue
            varying.append([(constant, ())])
            for atom in {a for sums in varying for _, m in sums for a in m}:
                self.uses[atom].append(len(self.terms))
            self.terms.append(varying)
        self._values = [self._value(t) for t in self.terms]
        self.total = self.fixed + sum(self._values)

    def _polynomial(self, axis: Axis) -> Polynomial:
        merged: dict[tuple[Factor, ...], int] = defaultdict(int)
        for monomial in ax.monomials(axis):
            parts = [self._units.get(m, (m, 1)) for m in monomial]
            free = tuple(m for m, _ in parts if m in self.sizes)
            merged[free] += math.prod(unit if m in self.sizes else m.size for m, unit in parts)
        return [(coefficient, free) for free, coefficient in merged.items()]

    def _value(self, term: list[Polynomial]) -> int:
        product = 1
        for sums in term:
            value = 0
            for coefficient, free in sums:
                for atom in free:
                    coefficient *= self.sizes[atom]
                value += coefficient
            product *= value
        return product

    def set(self, atom: Factor, size: int) -> None:
        """Give an atom another size and update the total."""
        self.sizes[atom] = size
        for i in self.uses[atom]:
            value = self._value(self.terms[i])
            self.total += value - self._values[i]
            self._values[i] = value

    def at(self, sizes: Mapping[Factor, int]) -> int:
        """Give some atoms other sizes; returns the total."""
        for atom, size in sizes.items():
            if self.sizes.get(atom) != size:
                self.set(atom, size)
        return self.total

    def saving(self, atom: Factor, count: int) -> int:
        """How much lower the cost becomes when `count` more indices of an atom are removed."""
        before = self.sizes[atom]
        self.sizes[atom] = before - count
        saved = sum(self._values[i] - self._value(self.terms[i]) for i in self.uses[atom])
        self.sizes[atom] = before
        return saved


def mac_terms(comb: Comb) -> list[list[Axis]]:
    """The multiply-accumulates of a program as a sum of products: the axes of each product."""
    return [axes for _, terms in comb.cost_terms() for axes in terms]


def parameter_terms(comb: Comb) -> list[list[Axis]]:
    """The parameters of a program as a sum of products: the axes of each tensor; a tied tensor counts once."""
    names = {name for name, _ in comb.module.named_parameters(remove_duplicate=True)}
    return [axes for name, axes in comb.parameters.items() if name in names]


TERMS = {"macs": mac_terms, "params": parameter_terms}


def layer_costs(comb: Comb, sizes: dict[Factor, int]) -> list[dict[str, Any]]:
    """One row for each convolution and linear layer: its name, kind, channels and MACs before and after. sizes: by atom,
    what is left of each group that shrinks."""
    rows = []
    sizers = {"before": Sizer({}), "after": Sizer(sizes)}
    for node, terms in comb.cost_terms():
        name = op_name(node)
        if not (name.startswith("conv") or name == "linear"):
            continue
        a = arguments(node)
        weight = a["weight"]
        channel = 1 if name.startswith("conv") else -1
        into, out = comb.axes[a["input"]][channel], comb.axes[node][channel]
        channels = {when: [size(into), size(out)] for when, size in sizers.items()}
        macs = {when: sum(math.prod(map(size, m)) for m in terms) for when, size in sizers.items()}
        kind = "linear" if name == "linear" else "depthwise" if 1 < a["groups"] == channels["before"][0] else "conv"
        what = str(weight.target) if weight.op == "get_attr" else node.name
        rows.append({"name": what, "kind": kind, "channels": channels, "macs": macs})
    return rows
