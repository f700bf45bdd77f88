"""Regions without gradients and of autocast are inlined."""

from __future__ import annotations

import torch
from torch import nn

import graphcomb as g

from .toys import names, same


def test_regions_are_inlined():
    class Regions(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 8)

        def forward(self, x):
            with torch.no_grad():
                mean = x.mean(-1, keepdim=True)
            with torch.autocast("cpu", enabled=False):
                y = self.a(x.float())
            return y - mean

    program = same(Regions(), torch.randn(2, 4, 6))
    assert all(n.op != "call_module" for n in program.graph.nodes)
    assert not any(name.startswith("wrap_with") for name in names(program))


def test_an_enabled_autocast_region_becomes_casts():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = torch.einsum("bi,oi->bo", x, self.a.weight).softmax(-1)
                with torch.autocast("cpu", enabled=False):
                    z = self.a.weight @ self.a.weight.t()
                return self.b(y), z

    model, x = Half(), torch.randn(4, 6)
    program = g.capture(model, x)
    for found, expected in zip(program.module()(x), model(x), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert not any(name.startswith("wrap_with") for name in names(program))
