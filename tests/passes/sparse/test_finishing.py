"""Rows that are finished: which, at which price, and not those of a trunk."""

import math

import torch

import graphcomb as g
from graphcomb.passes.sparse.finishing import finish_rows, sole_producers

from ..toys import network
from .toys import D


def test_rows_whose_last_weights_are_cheap_together_lose_them_together():
    """Two rows of six in blocks of four, the middle one cut by both; an entry of the second row is zero already."""
    order = torch.tensor([[2, 0, 1, 3], [0, 3, 1, 2], [1, 2, 3, 0]])
    losses = torch.tensor([[1.0, 2, 3, 4], [1.5, 2.5, 5, 6], [1.0, 2, 3, math.inf]], dtype=D)
    gone = torch.zeros(3, 4, dtype=torch.bool)
    gone[2, 0] = True
    pieces = [(order[:1], losses[:1]), (order[1:], losses[1:])]
    # The first row's costs are 2, 3, 1, 4 | 1.5, 5 and the second's 6, 2.5 | gone, 1, 2, 3. Above 3.5 lie 4 and 5, or 6.
    found = finish_rows(pieces, gone, 6, 3.5, 0.25)
    assert [len(o) for o, _ in found] == [1, 2]
    expected = [[1.0, 2, 3, 3.375], [1.5, 2.5, 3.375, 6], [1.0, 2, 3, math.inf]]
    assert torch.equal(torch.cat([x for _, x in found]), torch.tensor(expected, dtype=D))
    assert torch.equal(torch.cat([o for o, _ in found])[:, :3], order[:, :3])
    found = finish_rows(pieces, gone, 6, 3.5, 0.5)  # now both, and the end of the second row goes before others
    expected = [[1.0, 2, 2.25, 2.25], [1.5, 2.25, 2.5, 3], [1.0, 2, 3, math.inf]]
    assert torch.equal(torch.cat([x for _, x in found]), torch.tensor(expected, dtype=D))
    assert torch.cat([o for o, _ in found])[:2].tolist() == [[2, 0, 1, 3], [0, 1, 3, 2]]
    same = finish_rows(pieces, gone, 6, 3.5, 0.0)
    assert torch.equal(torch.cat([x for _, x in same]), losses)


def test_outputs_of_a_trunk_are_not_finished():
    """Both blocks' last convolutions and the stem write to one trunk; the classifier's outputs are the program's."""
    program = g.capture(network(), torch.randn(2, 3, 8, 8), dynamic_shapes="batch")
    assert sole_producers(program) == {"3.body.0.weight", "4.body.0.weight", "5.weight"}
