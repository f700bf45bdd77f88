"""How many indices every group keeps: sizes that the alignment allows, chosen by ratio, by count, by cost, or by a plan."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping

import numpy as np

from ...graph.comb.axes import Factor
from ...graph.comb.groups import Group
from ...graph.comb.solve import Comb
from .costs import Costs
from .groups import steps
from .importance.members import Scores
from .ties import Ties

Sizes = Mapping[Factor, int]


class Selection:
    """How many indices every group keeps; only sizes that the alignment allows. sizes: what is left of groups that have
    lost some before; nothing ever grows. ties: where given, the groups and sizes are of what stands for tied ones."""

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
        self._ties, self._wholes = ties, set() if ties is None else {b.whole.atom for b in ties.bundles}
        self._steps = (
            steps(comb, groups, alignment) if ties is None else ties.steps(steps(comb, ties.groups, alignment))
        )

    def kept(self, group: Group) -> int:
        """How many indices a group keeps, as chosen so far."""
        return self.sizes.get(group.atom, group.size)

    def step(self, group: Group) -> int:
        """By how many indices the group may shrink at a time."""
        return self._steps.get(group.atom, 1)

    def least(self, group: Group) -> int:
        """How many indices the group keeps at least; what stands for tied ones knows by itself."""
        return group.least if group.atom in self._wholes else max(self.minimum, group.least)

    def legal(self, group: Group, size: float) -> int:
        """The smallest allowed size of at least `size`."""
        step = self.step(group)
        aligned = math.ceil(max(size, self.least(group)) / step - 1e-9) * step
        return min(aligned, self._before.get(group.atom, group.size))

    def share(self, group: Group, share: float) -> int:
        """The smallest allowed size of at least a share of the group."""
        whole = group if self._ties is None else self._ties.whole(group)
        return self.legal(whole, share * whole.size) * (group.size // whole.size)

    def below(self, group: Group) -> int:
        """The next smaller allowed size, or 0."""
        step, size = self.step(group), self.kept(group)
        smaller = (math.ceil(size / step) - 1) * step
        return smaller if smaller >= self.least(group) else 0

    def allowed(self, group: Group) -> list[int]:
        """All sizes it may still have, smallest first."""
        size, step = self.kept(group), self.step(group)
        return sorted({self.legal(group, n) for n in range(step, size, step)} | {size})

    def above(self, group: Group, before: Sizes) -> int:
        """The next larger allowed size, or what it was before."""
        step = self.step(group)
        return min((self.kept(group) // step + 1) * step, before[group.atom])

    def approach(self, group: Group, size: int, share: float) -> None:
        """Go the share of the way from the whole group to a size, which need not be aligned."""
        if share == 1:
            self.sizes[group.atom] = size
        else:
            self.sizes[group.atom] = max(size, self.legal(group, group.size - share * (group.size - size)))

    def uniform(self, groups: list[Group], ratio: float) -> None:
        """Take the same share of every group, as near as the alignment allows and never more."""
        for g in groups:
            self.sizes[g.atom] = self.legal(g, g.size - int(g.size * ratio + 1e-9))

    def uniform_until(self, groups: list[Group], costs: Costs, goal: float) -> int:
        """The smallest common ratio that reaches the goal, by bisection; where a step of several groups at once is more
        than it takes, what fits comes back. Returns the cost reached."""

        def cost(ratio: float) -> int:
            self.uniform(groups, ratio)
            for g in groups:
                costs.set(g.atom, self.sizes[g.atom])
            return costs.total

        return self._bisected(cost, groups, costs, goal)

    def alike_until(self, kinds: list[list[Group]], scores: Scores, costs: Costs, goal: float) -> int:
        """The smallest common ratio that reaches the goal, where groups of one kind are ranked together and each kind loses
        the same share of its indices; by bisection, and what fits comes back. Returns the cost reached."""
        before, groups = dict(self.sizes), [g for kind in kinds for g in kind]

        def cost(ratio: float) -> int:
            self.sizes = dict(before)
            for kind in kinds:
                self.by_count(kind, scores, ratio)
            for g in groups:
                costs.set(g.atom, self.kept(g))
            return costs.total

        return self._bisected(cost, groups, costs, goal)

    def _bisected(self, cost: Callable[[float], int], groups: list[Group], costs: Costs, goal: float) -> int:
        """Set the smallest ratio with `cost(ratio)` within the goal; returns the cost reached."""
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
        """Give back steps that fit, the dearest first, each group in its turn."""
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
        self,
        groups: list[Group],
        scores: Scores,
        ratio: float,
        share: float = 1.0,
        among: list[Group] | None = None,
    ) -> bool:
        """Remove the globally least important chunks until `share` of the ratio of all indices is gone. Where the next one
        would be more than the ratio asks for, that is the end. Returns whether it came to that.

        among: the groups whose indices count, by default those that may shrink.
        """
        gone = sum(g.size - self.kept(g) for g in among or groups)
        indices = sum(g.size for g in among or groups)
        more = True
        left = int(indices * ratio + 1e-9) - gone
        now = int(indices * ratio * share + 1e-9) - gone

        def take(g: Group, size: int) -> bool | None:
            nonlocal left, now, more
            count = self.kept(g) - size
            more = count <= left and now > 0
            if not more:
                return None
            left -= count
            now -= count
            return True

        self._descend(groups, scores, lambda g, count: count, take)
        return not more or left == 0

    def greedy(
        self, groups: list[Group], scores: Scores, costs: Costs, goal: float, per_cost: bool, end: float
    ) -> bool:
        """Choose sizes that reach the `end`, and go as far towards them as the `goal` asks for. Returns whether the end
        can be reached.

        The end is chosen whole at every event: the least important chunks go, or those with the least importance per cost
        saved, until it is reached (see `_finish`), and what still fits comes back. An event then removes the first of the
        chunks chosen, in the same order, until its goal is reached; the very last waits for the last event. So whatever is
        gone at any time would be gone at the end, and while scores do not change, many events end where one does. To go
        for the goal alone would not do: a chunk that must not go yet, as it leads beyond the end, would be made up for by
        others, all of which could stay once it goes.

        per_cost: scores are changes of the loss, each as if its index went alone. Together indices lose more than that,
        the more so the fewer are left, and a group would be all but emptied; so a score counts `size / left` times (ours).
        end: the cost that may remain after the last event. goal: after this one.
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
        """Choose the sizes that reach the end; the chunks that go, in order, as the sizes they leave."""
        before = {g.atom: self.kept(g) for g in groups}
        chunks: list[tuple[Factor, int]] = []

        def weight(g: Group, count: int) -> float:
            return g.size / max(self.kept(g) - count, 1) if per_cost else 1.0

        def saving(g: Group, count: int) -> float:
            return costs.saving(g.atom, count) / weight(g, count) if per_cost else count

        def take(g: Group, size: int) -> bool | None:
            if costs.total <= end:
                return None
            if costs.total - costs.saving(g.atom, self.kept(g) - size) <= end:
                chunks.extend(self._finish(groups, scores, costs, end, weight, saving))
                return None
            costs.set(g.atom, size)
            chunks.append((g.atom, size))
            return True

        self._descend(groups, scores, saving, take)
        if costs.total <= end:
            self._refill(groups, scores, costs, end, before)
        return [(atom, size) for atom, size in chunks if size >= self.sizes[atom]]

    def _finish(
        self,
        groups: list[Group],
        scores: Scores,
        costs: Costs,
        goal: float,
        weight: Callable[[Group, int], float],
        saving: Callable[[Group, int], float],
    ) -> list[tuple[Factor, int]]:
        """One more chunk reaches the goal, perhaps by far. Of all ways to get there, some chunks in the order of their price
        and then any one that is enough, take the one that loses least. Returns its chunks."""
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
        for g in groups:
            costs.set(g.atom, self.kept(g))
        return way

    def _refill(self, groups: list[Group], scores: Scores, costs: Costs, goal: float, before: Sizes) -> None:
        """The last chunk removed may save far more than was asked for: give back the most important chunks that fit."""
        ranked = {g.atom: np.sort(scores[g.atom])[::-1] for g in groups}

        def gain(g: Group) -> float:
            size, more = self.kept(g), self.above(g, before)
            fits = more > size and costs.total - costs.saving(g.atom, size - more) <= goal
            return float(ranked[g.atom][size:more].sum()) if fits else -math.inf

        while (best := max(groups, key=gain, default=None)) is not None and gain(best) > -math.inf:
            self._resize(best.atom, self.above(best, before), costs)

    def _descend(
        self,
        groups: list[Group],
        scores: Scores,
        saving: Callable[[Group, int], float],
        take: Callable[[Group, int], bool | None],
    ) -> None:
        """Offer chunks to `take`, cheapest first; it answers True (removed), False (leave this group) or None (stop).

        Savings change as other groups shrink, so a chunk is priced anew when it comes up, and goes back when it is no
        longer the cheapest.
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
            answer = take(groups[i], size) if size else False
            if answer is None:
                return
            if answer:
                self.sizes[groups[i].atom] = size
                heapq.heappush(heap, (price(groups[i])[0], i))


def _running(groups: list[Group], scores: Scores) -> dict[Factor, np.ndarray]:
    """By group, what the n least important indices are worth together, for every n."""
    return {g.atom: np.concatenate([[0.0], np.cumsum(np.sort(scores[g.atom]))]) for g in groups}


def lowest_removed(scores: np.ndarray, keep: int) -> np.ndarray:
    """Mask that keeps the `keep` highest scores; of equal ones, the first."""
    mask = np.ones(len(scores), dtype=bool)
    mask[np.argsort(-scores, kind="stable")[keep:]] = False
    return mask
