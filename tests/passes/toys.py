"""Small networks, data that stops early, and comparisons of weights, which tests of passes share."""

import itertools

import torch
from torch import nn

import graphcomb as g


class Stop(Exception):
    pass


class Cut:
    """Batches, cut off by an exception after `count` of them: of all that are taken, or of every pass over them."""

    def __init__(self, data, count, every_pass=False):
        self.data, self.count, self.left, self.every_pass = data, count, count, every_pass
        self.generator = getattr(data, "generator", None)

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        for i, batch in enumerate(self.data):
            if (i == self.count) if self.every_pass else not self.left:
                raise Stop
            self.left -= 1
            yield batch


def state(program):
    return {k: v.clone() for k, v in program.module().state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def chain(*widths):
    """Convolutions of these widths in a row, (N, 1, H, W) to three classes."""
    layers = []
    for inputs, outputs in itertools.pairwise((1, *widths)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3))


def draws(count, shape, classes, seed=0):
    """Random batches of images and labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(shape, generator=generator), torch.randint(classes, shape[:1], generator=generator))
        for _ in range(count)
    ]


class Block(nn.Module):
    """A residual block around two normalised convolutions."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x):
        return torch.relu(x + self.body(x))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Block(8), Block(8), nn.Conv2d(8, 8, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def captured(model=None, seed=0):
    return g.capture(model or network(seed), torch.randn(2, 3, 8, 8), dynamic_shapes="batch")


def batches(count=8, seed=0):
    return draws(count, (8, 3, 8, 8), 4, seed)
