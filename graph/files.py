"""Files that are either complete or absent: written under a temporary name and renamed; errors of reading are one line."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import BadInput


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A context that yields a temporary name in the folder of `path`, renamed to `path` on success and removed on failure.
    Raises BadInput if the folder cannot be written."""
    part = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.part{path.suffix}")
        # O_EXCL: a new file, never the target of a link with that name; with the permissions of new files.
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield part
        part.replace(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if part != path:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """JSON-able values with None instead of numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a value as JSON; values that JSON does not know are written as text. Raises BadInput if the folder cannot be
    written."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=indent, default=str) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises BadInput for a file that cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise BadInput(f"{path}: not JSON ({error})") from error
