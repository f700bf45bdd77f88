"""The algebra of CAP against definitions, brute force and step-by-step elimination, in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcomb.graph.errors import BadInput
from graphcomb.graph.sparse import allowed
from graphcomb.passes.sparse import cap

D = torch.float64


def problem(blocks, size, count, damping=1e-3, seed=0):
    """Weights, gradients `(count, blocks, size)` and the Fisher matrix they have by definition."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(blocks, size, generator=generator, dtype=D)
    mixing = torch.randn(blocks, size, size, generator=generator, dtype=D) / size**0.5
    gradients = torch.einsum("kbi,bij->kbj", torch.randn(count, blocks, size, generator=generator, dtype=D), mixing)
    matrix = torch.einsum("kbi,kbj->bij", gradients, gradients) / count + damping * torch.eye(size, dtype=D)
    return weights, gradients, matrix


def fisher(gradients, damping=1e-3, cuts=(5, 6)):
    count, blocks, size = gradients.shape
    found = cap.Fisher(blocks, size, count, damping, D)
    for part in torch.tensor_split(gradients, cuts):
        found.add(part)
    return found


def test_few_gradients_are_not_summed_up_where_many_were_announced():
    """The rounding of sums of large gradients would hide λ: negative eigenvalues, and losses below zero."""
    _, gradients, _ = problem(3, 32, 8, damping=0.0)
    gradients = 1e3 * gradients
    few = cap.Fisher(3, 32, 64, 1e-4, torch.float32)
    few.add(gradients)
    exact = torch.einsum("kbi,kbj->bij", gradients.float().double(), gradients.float().double()) / 8 + 1e-4 * torch.eye(
        32
    )
    torch.testing.assert_close(few.matrix(slice(0, 3)), exact, rtol=1e-12, atol=1e-8)
    assert torch.linalg.eigvalsh(few.inverse(slice(0, 3))).min() > 0


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


@pytest.mark.parametrize(("count", "size"), [(7, 12), (12, 12), (50, 12), (3, 40)])
def test_the_inverse_is_the_woodbury_recursion_and_the_direct_inverse(count, size):
    _, gradients, matrix = problem(3, size, count)
    found = fisher(gradients)
    torch.testing.assert_close(found.matrix(slice(0, 3)), matrix, rtol=1e-12, atol=1e-14)
    inverse = torch.eye(size, dtype=D).expand(3, size, size) / 1e-3
    for g in gradients:
        hg = torch.einsum("bij,bj->bi", inverse, g)
        below = count + (g * hg).sum(1)
        inverse = inverse - torch.einsum("bi,bj->bij", hg, hg) / below[:, None, None]
    torch.testing.assert_close(found.inverse(slice(0, 3)), inverse, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.inverse(slice(1, 3)), torch.linalg.inv(matrix)[1:], rtol=1e-8, atol=1e-8)


def test_fewer_gradients_than_announced_are_averaged_over_those_that_came():
    _, gradients, _ = problem(2, 8, 5)
    found = cap.Fisher(2, 8, 30, 1e-2, D)
    found.add(gradients)
    expected = torch.einsum("kbi,kbj->bij", gradients, gradients) / 5 + 1e-2 * torch.eye(8, dtype=D)
    torch.testing.assert_close(found.matrix(slice(0, 2)), expected)
    torch.testing.assert_close(found.inverse(slice(0, 2)), torch.linalg.inv(expected))


def test_an_indefinite_matrix_is_raised_until_it_factors():
    good, bad = torch.eye(3, dtype=D), torch.ones(3, 3, dtype=D) - 1e-9 * torch.eye(3, dtype=D)
    factors = cap.cholesky(torch.stack([good, bad]))
    torch.testing.assert_close(factors[0], good)
    torch.testing.assert_close(factors[1] @ factors[1].T, bad, rtol=0, atol=1e-7)


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_a_matrix_that_never_factors_is_refused(value):
    with pytest.raises(BadInput, match="Sparsify: a matrix of the statistics cannot be factored"):
        cap.cholesky(torch.stack([torch.eye(2, dtype=D), torch.diag(torch.tensor([1.0, value], dtype=D))]))


