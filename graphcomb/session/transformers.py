"""A pass inside transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..passes.base import Pass, PassResult
from .session import Session, attach

FILE = "graphcomb_session.pt"


class SessionCallback(TrainerCallback):
    """Let a pass work on a model that transformers' Trainer trains: `Trainer(..., callbacks=[SessionCallback(pass_, ...)])`.

    The arguments are those of `graphcomb.attach`, `kwargs={"pixel_values": images}` for most models; the model keeps its
    class and shapes (cut="end"). `result` holds the `PassResult` when training has ended; the Trainer's checkpoints hold the
    session.
    """

    result: PassResult | None = None
    session: Session | None = None

    def __init__(self, pass_: Pass, example: tuple[Any, ...] = (), **options: Any):
        self.pass_, self.options = pass_, {"example": example} | options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Attach, and take up what a checkpoint holds."""
        self.session = attach(model, self.pass_, steps=state.max_steps, cut="end", **self.options)
        file = self._file(args, state)
        if state.global_step and file.is_file():
            self.session.load_state_dict(torch.load(file, weights_only=True))

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        """Gradients are complete and unscaled."""
        assert self.session is not None
        self.session.before_step(optimizer)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """The weights have changed."""
        assert self.session is not None
        self.session.after_step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the session beside the Trainer's own state."""
        if self.session is not None and state.is_world_process_zero:
            torch.save(self.session.state_dict(), self._file(args, state))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Cut."""
        assert self.session is not None
        self.result = self.session.finish()

    @staticmethod
    def _file(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / FILE
