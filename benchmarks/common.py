"""Functions that the benchmarks share: store results so that a run can resume, and record the revision that made them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any


def write(path: Path, text: str) -> None:
    """Write under a temporary name and rename, so that an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def save(path: Path, data: Any, sort_keys: bool = True) -> None:
    write(path, json.dumps(data, indent=1, sort_keys=sort_keys) + "\n")


@functools.cache
def revision() -> str:
    """The commit of graphcomb that is measured, with "-dirty" after changes; GRAPHCOMB_REVISION where there is no git."""
    if "GRAPHCOMB_REVISION" in os.environ:
        return os.environ["GRAPHCOMB_REVISION"]
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
