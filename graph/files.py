"""Files that are whole or not there: written under another name and renamed, read with one line where they are damaged."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import BadInput


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of `path`, renamed to it on success and removed on failure. Raises BadInput when
    the folder cannot be written."""
    part = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.part{path.suffix}")
        # A new file, never what a link under that name leads to, with the rights that new files have.
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield part
        part.replace(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if part != path:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a value as JSON; what JSON does not know is written as its text. Raises what `replacing` raises."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=indent, default=str) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises BadInput for one that cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise BadInput(f"{path}: not JSON ({error})") from error
