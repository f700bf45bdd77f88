"""Read a bench bundle on the device, check that its files are those that were bundled, and write files whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "graphcomb-bench/1"
PART = ".part"  # suffix of temporary files
# By precision, the largest error of an output that needs no note: max |a - b| / max |b| with b the reference.
TOLERANCES = {"fp32": 1e-3, "fp16": 5e-2, "int8": 0.3, "fp8": 0.3}


class Failure(Exception):
    """An error with a message of one line for the user."""


class Damaged(Failure):
    """A file of the bundle is not as it was written, so no file of it can be trusted."""


def digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            sha256.update(part)
    return sha256.hexdigest()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise Damaged instead of the errors of reading a file that is missing or damaged. path: the file, for the message."""
    try:
        yield
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror or error}") from error
    except (AttributeError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise Damaged(f"{path}: damaged ({type(error).__name__}: {error}); copy the bundle again") from error


def read_bundle(folder: Path) -> dict[str, Any]:
    """Return the content of bundle.json after checking that every model has a file, a reference, a digest and a known
    precision, and that the plug-in libraries are those that were bundled.

    Raises Failure for another version of the format, Damaged if a check fails.
    """
    path = folder / "bundle.json"
    with reading(path):
        bundle = json.loads(path.read_text())
        if bundle["format"] != FORMAT:
            raise Failure(f"{path}: of format {bundle['format']}, this script reads {FORMAT}; bundle the models again")
        if not bundle["models"]:
            raise ValueError("no models")
        for about in bundle["models"].values():
            about.setdefault("precision", bundle["precision"])
            about["file"], about["reference"], about["sha256"] = (
                str(about[k]) for k in ("file", "reference", "sha256")
            )
            TOLERANCES[about["precision"]]
    _check_files(folder, bundle.setdefault("plugins", {}))
    return bundle


def read_reference(folder: Path, about: dict[str, Any]) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Return the reference inputs by name, and the reference outputs in order, of a model (`about` in bundle.json).

    Raises Damaged if the files of the model are not those that were bundled.
    """
    _check_files(folder, {about["file"]: about["sha256"], **about.get("data", {})})
    with reading(folder / about["reference"]):
        with np.load(str(folder / about["reference"])) as data:
            arrays = {key: data[key] for key in data.files}
        feeds = {key[6:]: value for key, value in arrays.items() if key.startswith("input:")}
        return feeds, [arrays[key] for key in sorted(arrays) if key.startswith("output:")]


def _check_files(folder: Path, digests: dict[str, str]) -> None:
    for name, wanted in digests.items():
        with reading(folder / name):
            if digest(folder / name) != wanted:
                raise Damaged(f"{Path(name).name}: not the file that was bundled; copy the bundle again")


def complete(path: Path, names: Iterable[str], feeds: dict[str, np.ndarray]) -> None:
    """Raise Damaged if the names of the reference inputs are not those of the model's inputs."""
    if set(names) != feeds.keys():
        texts = ", ".join(sorted(names)), ", ".join(sorted(feeds))
        raise Damaged("{}: takes {}, and the reference has {}; bundle it again".format(path.name, *texts))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it, so that it is never half written."""
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        part.write_bytes(data)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON in the same way."""
    write_bytes(path, (json.dumps(values, indent=1) + "\n").encode())


def remove_parts(folder: Path) -> None:
    """Remove the temporary files of earlier runs that were killed. Those of processes that still run are left."""
    for part in folder.glob(f".*{PART}"):
        number = part.name[: -len(PART)].rpartition(".")[2]
        if number.isdigit() and not Path(f"/proc/{number}").exists():
            with contextlib.suppress(OSError):
                part.unlink()
