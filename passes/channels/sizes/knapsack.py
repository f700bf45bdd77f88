"""The sizes that keep the most importance within a latency: a knapsack over aligned chunks.

maximise sum_g V_g(n_g)   subject to   run + sum_layers t(layer at sizes n) <= budget

V_g(n) is the sum of the group's n largest scores. A layer's time depends on the sizes of several groups (a convolution's
inputs and outputs), so this is no plain knapsack problem. It is linearised around a solution: every group's time is taken
exactly at its possible sizes while the other groups stay as in that solution. The result is a multiple-choice knapsack,
solved by dynamic programming over a rounded-up time axis, and gives the next solution. Every solution is repaired (the
chunk with the least importance per second goes until the budget holds) and filled (the chunk with the most importance per
second comes back while it fits), and the best one wins. If there are few combinations, all are tried. Source: ours.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from ....graph.comb.axes import Factor
from ....graph.comb.solve import Comb, Sizer
from ....graph.workload.layer import Latency, rules_of
from ....graph.workload.layers import Layers
from ..importance.members import Scores
from .ties import Ties

Sizes = dict[Factor, int]
Options = Mapping[Factor, Sequence[int]]  # the sizes that each group may have
BINS = 1500  # number of bins of the time axis
ROUNDS = 8
EXHAUSTIVE = 4000  # combinations up to which all are tried
COMBINATIONS = 4096  # a layer with more combinations of sizes is not measured beforehand
WEIGHTS = (0.25, 0.5, 0.75, 0.9, 0.97, 1.0)  # of a floor's measure against importance, tried in this order


class Predictor:
    """Predicted seconds of a run of a program at any sizes of its groups; each layer is predicted once for each of its
    sizes."""

    def __init__(self, comb: Comb, latency: Latency, batch: int = 1, ties: Ties | None = None):
        self.layers, self.latency = Layers(comb, batch, rules_of(latency)), latency
        self._ties = ties or Ties([])
        units = self._ties.units
        wholes = ([units.get(a, (a, 1))[0] for a in self.layers.atoms(i)] for i in range(len(self.layers.nodes)))
        self._atoms = [tuple(dict.fromkeys(atoms)) for atoms in wholes]
        self.users: dict[Factor, list[int]] = defaultdict(list)
        for i, atoms in enumerate(self._atoms):
            for atom in atoms:
                self.users[atom].append(i)
        self._known: dict[tuple[int, tuple[int, ...]], float] = {}

    def atoms(self, index: int) -> tuple[Factor, ...]:
        """The atoms whose sizes one layer may depend on."""
        return self._atoms[index]

    def total(self, sizes: Mapping[Factor, int]) -> float:
        """Seconds of a run at these sizes; groups without one are whole."""
        return self.latency.per_run + sum(self.node(i, sizes) for i in range(len(self.layers.nodes)))

    def around(self, atom: Factor, sizes: Mapping[Factor, int]) -> float:
        """Seconds of the layers whose sizes depend on an atom."""
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
        """The predicted seconds before and after, the latency model, and its error if it knows that."""
        record = {"predicted": {"before": self.total({}), "after": self.total(sizes)}, "by": str(self.latency)}
        error = getattr(self.latency, "error", None)
        return record | ({"error": str(error), "factor": error.factor} if error else {})

    def prepare(self, options: Options, progress: bool = False) -> None:
        """Let the latency model measure, at once, every layer at every combination of the sizes that its groups may have."""
        wanted = []
        for index, atoms in enumerate(self._atoms):
            choices = [options.get(a, (a.size,)) for a in atoms]
            if math.prod(map(len, choices)) > COMBINATIONS:
                continue  # a long concatenation, which is measured when a search asks for it
            for combination in itertools.product(*choices):
                size = self._sizer(dict(zip(atoms, combination, strict=True)))
                wanted += [layer] if (layer := self.layers.numbered(index, size)) is not None else []
        self.latency.prepare(dict.fromkeys(wanted), progress)


@dataclass(frozen=True)
class Floor:
    """A quantity that must not fall below `least`. measure: its value at given sizes; it never falls as sizes grow."""

    measure: Callable[[Sizes], float]
    least: float


def knapsack(
    predictor: Predictor, options: Options, scores: Scores, budget: float, floor: Floor | None = None
) -> Sizes | None:
    """For every group one of its options, such that the most importance is kept and at most `budget` seconds are predicted;
    None where no choice is found.

    options: allowed sizes by atom. scores: importance of every index; any real numbers. floor: a quantity that the sizes
    must keep as well. Where it binds, the search weighs its measure against importance (a Lagrange multiplier), as little
    as helps.
    """
    problem = _Problem(predictor, options, scores, budget, floor)
    if math.prod(len(o) for o in problem.options.values()) <= EXHAUSTIVE:
        return problem.exhaustive()
    sizes = problem.search()
    for weight in WEIGHTS if sizes is None and floor is not None else ():
        sizes = sizes or problem.weighed(weight).search()
    return sizes


def towards(predictor: Predictor, options: Options, scores: Scores, end: Sizes, budget: float) -> Sizes:
    """Sizes between the largest options and those of `end`, with at most `budget` seconds predicted: chunks with the least
    importance per second go first, and no group becomes smaller than in `end`.

    end: one option of every group; it is the result where its seconds exceed the budget.
    """
    way = {a: [n for n in o if n >= end[a]] for a, o in options.items()}
    return _Problem(predictor, way, scores, budget).repaired({a: max(o) for a, o in way.items()}) or dict(end)


class _Problem:
    def __init__(
        self, predictor: Predictor, options: Options, scores: Scores, budget: float, floor: Floor | None = None
    ):
        self.options = {a: sorted(set(o)) for a, o in options.items()}
        self.predictor, self.budget, self.floor = predictor, budget, floor
        self.values = {a: self._values(np.asarray(scores[a], dtype=float), o) for a, o in self.options.items()}

    @staticmethod
    def _values(scores: np.ndarray, options: list[int]) -> np.ndarray:
        """The importance that each allowed size keeps."""
        kept = np.concatenate([[0.0], np.cumsum(np.sort(scores)[::-1])])
        return kept[options]

    def enough(self, sizes: Sizes) -> bool:
        return self.floor is None or self.floor.measure(sizes) >= self.floor.least

    def weighed(self, weight: float) -> _Problem:
        """The same problem in which the floor's measure makes up the share `weight` of the importance."""
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
        choices = (dict(zip(self.options, c, strict=True)) for c in itertools.product(*self.options.values()))
        feasible = (s for s in choices if self.enough(s) and self.predictor.total(s) <= self.budget)
        return max(feasible, key=self.value, default=None)

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
        """The sizes if they satisfy the floor and keep more importance than the best so far; else the best so far."""
        return sizes if self.enough(sizes) and (best is None or self.value(sizes) > self.value(best)) else best

    def _start(self) -> Sizes:
        """All groups at the same share of their options, the largest that fits."""

        def at(share: float) -> Sizes:
            return {a: o[min(int(share * len(o)), len(o) - 1)] for a, o in self.options.items()}

        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if self.predictor.total(at(middle)) <= self.budget else (low, middle)
        return at(low)

    def _linearised(self, sizes: Sizes) -> Sizes:
        """The best choice if each group's effect on the time is exact around `sizes` and these effects add up."""
        extra = {}
        for atom, options in self.options.items():
            times = np.array([self.predictor.around(atom, {**sizes, atom: n}) for n in options])
            extra[atom] = times - self.predictor.around(atom, sizes)
        left = self.budget - self.predictor.total(sizes) - sum(float(e.min()) for e in extra.values())
        if left <= 0:
            return {a: o[int(extra[a].argmin())] for a, o in self.options.items()}
        width = left / BINS
        reached = np.zeros(BINS + 1)  # reached[t] is the best value of the groups so far within t bins
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
        """Shrink sizes in place until the prediction is within the budget, the least importance per second first; None if
        that cannot be. Sizes that satisfy the floor still satisfy it afterwards."""
        held = self.enough(sizes)
        while (total := self.predictor.total(sizes)) > self.budget:
            chunks: list[tuple[float, Factor, int]] = []  # price, atom and the size that is left
            for atom, options in self.options.items():
                at = options.index(sizes[atom])
                before = self.predictor.around(atom, sizes)
                for to in range(at - 1, -1, -1):  # a chunk that saves nothing by itself may save time with the next one
                    saved = before - self.predictor.around(atom, {**sizes, atom: options[to]})
                    if saved > 0 and (not held or self.enough({**sizes, atom: options[to]})):
                        useful = min(saved, total - self.budget)
                        chunks.append(((self.values[atom][at] - self.values[atom][to]) / useful, atom, options[to]))
                        break
            if not chunks:
                return None
            _, atom, size = min(chunks, key=itemgetter(0))
            sizes[atom] = size
        return sizes

    def filled(self, sizes: Sizes) -> Sizes:
        """Grow sizes in place while the prediction stays within the budget, the most importance per second first."""
        while True:
            total = self.predictor.total(sizes)
            chunks: list[tuple[float, Factor, int]] = []  # importance per second, atom and the new size
            for atom, options in self.options.items():
                at = options.index(sizes[atom])
                before = self.predictor.around(atom, sizes)
                for to in range(at + 1, len(options)):
                    cost = self.predictor.around(atom, {**sizes, atom: options[to]}) - before
                    gain = self.values[atom][to] - self.values[atom][at]
                    if total + cost <= self.budget and gain > 0:
                        chunks.append((gain / max(cost, 1e-12), atom, options[to]))
            if not chunks:
                return sizes
            _, atom, size = max(chunks, key=itemgetter(0))
            sizes[atom] = size
