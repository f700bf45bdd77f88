"""Sizes under a latency: exact against brute force, monotone, and honest when nothing fits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import nn

from graphcomb import capture, comb
from graphcomb.graph.workload.layer import Layer
from graphcomb.passes.channels.sizes import knapsack as module
from graphcomb.passes.channels.sizes.knapsack import Floor, Predictor, knapsack

from ...toys import chain


class PerMac:
    """A device whose time is padded MACs and a price per layer."""

    def __init__(self, alignment: int = 1, per_run: float = 0.0):
        self.alignment, self.per_run, self.asked = alignment, per_run, 0

    def prepare(self, layers: Iterable[Layer], progress: bool = False) -> None:
        self.asked += len(list(layers))

    def seconds(self, layer: Layer) -> float:
        return 1e-9 * layer.macs(self.alignment) + 1e-7


@pytest.fixture
def solved():
    return comb(capture(chain(8, 12, 8), torch.zeros(1, 1, 6, 6)))


def problem(solved, step: int, latency: PerMac, seed: int = 0):
    groups = [g for g in solved.groups if g.frozen is None]
    draw = np.random.default_rng(seed)
    scores = {g.atom: draw.exponential(size=g.size) ** 2 for g in groups}
    options = {g.atom: list(range(step, g.size + 1, step)) for g in groups}
    return Predictor(solved, latency), options, scores


def kept(sizes, scores) -> float:
    return sum(np.sort(scores[a])[::-1][:n].sum() for a, n in sizes.items())


def brute_force(predictor, options, scores, budget: float) -> float:
    best = -np.inf
    for combination in itertools.product(*options.values()):
        sizes = dict(zip(options, combination, strict=True))
        if predictor.total(sizes) <= budget:
            best = max(best, kept(sizes, scores))
    return best


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("alignment", [1, 4])
def test_few_combinations_are_solved_exactly(solved, share: float, alignment: int) -> None:
    predictor, options, scores = problem(solved, 2, PerMac(alignment))
    budget = share * predictor.total({})
    found = knapsack(predictor, options, scores, budget)
    assert predictor.total(found) <= budget
    assert kept(found, scores) == pytest.approx(brute_force(predictor, options, scores, budget))


class PerWidth(PerMac):
    """A device whose time is the channels that are computed: no measure of arithmetic."""

    def seconds(self, layer: Layer) -> float:
        return 1e-6 * dict(layer.sizes).get("outputs", 0)


@pytest.mark.parametrize("exhaustive", [4000, 0])
def test_sizes_that_leave_too_little_are_not_chosen(solved, exhaustive: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "EXHAUSTIVE", exhaustive)
    predictor, options, scores = problem(solved, 1, PerWidth())
    middle = next(a for a, o in options.items() if len(o) == 12)
    scores[middle] *= 1e-6  # which the scores alone would all but empty
    budget, floor = 0.6 * predictor.total({}), Floor(solved.macs, 0.3 * solved.macs({}))
    assert solved.macs(knapsack(predictor, options, scores, budget)) < floor.least
    found = knapsack(predictor, options, scores, budget, floor)
    assert solved.macs(found) >= floor.least
    assert predictor.total(found) <= budget
    assert knapsack(predictor, options, scores, budget, Floor(solved.macs, 0.9 * solved.macs({}))) is None


@pytest.mark.parametrize("seed", range(5))
def test_the_search_comes_close_to_the_best(solved, seed: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "EXHAUSTIVE", 0)
    predictor, options, scores = problem(solved, 1, PerMac(), seed)
    for share in (0.25, 0.5, 0.75):
        budget = share * predictor.total({})
        found = knapsack(predictor, options, scores, budget)
        assert predictor.total(found) <= budget
        assert kept(found, scores) >= 0.97 * brute_force(predictor, options, scores, budget)


def test_separable_times_are_solved_exactly_up_to_rounding(monkeypatch) -> None:
    """Depthwise layers depend on one group each: a plain knapsack."""
    monkeypatch.setattr(module, "EXHAUSTIVE", 0)
    widths = (6, 10)

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleList(nn.Conv2d(1, w, 1) for w in widths)
            self.deep = nn.ModuleList(nn.Conv2d(w, w, 3, padding=1, groups=w) for w in widths)
            self.last = nn.ModuleList(nn.Conv2d(w, 2, 1) for w in widths)

        def forward(self, x):
            return sum(c(b(a(x))) for a, b, c in zip(self.first, self.deep, self.last, strict=True))

    solved = comb(capture(Branches(), torch.zeros(1, 1, 8, 8)))
    predictor, options, scores = problem(solved, 1, PerMac())
    for share in (0.3, 0.6, 0.9):
        budget = share * predictor.total({})
        found = knapsack(predictor, options, scores, budget)
        assert kept(found, scores) == pytest.approx(brute_force(predictor, options, scores, budget), rel=0.01)


def test_more_time_never_keeps_less(solved, monkeypatch) -> None:
    monkeypatch.setattr(module, "EXHAUSTIVE", 10**6)
    predictor, options, scores = problem(solved, 2, PerMac())
    budgets = [s * predictor.total({}) for s in (0.15, 0.3, 0.5, 0.7, 1.0)]
    values = [kept(knapsack(predictor, options, scores, b), scores) for b in budgets]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(sum(s.sum() for s in scores.values()))  # everything fits


@pytest.mark.parametrize("exhaustive", [0, 10**6])
def test_a_budget_nothing_meets_gives_none(solved, exhaustive: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "EXHAUSTIVE", exhaustive)
    predictor, options, scores = problem(solved, 2, PerMac(per_run=1.0))
    assert knapsack(predictor, options, scores, 0.5) is None


def test_padding_is_not_bought(solved) -> None:
    """On a device that pads to 4 channels, sizes in between cost as much as the next multiple, so they are not chosen."""
    predictor, options, scores = problem(solved, 1, PerMac(alignment=4))
    found = knapsack(predictor, options, scores, 0.4 * predictor.total({}))
    assert any(n < a.size for a, n in found.items())
    assert all(n % 4 == 0 for n in found.values())


def test_negative_scores_mark_what_is_gone(solved) -> None:
    predictor, options, scores = problem(solved, 2, PerMac())
    atom = next(iter(scores))
    scores[atom][:4] = -1.0
    found = knapsack(predictor, options, scores, predictor.total({}))
    assert found[atom] == scores[atom].size - 4


def test_everything_needed_is_prepared_at_once(solved) -> None:
    latency = PerMac()
    predictor, options, _ = problem(solved, 4, latency)
    predictor.prepare(options)
    widths = [len(o) for o in options.values()]
    assert latency.asked >= widths[0] + widths[0] * widths[1] + widths[1] * widths[2]
