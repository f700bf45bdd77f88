"""The file that an interrupted training run goes on from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...graph.errors import BadInput
from ...graph.files import replacing
from ..common.repeat import says_anew


class Checkpoint:
    """The state of one training run in a file. path: its name stands for everything that decides the result. name: of the
    pass that trains, for messages."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name

    def write(self, state: dict[str, Any]) -> None:
        """Write the state. Raises BadInput where the file cannot be written."""
        try:
            with replacing(self.path) as part:
                torch.save(state, part)
        except RuntimeError as error:  # of PyTorch's writer, as where a disk is full
            raise BadInput(f"{self.path}: cannot be written ({error})") from error

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
        """Delete the file, where there is one, and what killed runs have left of it half written."""
        for file in (self.path, *self.path.parent.glob(f".{self.path.stem}.*.part{self.path.suffix}")):
            file.unlink(missing_ok=True)


def data_differs(stored: list[str], first: Callable[[bool], list[str]]) -> bool:
    """Whether data is not what a stored run began with, by the codes of that and of its first batches. first: reads these
    anew, and draws other random numbers in between where it is told to.

    Batches after the first may hold random changes that depend on what training drew in between, and some data never
    repeats itself: what changes when other numbers are drawn in between, or without a reason, tells nothing.
    """
    now = first(False)
    if now == stored:
        return False
    again = zip(stored, now, first(True), strict=False)
    return len(now) != len(stored) or any(old != new == once_more for old, new, once_more in again)
