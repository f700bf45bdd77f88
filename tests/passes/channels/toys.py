"""Networks of convolutions and attention that are pruned while they train, their data, and the pass that does it."""

import functools
import itertools

import torch
from torch import nn
from torch.nn import functional as F

import graphcomb as g
from graphcomb.passes import Distill, RemoveChannels


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.one, self.two = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norm, self.short = nn.GroupNorm(1, outputs), nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        return F.relu(self.norm(self.two(F.relu(self.one(x)))) + self.short(x))


def convolutions(norm=True, width=8):
    """Two residual blocks; GroupNorm over all channels, so that multiplying by masks would not be slicing."""
    torch.manual_seed(0)
    blocks = [Block(1, width, 2), Block(width, 2 * width, 2)] if norm else []
    if not norm:
        blocks = [nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 4))


class Transformer(nn.Module):
    """Heads and hidden units are read by weights alone, the trunk by LayerNorms too."""

    def __init__(self, width=16, heads=4, depth=2, inputs=1, patch=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.heads = nn.Conv2d(inputs, width, patch, patch), heads
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "a": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width),
                "b": nn.LayerNorm(width), "up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width),
            })
            for _ in range(depth)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for m in self.layers:
            b, n, c = x.shape
            q, k, v = m["qkv"](m["a"](x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + m["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
            x = x + m["down"](F.gelu(m["up"](m["b"](x))))
        return self.head(self.norm(x).mean(1))


def batches(count=12, size=8, labels=True, dtype=torch.float32):
    """Four classes by the brightest quarter."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count * size, 1, 8, 8, generator=generator, dtype=dtype)
    y = torch.randint(4, (count * size,), generator=generator)
    for k, (row, column) in enumerate(itertools.product((0, 4), repeat=2)):
        x[y == k, :, row : row + 4, column : column + 4] += 1
    pairs = list(zip(x.split(size), y.split(size), strict=True))
    return pairs if labels else [a for a, _ in pairs]


def capture(model, dtype=torch.float32):
    return g.capture(model.to(dtype), torch.randn(3, 1, 8, 8, dtype=dtype), dynamic_shapes="batch")


@functools.cache
def dense(dtype=torch.float32):
    """`convolutions`, captured once; passes leave their input program alone."""
    return capture(convolutions(), dtype)


def pruning(train=None, **options):
    options = {"macs": 0.4, "round_to": 2, "interval": 2, **options}
    return RemoveChannels(train=Distill(**{"epochs": 1, "lr": 0.01, "warmup": 0.0} | (train or {})), **options)


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.block, self.head = nn.Conv2d(1, 8, 3, 1, 1), Block(8, 16), nn.Conv2d(16, 3, 1)

    def forward(self, x):
        return {"out": self.head(self.block(F.relu(self.stem(x))))}
