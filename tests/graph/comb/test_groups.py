"""Kinds of groups, and which of them patterns and ratios choose."""

import numpy as np
import pytest
import torch
from torch import nn

from graphcomb import capture
from graphcomb.graph.comb.groups import KINDS
from graphcomb.graph.comb.solve import Comb

from ..toys import CASES, TokenHead
from .toys import Around, X, pruned


def kinds_of(name, shape=None):
    case = CASES[name]
    comb = Comb(capture(case.model(), torch.randn(shape or case.shape)))
    return {g.name: (g.kind, g.size) for g in comb.groups if g.frozen is None and g.size > 1}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CatWithItself", {("channel", 8), ("channel", 6)}),
        ("FusedQkv", {("head", 3), ("head width", 5), ("hidden", 10)}),
        ("GroupedConv", {("group", 4), ("channel", 3), ("channel", 4)}),
        ("DepthwiseMultiplier", {("channel", 7), ("multiplier", 3)}),
        ("LayerScale", {("channel", 8), ("hidden", 16)}),
        ("GroupNorm", {("group", 3), ("channel", 4)}),
    ],
)
def test_kinds(name, expected):
    assert set(kinds_of(name).values()) == expected


def test_tokens_and_constants_are_kinds_of_their_own():
    class Registers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(5, 8), TokenHead(8)
            self.registers = nn.Parameter(torch.randn(1, 6, 8))
            self.register_buffer("table", torch.randn(4, 8))

        def forward(self, x):
            y = torch.cat([self.registers.expand(x.shape[0], -1, -1), self.a(x)], 1)
            return self.head(y) + self.table.softmax(0).mean() + (self.table @ self.table.mT).sum()

    x = torch.randn(2, 7, 5)
    comb = Comb(capture(Registers(), x))
    assert [g.kind for g in comb.groups if g.members[0] == ("registers", 1)] == ["token"]
    assert pruned(Registers(), x)[0]["registers"] == (1, 6, 4)  # tokens are off by default
    found = pruned(Registers(), x, kinds=("token",))[0]
    assert found["registers"] == (1, 3, 8)
    assert found["a.weight"] == (8, 5)


@pytest.mark.parametrize(
    ("kinds", "qkv", "proj"),
    [
        (("head",), (30, 10), (10, 10)),
        (("head width",), (27, 10), (10, 9)),
        (("hidden",), (45, 10), (5, 15)),
        (("head", "head width", "hidden"), (30, 10), (5, 10)),
        (("channel",), (45, 10), (10, 15)),
    ],
)
def test_heads_and_widths_are_targeted_separately_and_stay_balanced(kinds, qkv, proj):
    """Of 3 heads of width 5: one head goes, or two widths of every head; together, heads before widths."""
    case = CASES["FusedQkv"]
    found, _, result = pruned(case.model(), torch.randn(case.shape), kinds=kinds)
    assert (found["qkv.weight"], found["proj.weight"]) == (qkv, proj)
    lost = np.array(result.removed.get("qkv.weight", {}).get(0, []), dtype=int)
    gone = np.zeros((3, 3, 5), dtype=bool)
    gone.reshape(-1)[lost] = True
    assert (gone == gone[:1]).all()  # the same heads and widths of q, k and v
    assert (gone.any(2) == gone.all(2)).all() or (gone == gone[:, :1]).all()


def test_include_and_exclude_by_parameter_pattern():
    model, x = Around(lambda y: y), X
    everything = pruned(model, x)[0]
    assert everything["stem.weight"][0] == 3
    only = pruned(model, x, include=("stem.*",))[0]
    assert (only["stem.weight"][0], only["before.weight"][0], only["after.weight"][0]) == (3, 8, 10)
    only = pruned(model, x, include=("after.*",))[0]  # its inputs are members too
    assert (only["stem.weight"][0], only["before.weight"][0], only["after.weight"][0]) == (6, 4, 5)
    without = pruned(model, x, exclude=("before.*",))[0]
    assert (without["stem.weight"][0], without["before.weight"][0], without["after.weight"][0]) == (6, 8, 5)


@pytest.mark.parametrize(
    ("name", "parameter", "dim"),
    [("FusedQkv", "qkv.weight", 0), ("GroupedConv", "b.weight", 0), ("DepthwiseMultiplier", "b.weight", 0)],
)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_ratio_is_the_share_of_an_axis(name, parameter, dim, ratio):
    """Products do not compound: of heads x width, groups x channels or base x multiplier only one factor shrinks."""
    case = CASES[name]
    model = case.model()
    whole = dict(model.named_parameters())[parameter].shape[dim]
    found, comb, _ = pruned(model, torch.randn(case.shape), ratio=ratio, kinds=KINDS)
    largest = max(g.size for g in comb.groups if (parameter, dim) in g.members)
    share = 1 - found[parameter][dim] / whole
    assert ratio - 1 / min(g.size for g in comb.groups if (parameter, dim) in g.members) <= share <= ratio + 1e-9
    assert largest < whole


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_scopes_and_importances_are_exact(scope, importance):
    case = CASES["LayerScale"]
    _, _, result = pruned(case.model(), torch.randn(case.shape), scope=scope, importance=importance)
    assert result.removed
