"""Blocks found in the graph, by dominance and without names."""

import torch
from torch import nn

from graphcomb.graph.verify.evaluate import relative_error
from graphcomb.passes import Fuse
from graphcomb.passes.depth.price import find_blocks
from graphcomb.passes.depth.relax import relax

from .toys import Add, captured, conv, head, mlp


def test_blocks_are_found_with_their_costs(network):
    program, kinds = network
    blocks = find_blocks(program)
    assert [b.kind for b in blocks] == kinds
    assert all(b.prunable for b in blocks), [b.why for b in blocks]
    assert all(0 < b.saves <= b.macs and b.kernels > 0 and b.params > 0 for b in blocks)
    assert [b.dropped for b in blocks] == [k == "attention" for k in kinds]
    assert len({b.name for b in blocks}) == len(blocks)


def test_kinds_tell_groups_from_depthwise_layers():
    grouped = nn.Sequential(conv(8, 16, 1, groups=2), conv(16, 16, groups=4), conv(16, 8, 1, act=False))
    pooled = Add(nn.Sequential(nn.GroupNorm(1, 8), nn.AvgPool2d(3, 1, 1)))
    assert [b.kind for b in find_blocks(captured(head(Add(grouped), pooled)))] == ["residual", "residual"]


def test_a_value_used_outside_is_no_block():
    class Leak(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = conv(3, 8), conv(8, 8), conv(8, 8, act=False)

        def forward(self, x):
            x = self.stem(x)
            y = self.one(x)
            return (self.two(y) + x).mean((2, 3)) + y.mean((2, 3))

    assert not [b for b in find_blocks(captured(Leak())) if b.prunable]


def test_linear_branches_are_no_blocks():
    """A reparameterisable sum has nothing to relax; that is Fuse's."""
    assert [
        b.kind for b in find_blocks(captured(head(Add(conv(8, 8, act=False), conv(8, 8, 1, act=False), act=True))))
    ] == []


def test_blocks_behind_a_class_token():
    """The value that a tail follows is not made by a layer alone, and its size is no constant."""

    class Classed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
            self.block, self.head = mlp(8), nn.Linear(8, 4)

        def forward(self, x):
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], 1)
            return self.head(self.block(tokens)[:, 0])

    program = captured(Classed())
    (block,) = find_blocks(program)
    assert (block.kind, block.kernels) == ("mlp", 2)
    x = torch.randn(3, 3, 16, 12, dtype=torch.float64)
    with torch.no_grad():
        settled = relax(program, [block], settled=True)
        assert relative_error(Fuse()(settled).program.module()(x), settled.module()(x)) <= 1e-12
