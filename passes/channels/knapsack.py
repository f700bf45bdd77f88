"""Which sizes keep the most importance within a latency: a knapsack over aligned chunks.

    maximise sum_g V_g(n_g)   subject to   run + sum_layers t(layer at sizes n) <= budget

V_g(n) is the sum of the group's n largest scores. A layer's time depends on the sizes of several groups (a convolution's
inputs and outputs), so the problem is no plain knapsack: it is solved again and again with every group's time taken
exactly at its possible sizes while the others stay where the last solution left them. Each of these is a multiple-choice
knapsack, solved by dynamic programming over a rounded-up time axis. Every solution is repaired (the chunk with the least
importance per second goes until the budget holds) and filled (the chunk with the most importance per second comes back
while it fits), and the best one wins. With few combinations all are tried. Source: ours.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...graph.comb.axes import Factor
from ...graph.comb.solve import Comb, Sizer
from ...graph.workload.layer import Latency, rules_of
from ...graph.workload.layers import Layers
from .ties import Ties

Sizes = dict[Factor, int]
BINS = 1500  # of the time axis
ROUNDS = 8
EXHAUSTIVE = 4000  # combinations up to which all are tried
COMBINATIONS = 4096  # sizes of one layer that are measured beforehand, at most
WEIGHTS = (0.25, 0.5, 0.75, 0.9, 0.97, 1.0)  # of what has to be left beside importance, tried in this order


class Predictor:
    """Predicted seconds of a run of a combed program at any sizes of its groups; sizes of a layer are looked up once."""

    def __init__(self, comb: Comb, latency: Latency, batch: int = 1, ties: Ties | None = None):
        self.layers, self.latency = Layers(comb, batch, rules_of(latency)), latency
        self._ties = ties or Ties([])
        units = self._ties.units
        self._atoms = [
            tuple(dict.fromkeys(units.get(a, (a, 1))[0] for a in self.layers.atoms(i)))
            for i in range(len(self.layers.nodes))
        ]
        self.users: dict[Factor, list[int]] = defaultdict(list)
        for i, atoms in enumerate(self._atoms):
            for atom in atoms:
                self.users[atom].append(i)
        self._known: dict[tuple[int, tuple[int, ...]], float] = {}

    def total(self, sizes: Mapping[Factor, int]) -> float:
        """Seconds of a run at these sizes."""
        return self.latency.per_run + sum(self.node(i, sizes) for i in range(len(self.layers.nodes)))

    def around(self, atom: Factor, sizes: Mapping[Factor, int]) -> float:
        """Seconds of the layers that an atom takes part in."""
        return sum(self.node(i, sizes) for i in self.users[atom])

    def node(self, index: int, sizes: Mapping[Factor, int]) -> float:
        """Seconds of one layer."""
        key = index, tuple(sizes.get(a, a.size) for a in self._atoms[index])
        if key not in self._known:
            layer = self.layers.numbered(index, self._sizer(sizes))
            self._known[key] = 0.0 if layer is None else self.latency.seconds(layer)
        return self._known[key]

    def _sizer(self, sizes: Mapping[Factor, int]) -> Sizer:
        return self.layers.sizer(self._ties.spread(sizes))

    def record(self, sizes: Mapping[Factor, int]) -> dict[str, Any]:
        """What was predicted before and after, in seconds, by what, and how far off that may be."""
        record = {"predicted": {"before": self.total({}), "after": self.total(sizes)}, "by": str(self.latency)}
        error = getattr(self.latency, "error", None)
        return record | ({"error": str(error), "factor": error.factor} if error else {})

    def prepare(self, options: Mapping[Factor, Sequence[int]], progress: bool = False) -> None:
        """Let the table measure, at once, every layer at every combination of the sizes its groups may have."""
        wanted = []
        for index, atoms in enumerate(self._atoms):
            choices = [options.get(a, (a.size,)) for a in atoms]
            if math.prod(map(len, choices)) > COMBINATIONS:
                continue  # a long concatenation: measured as it comes up
            for combination in itertools.product(*choices):
                size = self._sizer(dict(zip(atoms, combination, strict=True)))
                wanted += [layer] if (layer := self.layers.numbered(index, size)) is not None else []
        self.latency.prepare(dict.fromkeys(wanted), progress)


@dataclass(frozen=True)
class Floor:
    """What sizes have to leave beside the latency. measure: never falls as sizes grow. least: of it."""

    measure: Callable[[Sizes], float]
    least: float


def knapsack(
    predictor: Predictor,
    options: Mapping[Factor, Sequence[int]],
    scores: Mapping[Factor, np.ndarray],
    budget: float,
    floor: Floor | None = None,
) -> Sizes | None:
    """The sizes, one of the options of every group, that keep the most importance with at most `budget` seconds
    predicted; None when nothing does.

    options: allowed sizes by atom. scores: importance of every index; any real numbers. floor: what the sizes have to leave
    beside. Where it binds, the search weighs importance against its measure (a Lagrange multiplier), as little as helps.
    """
    problem = _Problem(predictor, {a: sorted(set(o)) for a, o in options.items()}, scores, budget, floor)
    if math.prod(len(o) for o in problem.options.values()) <= EXHAUSTIVE:
        return problem.exhaustive()
    sizes = problem.search()
    for weight in WEIGHTS if sizes is None and floor is not None else ():
        sizes = sizes or problem.weighed(weight).search()
    return sizes


def towards(
    predictor: Predictor,
    options: Mapping[Factor, Sequence[int]],
    scores: Mapping[Factor, np.ndarray],
    end: Sizes,
    budget: float,
) -> Sizes:
    """Sizes on the way from the largest options to the end's, with at most `budget` seconds predicted: what has the least
    importance per second goes first, and nothing that stays at the end.

    end: one option of every group. What it takes is all that may go, even if that is more than the budget.
    """
    way = {a: sorted({n for n in o if n >= end[a]}) for a, o in options.items()}
    return _Problem(predictor, way, scores, budget).repaired({a: o[-1] for a, o in way.items()}) or dict(end)


class _Problem:
    def __init__(
        self,
        predictor: Predictor,
        options: dict[Factor, list[int]],
        scores: Mapping[Factor, np.ndarray],
        budget: float,
        floor: Floor | None = None,
    ):
        self.predictor, self.options, self.budget, self.floor = predictor, options, budget, floor
        self.values = {a: self._values(np.asarray(scores[a], dtype=float), o) for a, o in options.items()}

    @staticmethod
    def _values(scores: np.ndarray, options: list[int]) -> np.ndarray:
        """What each allowed size keeps."""
        kept = np.concatenate([[0.0], np.cumsum(np.sort(scores)[::-1])])
        return kept[options]

    def enough(self, sizes: Sizes) -> bool:
        return self.floor is None or self.floor.measure(sizes) >= self.floor.least

    def weighed(self, weight: float) -> _Problem:
        """The problem in which the floor's measure counts as importance, by this share of all of it."""
        assert self.floor is not None
        problem, largest = copy(self), {a: o[-1] for a, o in self.options.items()}
        measures = {
            a: np.array([self.floor.measure({**largest, a: n}) for n in options], dtype=float)
            for a, options in self.options.items()
        }
        wholes = [sum(float(np.ptp(v)) for v in parts.values()) or 1.0 for parts in (self.values, measures)]
        problem.values = {
            a: (1 - weight) * values / wholes[0] + weight * measures[a] / wholes[1] for a, values in self.values.items()
        }
        return problem

    def value(self, sizes: Sizes) -> float:
        return float(sum(self.values[a][self.options[a].index(n)] for a, n in sizes.items()))

    def exhaustive(self) -> Sizes | None:
        best: tuple[float, Sizes] | None = None
        for combination in itertools.product(*self.options.values()):
            sizes = dict(zip(self.options, combination, strict=True))
            if self.enough(sizes) and self.predictor.total(sizes) <= self.budget:
                value = self.value(sizes)
                if best is None or value > best[0]:
                    best = value, sizes
        return best and best[1]

    def search(self) -> Sizes | None:
        smallest = {a: o[0] for a, o in self.options.items()}
        if self.predictor.total(smallest) > self.budget:
            return self.repaired({a: o[-1] for a, o in self.options.items()})
        best, sizes = smallest if self.enough(smallest) else None, self._start()
        seen: set[tuple[int, ...]] = set()
        for _ in range(ROUNDS):
            sizes = self._linearised(sizes)
            feasible = self.repaired(dict(sizes))
            if feasible is not None:
                feasible = self.filled(feasible)
                best = self._better(feasible, best)
            if tuple(sizes.values()) in seen:
                break
            seen.add(tuple(sizes.values()))
            sizes = feasible or sizes
        greedy = self.repaired({a: o[-1] for a, o in self.options.items()})
        if greedy is not None:
            best = self._better(self.filled(greedy), best)
        return best

    def _better(self, sizes: Sizes, best: Sizes | None) -> Sizes | None:
        """The sizes, where they leave enough and are worth more than the best so far."""
        return sizes if self.enough(sizes) and (best is None or self.value(sizes) > self.value(best)) else best

    def _start(self) -> Sizes:
        """All groups at the same share, the largest that fits."""

        def at(share: float) -> Sizes:
            return {a: o[min(int(share * len(o)), len(o) - 1)] for a, o in self.options.items()}

        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if self.predictor.total(at(middle)) <= self.budget else (low, middle)
        return at(low)

    def _linearised(self, sizes: Sizes) -> Sizes:
        """The best choice when every group's own effect on the time is exact and the effects add up."""
        extra = {}
        for atom, options in self.options.items():
            times = np.array([self.predictor.around(atom, {**sizes, atom: n}) for n in options])
            extra[atom] = times - self.predictor.around(atom, sizes)
        left = self.budget - self.predictor.total(sizes) - sum(float(e.min()) for e in extra.values())
        if left <= 0:
            return {a: o[int(extra[a].argmin())] for a, o in self.options.items()}
        width = left / BINS
        reached = np.zeros(BINS + 1)  # the best value of the groups so far within so many bins
        choices = []
        for atom in self.options:
            need = np.ceil((extra[atom] - extra[atom].min()) / width - 1e-9).astype(int)
            table = np.full((len(need), BINS + 1), -np.inf)
            for row, (n, value) in enumerate(zip(need, self.values[atom], strict=True)):
                if n <= BINS:
                    table[row, n:] = reached[: BINS + 1 - n] + value
            choices.append((need, table.argmax(0)))
            reached = table.max(0)
        result, at = {}, BINS
        for (atom, options), (need, choice) in reversed(list(zip(self.options.items(), choices, strict=True))):
            pick = int(choice[at])
            result[atom] = options[pick]
            at -= int(need[pick])
        return {a: result[a] for a in self.options}

    def repaired(self, sizes: Sizes) -> Sizes | None:
        """Shrink, the least importance per second first, until the prediction is within the budget; in place. What leaves
        enough goes on doing so."""
        held = self.enough(sizes)
        while (total := self.predictor.total(sizes)) > self.budget:
            best: tuple[float, Factor, int] | None = None
            for atom, options in self.options.items():
                at = options.index(sizes[atom])
                before = self.predictor.around(atom, sizes)
                for to in range(at - 1, -1, -1):  # a chunk that saves nothing by itself may with the next one
                    saved = before - self.predictor.around(atom, {**sizes, atom: options[to]})
                    if saved > 0 and (not held or self.enough({**sizes, atom: options[to]})):
                        useful = min(saved, total - self.budget)
                        price = (self.values[atom][at] - self.values[atom][to]) / useful
                        if best is None or price < best[0]:
                            best = price, atom, options[to]
                        break
            if best is None:
                return None
            sizes[best[1]] = best[2]
        return sizes

    def filled(self, sizes: Sizes) -> Sizes:
        """Grow, the most importance per second first, while the prediction stays within the budget; in place."""
        while True:
            total = self.predictor.total(sizes)
            best: tuple[float, Factor, int] | None = None
            for atom, options in self.options.items():
                at = options.index(sizes[atom])
                before = self.predictor.around(atom, sizes)
                for to in range(at + 1, len(options)):
                    cost = self.predictor.around(atom, {**sizes, atom: options[to]}) - before
                    gain = self.values[atom][to] - self.values[atom][at]
                    if total + cost <= self.budget and gain > 0:
                        rate = gain / max(cost, 1e-12)
                        if best is None or rate > best[0]:
                            best = rate, atom, options[to]
            if best is None:
                return sizes
            sizes[best[1]] = best[2]
