"""Fisher matrices of blocks and their inverses against their definitions, in float64."""

import math

import pytest
import torch

from graphcomb.graph.errors import BadInput
from graphcomb.passes.sparse.statistics import fisher

from ..toys import D, fisher_of, problem


def test_few_gradients_are_not_summed_up_where_many_were_announced():
    """The rounding of sums of large gradients would hide λ: negative eigenvalues, and losses below zero."""
    _, gradients, _ = problem(3, 32, 8, damping=0.0)
    gradients = 1e3 * gradients
    few = fisher.Fisher(3, 32, 64, 1e-4, torch.float32)
    few.add(gradients)
    exact = torch.einsum("kbi,kbj->bij", gradients.float().double(), gradients.float().double()) / 8 + 1e-4 * torch.eye(
        32
    )
    torch.testing.assert_close(few.matrix(slice(0, 3)), exact, rtol=1e-12, atol=1e-8)
    assert torch.linalg.eigvalsh(few.inverse(slice(0, 3))).min() > 0


@pytest.mark.parametrize(("count", "size"), [(7, 12), (12, 12), (50, 12), (3, 40)])
def test_the_inverse_is_the_woodbury_recursion_and_the_direct_inverse(count, size):
    _, gradients, matrix = problem(3, size, count)
    found = fisher_of(gradients)
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
    found = fisher.Fisher(2, 8, 30, 1e-2, D)
    found.add(gradients)
    expected = torch.einsum("kbi,kbj->bij", gradients, gradients) / 5 + 1e-2 * torch.eye(8, dtype=D)
    torch.testing.assert_close(found.matrix(slice(0, 2)), expected)
    torch.testing.assert_close(found.inverse(slice(0, 2)), torch.linalg.inv(expected))


def test_an_indefinite_matrix_is_raised_until_it_factors():
    good, bad = torch.eye(3, dtype=D), torch.ones(3, 3, dtype=D) - 1e-9 * torch.eye(3, dtype=D)
    factors = fisher.cholesky(torch.stack([good, bad]))
    torch.testing.assert_close(factors[0], good)
    torch.testing.assert_close(factors[1] @ factors[1].T, bad, rtol=0, atol=1e-7)


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_a_matrix_that_never_factors_is_refused(value):
    with pytest.raises(BadInput, match="Sparsify: a matrix of the statistics cannot be factored"):
        fisher.cholesky(torch.stack([torch.eye(2, dtype=D), torch.diag(torch.tensor([1.0, value], dtype=D))]))
