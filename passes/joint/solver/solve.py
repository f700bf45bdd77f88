"""The best choice, exactly: a mixed-integer linear program in transport form, solved by HiGHS through SciPy.

Binary variables: x[a,k], axis a has its k-th size; z[b], block b is gone. The seconds of a layer are no linear function of
its sizes, so every cell c of its table has a share p[c], and the shares have to agree with the sizes:

    sum_c p[c] = 1, 1 - z[b] or z[b]              for a layer of no block, of one that stays, of one that is gone
    sum_{c at size k of axis a} p[c] <= x[a,k]    a transport problem between the margins, tighter than products of binaries

    sum_k x[a,k] = 1 or 1 - z[b]                  for an axis, or one inside a block
    sum_{b in S} z[b] <= |S| - 1                  for blocks S that must not all go

If x and z are integers, the shares are, too. Source: the decision of widths and depth together after MDP (arXiv 2504.02168)
and LayerMerge (arXiv 2406.12837); this program is ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .problem import Choice, Problem, apart
from .separate import choose, separate

GAP = 1e-7  # relative difference to the optimum at which the solver stops
LIMIT = 120.0  # seconds of one call of the solver
TIGHT = 1e-7  # relative tolerance of a limit, for the solver's rounding


@dataclass(frozen=True)
class Solved:
    """A choice, its seconds and loss, and its relative `gap` to the optimum as the solver knows it (0: proven optimal)."""

    choice: Choice
    seconds: float
    loss: float
    gap: float


@dataclass
class _Rows:
    """Rows of a sparse matrix with bounds, and the bounds of its columns."""

    entries: list[tuple[int, int, float]] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def add(self, columns: list[tuple[int, float]], low: float, high: float) -> None:
        row = len(self.low)
        self.entries += [(row, column, value) for column, value in columns]
        self.low.append(low)
        self.high.append(high)


class _Program:
    """The mixed-integer program of a problem: columns for sizes, blocks and shares."""

    def __init__(self, problem: Problem):
        self.problem = problem = problem.joined()
        self.rows = _Rows()
        self.first = np.cumsum([0, *(len(axis.sizes) for axis in problem.axes)])  # column of each axis's first size
        self.block = int(self.first[-1])  # column of the first block
        self.whole = self.block + len(problem.blocks)  # number of integer columns, which come first
        self.upper = [1.0] * self.whole
        self.lower = [0.0] * self.whole
        self.seconds: list[float] = [0.0] * self.whole
        self.offset = 0.0  # seconds of blocks without axes while they stay; their columns subtract these
        for i, axis in enumerate(problem.axes):
            for k in range(len(axis.sizes)):
                if k not in axis.choices:
                    self.upper[self.first[i] + k] = 0.0
            columns = [(int(self.first[i]) + k, 1.0) for k in range(len(axis.sizes))]
            self.rows.add(columns + self._with(axis.block), 1.0, 1.0)
        for b, removal in enumerate(problem.blocks):
            if removal.goes is not None:
                self.lower[self.block + b] = self.upper[self.block + b] = float(removal.goes)
        for term in problem.terms:
            self._term(term.axes, term.seconds, term.block, term.gone)
        for blocks in problem.apart:
            self.rows.add([(self.block + b, 1.0) for b in blocks], 0.0, len(blocks) - 1.0)

    def _with(self, block: int | None) -> list[tuple[int, float]]:
        """The column that completes a sum, which is 1 while the block stays, to a sum that is always 1."""
        return [] if block is None else [(self.block + block, 1.0)]

    def _term(self, axes: tuple[int, ...], seconds: np.ndarray, block: int | None, gone: bool) -> None:
        if not axes:
            assert block is not None  # `joined` adds the constants of no block to the problem's
            self.seconds[self.block + block] += float(seconds) if gone else -float(seconds)
            self.offset += 0.0 if gone else float(seconds)
            return
        if len(axes) == 1 and not gone and self.problem.axes[axes[0]].block == block:
            for k, value in enumerate(seconds):
                self.seconds[int(self.first[axes[0]]) + k] += float(value)
            return
        start = len(self.seconds)
        self.seconds += [float(v) for v in seconds.reshape(-1)]
        places = np.arange(start, len(self.seconds)).reshape(seconds.shape)
        every = [(int(c), 1.0) for c in places.reshape(-1)]
        if gone:
            assert block is not None
            self.rows.add([*every, (self.block + block, -1.0)], 0.0, 0.0)
        else:
            self.rows.add(every + self._with(block), 1.0, 1.0)
        for dim, axis in enumerate(axes):
            for k in range(seconds.shape[dim]):
                margin = [(int(c), 1.0) for c in np.take(places, k, axis=dim).reshape(-1)]
                self.rows.add([*margin, (int(self.first[axis]) + k, -1.0)], -np.inf, 0.0)

    def losses(self) -> np.ndarray:
        """The coefficient of each column in the loss."""
        values = np.zeros(len(self.seconds))
        for i, axis in enumerate(self.problem.axes):
            values[self.first[i] : self.first[i + 1]] = axis.losses
        values[self.block : self.whole] = [removal.loss for removal in self.problem.blocks]
        return values

    def minimise(
        self, objective: np.ndarray, limited: np.ndarray | None, limit: float, seconds: float
    ) -> tuple[Choice, float] | None:
        """The choice with the least objective whose `limited` sum is within the limit, and its gap; None if there is none.
        Objective and sum are scaled to about 1, for which the solver's tolerances are made."""
        if not self.seconds:  # nothing to choose
            return (Choice((), ()), 0.0) if limited is None or limit >= 0 else None
        from scipy.optimize import Bounds, LinearConstraint, milp  # here, since it takes half a second to import
        from scipy.sparse import coo_array

        entries, low, high = list(self.rows.entries), list(self.rows.low), list(self.rows.high)
        if limited is not None:
            scale = float(np.abs(limited).max()) or 1.0
            entries += [(len(low), int(c), float(limited[c]) / scale) for c in np.flatnonzero(limited)]
            low.append(-np.inf)
            high.append(limit / scale)
        row, column, value = zip(*entries, strict=True) if entries else ((), (), ())
        width = len(self.seconds)
        upper = np.array(self.upper + [1.0] * (width - self.whole))
        lower = np.array(self.lower + [0.0] * (width - self.whole))
        constraints = (
            [LinearConstraint(coo_array((value, (row, column)), (len(low), width)).tocsr(), low, high)] if low else []
        )
        with _quiet():
            solution: Any = milp(
                objective / (float(np.abs(objective).max()) or 1.0),
                integrality=np.array([1] * self.whole + [0] * (width - self.whole)),
                bounds=Bounds(lower, upper),
                constraints=constraints,
                options={"time_limit": seconds, "mip_rel_gap": GAP},
            )
        if solution.x is None:
            return None
        return self._choice(solution.x), float(solution.mip_gap or 0.0)

    def _choice(self, values: np.ndarray) -> Choice:
        gone = tuple(bool(v > 0.5) for v in values[self.block : self.whole])
        sizes = []
        for i, axis in enumerate(self.problem.axes):
            removed = axis.block is not None and gone[axis.block]
            sizes.append(-1 if removed else int(values[self.first[i] : self.first[i + 1]].argmax()))
        return Choice(tuple(sizes), gone)


