"""The model of the demo: a small residual network, and its trained reference, which the cache folder keeps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.nn import functional

from .data import cache_folder, digits
from .graph.files import replacing


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """The CIFAR form of ResNet: three stages of `blocks` blocks with 1, 2 and 4 times `width` channels.

    It maps images (N, channels, H, W), H and W multiples of 4, to logits (N, classes).
    """

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 32, blocks: int = 1):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        stages: list[nn.Module] = []
        inputs = width
        for stage in range(3):
            for block in range(blocks):
                outputs = width * 2**stage
                stages.append(ResidualBlock(inputs, outputs, 2 if stage and not block else 1))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def random_torchvision(name: str, **options: Any) -> nn.Module:
    """Return a torchvision model with random weights, for runs without an internet connection.

    Weights that torchvision initialises to zero (the head of ViT) are random, too, since outputs that are always zero would
    pass every comparison. options: arguments of torchvision's builder of the model.
    """
    from torchvision.models import get_model

    model = get_model(name, weights=None, **options)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.trunc_normal_(parameter, std=0.02)
    return model


@dataclass(frozen=True)
class Training:
    """The settings with which the reference is trained. They determine the name of the cached weights."""

    width: int = 32
    blocks: int = 1
    epochs: int = 24
    rate: float = 2e-3
    weight_decay: float = 0.05
    batch_size: int = 64
    size: int = 16
    seed: int = 0


def trained_digits(**options: Any) -> SmallResNet:
    """Return a `SmallResNet` trained on digits, in eval mode.

    It is trained once, in about a minute on two cores, and then cached. options: fields of `Training`.
    """
    training = Training(**options)
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(training), sort_keys=True).encode()).hexdigest()[:12]
    path = cache_folder() / f"digits-{digest}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = SmallResNet(width=training.width, blocks=training.blocks)
        if not _restore(model, path):
            fit(model, training)
            with replacing(path) as part:
                torch.save(model.state_dict(), part)
    return model.eval()


def fit(model: nn.Module, training: Training) -> None:
    """Train a model on digits in place: cross-entropy with label smoothing 0.1, AdamW, one learning-rate cycle."""
    loader, _ = digits(training.batch_size, training.size)
    optimizer = torch.optim.AdamW(model.parameters(), training.rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.rate, training.epochs * len(loader))
    model.train()
    for _ in track(range(training.epochs), description="training the reference on digits"):
        for images, labels in loader:
            loss = functional.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _restore(model: nn.Module, path: Path) -> bool:
    """Load cached weights and return whether that worked. A file that cannot be read or does not fit counts as missing,
    since the weights can always be trained again."""
    if not path.is_file():
        return False
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:
        return False
    return True
