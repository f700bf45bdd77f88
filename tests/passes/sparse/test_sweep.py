"""Sweeps over columns against optimal brain surgeon, in float64."""

import pytest
import torch

from graphcomb.graph.sparse import allowed
from graphcomb.passes.sparse import cap
from graphcomb.passes.sparse.sweep import sweep

from .toys import D, problem


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
    swept, mask = sweep(weights, matrix[0], 48, pattern, None, width)
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
    swept, mask = sweep(weights.expand(3, size), matrix[0], 0, pattern, None, width)
    assert (mask.view(3, -1, pattern[1]).sum(2) == pattern[1] - pattern[0]).all()
    assert torch.equal(mask, swept == 0)


def test_the_column_sweep_keeps_earlier_zeros():
    weights, _, matrix = problem(1, 8, 30)
    rows = weights.expand(4, 8).clone()
    alive = torch.ones(4, 8, dtype=torch.bool)
    alive[:, 2] = alive[1, 5] = False
    swept, mask = sweep(rows * alive, matrix[0], 11, None, alive)
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
    swept, mask = sweep(weights, matrix[0], 0, pattern, alive, width)
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
    swept, mask = sweep(weights, matrix[0], 32 - int((~alive).sum()), None, alive)
    assert mask[:, :8].all()
    assert not mask[:, 8:].any()
    many = matrix[:1].expand(4, 16, 16)
    torch.testing.assert_close(swept, cap.repair(weights, many, mask), rtol=1e-9, atol=1e-12)
    assert (cap.loss(swept - weights, many) < cap.loss(weights.masked_fill(mask, 0) - weights, many)).all()
