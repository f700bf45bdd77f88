"""Results of stages in a folder, so that an interrupted run goes on."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...graph.errors import BadInput
from ...graph.program import Program
from ..base import Context
from ..common.processes import accelerator, agreed
from ..common.repeat import Samples, run_code, says_anew


class StoredStage:
    """The result of a stage, in the context's `out` under a name that stands for what it depends on, with a sample of the
    data. The main process decides whether there is one; without a folder there never is."""

    def __init__(self, stage: str, program: Program, context: Context, *identity: Any):
        self.path: Path | None = None
        self.stage, self.samples = stage, Samples(context)
        if context.out is not None:
            parts = (*identity, accelerator().num_processes)
            code = agreed(lambda: run_code(program.module(), context, *parts))
            self.path = Path(context.out) / f"{stage}-{code}"

    def tensors(self) -> dict[str, torch.Tensor] | None:
        """The stored state of a network by name, on the CPU; None where there is none of this run."""
        return self._read(lambda path: torch.load(path, map_location="cpu", weights_only=True))

    def keep_tensors(self, state: dict[str, torch.Tensor]) -> None:
        """Store the state of a network."""
        self._write(state, torch.save)

    def values(self) -> dict[str, float]:
        """The stored scores; none where there are none of this run."""
        return self._read(lambda path: json.loads(path.read_text())) or {}

    def keep_values(self, values: dict[str, float]) -> None:
        """Store scores, in place of those before."""
        self._write(values, lambda value, part: part.write_text(json.dumps(value)))

    def _read(self, read: Callable[[Path], Any]) -> Any:
        """What the main process finds of the same data, in every process."""
        return None if self.path is None else agreed(lambda: self._same(read))

    def _same(self, read: Callable[[Path], Any]) -> Any:
        assert self.path is not None
        if self.path.exists():
            try:
                stored = read(self.path)
                if not self.samples.differ(stored["data"]):
                    return stored["result"]
            except (OSError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
                raise BadInput(f"{self.path}: cannot be read ({error}); delete it to start this stage anew") from error
        if list(self.path.parent.glob(f"{self.stage}-*")):
            says_anew(self.path.parent, f"PruneDepth's {self.stage}")
        return None

    def _write(self, result: Any, write: Callable[[Any, Path], Any]) -> None:
        if self.path is None or not accelerator().is_main_process:
            return
        part = self.path.with_name(f".{self.path.name}.part")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write({"result": result, "data": self.samples.codes}, part)
        os.replace(part, self.path)
