"""Networks, batches and plain training loops for the tests of sessions."""

import torch
from torch import nn
from torch.nn import functional as F

import graphcomb
from graphcomb.passes import RemoveChannels

STEPS = 12


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


class Attention(nn.Module):
    """A class-token-free ViT: heads and hidden units are read by weights alone, the trunk by LayerNorms too."""

    def __init__(self, width=16, heads=4, depth=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.heads = nn.Conv2d(3, width, 4, 4), heads
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "a": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width),
                "b": nn.LayerNorm(width), "up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width),
            })
            for _ in range(depth)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)
        self.double()

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for m in self.layers:
            n, t, c = x.shape
            q, k, v = m["qkv"](m["a"](x)).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
            x = x + m["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))
            x = x + m["down"](F.gelu(m["up"](m["b"](x))))
        return self.head(self.norm(x).mean(1))


def batch(step, size=4, side=8, dtype=torch.float64):
    """In float64, so that rounding which optimizers divide by itself (a bias in front of a BatchNorm) decides nothing."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 3, side, side, generator=generator).to(dtype), torch.randint(
        4, (size,), generator=generator
    )


def attached(model, cut, pass_=None, steps=STEPS, **options):
    pass_ = pass_ or RemoveChannels(macs=0.5, interval=2, round_to=1)
    return graphcomb.attach(model, pass_, example=(batch(0)[0],), steps=steps, cut=cut, **options)


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
