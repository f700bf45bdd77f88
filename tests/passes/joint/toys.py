"""Small trained-like networks for decisions about width and depth, and devices that predict latencies."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import nn

import graphcomb
from graphcomb.graph.workload.layer import Layer


class PerMac:
    """A device whose time is multiply-accumulates and a price per layer."""

    per_run = 1e-8

    def prepare(self, layers: Iterable[Layer], progress: bool = False) -> None:
        pass

    def seconds(self, layer: Layer) -> float:
        return 1e-9 * layer.macs(1) + (0.0 if layer.joined else 1e-8)

    def __str__(self) -> str:
        return "per MAC"


class Block(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.one, self.two = nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.two(torch.relu(self.one(x))))


class Heads(nn.Module):
    """Two outputs, one of class scores and one of boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scores, self.boxes = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.body(x))
        return self.scores(x), self.boxes(x).sigmoid()


def chain(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def trunk(width: int = 8, inner: int = 8, blocks: int = 2) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1), nn.ReLU(), *(Block(width, inner) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4),
    )  # fmt: skip


def images(*shape: int, batches: int = 4, size: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(batches, size, *shape, generator=generator))


def program(model: nn.Module, *shape: int) -> graphcomb.Program:
    """Captured, with weights that make outputs differ clearly between images."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=1.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.1)
    return graphcomb.capture(model.eval(), torch.randn(2, *shape), dynamic_shapes="batch")
