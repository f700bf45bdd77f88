"""Forms of one model: parity, equivalence, and the program with random weights."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb import verify

from .toys import (
    IMAGE,
    Residual,
    Shy,
)


def test_parity_of_the_forms_of_a_program(tmp_path):
    torch.manual_seed(0)
    model = Residual()
    program = g.capture(model, torch.randn(IMAGE), dynamic_shapes="batch")
    assert verify.parity(program, model.eval()) < 1e-6
    assert verify.parity(program, g.load(program.save(tmp_path / "m.pt2"))) < 1e-6
    assert verify.parity(program, lambda x: [model(x).detach().numpy()], (torch.randn(2, 3, 9, 9),)) < 1e-6
    assert verify.parity(program, lambda x: model(x) * 1.01) == pytest.approx(0.01, rel=0.2)
    assert verify.parity(program, lambda x: model(x)[:1]) == float("inf")
    model.train()
    assert verify.parity(program, model) < 1e-6  # compared in eval mode, left in train mode
    assert model.training


def test_equivalence_of_rewrites():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).eval()
    folded = nn.Linear(4, 3)
    with torch.no_grad():
        folded.weight.copy_(model[1].weight @ model[0].weight)
        folded.bias.copy_(model[1].weight @ model[0].bias + model[1].bias)
    x = torch.randn(3, 4)
    before, after = g.capture(model, x, dynamic_shapes="batch"), g.capture(folded, x, dynamic_shapes="batch")
    assert verify.equivalence(before, after) < 1e-6  # the folded weights were rounded to float32
    with torch.no_grad():
        after.module().get_parameter("bias")[0] += 0.1
    assert verify.equivalence(before, after) > 1e-3


def test_randomised_program_is_alive_and_leaves_its_source():
    torch.manual_seed(0)
    program = g.capture(Shy(), torch.randn(3, 3, 6, 6), dynamic_shapes="batch")
    other = verify.randomised(program, seed=2)
    assert program.module().get_parameter("out.weight").abs().max() == 0
    assert other.module().get_parameter("out.weight").abs().min() > 0
    assert other.module().get_parameter("out.weight").dtype == torch.float32
    x = torch.randn(3, 3, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.allclose(other.graph_module(x)[0], other.graph_module(x)[1])
