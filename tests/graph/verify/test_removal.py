"""What several passes removed in a row is one removal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphcomb as g
from graphcomb import verify
from graphcomb.graph.errors import BadInput
from graphcomb.graph.verify.removal import composed
from graphcomb.passes import Fuse, RemoveChannels

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


@given(st.data())
def test_composed_indices_are_those_that_deletions_in_a_row_leave_out(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    left, steps = list(range(size)), []
    for _ in range(data.draw(st.integers(0, 4))):
        indices = data.draw(st.sets(st.integers(0, len(left) - 1), max_size=len(left)) if left else st.just(set()))
        steps.append({"weight": {0: data.draw(st.permutations(sorted(indices)))}})
        left = [number for i, number in enumerate(left) if i not in indices]
    lost = composed(steps).get("weight", {}).get(0, [])
    assert lost == [i for i in range(size) if i not in left]


def test_a_tensor_that_a_pass_between_made_is_verified_step_by_step() -> None:
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    program = g.capture(nn.Sequential(*layers), torch.ones(1, 3, 8, 8))
    once = RemoveChannels(ratio=0.25, round_to=1)(program)
    twice = RemoveChannels(ratio=0.25, round_to=1)(Fuse()(once.program).program)
    with pytest.raises(BadInput, match=r"no parameter or buffer 0\.bias; verify one pass after the other"):
        verify.surgery(program, twice)


def test_a_wrong_weight_after_several_surgeries_is_found():
    program, results = chain(0.25, 0.4)
    results[1].program.module().get_parameter("a.weight").data[1] *= 2
    with pytest.warns(UserWarning, match=r"a\.weight does not hold the kept values"):
        assert verify.surgery(program, results[1]) == float("inf")


def test_surgeries_of_another_program_are_refused_with_a_line():
    _, results = chain(0.25, 0.4)
    with pytest.raises(BadInput, match="verify one pass after the other"):
        verify.surgery(g.capture(nn.Conv2d(3, 8, 3), torch.randn(2, 3, 8, 8)), results[1])