@pytest.mark.parametrize("size", [4, cap.PANEL, 2 * cap.PANEL + 8])
@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4)])
def test_elimination_is_obs_one_weight_at_a_time(size, pattern):
    weights, gradients, _ = problem(4, size, 2 * size)
    inverse = fisher(gradients).inverse(slice(0, 4))
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
    inverse = fisher(gradients * alive).inverse(slice(0, 3))
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
    found = fisher(gradients)
    inverse = found.inverse(slice(0, 3))
    order, losses = cap.eliminate(weights, inverse.clone())
    mask = cap.first(order, torch.full((3,), 12 - kept), 12)
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

    found = fisher(gradients)
    order, losses = cap.eliminate(weights, found.inverse(slice(0, 1)))
    for count in (1, 7, 15, 20):
        mask = cap.first(order, torch.tensor([count]), 20)
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
    found, whole = fisher(gradients), slice(0, 8)
    inverse = found.inverse(whole)
    order, losses = cap.eliminate(weights, inverse.clone())
    scores = weights.square() / inverse.diagonal(dim1=1, dim2=2)
    for count in (8, 16, 24):
        lengths = torch.full((8,), count)
        ours = cap.repair(weights, matrix, cap.first(order, lengths, 32))
        at_once = cap.first(scores.argsort(1), lengths, 32)
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


def columns_one_by_one(weights, matrix, mask):
    """Optimal brain surgeon, row by row: columns from left to right, those before keep their values."""
    rows = []
    for weight, gone in zip(weights, mask, strict=True):
        w, h = weight.clone(), torch.linalg.inv(matrix)
        for j in range(len(w)):
            if gone[j]:
                w = w - h[j] * w[j] / h[j, j]
            h = h - torch.outer(h[:, j], h[j]) / h[j, j]  # column j stays as it is from here on
        rows.append(w.masked_fill(gone, 0))
    return torch.stack(rows)


@pytest.mark.parametrize(("pattern", "width"), [(None, 128), (None, 5), ((2, 4), 8)])
def test_the_column_sweep_is_obs_restricted_to_the_columns_to_the_right(pattern, width):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 16, generator=generator, dtype=D)
    _, _, matrix = problem(1, 16, 40)
    swept, mask = cap.sweep(weights, matrix[0], 48, pattern, None, width)
    assert mask.sum() == 48
    assert pattern is None or allowed(mask, pattern)
    torch.testing.assert_close(swept, columns_one_by_one(weights, matrix[0], mask), rtol=1e-8, atol=1e-10)
    dropped = weights.masked_fill(mask, 0)
    many = matrix.expand(6, 16, 16)
    assert cap.loss(swept - weights, many).sum() < cap.loss(dropped - weights, many).sum()


@pytest.mark.parametrize(("pattern", "width"), [((1, 3), 8), ((2, 5), 8), ((3, 6), 8), ((2, 4), 3)])
def test_blocks_of_columns_of_the_sweep_cut_no_group(pattern, width):
    size = 6 * pattern[1]
    weights, _, matrix = problem(1, size, 2 * size)
    swept, mask = cap.sweep(weights.expand(3, size), matrix[0], 0, pattern, None, width)
    assert (mask.view(3, -1, pattern[1]).sum(2) == pattern[1] - pattern[0]).all()
    assert torch.equal(mask, swept == 0)


def test_the_column_sweep_keeps_earlier_zeros():
    weights, _, matrix = problem(1, 8, 30)
    rows = weights.expand(4, 8).clone()
    alive = torch.ones(4, 8, dtype=torch.bool)
    alive[:, 2] = alive[1, 5] = False
    swept, mask = cap.sweep(rows * alive, matrix[0], 11, None, alive)
    assert (swept[~alive] == 0).all()
    assert mask[~alive].all()
    assert mask.sum() == 16


@pytest.mark.parametrize(("pattern", "width"), [(None, 128), (None, 4), ((2, 4), 8)])
def test_the_column_sweep_fills_no_earlier_zeros_where_there_are_more_than_asked_for(pattern, width):
    """Every earlier zero is an equality that the sweep keeps: column by column as in optimal brain surgeon."""
    generator = torch.Generator().manual_seed(2)
    alive = torch.rand(6, 16, generator=generator) > 0.7
    weights = torch.randn(6, 16, generator=generator, dtype=D) * alive
    _, _, matrix = problem(1, 16, 40)
    swept, mask = cap.sweep(weights, matrix[0], 0, pattern, alive, width)
    assert (swept[~alive] == 0).all()
    assert torch.equal(mask, swept == 0)
    assert pattern is None or allowed(mask, pattern)
    torch.testing.assert_close(swept, columns_one_by_one(weights, matrix[0], mask), rtol=1e-8, atol=1e-10)


