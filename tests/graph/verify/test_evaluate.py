"""A graph evaluated in double precision is the program."""

from __future__ import annotations

import torch
from torch import nn

import graphcomb as g
from graphcomb import verify
from graphcomb.graph.verify.evaluate import Evaluator, double_weights, relative_error
from graphcomb.passes import RemoveChannels

from .toys import (
    IMAGE,
    Residual,
)


def test_evaluation_in_double_matches_the_program():
    torch.manual_seed(0)
    program = g.capture(Residual().double(), torch.randn(IMAGE, dtype=torch.float64))
    expected = program.graph_module(*program.args)
    assert relative_error(Evaluator(program, double_weights(program)).run(program.args), expected) == 0


class Started(nn.Module):
    """A layer applied to nothing but zeros, whose type no argument names."""

    def __init__(self):
        super().__init__()
        self.start, self.body, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.start(torch.zeros(x.shape[0], 6)) * self.body(x))


def test_tensors_that_a_network_makes_are_double_too():
    program = g.capture(Started().eval(), torch.randn(2, 6), dynamic_shapes="batch")
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    assert verify.check(program, result).ok