Connects = Callable[[frozenset[int]], bool]
"""Whether the network's outputs still depend on its inputs when blocks of these indices are gone."""


def solve(
    problem: Problem,
    seconds: float | None = None,
    loss: float | None = None,
    connects: Connects = lambda gone: True,
    limit: float = LIMIT,
) -> Solved | None:
    """The choice with the least loss within `seconds`; or, with `loss`, the fastest choice that loses no more than that;
    with neither, the fastest of all. None if no choice is within the limit.

    connects: asked about every answer; if it says no, those blocks must not all go, and the solver is asked again. limit:
    seconds that the solver may take each time; then the best choice so far is returned with its gap.
    """
    while True:
        if (quick := _separately(problem, seconds, loss)) is not None and (
            quick[0] is None or _joined(quick[0], connects)
        ):
            choice = quick[0]
            return None if choice is None else Solved(choice, problem.seconds(choice), problem.loss(choice), 0.0)
        program = _Program(problem)
        times, losses = np.array(program.seconds), program.losses()
        if seconds is not None:
            room = seconds * (1 + TIGHT) - program.problem.constant - program.offset
            solution = program.minimise(losses, times, room, limit)
        elif loss is not None:
            solution = program.minimise(times, losses, loss * (1 + TIGHT), limit)
        else:
            solution = program.minimise(times, None, 0.0, limit)
        if solution is None:
            return None
        choice, gap = solution
        gone = _gone(choice)
        if _joined(choice, connects):
            return Solved(choice, problem.seconds(choice), problem.loss(choice), gap)
        problem = apart(problem, [gone])


def _gone(choice: Choice) -> frozenset[int]:
    return frozenset(b for b, removed in enumerate(choice.gone) if removed)


def _joined(choice: Choice, connects: Connects) -> bool:
    gone = _gone(choice)
    return not gone or connects(gone)


def _separately(problem: Problem, seconds: float | None, loss: float | None) -> tuple[Choice | None] | None:
    """The best choice of a problem in which no two groups share a layer; None for any other problem."""
    joined = problem.joined()
    if not separate(joined):
        return None
    limits = [None if limit is None else limit * (1 + TIGHT) for limit in (seconds, loss)]
    choice, small = choose(joined, *limits)
    return (choice,) if small else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what compiled code writes to stdout, as HiGHS does at times."""
    sys.stdout.flush()
    with open(os.devnull, "w") as nowhere:
        before = os.dup(1)
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(before, 1)
            os.close(before)