def test_on_a_quadratic_objective_the_column_sweep_reaches_the_best_weights_beside_earlier_zeros():
    """Where all that goes lies left of all that stays, the weights to the right are free: no better ones exist."""
    weights, _, matrix = problem(4, 16, 40)
    weights[:, :8] *= 1e-3
    alive = torch.ones(4, 16, dtype=torch.bool)
    alive[:, 3] = alive[0, :3] = alive[1, 7] = False
    weights *= alive
    swept, mask = cap.sweep(weights, matrix[0], 32 - int((~alive).sum()), None, alive)
    assert mask[:, :8].all()
    assert not mask[:, 8:].any()
    many = matrix[:1].expand(4, 16, 16)
    torch.testing.assert_close(swept, cap.repair(weights, many, mask), rtol=1e-9, atol=1e-12)
    assert (cap.loss(swept - weights, many) < cap.loss(weights.masked_fill(mask, 0) - weights, many)).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=2, max_size=8), st.integers(0, 30))
def test_prefixes_take_the_cheapest_and_exactly_so_many(steps, count):
    losses = torch.tensor(steps, dtype=D).cumsum(1)
    losses[0, 2] = math.inf
    parts = [losses[:1], losses[1:]]
    lengths = torch.cat(cap.prefixes(parts, count))
    finite = int(losses.isfinite().sum())
    assert int(lengths.sum()) == min(count, finite)
    order = torch.arange(3).expand(len(losses), 3)
    mask = cap.first(order, lengths, 3)
    assert (mask.sum(1) == lengths).all()
    taken, left = losses[mask], losses[~mask]
    assert not len(taken) or not len(left) or taken.max() <= left.min()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_blocks_put_together_again_are_the_tensor(out, into, kernel, size, last):
    tensor = torch.randn(out, into, kernel, kernel)
    blocks = cap.to_blocks(tensor, size, last)
    assert blocks.shape == (-(-tensor.numel() // size), size)
    assert torch.equal(cap.from_blocks(blocks, tensor.shape, last), tensor)
    if last:
        assert torch.equal(blocks.reshape(-1)[:into], tensor[0, :, 0, 0])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=8, max_size=8), st.integers(0, 8))
def test_lowest_scores(values, count):
    scores = torch.tensor(values, dtype=D).view(2, 4)
    masks = cap.lowest([scores[:1], scores[1:]], count)
    mask = torch.cat(masks)
    assert mask.sum() == count
    assert not 0 < count < 8 or scores[mask].max() <= scores[~mask].min()
    groups = cap.lowest_of_groups(scores, (1, 4))
    assert (groups.sum(1) == 3).all()
    assert allowed(groups, (1, 4))
    assert not allowed(~groups, (1, 4))
    assert not allowed(groups[:, :3], (1, 4))
    assert all(scores[r][~groups[r]].item() == scores[r].max() for r in range(2))


def test_single_precision_keeps_the_order_of_magnitude_of_the_loss():
    weights, gradients, _ = problem(4, 64, 256, damping=1e-6)
    exact = fisher(gradients, 1e-6).inverse(slice(0, 4))
    order, losses = cap.eliminate(weights.float(), exact.float())
    _, precise = cap.eliminate(weights, exact)
    torch.testing.assert_close(losses[:, 31].double(), precise[:, 31], rtol=1e-2, atol=0)
    assert order.sort(1).values.equal(torch.arange(64).expand(4, 64))


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
    ours, theirs = (total(losses, cap.prefixes([x], count)[0]) for x in (cap.increments(losses), losses))
    least = cheapest(losses, count)
    assert least * (1 - 1e-12) <= ours <= 1.03 * least
    assert ours < theirs


def test_increments_never_fall_and_end_with_the_block():
    losses = torch.tensor([[1.0, 1.5, 4.0, math.inf], [0.0, 2.0, 2.5, 3.0]], dtype=D)
    expected = torch.tensor([[1.0, 1.0, 2.5, math.inf], [0.0, 2.0, 2.0, 2.0]], dtype=D)
    assert torch.equal(cap.increments(losses), expected)


def test_an_elimination_that_loses_all_digits_says_so():
    weights = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    inverse = torch.full((2, 8, 8), 1e38).float()  # singular, and at the end of the range: differences are NaN
    with pytest.raises(cap.Imprecise, match="float32"):
        cap.eliminate(weights * 1e30, inverse)
