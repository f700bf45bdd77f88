"""Pruned networks built by hand, from narrower layers and weights sliced here, and what the comb makes of a network."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import graphcomb as g
from graphcomb.graph.comb.solve import comb
from graphcomb.graph.comb.surgery import remove

EXACT = 1e-10


def without(tensor, lost):
    for d, indices in lost.items():
        tensor = tensor.index_select(d, torch.tensor([i for i in range(tensor.shape[d]) if i not in indices]))
    return tensor


def by_hand(wide, narrow, removed, *inputs, dynamic="batch"):
    """(dense program, result) from an eager network and its narrower twin, which gets the wide one's sliced weights."""
    state = {name: without(t, removed.get(name, {})) for name, t in wide.state_dict().items()}
    narrow.load_state_dict(state)
    before = g.capture(wide, inputs, dynamic_shapes=dynamic)
    return before, SimpleNamespace(program=g.capture(narrow, inputs, dynamic_shapes=dynamic), removed=removed)


class Residual(nn.Module):
    """Convolutions with BatchNorm, a residual branch and squeeze-excite."""

    def __init__(self, body=8, inner=6, squeeze=4):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, body, 3, padding=1), nn.BatchNorm2d(body)
        self.a, self.norm_a = nn.Conv2d(body, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.b = nn.Conv2d(inner, body, 1)
        self.reduce, self.expand = nn.Conv2d(body, squeeze, 1), nn.Conv2d(squeeze, body, 1)
        self.head = nn.Linear(body, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        y = self.b(self.norm_a(self.a(x)).relu())
        y = y * self.expand(self.reduce(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head((x + y).relu().mean((2, 3)))


BODY, INNER, SQUEEZE = [0, 3, 6], [1, 2], [3]
RESIDUAL = (
    {f"{n}.{k}": {0: BODY} for n in ("stem", "b", "expand") for k in ("weight", "bias")}
    | {f"norm.{k}": {0: BODY} for k in ("weight", "bias", "running_mean", "running_var")}
    | {f"norm_a.{k}": {0: INNER} for k in ("weight", "bias", "running_mean", "running_var")}
    | {"a.weight": {0: INNER, 1: BODY}, "a.bias": {0: INNER}, "head.weight": {1: BODY}}
    | {"reduce.weight": {0: SQUEEZE, 1: BODY}, "reduce.bias": {0: SQUEEZE}}
)
RESIDUAL["b.weight"] = {0: BODY, 1: INNER}
RESIDUAL["expand.weight"] = {0: BODY, 1: SQUEEZE}
IMAGE = (3, 3, 7, 5)


def residual(removed=RESIDUAL):
    torch.manual_seed(0)
    return by_hand(Residual(), Residual(5, 4, 3), removed, torch.randn(IMAGE))


class Attention(nn.Module):
    """Attention with separate projections; heads and widths may be smaller, the scale is the one of width 8."""

    def __init__(self, body=12, heads=4, width=8, values=8, scale=8**-0.5):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.norm = nn.LayerNorm(body)
        self.q, self.k = nn.Linear(body, heads * width), nn.Linear(body, heads * width)
        self.v, self.out = nn.Linear(body, heads * values), nn.Linear(heads * values, body)
        self.head = nn.Linear(body, 3)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x):
        x = x * 1.0
        y = self.norm(x)
        q, k, v = self.split(self.q(y)), self.split(self.k(y)), self.split(self.v(y))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


def grid(heads, width, lost_heads, lost_width):
    """Indices of a (head, width) axis that go."""
    return [h * width + w for h in range(heads) for w in range(width) if h in lost_heads or w in lost_width]


WIDTH, VALUES = grid(4, 8, [2], [0, 5]), grid(4, 8, [2], [3])
HEADS = (
    {f"{n}.{k}": {0: WIDTH} for n in "qk" for k in ("weight", "bias")}
    | {f"v.{k}": {0: VALUES} for k in ("weight", "bias")}
    | {"out.weight": {1: VALUES}}
)


def attention(removed=HEADS, scale=8**-0.5):
    torch.manual_seed(0)
    return by_hand(Attention(), Attention(12, 3, 6, 7, scale), removed, torch.randn(3, 5, 12))


class Shy(nn.Module):
    """A network whose fresh weights hide nearly everything."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 1e-6))
        self.register_buffer("mask", torch.tensor([0.0, -100.0, 0, 0, 0, 0, float("-inf"), 0]))
        self.register_buffer("order", torch.arange(8))
        self.out = nn.Linear(8, 8)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.norm.bias, -9.0)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu() * self.gamma
        return (self.out(x.mean((2, 3)))[:, self.order] + self.mask).softmax(-1)


def combed(model, x, seed=0, ratio=0.5):
    torch.manual_seed(seed)
    before = g.capture(model(), x, dynamic_shapes="batch")
    solved, generator, masks = comb(before), np.random.default_rng(seed), {}
    for group in solved.groups:
        if group.frozen is None and group.size > 1 and group.kind not in ("token", "multiplier", "constant"):
            masks[group.atom] = np.ones(group.size, dtype=bool)
            masks[group.atom][generator.permutation(group.size)[: int(group.size * ratio)]] = False
    program, removed = remove(solved, masks)
    return before, SimpleNamespace(program=program, removed=removed)
