"""Results of stages in a folder, so that an interrupted run continues."""

import pickle
from pathlib import Path
from typing import Any

import torch

from ...graph.errors import BadInput
from ...graph.program import Program
from ..base import Context
from ..common.processes import accelerator, agreed
from ..common.repeat import Samples, run_code, says_anew
from ..train.checkpoint import Checkpoint


class StoredStage:
    """The result of a stage, in a file of the context's `out` whose name has a hash of everything that it depends on.

    The file also has a sample of the data. The main process reads and writes it for all; without a folder nothing is
    stored.
    """

    def __init__(self, stage: str, program: Program, context: Context, *identity: Any):
        self.path: Path | None = None
        self.stage, self.samples = stage, Samples(context)
        if context.out is not None:
            parts = (*identity, accelerator().num_processes)
            code = agreed(lambda: run_code(program.module(), context, *parts))
            self.path = Path(context.out) / f"{stage}-{code}"

    def read(self) -> Any:
        """The stored tensors or numbers, by name, in every process; None if nothing of this run is stored. Raises BadInput
        for a damaged file."""
        return None if self.path is None else agreed(self._read)

    def _read(self) -> Any:
        assert self.path is not None
        if self.path.exists():
            try:
                stored = torch.load(self.path, map_location="cpu", weights_only=True)
                if not self.samples.differ(stored["data"]):
                    return stored["result"]
            except (OSError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
                raise BadInput(f"{self.path}: cannot be read ({error}); delete it to start this stage anew") from error
        if list(self.path.parent.glob(f"{self.stage}-*")):
            says_anew(self.path.parent, f"PruneDepth's {self.stage}")
        return None

    def write(self, result: dict[str, Any]) -> None:
        """Store tensors or numbers in place of earlier ones."""
        if self.path is not None and accelerator().is_main_process:
            Checkpoint(self.path, "PruneDepth").write({"result": result, "data": self.samples.codes})
