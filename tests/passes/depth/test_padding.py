"""Padding in unusual places and layouts moves to the head of a block, exactly."""

import pytest
import torch
from torch import nn

from graphcomb.graph.verify.evaluate import relative_error
from graphcomb.passes import Fuse
from graphcomb.passes.common.feed import Batch
from graphcomb.passes.depth.price import find_blocks
from graphcomb.passes.depth.relax import relax, set_switches, settle
from graphcomb.passes.depth.start_norms import start_norms

from .toys import Add, Move, captured, conv, head, last


class Scaled(nn.Module):
    """A scale in front of all layers of a branch, given as the first factor."""

    def __init__(self, *layers):
        super().__init__()
        self.gamma, self.body = nn.Parameter(torch.rand(8, 1, 1)), nn.Sequential(*layers)

    def forward(self, x):
        return x + self.body(self.gamma.exp() * x)


def conv3(**options):
    return nn.Conv2d(8, 8, 3, **{"padding": 1, **options})


TO_LAST, TO_FIRST, POOL = Move(0, 2, 3, 1), Move(0, 3, 1, 2), nn.MaxPool2d(2)


PADDINGS = {
    "by a word": lambda: head(Add(nn.Sequential(conv(8, 8, 1), conv3(padding="same"), nn.ReLU(), conv3(padding="same")))),
    "by a word, unevenly": lambda: head(POOL, conv(8, 16, 1), nn.Conv2d(16, 8, 4, padding="same"), nn.BatchNorm2d(8)),
    "by a layer": lambda: head(POOL, conv(8, 16, 1), nn.ZeroPad2d((0, 1, 2, 1)), nn.Conv2d(16, 8, 3, 2), nn.BatchNorm2d(8)),
    "twice": lambda: head(conv(8, 8, 1), nn.ZeroPad2d(1), conv(8, 8, 1), nn.Conv2d(8, 4, 5, padding=1), nn.Conv2d(4, 8, 1)),
    "behind a scale": lambda: head(Scaled(nn.BatchNorm2d(8), conv(8, 8), nn.Conv2d(8, 8, 1))),
    "behind a group norm": lambda: head(Add(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), conv(8, 8), conv3()))),
    "behind a transposed convolution": lambda: head(
        POOL, nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU(), conv(8, 8), nn.Conv2d(8, 8, 1)
    ),
    "behind a norm over the last axis": lambda: head(
        Add(nn.Sequential(conv(8, 8, 1), TO_LAST, nn.LayerNorm(8), TO_FIRST, nn.GELU(), conv(8, 8), nn.Conv2d(8, 8, 1)))
    ),
    "in another layout": lambda: last(
        Add(nn.Sequential(TO_FIRST, nn.BatchNorm2d(8), conv(8, 8), nn.Conv2d(8, 8, 1), TO_LAST))
    ),
    "between layouts": lambda: last(
        Add(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), TO_FIRST, conv(8, 8), TO_LAST, nn.Linear(8, 8), nn.Linear(8, 8)))
    ),
    "behind layers over the width": lambda: head(
        Add(nn.Sequential(conv(8, 8, 1), nn.Linear(12, 12), nn.LayerNorm(12), nn.ReLU(), conv(8, 8), nn.Conv2d(8, 8, 1)))
    ),
    "transposed": lambda: head(
        Add(nn.Sequential(Move(0, 1, 3, 2), conv(8, 8, 1), Move(0, 1, 3, 2), conv(8, 8), nn.Conv2d(8, 8, 1)))
    ),
}  # fmt: skip


OTHERS = {
    "slopes of channels": lambda: head(Add(nn.Sequential(nn.Conv2d(8, 16, 1), nn.PReLU(16), nn.Conv2d(16, 8, 1)))),
    "rms norm": lambda: last(Add(nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))),
    "no bias": lambda: head(
        Add(
            nn.Sequential(
                nn.Conv2d(8, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 2, 1, bias=False), nn.ReLU(),
                nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(2, 8, 1, bias=False),
            )
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", [*PADDINGS.values(), *OTHERS.values()], ids=[*PADDINGS, *OTHERS])
def test_unusual_blocks_are_exact_at_both_ends(make):
    program = captured(make())
    blocks = [b for b in find_blocks(program) if b.prunable]
    assert blocks
    x = torch.randn(3, 3, 16, 12, dtype=torch.float64)
    with torch.no_grad():
        relaxed = relax(program, blocks, fitted=True)
        start_norms(relaxed, [Batch((x,), {}, None, 3)])
        assert relative_error(relaxed.module()(x), program.module()(x)) <= 1e-14
        set_switches(relaxed.module(), [0.0] * len(blocks))
        pruned, settled = relaxed.module()(x), settle(relax(program, blocks, True, fitted=True), relaxed)
        assert relative_error(settled.module()(x), pruned) <= 1e-13
        fused = Fuse()(settled).program
        assert relative_error(fused.module()(x), pruned) <= 1e-10
    assert fused.macs <= program.macs - sum(b.saves for b in blocks)  # more where a neighbour merges too
