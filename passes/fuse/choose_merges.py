"""Which merges to do: chains and sums are cut so that multiply-accumulates, and then kernels, are fewest (ours)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ...graph.cost import evaluate, macs
from ...graph.facts import DROPOUTS
from ...graph.nodes import arguments, op_name, shape
from .merge_weights import Geometry, Inexact
from .parts import Branch, Part, Step, Sum, geometry_of, map_of, map_of_chain

LONGEST = 16  # most parts of a chain that are merged into one map

Cost = tuple[int, int]  # MACs for the example input, kernels launched
Layers = tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class Merge:
    """One map in the place of several.

    parts: the parts in a row that the map replaces, or a single `Sum`. indices: of a sum, the branches that the map
    replaces; None: everything. axis: the dimension of the channels. geometry: that of the new map. before, after: cost
    of what the map replaces, and of the map.
    """

    parts: tuple[Part, ...]
    axis: int
    indices: tuple[int, ...] | None
    geometry: Geometry
    before: Cost
    after: Cost

    @property
    def source(self) -> fx.Node:
        """The node whose value the map reads."""
        return self.parts[0].source

    @property
    def last(self) -> fx.Node:
        """The node whose value the map computes."""
        return self.parts[-1].last

    @property
    def branches(self) -> list[Branch]:
        """What the map replaces; parts in a row count as one branch."""
        if self.indices is None:
            return [Branch(1.0, self.last, self.parts)]
        return [self.parts[0].branches[i] for i in self.indices]

    @property
    def rest(self) -> list[Branch]:
        """The branches of a sum that stay as they are."""
        chosen = self.indices
        return [] if chosen is None else [b for i, b in enumerate(self.parts[0].branches) if i not in chosen]

    @property
    def members(self) -> set[fx.Node]:
        """The nodes that the map makes superfluous."""
        inner = set().union(*(b.members for b in self.branches))
        return inner if self.indices is None else inner.union(self.parts[0].nodes)

    def steps(self) -> list[Step]:
        """All affine steps that the map replaces."""
        return [step for branch in self.branches for part in branch.parts for step in part.steps()]


@dataclass(frozen=True)
class Choice:
    """A way to compute some parts: its cost, and the merges to do."""

    cost: Cost
    merges: tuple[Merge, ...] = ()

    def __add__(self, other: Choice) -> Choice:
        return Choice(plus(self.cost, other.cost), self.merges + other.merges)


def plus(*costs: Cost) -> Cost:
    """The sum of costs."""
    return sum(c[0] for c in costs), sum(c[1] for c in costs)


class Planner:
    """Finds the cheapest way to compute chains and sums.

    skip: nodes whose values no merge may compute, since it was tried and is wrong. sparse: sparse weights and their
    patterns, whose zeros a merge must not fill. refused, gated: neighbouring layers that cannot be merged exactly, and
    those that cost more when merged, with the reason.
    """

    def __init__(self, skip: Iterable[fx.Node], sparse: Mapping[str, str | None]):
        self.skip, self.sparse = set(skip), sparse
        self.refused: dict[Layers, str] = {}
        self.gated: dict[Layers, str] = {}
        self.known: dict[tuple[fx.Node, int], Choice] = {}

    def chain(self, parts: Sequence[Part]) -> Choice:
        """The cheapest way to compute parts in a row, of which at least one has a layer."""
        axis = next(p.axis for p in parts if p.carriers)
        assert axis is not None
        return self._chain(parts, axis)

    def _chain(self, parts: Sequence[Part], axis: int) -> Choice:
        maps: list[Geometry | Inexact] = []
        for part in parts:
            try:
                maps.append(map_of(part, axis, geometry_of))
            except Inexact as why:
                maps.append(why)
        # best[j] is the cheapest way to compute the first j parts (0 to j - 1). Part j either runs alone after best[j], or
        # is merged with parts i to j - 1, after best[i]. `merged` is the map of parts i to j: as i falls, part i is put in
        # front of it, until a composition is inexact.
        best = [Choice((0, 0))]
        for j, part in enumerate(parts):
            best.append(best[j] + self._alone(part, axis))
            merged = maps[j]
            for i in range(j - 1, max(-1, j - LONGEST), -1):
                first = maps[i]
                if isinstance(merged, Inexact) or isinstance(first, Inexact):
                    break
                try:
                    merged = first.then(merged)
                    merged.convolution_padding()
                except Inexact as why:
                    self._note(self.refused, parts[i], part, str(why))
                    break
                apart = plus(*(self._alone(p, axis).cost for p in parts[i : j + 1]))
                merge = self._merge(parts[i : j + 1], axis, None, merged, apart)
                if merge is None:
                    continue
                choice = best[i] + Choice(merge.after, (merge,))
                if choice.cost < best[j + 1].cost:
                    best[j + 1] = choice
                elif i == j - 1 and merge.after[0] > apart[0]:
                    why_not = f"merged they take {merge.after[0]:,} MACs instead of {apart[0]:,}"
                    self._note(self.gated, parts[i], part, why_not)
        return best[-1]

    def _alone(self, part: Part, axis: int) -> Choice:
        """The cheapest way to compute one part without its neighbours."""
        key = part.last, axis
        if key not in self.known:
            if isinstance(part, Sum):
                self.known[key] = self._branches(part, axis)
            else:
                launched = sum(op_name(n) not in DROPOUTS for n in part.nodes)
                self.known[key] = Choice((sum(evaluate(macs(n)) for n in part.nodes), launched))
        return self.known[key]

    def _branches(self, part: Sum, axis: int) -> Choice:
        """The cheapest way to compute a sum: one of the two most expensive branches takes in every other whose merging
        saves cost.
        """
        apart = [self._chain(b.parts, axis) for b in part.branches]
        maps: dict[int, Geometry] = {}
        for i, branch in enumerate(part.branches):
            try:
                maps[i] = map_of_chain(branch.parts, axis, part.source, geometry_of)
            except Inexact as why:
                self._note(self.refused, branch.parts[0], branch.parts[-1], str(why))
        best = sum(apart, Choice((0, len(apart) - 1)))
        for first in sorted(maps, key=lambda i: -maps[i].taps)[:2]:
            chosen, total = [first], maps[first]
            cost = _price(total, part.source, part.last)
            for i in maps.keys() - {first}:
                try:
                    wider = total.plus(maps[i])
                    wider.convolution_padding()
                except Inexact:
                    continue
                price = _price(wider, part.source, part.last)
                if price < plus(cost, apart[i].cost, (0, 1)):
                    chosen, total, cost = [*chosen, i], wider, price
            if len(chosen) == 1:
                continue
            before = plus(*(apart[i].cost for i in chosen), (0, len(chosen) - 1))
            indices = None if len(chosen) == len(apart) else tuple(sorted(chosen))
            merge = self._merge([part], axis, indices, total, before)
            if merge is not None:
                rest = [apart[i] for i in range(len(apart)) if i not in chosen]
                choice = sum(rest, Choice(plus(cost, (0, len(rest))), (merge,)))
                best = min(best, choice, key=lambda c: c.cost)
        return best

    def _merge(
        self, parts: Sequence[Part], axis: int, indices: tuple[int, ...] | None, geometry: Geometry, before: Cost
    ) -> Merge | None:
        """The merge; None where one with this end was wrong before, no layer carries its weights, or it would fill a
        sparse weight.
        """
        source, last = parts[0].source, parts[-1].last
        carriers = [c for p in parts for c in p.carriers]
        if last in self.skip or not carriers:
            return None
        if len(carriers) > 1 or any(isinstance(p, Sum) for p in parts):
            names = [str(arguments(c)["weight"].target) for c in carriers]
            if filled := [name for name in names if name in self.sparse]:
                pattern = self.sparse[filled[0]] or "sparse"
                why = f"it would fill up {filled[0]}, which Sparsify made {pattern}; run Fuse before Sparsify"
                self.refused[carriers[0], carriers[-1]] = why
                return None
        return Merge(tuple(parts), axis, indices, geometry, before, _price(geometry, source, last))

    def _note(self, into: dict[Layers, str], first: Part, second: Part, why: str) -> None:
        """Remember why two layers were not merged; normalisations get their reasons elsewhere (`fuse._why_left`)."""
        if first.carriers and second.carriers and first is not second:
            into[first.carriers[-1], second.carriers[0]] = why


def _price(geometry: Geometry, source: fx.Node, last: fx.Node) -> Cost:
    """The cost of one map between two values: its MACs, and one kernel."""
    if geometry.transposed:
        return math.prod(shape(source)) * geometry.taps * geometry.outputs // geometry.inputs, 1
    return math.prod(shape(last)) * geometry.taps, 1
