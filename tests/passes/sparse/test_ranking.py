"""Which entries go: exactly so many, the cheapest ones, in the order of their block."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcomb.graph.sparse import allowed
from graphcomb.passes.sparse import cap, ranking

from .toys import D


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=2, max_size=8), st.integers(0, 30))
def test_prefixes_take_the_cheapest_and_exactly_so_many(steps, count):
    losses = torch.tensor(steps, dtype=D).cumsum(1)
    losses[0, 2] = math.inf
    parts = [losses[:1], losses[1:]]
    lengths = torch.cat(ranking.prefixes(parts, count))
    finite = int(losses.isfinite().sum())
    assert int(lengths.sum()) == min(count, finite)
    order = torch.arange(3).expand(len(losses), 3)
    mask = ranking.first(order, lengths, 3)
    assert (mask.sum(1) == lengths).all()
    taken, left = losses[mask], losses[~mask]
    assert not len(taken) or not len(left) or taken.max() <= left.min()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=8, max_size=8), st.integers(0, 8))
def test_lowest_scores(values, count):
    scores = torch.tensor(values, dtype=D).view(2, 4)
    masks = ranking.lowest([scores[:1], scores[1:]], count)
    mask = torch.cat(masks)
    assert mask.sum() == count
    assert not 0 < count < 8 or scores[mask].max() <= scores[~mask].min()
    groups = ranking.lowest_of_groups(scores, (1, 4))
    assert (groups.sum(1) == 3).all()
    assert allowed(groups, (1, 4))
    assert not allowed(~groups, (1, 4))
    assert not allowed(groups[:, :3], (1, 4))
    assert all(scores[r][~groups[r]].item() == scores[r].max() for r in range(2))


def total(losses, lengths):
    """What all blocks lose when each loses so many."""
    wide = torch.nn.functional.pad(losses, (1, 0))
    return float(wide.gather(1, lengths.unsqueeze(1)).sum())


def cheapest(losses, count):
    """The least that the blocks can lose when `count` go in all, each in its own order (dynamic programming)."""
    best = [0.0] + [math.inf] * count
    for row in torch.nn.functional.pad(losses, (1, 0)).tolist():
        best = [min(best[n - k] + row[k] for k in range(min(n, len(row) - 1) + 1)) for n in range(count + 1)]
    return best[count]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 0.9])
def test_allocation_by_increments_loses_less_than_by_cumulated_losses_and_hardly_more_than_the_least(seed, share):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(40, 1, 1, generator=generator, dtype=D) * 3 + 0.1  # blocks of unlike importance
    gradients = torch.randn(40, 64, 32, generator=generator, dtype=D) * scale
    gradients = gradients @ torch.randn(40, 32, 32, generator=generator, dtype=D)
    matrix = gradients.mT @ gradients / 64
    inverse = torch.linalg.inv(matrix + 1e-2 * matrix.diagonal(dim1=1, dim2=2).mean() * torch.eye(32, dtype=D))
    _, losses = cap.eliminate(torch.randn(40, 32, generator=generator, dtype=D), inverse)
    count = round(share * losses.numel())
    ours, theirs = (total(losses, ranking.prefixes([x], count)[0]) for x in (ranking.increments(losses), losses))
    least = cheapest(losses, count)
    assert least * (1 - 1e-12) <= ours <= 1.03 * least
    assert ours < theirs


def test_increments_never_fall_and_end_with_the_block():
    losses = torch.tensor([[1.0, 1.5, 4.0, math.inf], [0.0, 2.0, 2.5, 3.0]], dtype=D)
    expected = torch.tensor([[1.0, 1.0, 2.5, math.inf], [0.0, 2.0, 2.0, 2.0]], dtype=D)
    assert torch.equal(ranking.increments(losses), expected)
