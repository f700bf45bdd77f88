"""How to train: the options that every trained pass has, and the learning rate that follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ...graph.errors import BadInput
from ..base import Options


@dataclass(frozen=True)
class Training(Options):
    """How to train; the options that every trained pass has.

    epochs: passes over the data (ignored when `steps` is given). steps: optimizer steps. optimizer: "adamw" or "sgd"
    (momentum 0.9). lr: peak learning rate. weight_decay: not applied to biases and norm scales (tensors of fewer than
    two dimensions). schedule: of the learning rate after the warm-up, down to 0, or "constant". warmup: share of all
    steps, 0..1. clip: largest gradient norm, 0 for none. batch_norm: "train" normalises with batch statistics and
    updates the running ones, "frozen" uses the running ones as they are. precision: "no", "bf16" or "fp16" (autocast;
    fp16 needs a GPU). checkpoint_every: steps between checkpoints in the context's `out` folder, 0 for once an epoch.
    """

    epochs: int = 1
    steps: int | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    clip: float = 1.0
    batch_norm: Literal["train", "frozen"] = "train"
    precision: Literal["no", "bf16", "fp16"] = "no"
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        self._require("epochs", self.epochs >= 1, "at least 1")
        self._require("steps", self.steps is None or self.steps >= 1, "at least 1, or null")
        self._require("lr", self.lr > 0, "greater than 0")
        self._require("weight_decay", self.weight_decay >= 0, "at least 0")
        self._require("warmup", 0 <= self.warmup <= 1, "a share of the steps, 0 to 1")
        self._require("clip", self.clip >= 0, "at least 0")
        self._require("checkpoint_every", self.checkpoint_every >= 0, "at least 0")

    def _require(self, field: str, holds: bool, what: str) -> None:
        if not holds:
            raise BadInput(f"{type(self).__name__}.{field}: must be {what}, got {getattr(self, field)!r}")


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def learning_rate(training: Training, step: int, total: int) -> float:
    """Learning rate of the step (counted from 0): linear warm-up to `lr`, then the schedule."""
    warm = round(training.warmup * total)
    if step < warm:
        return training.lr * (step + 1) / warm
    return training.lr * SCHEDULES[training.schedule]((step - warm) / max(total - warm, 1))


def make_optimizer(module: torch.nn.Module, training: Training) -> torch.optim.Optimizer:
    """An optimizer of the parameters that train; weight decay is for tensors of two dimensions and more."""
    params = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=training.lr)
