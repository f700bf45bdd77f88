"""Networks, batches and plain training loops for the tests of sessions."""

import torch
from torch import nn
from torch.nn import functional as F

import graphcomb
from graphcomb.passes import RemoveChannels

from ...passes.channels.toys import Transformer

STEPS = 12
CUTS = ("end", "during")
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, eps=1e-4),
}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.n, self.m = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.m(self.b(F.relu(self.n(self.a(x))))))


class Residual(nn.Module):
    def __init__(self, width=8, classes=4):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.Hardswish())
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, classes)
        self.double()

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def attention():
    return Transformer(inputs=3, patch=4).double()


def batch(step, size=4, side=8, dtype=torch.float64):
    """In float64, so that rounding which optimizers divide by itself (a bias in front of a BatchNorm) decides nothing."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 3, side, side, generator=generator).to(dtype), torch.randint(
        4, (size,), generator=generator
    )


def attached(model, cut, pass_=None, steps=STEPS, **options):
    pass_ = pass_ or RemoveChannels(macs=0.5, interval=2, round_to=1)
    return graphcomb.attach(model, pass_, steps=steps, cut=cut, **{"example": (batch(0)[0],)} | options)


def train(session, optimizer, steps=STEPS, first=0, each=None):
    """The loop of the documentation."""
    for step in range(first, steps):
        x, y = batch(step)
        F.cross_entropy(session.module(x), y).backward()
        session.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        session.after_step()
        if each is not None:
            each(step)
