"""Options of training, and the learning rate and optimizer that follow from them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ..base import Options, check_field


@dataclass(frozen=True)
class Training(Options):
    """Options of every pass that trains.

    - epochs: passes over the data, used if `steps` is None. steps: optimizer steps.
    - optimizer: "adamw" or "sgd" (momentum 0.9). weight_decay: for tensors with two or more dimensions, so neither for
      biases nor for scales of normalisations.
    - lr: the peak learning rate, reached by a linear warm-up over the share `warmup` of all steps, 0 to 1. schedule: how it
      falls to 0 afterwards, "cosine" or "linear", or "constant".
    - clip: largest norm of all gradients together, 0 for no limit.
    - batch_norm: "train" normalises with the batch's statistics and updates the running ones, "frozen" uses the running
      ones as they are.
    - precision: of autocast, "no", "bf16" or "fp16" (which needs a GPU). Weights stay in their own precision.
    - checkpoint_every: steps between checkpoints in the context's `out` folder; 0 for one after each epoch.
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
        check_field(self, "epochs", self.epochs >= 1, "at least 1")
        check_field(self, "steps", self.steps is None or self.steps >= 1, "at least 1, or null")
        check_field(self, "lr", self.lr > 0, "above 0")
        check_field(self, "warmup", 0 <= self.warmup <= 1, "a share of the steps, 0 to 1")
        for key in ("weight_decay", "clip", "checkpoint_every"):
            check_field(self, key, getattr(self, key) >= 0, "at least 0")


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def learning_rate(training: Training, step: int, total: int) -> float:
    """Learning rate of a step (counted from 0) out of `total`: linear warm-up to `lr`, then the schedule."""
    warm = round(training.warmup * total)
    if step < warm:
        return training.lr * (step + 1) / warm
    return training.lr * SCHEDULES[training.schedule]((step - warm) / max(total - warm, 1))


def make_optimizer(module: torch.nn.Module, training: Training) -> torch.optim.Optimizer:
    """An optimizer for the parameters that train; weight decay applies to tensors of two or more dimensions."""
    params = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=training.lr)
