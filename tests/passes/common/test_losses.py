"""Losses without labels: what looks like class scores, and values in units of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import graphcomb
from graphcomb import Context
from graphcomb.passes.channels.importance.scores import importance_of
from graphcomb.passes.common.divergence import Divergence
from graphcomb.passes.common.losses import UnlabelledLoss, deviations, tell_classes


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def driving(count: int = 64) -> torch.Tensor:
    """Steering angles in radians and speeds in metres a second."""
    return normal(count, 2) * torch.tensor([0.1, 3.0]) + torch.tensor([0.0, 20.0])


@pytest.mark.parametrize(
    ("values", "dim", "classes"),
    [
        (normal(64, 10), 1, True),
        (normal(4, 21, 8, 8), 1, True),
        (normal(4, 8, 8, 21), -1, True),
        (torch.where(torch.arange(10) < 5, normal(64, 10), -math.inf), 1, True),  # masked classes
        (normal(4, 10) + torch.tensor([9.0] + [0.0] * 9), 1, True),  # four images of one class are no evidence
        (driving(), 1, False),
        (driving(4), 1, True),
        (torch.rand(64, 2), 1, False),  # coordinates
        (0.5 + 0.1 * normal(4, 3, 16, 16), 1, False),  # colours
        (normal(64, 1), 1, False),
    ],
)
def test_class_scores_are_told_from_values(values: torch.Tensor, dim: int, classes: bool):
    assert tell_classes(values, dim) is classes


def test_each_value_has_its_own_unit():
    values = driving()
    assert deviations(values, 1).shape == (1, 2)
    assert deviations(values, 1)[0].tolist() == pytest.approx(values.double().std(0).tolist())
    assert deviations(values, None).item() == pytest.approx(values.double().std().item())
    assert deviations(torch.full((4, 2), 3.0), 1).tolist() == pytest.approx(np.full((1, 2), 3e-6))  # nothing varies
    assert deviations(torch.zeros(()), None).item() > 0


def test_projections_of_values_are_in_their_units():
    values = driving().requires_grad_()
    UnlabelledLoss(torch.Generator().manual_seed(3))((values,)).backward()
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = noise / values.detach().double().std(0) / math.sqrt(2)
    torch.testing.assert_close(values.grad.double(), expected, rtol=1e-5, atol=0)


def test_the_first_batch_decides_what_outputs_are_and_their_units():
    def gradients(*batches: torch.Tensor) -> torch.Tensor:
        loss = UnlabelledLoss(torch.Generator().manual_seed(0))
        for batch in batches:
            last = batch.clone().requires_grad_()
            loss(last).backward()
        return last.grad

    flat, scores = 1e-3 * normal(16, 5), normal(16, 5, seed=1)
    assert gradients(scores, flat).sum(1).abs().max() < 1e-5  # of log-probabilities
    assert gradients(flat, scores).sum(1).abs().max() > 0.1
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (64, 2)][1]
    expected = noise / driving().double().std(0) / math.sqrt(2)
    torch.testing.assert_close(gradients(driving(), driving(2)).double(), expected, rtol=1e-5, atol=0)
    few = [gradients(1e-3 * normal(1, 5, seed=i)).abs().max() for i in range(50)]
    assert max(few) < 1e5  # one sample has no units of its own, and no value near 0 counts for more


def test_a_divergence_of_values_counts_each_in_its_unit():
    """The softmax of an angle and a speed is (0, 1), so that its divergence is 0 whatever happens to either."""
    model = nn.Linear(6, 2).eval()
    data = list(normal(4, 16, 6, seed=2))
    model.weight.data *= torch.tensor([[0.1], [5.0]])
    model.bias.data = torch.tensor([0.0, 60.0])
    dense, other = (graphcomb.capture(model, data[0], dynamic_shapes="batch") for _ in range(2))
    other.module().weight.data[0] *= 0.5
    with torch.no_grad():
        a, b = (p.module()(torch.cat(data)).double() for p in (dense, other))
    expected = ((a - b) / a.std(0)).square().mean() / 2
    assert Divergence(dense, data)(other) == pytest.approx(float(expected), rel=1e-5)
    assert expected > 0.05


@pytest.mark.parametrize("importance", ["fisher-unlabelled", "repair"])
def test_channels_that_only_one_of_two_values_needs_are_scored_in_its_unit(importance: str):
    class Driver(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(6, 8)
            self.angle, self.speed = nn.Linear(8, 1), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            angle, speed = self.angle(self.one(x).relu()), self.speed(self.two(x).relu())
            return torch.cat([0.1 * angle, 20 + 3 * speed], 1)

    torch.manual_seed(0)
    model = Driver()
    model.two.load_state_dict(model.one.state_dict())
    model.speed.load_state_dict(model.angle.state_dict())
    found = graphcomb.comb(graphcomb.capture(model.double().eval(), torch.zeros(2, 6).double(), dynamic_shapes="batch"))
    groups = [g for g in found.groups if g.frozen is None]
    assert [g.name for g in groups] == ["one.weight:0", "two.weight:0"]
    scores = importance_of(importance)(found, groups, Context(data=list(normal(16, 64, 6).double())), 1024)
    one, two = (scores[g.atom].sum() for g in groups)
    assert one > 0
    assert one == pytest.approx(two, rel=0.5)
