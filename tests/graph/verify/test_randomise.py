"""Random weights hide nothing, and keep what has a meaning."""

from __future__ import annotations

import torch
from torch import nn

import graphcomb as g
from graphcomb.graph.nodes import op_name
from graphcomb.graph.verify.check import Trial
from graphcomb.graph.verify.evaluate import Evaluator, double_weights, relative_error
from graphcomb.graph.verify.randomise import randomise
from graphcomb.graph.verify.removal import checked
from graphcomb.passes import RemoveChannels

from .toys import (
    BODY,
    IMAGE,
    RESIDUAL,
    Residual,
    Shy,
    by_hand,
    without,
)


def test_random_weights_hide_nothing_and_keep_what_has_meaning():
    program = g.capture(Shy(), torch.randn(3, 3, 6, 6), dynamic_shapes="batch")
    x = torch.randn(2, 3, 6, 6)
    saved = {n: t.clone() for n, t in program.module().state_dict().items()}
    weights, _ = randomise(program, [x], seed=0)
    assert all(torch.equal(saved[n], t) for n, t in program.module().state_dict().items())
    assert torch.equal(weights["mask"], saved["mask"].double())
    assert torch.equal(weights["order"], saved["order"])
    assert weights["gamma"].min() > 0.1
    assert len(weights["out.weight"].unique()) == 64
    assert all(w.dtype == torch.float64 for n, w in weights.items() if n != "order")
    seen = {}
    Evaluator(program, weights).run([x], lambda n, v: seen.update({op_name(n): v}))
    assert (seen["relu"].amax((0, 2, 3)) > 0).all()  # no dead channel
    assert torch.equal(randomise(program, [x], seed=0)[0]["conv.weight"], weights["conv.weight"])
    assert not torch.equal(randomise(program, [x], seed=1)[0]["conv.weight"], weights["conv.weight"])


def test_own_weights_would_hide_what_random_ones_show():
    """The reason to draw weights: with a zero layer, right and wrong surgery give the same outputs."""
    torch.manual_seed(0)
    wide, narrow = Residual(), Residual(5, 4, 3)
    nn.init.zeros_(wide.b.weight)
    before, result = by_hand(wide, narrow, RESIDUAL, torch.randn(IMAGE))
    removed = checked(before, result.removed)
    wrong = {**removed, "b.weight": {0: BODY, 1: [1, 3]}}
    own = double_weights(before)
    x = [torch.randn(IMAGE)]

    def outputs(weights, lost):
        return Evaluator(result.program, {n: without(t, lost.get(n, {})) for n, t in weights.items()}).run(x)

    assert relative_error(outputs(own, wrong), outputs(own, removed)) == 0
    trial = Trial(before, result.program, removed)
    trial.prepare()
    assert relative_error(outputs(trial.weights, wrong), outputs(trial.weights, removed)) > 1e-3


def test_a_shared_layer_is_calibrated_after_a_call_has_read_it():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(self.a(x)), self.c(self.a(x + 1).relu())  # for the ReLU the bias is moved

    program = g.capture(Shared(), torch.randn(5, 4))
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    assert result.removed["a.bias"]
    assert g.verify.surgery(program, result) <= 1e-10
