"""The file that an interrupted training run goes on from."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ...graph.errors import BadInput
from ..common.repeat import says_anew


class Checkpoint:
    """The state of one training run in a file. path: its name stands for everything that decides the result. name: of the
    pass that trains, for messages."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name

    def write(self, state: dict[str, Any]) -> None:
        """Write the state under a temporary name and rename it. BadInput where the folder cannot be written."""
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, part)
            os.replace(part, self.path)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise BadInput(f"{self.path}: the checkpoint cannot be written ({error})") from None

    def read(self) -> dict[str, Any] | None:
        """The state, None where there is no file. BadInput for one that is damaged."""
        if not self.path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            _ = [process["seen"] for process in state["own"]]
            return state
        except Exception as error:
            raise self.unusable(error) from error

    def unusable(self, error: Exception) -> BadInput:
        """The error of a file whose state does not fit the run."""
        return BadInput(f"{self.path}: no usable checkpoint ({error}); delete it to train from the start")

    def warn_of_others(self) -> None:
        """Warn where the folder holds a checkpoint of the pass that is not taken up."""
        if list(self.path.parent.glob(f"{self.name.lower()}-*.ckpt")):
            says_anew(self.path.parent, self.name)

    def remove(self) -> None:
        """Delete the file, where there is one."""
        self.path.unlink(missing_ok=True)
