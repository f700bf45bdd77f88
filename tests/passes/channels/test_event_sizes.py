"""Sizes chosen event by event: for any groups, costs and scores, what is gone early would be gone at the end, and the end
is what choosing once would have given."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcomb.graph.comb.axes import Factor
from graphcomb.graph.comb.groups import Group
from graphcomb.passes.channels.sizes.costs import Costs
from graphcomb.passes.channels.sizes.selection import Selection
from graphcomb.passes.channels.while_training import event_steps


class Network:
    """Some groups of channels, and layers that cost the product of the sizes that they join."""

    def __init__(self, sizes, layers, alignment, scores):
        atoms = [Factor(n) for n in sizes]
        self.groups = [Group(f"g{i}", a.size, "channel", [(f"g{i}", 0)], None, a) for i, a in enumerate(atoms)]
        self.terms = [[(Factor(times),), *((atoms[i],) for i in dict.fromkeys(joined))] for times, joined in layers]
        self.comb = SimpleNamespace(parameters={g.name: [(g.atom,)] for g in self.groups})
        self.alignment = alignment
        self.scores = {g.atom: np.asarray(own, dtype=float) for g, own in zip(self.groups, scores, strict=True)}
        self.dense = self.cost({})

    def cost(self, sizes):
        costs = Costs(self.terms, self.groups)
        for atom, size in sizes.items():
            costs.set(atom, size)
        return costs.total

    def selection(self, sizes=None):
        return Selection(self.comb, self.groups, self.alignment, 1, sizes)

    def event(self, sizes, goal, end, per_cost, scores=None):
        """The sizes after an event, and whether the end can be reached."""
        selection, costs = self.selection(sizes), Costs(self.terms, self.groups)
        for atom, size in sizes.items():
            costs.set(atom, size)
        reached = selection.greedy(self.groups, scores or self.scores, costs, goal, per_cost, end)
        assert costs.total == self.cost(selection.sizes)
        return selection.sizes, reached

    def events(self, share, count, per_cost, scores=None):
        """The sizes after each event of an adaptive schedule that leaves a share of the cost; None where it cannot."""
        end, sizes, found = share * self.dense, {}, []
        for done in event_steps("adaptive", 100 * count, 100, 1, 1.0).values():
            goal = end if done == 1 else self.dense - done * (self.dense - end)
            sizes, reached = self.event(sizes, goal, end, per_cost, scores and scores(len(found), sizes))
            if not reached:
                return None
            found.append(sizes)
        return found

    def kept(self, sizes):
        """The share of all scores that is left."""
        left = sum(np.sort(own)[a.size - sizes.get(a, a.size) :].sum() for a, own in self.scores.items())
        return left / sum(own.sum() for own in self.scores.values())

    def size(self, sizes, group):
        return sizes.get(group.atom, group.size)


@st.composite
def networks(draw):
    count = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    joined = st.lists(st.integers(0, count - 1), min_size=1, max_size=2)
    layers = draw(st.lists(st.tuples(st.integers(1, 30), joined), min_size=1, max_size=8))
    layers += [(1, [i]) for i in range(count)]
    layers.append((draw(st.integers(1, 200)), [draw(st.integers(0, count - 1))]))  # one group may outweigh the rest
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = [numbers.exponential(numbers.exponential() ** 2, n) for n in sizes]
    return Network(sizes, layers, draw(st.sampled_from([1, 2, 3, 4, 8])), scores)


@settings(max_examples=300, deadline=None)
@given(networks(), st.floats(0.1, 0.95), st.integers(2, 12), st.booleans())
def test_many_events_end_where_one_does_and_nothing_is_lost_on_the_way(network, share, count, per_cost):
    once, reached = network.event({}, share * network.dense, share * network.dense, per_cost)
    found = network.events(share, count, per_cost)
    assert (found is not None) == reached
    if not reached:
        return
    end = found[-1]
    for early in found:  # what an event takes would be gone at the end
        assert all(network.size(early, g) >= network.size(end, g) for g in network.groups)
        assert all(network.size(early, g) >= network.size(once, g) for g in network.groups)
    assert network.cost(end) <= share * network.dense
    assert network.kept(end) == pytest.approx(network.kept(once))
    bigger = network.selection(end)
    for group in network.groups:  # within a chunk of the target: nothing that went would still fit
        if network.size(end, group) < group.size:
            more = bigger.above(group, {group.atom: group.size})
            assert network.cost({**end, group.atom: more}) > share * network.dense


@settings(max_examples=200, deadline=None)
@given(networks(), st.floats(0.1, 0.95), st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_the_target_is_met_whatever_the_scores_do_meanwhile(network, share, count, seed):
    """Every event sees other scores, as training gives them."""
    numbers = np.random.default_rng(seed)

    def noisy(event, sizes):
        return {a: own * numbers.lognormal(0, 0.3, own.shape) for a, own in network.scores.items()}

    _, reached = network.event({}, share * network.dense, share * network.dense, True)
    found = network.events(share, count, True, noisy)
    assert (found is not None) == reached
    if found:
        assert network.cost(found[-1]) <= share * network.dense
        for before, after in zip([{}, *found], found, strict=False):
            assert all(network.size(before, g) >= network.size(after, g) for g in network.groups)


@settings(max_examples=100, deadline=None)
@given(networks(), st.floats(0.1, 0.95), st.floats(0.05, 0.95))
def test_a_share_of_all_indices_is_chosen_once_as_well(network, ratio, share):
    once, first, then = network.selection(), network.selection(), None
    once.by_count(network.groups, network.scores, ratio)
    first.by_count(network.groups, network.scores, ratio, share)
    then = network.selection(first.sizes)
    then.by_count(network.groups, network.scores, ratio)
    assert {g.name: then.kept(g) for g in network.groups} == {g.name: once.kept(g) for g in network.groups}
    gone = sum(g.size - once.kept(g) for g in network.groups)
    assert gone <= ratio * sum(g.size for g in network.groups) + 1e-6


def test_a_chunk_that_would_lead_beyond_the_end_is_not_made_up_for_by_the_others():
    """Half of the trunk is more than what is asked for, so some of the branches are enough; none of them is emptied."""
    layers = [(10, [0, i]) for i in range(1, 5)] + [(400, [0])]
    numbers = np.random.default_rng(0)
    scores = [0.01 * numbers.random(16)] + [numbers.random(32) for _ in range(4)]
    network = Network([16, 32, 32, 32, 32], layers, 8, scores)
    found = network.events(0.62, 8, per_cost=True)
    once, _ = network.event({}, 0.62 * network.dense, 0.62 * network.dense, per_cost=True)
    assert [network.size(found[-1], g) for g in network.groups] == [network.size(once, g) for g in network.groups]
    assert all(network.size(found[-1], g) >= 16 for g in network.groups[1:])
