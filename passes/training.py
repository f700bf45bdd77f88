"""Training and what it is made of, under one name: see `passes.train` and `passes.common`."""

from .common.losses import accuracy, default_loss, logits_of, task_loss
from .common.processes import accelerator, agreed, averaged, gathered, placed
from .common.repeat import fingerprint, rng_state, seeded
from .common.scoring import bar, evaluate
from .train.callbacks import Callback, HeldZeros, Kept, Surgery, taken
from .train.loop import fit, total_steps
from .train.options import SCHEDULES, Training, learning_rate

__all__ = [
    "SCHEDULES",
    "Callback",
    "HeldZeros",
    "Kept",
    "Surgery",
    "Training",
    "accelerator",
    "accuracy",
    "agreed",
    "averaged",
    "bar",
    "default_loss",
    "evaluate",
    "fingerprint",
    "fit",
    "gathered",
    "learning_rate",
    "logits_of",
    "placed",
    "rng_state",
    "seeded",
    "taken",
    "task_loss",
    "total_steps",
]
