"""A network around one function, and how far it can be pruned."""

import torch
from torch import nn

from graphcomb import capture, verify
from graphcomb.graph.comb.solve import Comb
from graphcomb.passes import RemoveChannels

from ..toys import Head


class Around(nn.Module):
    """One stretch of layers before and one after whatever `function` does to 8 channels of (B, C, 4, 4)."""

    def __init__(self, function, out=8):
        super().__init__()
        self.function = function
        self.stem, self.before = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1)
        self.after, self.head = nn.Conv2d(out, 10, 1), Head(10)

    def forward(self, x):
        y = self.before(self.stem(x).relu())
        return self.head(self.after(self.function(y)).relu())


def pruned(model, x, **options):
    """Half of everything the options allow, exact; shapes of what is left by parameter name."""
    torch.manual_seed(0)
    program = capture(model, x)
    result = RemoveChannels(**({"ratio": 0.5, "round_to": 1} | options))(program)
    if result.removed:
        assert verify.surgery(program, result) <= 1e-10
    found = {n: tuple(p.shape) for n, p in result.program.module().named_parameters()}
    return found, Comb(program), result


X = torch.randn(2, 3, 4, 4)
