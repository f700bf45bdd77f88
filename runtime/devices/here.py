"""Which of the targets this machine is."""

import re
import warnings

import torch

from ...graph.errors import BadInput, MissingBackend
from ..kit.cuda import Cuda, CudaError
from ..kit.telemetry import read_line
from .table import NAMES, TARGETS, Target, canonical


def local_target(backend: str) -> Target:
    """The target that this machine's GPU is; of boards with the same GPU the one that the machine's name fits best, with
    a warning where that leaves several. Raises MissingBackend without a GPU, BadInput for one the table lacks."""
    try:
        capability = canonical(Cuda().compute_capability)
    except CudaError as error:
        raise MissingBackend(f"{backend} builds for this machine's GPU; {error}") from error
    able = [t for t in TARGETS.values() if t.compute_capability == capability]
    # Classic TensorRT builds for every GPU; where TensorRT-RTX does too, the table has the latter's target.
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
    """The words in the names of the board (which Jetsons tell) and of the GPU (which PyTorch knows)."""
    board = read_line("/proc/device-tree/model") or ""
    return _words(f"{board} {torch.cuda.get_device_name() if torch.cuda.is_available() else ''}")


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
