"""What stays lost after repair, against removing and refitting by hand."""

import numpy as np
import pytest
import torch
from torch import nn

import graphcomb
from graphcomb.passes import Context, RemoveChannels
from graphcomb.passes.repair import score


def network(copies: bool = False) -> nn.Module:
    torch.manual_seed(0)
    first, last = nn.Linear(12, 10), nn.Linear(10, 3)
    if copies:
        with torch.no_grad():
            first.weight[5:] = first.weight[:5]
            first.bias[5:] = first.bias[:5]
            last.weight[:, 5:] *= 10  # large, so that only the repair tells that they can go
    return nn.Sequential(first, nn.Tanh(), last).double().eval()


def batches(count: int = 200) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(count, 12, dtype=torch.float64, generator=generator).split(50))


def comb(model: nn.Module) -> graphcomb.Comb:
    return graphcomb.comb(graphcomb.capture(model, torch.zeros(2, 12).double(), dynamic_shapes="batch"))


def test_the_first_index_to_go_costs_what_refitting_by_hand_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "RIDGES", (1e-9,))
    model, x = network(), torch.cat(batches())
    found = comb(model)
    (group,) = [g for g in found.groups if g.frozen is None]
    (reader,), count = score.readers(found, [group], Context(data=batches()), 1000)
    assert count == len(x)
    scores = score.Losses(found, [group], Context(data=batches()), 1000).scores()[group.atom]
    hidden = model[:2](x).detach()
    root = (reader.sensitivity * reader.coherent[0] / reader.coherent[1] / len(x)).sqrt()
    lost = []
    for i in range(10):
        rest = torch.cat([hidden[:, [j for j in range(10) if j != i]], torch.ones(len(x), 1)], 1)
        column = hidden[:, i : i + 1]
        residual = column - rest @ torch.linalg.lstsq(rest, column).solution
        lost.append(float(residual.square().sum() * (root * model[2].weight[:, i].detach()).square().sum()))
    first = int(np.argmin(scores))
    assert first == int(np.argmin(lost))
    assert scores[first] == pytest.approx(lost[first], rel=1e-5)


def test_of_channels_that_repeat_one_another_one_goes_and_the_other_stays() -> None:
    found = comb(network(copies=True))
    (group,) = [g for g in found.groups if g.frozen is None]
    scores = score.Losses(found, [group], Context(data=batches()), 1000).scores()[group.atom]
    gone = set(np.argsort(scores)[:5].tolist())
    assert {i % 5 for i in gone} == set(range(5))
    result = RemoveChannels(ratio=0.5, round_to=1, importance="repair", repair=True)(found.program, data=batches())
    x = torch.cat(batches())
    wanted = found.program.module().eval()(x)
    torch.testing.assert_close(result.program.module().eval()(x), wanted, rtol=0, atol=1e-6)


def test_an_axis_that_no_linear_layer_reads_is_scored_in_the_same_unit() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).flatten(2)).mean(1)

    torch.manual_seed(0)
    program = graphcomb.capture(Attention().double().eval(), torch.zeros(2, 5, 8).double(), dynamic_shapes="batch")
    data = list(torch.randn(32, 5, 8, dtype=torch.float64).split(8))
    found = graphcomb.comb(program)
    groups = [g for g in found.groups if g.frozen is None]
    scores = score.Losses(found, groups, Context(data=data), 100).scores()
    assert any(np.isinf(own).all() for own in scores.values())
    result = RemoveChannels(ratio=0.5, round_to=1, importance="repair", kinds=("head width", "head"))(
        program, data=data
    )
    assert result.removed
