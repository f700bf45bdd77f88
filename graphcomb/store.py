"""Store the finished passes of a pipeline in a folder, from which an interrupted run continues."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from .graph.files import write_json
from .graph.program import Program
from .passes.base import Pass
from .passes.common.processes import agreed, stored_program
from .passes.common.repeat import Samples, code_of, functions_code, says_anew


def is_main() -> bool:
    """Return whether this process writes files: the only process, or the first of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


class Store:
    """The finished passes in a folder.

    A pass is stored as NN-Name.json, with a digest of everything that it depends on and codes of samples of the data, and
    NN-Name.pt2, the program. If the pass changed nothing, NN-Name.json has its record and there is no program. The folder
    NN-Name has the checkpoints of an unfinished pass. Of several processes only the main one writes.

    - digest: digest of everything that all passes depend on.
    - resume: whether finished passes may be reused.
    - samples: codes of samples of the data, which tell whether the data has changed.
    """

    def __init__(self, folder: Path, digest: str, resume: bool, samples: Samples):
        self.folder, self.digest, self.resume, self.samples = folder, digest, resume, samples
        self.warned = False

    def find(self, index: int, pass_: Pass, program: Program) -> Program | None:
        """Return the stored result of a pass, or None. It must be called once for each pass, in order, since the digest of a
        pass includes those before it."""
        parts = [self.digest, type(pass_).__name__, code_of(type(pass_)), functions_code(pass_), pass_.options()]
        self.digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
        base = self.path(index, pass_)
        note = agreed(lambda: self._note(base)) if self.resume else None
        if note is not None:
            if "record" in note:
                same = program.copy()
                same.history.append(note["record"])
                return same
            return stored_program(base.with_suffix(".pt2")) if note.get("finished") else None
        if is_main():
            shutil.rmtree(base, ignore_errors=True)
            base.with_suffix(".pt2").unlink(missing_ok=True)
            note = {"digest": self.digest, "finished": False, "data": self.samples.codes}
            write_json(base.with_suffix(".json"), note)
        return None

    def _note(self, base: Path) -> dict[str, Any] | None:
        """Return the content of the JSON file of a pass if its digest and the data are unchanged, else None."""
        try:
            note = json.loads(base.with_suffix(".json").read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(note, dict):
            return None
        if note.get("digest") == self.digest and not self.samples.differ(note.get("data", [[], []])):
            return note
        if note.get("finished") and not self.warned:
            self.warned = True
            says_anew(self.folder, base.name)
        return None

    def keep(self, index: int, pass_: Pass, program: Program) -> None:
        """Store a finished pass and delete its checkpoints."""
        if not is_main():
            return
        base, record = self.path(index, pass_), program.history[-1]
        note: dict[str, Any] = {"digest": self.digest, "finished": True, "data": self.samples.codes}
        if record.get("changed"):
            program.save(base.with_suffix(".pt2"))
        else:
            note["record"] = record
        write_json(base.with_suffix(".json"), note)
        shutil.rmtree(base, ignore_errors=True)

    def path(self, index: int, pass_: Pass) -> Path:
        """Return the path under which a pass is stored, without a suffix."""
        return self.folder / f"{index:02d}-{type(pass_).__name__}"
