"""Find the target that this machine is."""

import re
import warnings

import torch

from ...graph.errors import BadInput, MissingBackend
from ..kit.cuda import Cuda, CudaError
from ..kit.telemetry import read_line
from .table import NAMES, TARGETS, Target, canonical


def local_target(backend: str) -> Target:
    """Return the target of this machine's GPU for a backend ("tensorrt" or "tensorrt_rtx").

    Of several boards with the same compute capability it is the one whose name fits the machine's best; if several fit
    equally, the first one, with a warning that names the others.

    Raises MissingBackend without a GPU, BadInput for a GPU that the table of targets does not have.
    """
    try:
        capability = canonical(Cuda().compute_capability)
    except CudaError as error:
        raise MissingBackend(f"{backend} builds for this machine's GPU; {error}") from error
    able = [t for t in TARGETS.values() if t.compute_capability == capability]
    # TensorRT builds for every GPU, but the row of a GPU that TensorRT-RTX supports names TensorRT-RTX as its backend.
    targets = [t for t in able if t.backend == backend] or [t for t in able if backend == "tensorrt"]
    gpu = "SM{}{}".format(*capability)
    if not targets:
        raise BadInput(f"{NAMES[backend]}: no target for this machine's GPU ({gpu})")
    words = _machine_names()
    fits = [len(words & _words(f"{t.name} {t.board}")) for t in targets]
    best = [t for t, fit in zip(targets, fits, strict=True) if fit == max(fits)]
    if len(best) > 1:
        others = ", ".join(t.name for t in best[1:])
        warnings.warn(f"this machine's GPU ({gpu}) is taken for {best[0].name}; it may be {others}", stacklevel=2)
    return best[0]


def _machine_names() -> set[str]:
    """Return the words in the name of the board (which a Jetson reports) and of the GPU (which PyTorch reports)."""
    board = read_line("/proc/device-tree/model") or ""
    return _words(f"{board} {torch.cuda.get_device_name() if torch.cuda.is_available() else ''}")


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
