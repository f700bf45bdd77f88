"""The elimination of CAP against definitions, brute force and step-by-step elimination, in float64."""

import itertools
import math

import pytest
import torch

from graphcomb.passes.sparse import cap, ranking

from .toys import D, fisher_of, problem


def one_by_one(w, inverse, steps, alive=None, pattern=None):
    """Optimal brain surgeon with plain loops: order, cumulated losses, weights after each step."""
    w, h = w.clone(), inverse.clone()
    alive = [True] * len(w) if alive is None else alive.tolist()
    order, losses, trace, total = [], [], [], 0.0
    dead = {i for i, a in enumerate(alive) if not a}
    for _ in range(steps):
        best = None
        for i in range(len(w)):
            if pattern is not None:
                group = range(i // pattern[1] * pattern[1], (i // pattern[1] + 1) * pattern[1])
                full = sum(j in dead for j in group) >= pattern[1] - pattern[0]
            else:
                full = False
            if i not in dead and not full and (best is None or w[i] ** 2 / h[i, i] < w[best] ** 2 / h[best, best]):
                best = i
        total += float(w[best] ** 2 / (2 * h[best, best]))
        w = w - h[:, best] * w[best] / h[best, best]
        h = h - torch.outer(h[:, best], h[best]) / h[best, best]
        dead.add(best)
        order.append(best)
        losses.append(total)
        trace.append(w.clone())
    return order, losses, trace


@pytest.mark.parametrize("size", [4, cap.PANEL, 2 * cap.PANEL + 8])
@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4)])
def test_elimination_is_obs_one_weight_at_a_time(size, pattern):
    weights, gradients, _ = problem(4, size, 2 * size)
    inverse = fisher_of(gradients).inverse(slice(0, 4))
    order, losses = cap.eliminate(weights, inverse.clone(), None, pattern)
    assert order.shape[1] == (size if pattern is None else size * (4 - pattern[0]) // 4)
    for i in range(4):
        expected, costs, _ = one_by_one(weights[i], inverse[i], order.shape[1], None, pattern)
        assert order[i].tolist() == expected
        torch.testing.assert_close(losses[i], torch.tensor(costs, dtype=D), rtol=1e-11, atol=0)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_elimination_leaves_out_what_was_pruned_before(pattern):
    weights, gradients, _ = problem(3, 24, 60)
    alive = torch.rand(3, 24, generator=torch.Generator().manual_seed(1)) > 0.4
    alive[0, 4:8] = False
    inverse = fisher_of(gradients * alive).inverse(slice(0, 3))
    order, losses = cap.eliminate(weights * alive, inverse.clone(), alive, pattern)
    for i in range(3):
        steps = int(losses[i].isfinite().sum())
        left = alive[i].sum() if pattern is None else (2 - (~alive[i]).view(-1, 4).sum(1)).clamp(min=0).sum()
        assert steps == left
        expected, costs, _ = one_by_one(weights[i] * alive[i], inverse[i], steps, alive[i], pattern)
        assert order[i, :steps].tolist() == expected
        torch.testing.assert_close(losses[i, :steps], torch.tensor(costs, dtype=D), rtol=1e-11, atol=0)
        assert not losses[i].isnan().any()


@pytest.mark.parametrize("kept", [1, 5, 11])
def test_the_closed_form_is_the_end_of_the_step_by_step_update(kept):
    weights, gradients, matrix = problem(3, 12, 40)
    found = fisher_of(gradients)
    inverse = found.inverse(slice(0, 3))
    order, losses = cap.eliminate(weights, inverse.clone())
    mask = ranking.first(order, torch.full((3,), 12 - kept), 12)
    repaired = cap.repair(weights, found.matrix(slice(0, 3)), mask)
    cost = cap.loss(repaired - weights, matrix)
    for i in range(3):
        _, costs, trace = one_by_one(weights[i], inverse[i], 12 - kept)
        torch.testing.assert_close(repaired[i], trace[-1], rtol=1e-9, atol=1e-11)
        pruned = mask[i]
        textbook = weights[i] - inverse[i][:, pruned] @ torch.linalg.solve(
            inverse[i][pruned][:, pruned], weights[i][pruned]
        )
        torch.testing.assert_close(repaired[i], textbook, rtol=1e-9, atol=1e-11)
        assert (repaired[i][pruned] == 0).all()
        assert math.isclose(costs[-1], float(losses[i, 11 - kept]), rel_tol=1e-11)
        assert math.isclose(costs[-1], float(cost[i]), rel_tol=1e-9)


def test_on_a_quadratic_objective_the_predicted_loss_is_the_true_one():
    """Damped least squares, `1/(2m) |A (w - w0)|^2 + damping/2 |w - w0|^2`: the rows of `A` are gradients."""
    weights, gradients, _ = problem(1, 20, 64)
    rows, start = gradients[:, 0], weights[0]

    def objective(w):
        return float(((rows @ (w - start)) ** 2).mean() / 2 + 1e-3 * ((w - start) ** 2).sum() / 2)

    found = fisher_of(gradients)
    order, losses = cap.eliminate(weights, found.inverse(slice(0, 1)))
    for count in (1, 7, 15, 20):
        mask = ranking.first(order, torch.tensor([count]), 20)
        repaired = cap.repair(weights, found.matrix(slice(0, 1)), mask)
        assert math.isclose(objective(repaired[0]), float(losses[0, count - 1]), rel_tol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_against_brute_force_on_tiny_blocks(seed):
    weights, _, matrix = problem(1, 6, 20, seed=seed)
    inverse = torch.linalg.inv(matrix)
    order, losses = cap.eliminate(weights, inverse.clone())
    for count in range(1, 6):
        every = {}
        for chosen in itertools.combinations(range(6), count):
            mask = torch.zeros(1, 6, dtype=torch.bool)
            mask[0, list(chosen)] = True
            repaired = cap.repair(weights, matrix, mask)
            every[chosen] = float(cap.loss(repaired - weights, matrix))
            nudged = repaired + 1e-3 * torch.randn(1, 6, generator=torch.Generator().manual_seed(seed), dtype=D) * ~mask
            assert every[chosen] < float(cap.loss(nudged - weights, matrix)), "the update is the best for its set"
        taken = tuple(sorted(order[0, :count].tolist()))
        best = min(every.values())
        assert math.isclose(float(losses[0, count - 1]), every[taken], rel_tol=1e-9)
        assert best <= every[taken] * (1 + 1e-12)
        if count == 1:
            assert math.isclose(every[taken], best, rel_tol=1e-12), "the first step is optimal"


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_without_correlations_the_greedy_choice_is_the_best_of_all(pattern):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, 8, generator=generator, dtype=D)
    matrix = torch.diag(torch.rand(8, generator=generator, dtype=D) + 0.1)[None]
    order, losses = cap.eliminate(weights, torch.linalg.inv(matrix), None, pattern)
    costs = (weights.square() * matrix.diagonal(dim1=1, dim2=2) / 2)[0]
    for count in range(1, order.shape[1] + 1):
        legal = [
            chosen
            for chosen in itertools.combinations(range(8), count)
            if pattern is None or all(sum(i // 4 == g for i in chosen) <= 2 for g in (0, 1))
        ]
        assert math.isclose(float(losses[0, count - 1]), min(float(costs[list(c)].sum()) for c in legal), rel_tol=1e-12)


def test_correlation_updates_beat_independent_ones():
    weights, gradients, matrix = problem(8, 32, 64)
    found, whole = fisher_of(gradients), slice(0, 8)
    inverse = found.inverse(whole)
    order, losses = cap.eliminate(weights, inverse.clone())
    scores = weights.square() / inverse.diagonal(dim1=1, dim2=2)
    for count in (8, 16, 24):
        lengths = torch.full((8,), count)
        ours = cap.repair(weights, matrix, ranking.first(order, lengths, 32))
        at_once = ranking.first(scores.argsort(1), lengths, 32)
        theirs = cap.step_once(weights, inverse, at_once)
        repaired = cap.repair(weights, matrix, at_once)
        masked = weights.masked_fill(at_once, 0)
        costs = [float(cap.loss(w - weights, matrix).sum()) for w in (ours, repaired, theirs, masked)]
        assert costs[0] < costs[1] < min(costs[2:])
        assert math.isclose(costs[0], float(losses[:, count - 1].sum()), rel_tol=1e-9)


def test_a_single_weight_moves_the_others_alike_in_woodfisher_and_cap():
    weights, _, matrix = problem(2, 9, 30)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 3] = mask[1, 8] = True
    alone = cap.step_once(weights, torch.linalg.inv(matrix), mask)
    torch.testing.assert_close(alone, cap.repair(weights, matrix, mask))


def test_single_precision_keeps_the_order_of_magnitude_of_the_loss():
    weights, gradients, _ = problem(4, 64, 256, damping=1e-6)
    exact = fisher_of(gradients, 1e-6).inverse(slice(0, 4))
    order, losses = cap.eliminate(weights.float(), exact.float())
    _, precise = cap.eliminate(weights, exact)
    torch.testing.assert_close(losses[:, 31].double(), precise[:, 31], rtol=1e-2, atol=0)
    assert order.sort(1).values.equal(torch.arange(64).expand(4, 64))


def test_an_elimination_that_loses_all_digits_says_so():
    weights = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    inverse = torch.full((2, 8, 8), 1e38).float()  # singular, and at the end of the range: differences are NaN
    with pytest.raises(cap.Imprecise, match="float32"):
        cap.eliminate(weights * 1e30, inverse)
