"""What several passes removed in a row is one removal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb import verify
from graphcomb.graph.errors import BadInput
from graphcomb.passes import RemoveChannels

from ...oracles.restriction import interference, restriction
from .toys import (
    EXACT,
    Residual,
)


def chain(*ratios):
    """A program, and the results of pruning it again and again."""
    program = g.capture(Residual(), torch.randn(2, 3, 8, 8), dynamic_shapes="batch")
    results, last = [], program
    for ratio in ratios:
        results.append(RemoveChannels(ratio=ratio, round_to=1)(last))
        last = results[-1].program
    return program, results


def test_several_surgeries_in_a_row_are_one():
    program, results = chain(0.25, 0.4, 0.3)
    for before, result in ((program, results[1]), (program, results[2]), (results[0].program, results[2])):
        assert verify.surgery(before, result) <= EXACT
        assert restriction(before, result) <= EXACT
        assert interference(before, result) <= EXACT
    assert verify.surgery(results[1].program, results[2]) <= EXACT


def test_a_wrong_weight_after_several_surgeries_is_found():
    program, results = chain(0.25, 0.4)
    results[1].program.module().get_parameter("a.weight").data[1] *= 2
    with pytest.warns(UserWarning, match=r"a\.weight does not hold the kept values"):
        assert verify.surgery(program, results[1]) == float("inf")


def test_surgeries_of_another_program_are_refused_with_a_line():
    _, results = chain(0.25, 0.4)
    with pytest.raises(BadInput, match="verify one pass after the other"):
        verify.surgery(g.capture(nn.Conv2d(3, 8, 3), torch.randn(2, 3, 8, 8)), results[1])
