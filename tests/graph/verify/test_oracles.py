"""Programs made by the comb: three oracles agree, and wrong indices are caught."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphcomb import verify
from graphcomb.graph.comb.solve import comb
from graphcomb.graph.errors import GraphcombError
from graphcomb.graph.nodes import op_name

from ...oracles.mutate import mutate, mutation_test
from ...oracles.restriction import interference, restriction
from .toys import (
    EXACT,
    IMAGE,
    Residual,
    attention,
    combed,
)


class Mixed(nn.Module):
    """Grouped and depthwise convolutions, a transposed one, concatenation, GroupNorm and a shuffle."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.depth = nn.Conv2d(16, 32, 3, padding=1, groups=16)
        self.up = nn.ConvTranspose2d(48, 8, 2, stride=2)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        y = F.channel_shuffle(self.grouped(x), 4)
        z = torch.cat([self.depth(y).relu(), x], 1)
        return self.out(self.up(z).relu())


class Transformer(nn.Module):
    """Patches, a class token, position embedding, fused qkv, layer scale and an MLP."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 24, 4, stride=4)
        self.token, self.place = nn.Parameter(torch.zeros(1, 1, 24)), nn.Parameter(torch.randn(1, 5, 24) * 0.02)
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.scale = nn.Parameter(torch.full((24,), 1e-5))
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.head = nn.Linear(24, 7)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 4, 6)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.scale * self.proj(y)
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


MADE = [(Residual, IMAGE), (Mixed, (3, 3, 6, 6)), (Transformer, (3, 3, 8, 8))]


@pytest.mark.parametrize(("model", "size"), MADE)
def test_three_oracles_agree(model, size):
    before, result = combed(model, torch.randn(size))
    assert result.removed
    assert verify.check(before, result).ok
    assert restriction(before, result) < EXACT
    assert interference(before, result) < EXACT


@pytest.mark.parametrize(("model", "size"), MADE)
def test_wrong_indices_are_caught(model, size):
    before, result = combed(model, torch.randn(size))
    report = mutation_test(before, result, seed=1)
    assert report.total >= 12
    assert report.caught + len(report.missed) == report.total
    invisible = [m for m in report.missed if "softmax" in m.why or "attention" in m.why]
    assert len(report.missed) == len(invisible), report.missed  # only shifts in front of a softmax stay hidden


def test_mutations_that_stay_hidden_are_explained():
    """The bias of keys shifts all scores of a query alike, and the softmax forgets it."""
    torch.manual_seed(0)
    before, result = attention()
    found = {(m.parameter, m.dim): m for m in mutate(before, result)}
    assert found["k.weight", 0].caught
    hidden = found["k.bias", 0]
    assert not hidden.caught
    assert "scaled_dot_product_attention" in hidden.why
    assert all(m.caught for key, m in found.items() if key != ("k.bias", 0))
    assert mutation_test(before, result, count=3).total == 3


def test_removals_that_are_no_union_of_atoms():
    before, result = combed(Residual, torch.randn(IMAGE))
    removed = {n: dict(d) for n, d in result.removed.items()}
    removed["head.weight"][1] = removed["head.weight"][1][1:]
    with pytest.raises(GraphcombError, match="not what its atoms lose elsewhere"):
        restriction(before, SimpleNamespace(program=result.program, removed=removed))


def test_second_opinions_see_a_leak():
    """A comb that overlooks one consumer: noise gets through to the outputs, and the restricted network is another."""
    before, result = combed(Residual, torch.randn(IMAGE))
    wrong = comb(before)
    head = next(n for n in wrong.module.graph.nodes if op_name(n) == "linear")
    wrong.axes[head.args[0]] = [wrong.axes[head.args[0]][0], wrong.fresh(head.args[0], 1)]
    assert interference(before, result, comb=wrong) > 1e-3
    assert restriction(before, result, comb=wrong) > 1e-3


def test_buffers_that_the_network_writes_stay_as_they_are():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return self.b(self.a(x).relu()) * self.calls

    before, result = combed(Counting, torch.randn(3, 4))
    assert verify.check(before, result).ok
    assert before.module().get_buffer("calls") == result.program.module().get_buffer("calls") == 0
