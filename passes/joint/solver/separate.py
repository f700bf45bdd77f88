"""The best choice where no two groups share a layer: a multiple-choice knapsack, solved exactly without a solver.

Each axis, and each block with the axes inside it, is an independent list of options (seconds, loss). Only the options that
no other one beats in both can be part of an optimum, for any budget, so lists are added up one by one and what is beaten is
dropped (the Pareto front of the sums, Nemhauser and Ullmann 1969). Numbers are not rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .problem import Axis, Choice, Problem

MOST = 50_000  # points of a front, above which the problem is left to the solver


# An option or a sum of them: seconds, loss, the place of each axis, and whether each block goes.
Point = tuple[float, float, dict[int, int], dict[int, bool]]


@dataclass
class _Front:
    """Sums that no other one beats, by ascending seconds and descending loss. parents: for each list added so far, the sum
    before and the option that it took."""

    seconds: np.ndarray
    losses: np.ndarray
    parents: list[tuple[np.ndarray, np.ndarray]]


def separate(problem: Problem) -> bool:
    """Whether every layer's seconds depend on one axis at most, and blocks only on the axes inside them. problem: with terms
    that are joined."""
    return not problem.apart and all(
        not t.axes or (len(t.axes) == 1 and not t.gone and problem.axes[t.axes[0]].block == t.block)
        for t in problem.terms
    )


def choose(problem: Problem, seconds: float | None, loss: float | None) -> tuple[Choice | None, bool]:
    """The best choice of a separate problem as `solve` defines it, or None if there is none; and whether the fronts were
    small enough to tell."""
    times = {i: np.zeros(len(axis.sizes)) for i, axis in enumerate(problem.axes)}
    block_times = {(b, gone): 0.0 for b in range(len(problem.blocks)) for gone in (False, True)}
    for term in problem.terms:
        if term.axes:
            times[term.axes[0]] = times[term.axes[0]] + term.seconds
        elif term.block is not None:
            block_times[term.block, term.gone] += float(term.seconds)
    inside: dict[int | None, list[int]] = {}
    for i, axis in enumerate(problem.axes):
        inside.setdefault(axis.block, []).append(i)
    lists: list[list[Point]] = [
        [(t, m, {i: k}, {}) for t, m, k in _options(problem.axes[i], times[i])] for i in inside.get(None, [])
    ]
    for b, removal in enumerate(problem.blocks):
        options: list[Point] = []
        if removal.goes is not True:
            stays = _added(
                [[(t, m, {i: k}, {}) for t, m, k in _options(problem.axes[i], times[i])] for i in inside.get(b, [])]
            )
            if stays is None:
                return None, False
            options += [(t + block_times[b, False], m, sizes, {b: False}) for t, m, sizes, _ in stays]
        if removal.goes is not False:
            options.append((block_times[b, True], removal.loss, dict.fromkeys(inside.get(b, []), -1), {b: True}))
        lists.append(options)
    front = _added(lists)
    if front is None:
        return None, False
    room = None if seconds is None else seconds - problem.constant
    best = None
    if room is not None:
        best = next((p for p in reversed(front) if p[0] <= room), None)
    else:
        best = next((p for p in front if loss is None or p[1] <= loss), None)
    if best is None:
        return None, True
    sizes, gone = best[2], best[3]
    return Choice(
        tuple(sizes[i] for i in range(len(problem.axes))), tuple(gone[b] for b in range(len(problem.blocks)))
    ), True


def _options(axis: Axis, seconds: np.ndarray) -> list[tuple[float, float, int]]:
    return [(float(seconds[k]), axis.losses[k], k) for k in axis.choices]


def _added(lists: list[list[Point]]) -> list[Point] | None:
    """The points of all sums of one option of each list that no other sum beats, by seconds; None if there are too many."""
    front = _Front(np.zeros(1), np.zeros(1), [])
    for options in lists:
        if not options:
            return []
        times, losses = (np.array([o[i] for o in options]) for i in (0, 1))
        t = (front.seconds[:, None] + times).reshape(-1)
        m = (front.losses[:, None] + losses).reshape(-1)
        order = np.lexsort((m, t))
        lowest = np.minimum.accumulate(m[order])
        kept = order[np.r_[True, m[order][1:] < lowest[:-1]]]
        if len(kept) > MOST:
            return None
        front = _Front(t[kept], m[kept], [*front.parents, (kept // len(options), kept % len(options))])
    return [_point(front, i, lists) for i in range(len(front.seconds))]


def _point(front: _Front, index: int, lists: list[list[Point]]) -> Point:
    t, m = float(front.seconds[index]), float(front.losses[index])
    sizes: dict[int, int] = {}
    gone: dict[int, bool] = {}
    for options, (before, option) in zip(reversed(lists), reversed(front.parents), strict=True):
        _, _, chosen, going = options[int(option[index])]
        sizes |= chosen
        gone |= going
        index = int(before[index])
    return t, m, sizes, gone
