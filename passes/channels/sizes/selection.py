"""How many indices every group keeps: aligned sizes, chosen for a ratio, a number of indices, a cost, or a plan."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from ....graph.comb.axes import Factor
from ....graph.comb.groups import Group
from ....graph.comb.solve import Comb
from ..groups import steps
from ..importance.members import Scores
from .costs import Costs
from .ties import Ties

Sizes = Mapping[Factor, int]
OfChunk = Callable[[Group, int], float]  # a number for the next indices of a group, of which there are so many


class Selection:
    """The number of indices that every group keeps, always an aligned size.

    groups: those whose sizes are chosen. minimum: how many indices each keeps at least. sizes: of groups that have lost
    some before; nothing grows beyond them. ties: if given, `groups` and all sizes are those of wholes (`Ties.chosen`).
    """

    def __init__(
        self,
        comb: Comb,
        groups: list[Group],
        alignment: int,
        minimum: int,
        sizes: Sizes | None = None,
        ties: Ties | None = None,
    ):
        self.comb, self.alignment, self.minimum = comb, alignment, minimum
        self.sizes: dict[Factor, int] = dict(sizes or {})
        self._before = dict(self.sizes)
        self._ties = ties or Ties(groups)
        self._wholes = {b.whole.atom for b in self._ties.bundles}
        self._steps = self._ties.steps(steps(comb, self._ties.groups, alignment))

    def kept(self, group: Group) -> int:
        """Number of indices that a group keeps, as chosen so far."""
        return self.sizes.get(group.atom, group.size)

    def step(self, group: Group) -> int:
        """Number of indices by which the group may shrink at a time."""
        return self._steps.get(group.atom, 1)

    def least(self, group: Group) -> int:
        """Smallest number of indices that the group may keep; a bundle's whole has its own."""
        return group.least if group.atom in self._wholes else max(self.minimum, group.least)

    def legal(self, group: Group, size: float) -> int:
        """The smallest allowed size of at least `size`, but never more than the group has left."""
        step = self.step(group)
        aligned = math.ceil(max(size, self.least(group)) / step - 1e-9) * step
        return min(aligned, self._before.get(group.atom, group.size))

    def share(self, group: Group, share: float) -> int:
        """The smallest allowed size of the group that is at least the given share of it."""
        whole = self._ties.whole(group)
        return self.legal(whole, share * whole.size) * (group.size // whole.size)

    def below(self, group: Group) -> int:
        """The next smaller allowed size, or 0 if there is none."""
        step, size = self.step(group), self.kept(group)
        smaller = (math.ceil(size / step) - 1) * step
        return smaller if smaller >= self.least(group) else 0

    def allowed(self, group: Group) -> list[int]:
        """All sizes that the group may still have, smallest first."""
        size, step = self.kept(group), self.step(group)
        return sorted({self.legal(group, n) for n in range(step, size, step)} | {size})

    def above(self, group: Group, before: Sizes) -> int:
        """The next larger allowed size, at most that in `before`."""
        step = self.step(group)
        return min((self.kept(group) // step + 1) * step, before[group.atom])

    def approach(self, group: Group, size: int, share: float) -> None:
        """Move a group the given share of the way from its whole size to `size`, which need not be aligned."""
        if share == 1:
            self.sizes[group.atom] = size
        else:
            self.sizes[group.atom] = max(size, self.legal(group, group.size - share * (group.size - size)))

    def uniform(self, groups: list[Group], ratio: float) -> None:
        """Remove the same share of every group, or less where the alignment requires."""
        for g in groups:
            self.sizes[g.atom] = self.legal(g, g.size - int(g.size * ratio + 1e-9))

    def uniform_until(self, groups: list[Group], costs: Costs, goal: float) -> int:
        """Set the smallest common ratio whose cost is at most the goal, by bisection; then give back what fits, since one
        ratio may shrink several groups by a step at once. Returns the cost reached, which may exceed the goal."""

        def cost(ratio: float) -> int:
            self.uniform(groups, ratio)
            return costs.at({g.atom: self.sizes[g.atom] for g in groups})

        return self._bisected(cost, groups, costs, goal)

    def alike_until(self, kinds: list[list[Group]], scores: Scores, costs: Costs, goal: float) -> int:
        """Like `uniform_until`, but groups of one kind are ranked together, and each kind loses the same share of its
        indices. Returns the cost reached."""
        before, groups = dict(self.sizes), [g for kind in kinds for g in kind]

        def cost(ratio: float) -> int:
            self.sizes = dict(before)
            for kind in kinds:
                self.by_count(kind, scores, ratio)
            return costs.at({g.atom: self.kept(g) for g in groups})

        return self._bisected(cost, groups, costs, goal)

    def _bisected(self, cost: Callable[[float], int], groups: list[Group], costs: Costs, goal: float) -> int:
        """Set the smallest ratio with `cost(ratio)` within the goal, and give back what fits; returns the cost reached."""
        low, high = 0.0, 1.0 - 1e-9
        if cost(high) > goal:
            return costs.total
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(middle) > goal else (low, middle)
        cost(high)
        self._grow(groups, costs, goal)
        return costs.total

    def _grow(self, groups: list[Group], costs: Costs, goal: float) -> None:
        """Give back steps that fit within the goal, the most expensive first, one for each group in turn."""
        whole = {g.atom: self._before.get(g.atom, g.size) for g in groups}
        grown = True
        while grown:
            grown = False
            more = {g.atom: costs.saving(g.atom, self.kept(g) - self.above(g, whole)) for g in groups}
            for g in sorted(groups, key=lambda g: more[g.atom]):
                size = self.above(g, whole)
                if size > self.kept(g) and costs.total - costs.saving(g.atom, self.kept(g) - size) <= goal:
                    self._resize(g.atom, size, costs)
                    grown = True

    def by_count(
        self, groups: list[Group], scores: Scores, ratio: float, share: float = 1.0, among: list[Group] | None = None
    ) -> bool:
        """Remove the least important chunks of all groups together until `share` of `ratio` of all indices is gone, or
        until the next chunk would exceed the ratio. Returns False if there was no chunk left before that, else True.

        among: the groups whose indices count; by default `groups`.
        """
        gone = sum(g.size - self.kept(g) for g in among or groups)
        indices = sum(g.size for g in among or groups)
        left = int(indices * ratio + 1e-9) - gone
        now = int(indices * ratio * share + 1e-9) - gone
        for g, size in self._cheapest(groups, scores, lambda g, count: count):
            count = self.kept(g) - size
            if count > left or now <= 0:
                return True
            left, now = left - count, now - count
            self.sizes[g.atom] = size
        return left == 0

    def greedy(
        self, groups: list[Group], scores: Scores, costs: Costs, goal: float, per_cost: bool, end: float
    ) -> bool:
        """Choose sizes whose cost is at most `end`, and shrink groups towards them until the cost is at most `goal`.
        Returns whether `end` or `goal` was reached.

        goal: the cost that may remain after this event. end: the cost that may remain after the last event. per_cost:
        scores are changes of the loss, so chunks are ranked by importance per cost saved, else by importance per index.

        Every event chooses the whole way to the end: the chunks that rank lowest go until the end is reached (`_finish`
        chooses the last ones), and what still fits comes back. Of these chunks the event removes the first ones until its
        own goal is reached; the very last chunk waits for the last event. So while scores do not change, many events end
        where one does. To aim for the goal alone would be worse: a chunk that leads beyond the end must not go yet, and
        would be replaced by others, which could all stay once it goes.

        With `per_cost`, each score is the loss if its index alone were removed. Indices lose more together, the more so the
        fewer are left, and a group would be all but emptied; so a score counts `size / left` times (ours).
        """
        before = {g.atom: self.kept(g) for g in groups}
        chunks = self._to_the_end(groups, scores, costs, end, per_cost)
        reached = costs.total <= end
        if goal > end:
            for atom, size in before.items():
                self._resize(atom, size, costs)
            for atom, size in chunks[:-1] if reached else chunks:
                if costs.total <= goal:
                    break
                self._resize(atom, size, costs)
        return reached or costs.total <= goal

    def _resize(self, atom: Factor, size: int, costs: Costs) -> None:
        self.sizes[atom] = size
        costs.set(atom, size)

    def _to_the_end(
        self, groups: list[Group], scores: Scores, costs: Costs, end: float, per_cost: bool
    ) -> list[tuple[Factor, int]]:
        """Choose the sizes that reach the end. Returns the chunks that go, in order, each as an atom and the size that it
        leaves."""
        before = {g.atom: self.kept(g) for g in groups}
        chunks: list[tuple[Factor, int]] = []

        def weight(g: Group, count: int) -> float:
            return g.size / max(self.kept(g) - count, 1) if per_cost else 1.0

        def saving(g: Group, count: int) -> float:
            return costs.saving(g.atom, count) / weight(g, count) if per_cost else count

        for g, size in self._cheapest(groups, scores, saving):
            if costs.total <= end:
                break
            if costs.total - costs.saving(g.atom, self.kept(g) - size) <= end:
                chunks += self._finish(groups, scores, costs, end, weight, saving)
                break
            self._resize(g.atom, size, costs)
            chunks.append((g.atom, size))
        if costs.total <= end:
            self._refill(groups, scores, costs, end, before)
        return [(atom, size) for atom, size in chunks if size >= self.sizes[atom]]

    def _finish(
        self, groups: list[Group], scores: Scores, costs: Costs, goal: float, weight: OfChunk, saving: OfChunk
    ) -> list[tuple[Factor, int]]:
        """Choose the last chunks, where one more chunk would reach the goal, perhaps by far.

        Each candidate way removes some chunks in the order of their price, then any one chunk that suffices; the way that
        loses the least importance is taken. Returns its chunks.
        """
        sums, start = _running(groups, scores), dict(self.sizes)
        spent, best = 0.0, math.inf
        chunks: list[tuple[Factor, int]] = []
        way: list[tuple[Factor, int]] = []
        while True:
            enough, small = [], []
            for g in groups:
                size, kept = self.below(g), self.kept(g)
                if size:
                    loss = float(sums[g.atom][g.size - size] - sums[g.atom][g.size - kept])
                    total = spent + loss * weight(g, kept - size)
                    if costs.total - costs.saving(g.atom, kept - size) <= goal:
                        enough.append((total, g.atom, size))
                    else:
                        small.append((loss / max(saving(g, kept - size), 1e-12), total, g.atom, size))
            if enough and min(e[0] for e in enough) < best:
                best, atom, size = min(enough, key=lambda e: e[0])
                way = [*chunks, (atom, size)]
            small = [s for s in small if s[1] < best]
            if not small:
                break
            _, spent, atom, size = min(small, key=lambda s: s[0])
            chunks.append((atom, size))
            self._resize(atom, size, costs)
        self.sizes = start | dict(way)
        costs.at({g.atom: self.kept(g) for g in groups})
        return way

    def _refill(self, groups: list[Group], scores: Scores, costs: Costs, goal: float, before: Sizes) -> None:
        """Give back the most important chunks that fit, since the last chunk removed may save far more than was needed."""
        ranked = {g.atom: np.sort(scores[g.atom])[::-1] for g in groups}

        def gain(g: Group) -> float:
            size, more = self.kept(g), self.above(g, before)
            fits = more > size and costs.total - costs.saving(g.atom, size - more) <= goal
            return float(ranked[g.atom][size:more].sum()) if fits else -math.inf

        while (best := max(groups, key=gain, default=None)) is not None and gain(best) > -math.inf:
            self._resize(best.atom, self.above(best, before), costs)

    def _cheapest(self, groups: list[Group], scores: Scores, saving: OfChunk) -> Iterator[tuple[Group, int]]:
        """Yield chunks, cheapest first, each as a group and the size that it leaves; the caller has to give the group this
        size before it takes the next one.

        Savings change as other groups shrink, so a chunk is priced again when it comes up, and goes back if it is no longer
        the cheapest.
        """
        sums = _running(groups, scores)

        def price(g: Group) -> tuple[float, int]:
            size = self.below(g)
            if not size:
                return math.inf, 0
            gone, after = g.size - self.kept(g), g.size - size
            loss = sums[g.atom][after] - sums[g.atom][gone]
            return float(loss) / max(saving(g, after - gone), 1e-12), size

        heap = [(price(g)[0], i) for i, g in enumerate(groups)]
        heapq.heapify(heap)
        while heap:
            _, i = heapq.heappop(heap)
            value, size = price(groups[i])
            if heap and value > heap[0][0]:
                heapq.heappush(heap, (value, i))
                continue
            if size:
                yield groups[i], size
                heapq.heappush(heap, (price(groups[i])[0], i))


def _running(groups: list[Group], scores: Scores) -> dict[Factor, np.ndarray]:
    """For each group, the sums of its n lowest scores, for every n from 0."""
    return {g.atom: np.concatenate([[0.0], np.cumsum(np.sort(scores[g.atom]))]) for g in groups}


def lowest_removed(scores: np.ndarray, keep: int) -> np.ndarray:
    """A bool mask, True for the `keep` highest scores; of equal scores, the first are kept."""
    mask = np.ones(len(scores), dtype=bool)
    mask[np.argsort(-scores, kind="stable")[keep:]] = False
    return mask
