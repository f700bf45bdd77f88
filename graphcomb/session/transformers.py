"""A callback that runs a pass inside the Trainer of transformers."""

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
    """Apply a pass while the Trainer of transformers trains: `Trainer(..., callbacks=[SessionCallback(pass_, ...)])`.

    The arguments are those of `graphcomb.attach`, for most models `kwargs={"pixel_values": images}`, with cut="end": the
    model keeps its class and shapes. After training `result` is the `PassResult`. Checkpoints of the Trainer contain the
    session.
    """

    result: PassResult | None = None
    session: Session | None = None

    def __init__(self, pass_: Pass, example: tuple[Any, ...] = (), **options: Any):
        self.pass_, self.options = pass_, {"example": example} | options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Attach the pass, and load the session from a checkpoint if training resumes."""
        self.session = attach(model, self.pass_, steps=state.max_steps, cut="end", **self.options)
        file = self._file(args, state)
        if state.global_step and file.is_file():
            self.session.load_state_dict(torch.load(file, weights_only=True))

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        """Call `Session.before_step`. The gradients are complete and unscaled now."""
        assert self.session is not None
        self.session.before_step(optimizer)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Call `Session.after_step`, since the weights have changed."""
        assert self.session is not None
        self.session.after_step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the session beside the Trainer's own state."""
        if self.session is not None and state.is_world_process_zero:
            torch.save(self.session.state_dict(), self._file(args, state))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Finish the session, which removes what was held at zero."""
        assert self.session is not None
        self.result = self.session.finish()

    @staticmethod
    def _file(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / FILE
