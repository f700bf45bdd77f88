"""The options of the kit's command line, and what can be checked of them before anything is measured."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .contents import Failure
from .cuda import Cuda

LIBRARIES = ("tensorrt", "tensorrt_rtx", "onnxruntime")


def line(error: BaseException) -> str:
    """Return an error as one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (Failure, RuntimeError, OSError)) and text else f"{type(error).__name__}: {text}"


def writable(folder: Path) -> None:
    """Raise Failure if results cannot be written to a folder. This is checked before the measurement, which takes long."""
    if not folder.is_dir():
        raise Failure(f"--out: there is no folder {folder}; make it first")
    if not os.access(str(folder), os.W_OK | os.X_OK):
        raise Failure(f"--out: no permission to write in {folder}")


def library(name: str, preferred: str | None = None) -> tuple[str, dict[str, str]]:
    """Return the library to measure with, and by name of each library that was tried before, why it cannot be used.

    name: a library, or "auto" for the first one that can run here, with `preferred` tried first. TensorRT can run here if it
    is installed and there is a GPU. Raises Failure if no library can be used.
    """
    missing: dict[str, str] = {}
    for candidate in sorted(LIBRARIES, key=lambda c: c != preferred) if name == "auto" else (name,):
        try:
            module = importlib.import_module(candidate)
            if candidate != "onnxruntime" and not hasattr(module, "Builder"):
                raise ImportError("installed without its libraries")
            if candidate != "onnxruntime" and name == "auto":
                Cuda().close()
            return candidate, missing
        except ModuleNotFoundError as error:
            missing[candidate] = "not installed" if error.name == candidate else f"cannot be imported: {line(error)}"
        except Exception as error:  # an installed library whose shared objects are missing raises various errors
            missing[candidate] = f"cannot be used: {line(error)}"
    reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in missing.items())
    raise Failure("none of {} can run here ({})".format(", ".join(LIBRARIES), reasons) if name == "auto" else reasons)


def at_least(least: float, kind: type = float) -> Callable[[str], Any]:
    """Return an argparse type: a finite number of at least `least`."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: a number of at least {least}")
        return value

    convert.__name__ = kind.__name__
    return convert


# The options of the command line: by name, the arguments of argparse's add_argument.
OPTIONS: dict[str, dict[str, Any]] = {
    "engine": {
        "choices": ("auto", *LIBRARIES),
        "default": "auto",
        "help": "inference library; by default the bundle's if it can run here",
    },
    "seconds": {"type": at_least(0), "default": 20.0, "help": "time limit of the latency measurement"},
    "rounds": {"type": at_least(1, int), "default": 100, "help": "number of rounds after which the measurement ends"},
    "power-seconds": {"type": at_least(0), "default": 8.0, "help": "how long each model runs for power"},
    "idle-seconds": {
        "type": at_least(0),
        "default": 3.0,
        "help": "how long power at rest is read before the first build",
    },
    "rebuild": {"action": "store_true", "help": "build all engines, also those that an earlier run has kept"},
    "sparse": {"action": "store_true", "help": "allow kernels for 2:4 sparse weights for every model"},
    "dla": {"type": at_least(0, int), "metavar": "CORE", "help": "DLA core to run on; the GPU runs the other layers"},
    "no-graphs": {"dest": "graphs", "action": "store_false", "help": "measure without CUDA graphs"},
    "streams": {"type": at_least(1, int), "default": 2, "help": "number of streams at once for the throughput"},
    "data": {"type": Path, "metavar": "FOLDER", "help": "folder of images to measure the accuracy on (see data.py)"},
    "metric": {"metavar": "FILE.py:NAME", "help": "function of (outputs, target) to average over the images"},
    "build-seconds": {"type": at_least(1), "default": 3600.0, "help": "time limit of one build"},
    "threads": {"type": at_least(1, int), "default": 1, "help": "number of threads of ONNX Runtime"},
}
