"""The proof at the end of a capture: what it compares in networks with torch.cond, and differences of one mode alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphcomb as g
from graphcomb.graph.capture import functional, observe
from graphcomb.graph.capture.functional import CaptureWarning
from graphcomb.graph.errors import CaptureError
from graphcomb.graph.trainable import walk

ATEN = torch.ops.aten


class Branches(nn.Module):
    """Parameters, a dropout before the branches, a buffer that counts calls."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return torch.cond(x.sum() > 0, lambda x: self.a(x) * 2, lambda x: self.b(x).relu(), (self.drop(x),))


class NormInside(nn.Module):
    """BatchNorm in a branch, which eager PyTorch runs in training without gradients only."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.norm(self.a(x)), lambda x: self.a(x), (x,))


def plant(monkeypatch, target, change):
    """Change the first node of an operator in every captured graph, or body of a branch, after it was made."""

    def wrong(module):
        node = next(n for _, n in walk(module) if n.target is target)
        change(node)
        node.graph.owning_module.recompile()

    monkeypatch.setattr(functional, "fold_constants", wrong)


@pytest.mark.parametrize("sign", [1, -1])
def test_networks_with_branches_are_proven_in_both_modes(sign):
    program = g.capture(Branches(), sign * torch.rand(3, 4))
    assert program.proof.skipped == []
    assert program.proof.error == {"eval": pytest.approx(0, abs=1e-5), "train": pytest.approx(0, abs=1e-5)}


def test_a_wrong_value_in_a_branch_is_refused(monkeypatch):
    plant(monkeypatch, ATEN.mul.Tensor, lambda node: node.update_arg(1, 3.0))
    with pytest.raises(
        CaptureError, match=r"in eval mode at a node that cannot be named \(.*torch\.cond.*: output 0 is off"
    ):
        g.capture(Branches(), torch.rand(3, 4))


def test_a_wrong_gradient_in_a_branch_is_refused(monkeypatch):
    def detached(node):
        with node.graph.inserting_before(node):
            node.replace_input_with(node.args[0], node.graph.call_function(ATEN.detach.default, (node.args[0],)))

    plant(monkeypatch, ATEN.mul.Tensor, detached)
    with pytest.raises(
        CaptureError, match="other gradients than the model in eval mode at a node that cannot be named"
    ):
        g.capture(Branches(), torch.rand(3, 4))


def test_a_norm_in_a_branch_follows_the_mode():
    model, x = NormInside(), torch.rand(5, 4)
    with pytest.warns(CaptureWarning, match="computes its branch again, and moves running statistics twice"):
        program = g.capture(model, x)
    assert program.proof.error == {"eval": pytest.approx(0, abs=1e-5), "train": pytest.approx(0, abs=1e-5)}
    module, reference = program.module(), copy.deepcopy(nn.Sequential(model.a, model.norm))
    for training, calls in ((True, 2), (False, 1)):
        module.train(training)
        reference.train(training)
        expected, result = reference(x), module(x)
        torch.testing.assert_close(result, expected)
        wanted = torch.autograd.grad(expected.square().sum(), list(reference.parameters()))
        found = torch.autograd.grad(
            result.square().sum(), [module.get_parameter(n) for n, _ in model.named_parameters()]
        )
        torch.testing.assert_close(found, wanted)
        with torch.no_grad():
            for _ in range(calls - 1):  # as often as the backward pass did
                reference(x)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(module.get_buffer(f"norm.{name}"), reference[1].get_buffer(name))
    module.train()
    reference.train()
    with torch.no_grad():
        torch.testing.assert_close(module(x), reference(x))
    torch.testing.assert_close(module.get_buffer("norm.running_mean"), reference[1].running_mean)


def test_what_fails_under_observation_alone_is_not_blamed_on_the_model(monkeypatch):
    def fails(self, func, types, args=(), kwargs=None):
        raise NotImplementedError("an operator that cannot be intercepted")

    monkeypatch.setattr(observe._SameDraws, "__torch_dispatch__", fails)
    program = g.capture(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), torch.randn(3, 4))
    assert program.proof.skipped == []
    assert set(program.proof.error) == {"eval", "train"}


def test_a_model_that_fails_is_named_with_its_own_words():
    class Fails(nn.Module):
        def forward(self, x):
            if self.training and not torch.compiler.is_exporting():
                raise ValueError("no labels to train on")
            return x * 2

    with pytest.warns(CaptureWarning, match="the model itself fails: ValueError: no labels to train on"):
        g.capture(Fails(), torch.randn(3, 4))


class Trained(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(F.dropout(self.norm(self.a(x)), 0.5, self.training))


@pytest.mark.parametrize(
    ("target", "change", "what"),
    [
        (ATEN.batch_norm.default, lambda n: n.update_arg(6, 0.3), "buffer norm.running"),
        (ATEN.dropout.default, lambda n: n.update_arg(1, 0.1), "output 0"),
    ],
    ids=["statistics", "values"],
)
def test_a_difference_in_training_alone_is_refused(monkeypatch, target, change, what):
    plant(monkeypatch, target, change)
    with pytest.raises(CaptureError, match=rf"differs from the model in train mode at .*: {what}.* is off"):
        g.capture(Trained(), torch.randn(8, 6))
