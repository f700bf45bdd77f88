"""How many indices go: the end of a greedy selection, where one chunk may save far more than is still asked for."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphcomb import Comb, capture
from graphcomb.passes.channels.sizes.costs import Costs, mac_terms
from graphcomb.passes.channels.sizes.selection import Selection


class Trunk(nn.Module):
    """A wide trunk, every channel of which is a part of all layers, and narrow branches."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.up = nn.ModuleList(nn.Conv2d(16, 12, 1) for _ in range(3))
        self.down = nn.ModuleList(nn.Conv2d(12, 16, 1) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return x.mean((2, 3)).sum(1)


COMB = Comb(capture(Trunk(), (torch.randn(1, 1, 6, 6),)))
GROUPS = [g for g in COMB.groups if g.frozen is None]
DENSE = Costs(mac_terms(COMB), GROUPS).total


def selected(scores, goal, end, per_cost):
    """Sizes, the cost they reach, and whether the goal can be reached."""
    selection, costs = Selection(COMB, GROUPS, 4, 4), Costs(mac_terms(COMB), GROUPS)
    reached = selection.greedy(GROUPS, scores, costs, goal, per_cost, end)
    assert costs.total == COMB.macs(selection.sizes)
    return selection.sizes, costs.total, reached


def lost(scores, sizes):
    return sum(np.sort(scores[g.atom])[: g.size - sizes.get(g.atom, g.size)].sum() for g in GROUPS)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.35, 0.95), st.booleans())
def test_the_last_chunk_is_not_worse_than_the_next_in_line(seed, share, per_cost):
    draw = np.random.default_rng(seed)
    scores = {g.atom: draw.exponential(draw.exponential(), g.size) for g in GROUPS}
    goal = share * DENSE
    chosen, cost, reached = selected(scores, goal, goal, per_cost)
    plain, plain_cost, plain_reached = selected(scores, goal, -math.inf, per_cost)
    assert reached
    assert plain_reached
    assert max(cost, plain_cost) <= goal
    if not per_cost:  # the loss is then the sum of the scores
        assert lost(scores, chosen) <= lost(scores, plain) + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.35, 0.9), st.floats(0.05, 0.95))
def test_nothing_on_the_way_goes_beyond_the_end(seed, share, progress):
    draw = np.random.default_rng(seed)
    scores = {g.atom: draw.exponential(draw.exponential(), g.size) for g in GROUPS}
    end = share * DENSE
    _, cost, reached = selected(scores, DENSE - progress * (DENSE - end), end, per_cost=True)
    assert reached
    assert cost > end


def test_a_little_more_does_not_take_a_chunk_of_the_trunk():
    """Per MAC the trunk is the cheapest, but a sixth of a branch is enough."""
    scores = {g.atom: np.full(g.size, 2.0 if g.size == 16 else 1.0) for g in GROUPS}
    goal = 0.97 * DENSE
    sizes, cost, _ = selected(scores, goal, goal, per_cost=True)
    plain, plain_cost, _ = selected(scores, goal, -math.inf, per_cost=True)
    trunk = next(g.atom for g in GROUPS if g.size == 16)
    assert plain[trunk] == 12
    assert plain_cost < 0.8 * DENSE
    assert trunk not in sizes
    assert 0.85 * DENSE < cost <= goal


def test_what_cannot_be_reached_is_said():
    scores = {g.atom: np.ones(g.size) for g in GROUPS}
    assert not selected(scores, 0.01 * DENSE, 0.01 * DENSE, per_cost=True)[2]
    assert not selected(scores, 0.02 * DENSE, 0.01 * DENSE, per_cost=True)[2]
