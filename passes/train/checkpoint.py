"""The file from which an interrupted training run continues."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...graph.errors import BadInput
from ...graph.files import replacing
from ..common.repeat import says_anew


class Checkpoint:
    """The state of one training run in a file. path: its name has a hash of everything that decides the result. name: of
    the pass that trains, for messages."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name

    def write(self, state: dict[str, Any]) -> None:
        """Write the state. Raises BadInput if the file cannot be written."""
        try:
            with replacing(self.path) as part:
                torch.save(state, part)
        except RuntimeError as error:  # PyTorch's writer raises this, for instance if the disk is full
            raise BadInput(f"{self.path}: cannot be written ({error})") from error

    def read(self) -> dict[str, Any] | None:
        """The state, or None if there is no file. Raises BadInput for a damaged file."""
        if not self.path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            _ = [process["seen"] for process in state["own"]]
            return state
        except Exception as error:
            raise self.unusable(error) from error

    def unusable(self, error: Exception) -> BadInput:
        """The error for a file whose state does not fit the run."""
        return BadInput(f"{self.path}: no usable checkpoint ({error}); delete it to train from the start")

    def warn_of_others(self) -> None:
        """Warn if the folder has a checkpoint of the pass that belongs to another run."""
        if list(self.path.parent.glob(f"{self.name.lower()}-*.ckpt")):
            says_anew(self.path.parent, self.name)

    def remove(self) -> None:
        """Delete the file, if there is one, and what killed runs have left of it half written."""
        for file in (self.path, *self.path.parent.glob(f".{self.path.stem}.*.part{self.path.suffix}")):
            file.unlink(missing_ok=True)


def data_differs(stored: list[str], first: Callable[[bool], list[str]]) -> bool:
    """Whether the data is other than that of a stored run, by the hashes of the first batches.

    stored: those of the stored run. first: computes those of the data now; if its argument is True, other random numbers
    are drawn between batches. Batches after the first may hold random changes that depend on what training drew in between,
    and some data never repeats itself: so hashes that change with the numbers drawn, or from one reading to the next, prove
    nothing.
    """
    now = first(False)
    if now == stored:
        return False
    again = zip(stored, now, first(True), strict=False)
    return len(now) != len(stored) or any(old != new == once_more for old, new, once_more in again)
