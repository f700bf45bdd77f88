"""Import TensorRT or TensorRT-RTX, load plug-ins into it, and show the progress of its builds."""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from rich.progress import Progress, TaskID

from ....graph.errors import BadInput, MissingBackend, Refused
from ...kit import trt as kit
from ...kit.contents import Failure
from ..backends import not_installed


def library(backend: str) -> ModuleType:
    """Import `tensorrt` or `tensorrt_rtx`. Raises MissingBackend if it is not installed or cannot load its libraries."""
    try:
        module = importlib.import_module(backend)
    except ModuleNotFoundError as error:
        if error.name != backend:
            raise MissingBackend(f"{backend} cannot be loaded: {error}; install what it lacks") from error
        raise not_installed(backend) from error
    except Exception as error:  # loading shared libraries fails in many ways
        reason = " ".join(str(error).split())[:160]
        raise MissingBackend(f"{backend} is installed and cannot be loaded: {reason}") from error
    if not hasattr(module, "Builder"):
        raise MissingBackend(f"{backend} is installed without its libraries; install them from NVIDIA or JetPack")
    return module


def load_plugins(trt: ModuleType, logger: Any, paths: Sequence[str]) -> None:
    """Load shared libraries with plugins. Raises BadInput for one that cannot be loaded, and for a version of the library
    that cannot load plugins."""
    try:
        kit.load_plugins(trt, logger, paths)
    except Failure as error:
        raise BadInput(f"option plugins: {error}") from error


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Raise Refused instead of the errors of the library and of CUDA, among them that a kernel took too long. No garbage is
    collected within the block (see `collector_off`).

    what: the file, for the message.
    """
    try:
        with kit.collector_off():
            yield
    except (RuntimeError, Failure) as error:
        raise Refused(f"{what}: {' '.join(str(error).split())}") from error


def new_monitor(trt: ModuleType, bar: Progress, whole: TaskID) -> Any:
    """Return a monitor that shows the library's build phases as tasks of a progress bar. whole: the task of the build."""
    base: Any = trt.IProgressMonitor

    class Monitor(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.phases: dict[str, TaskID] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.phases[phase_name] = whole
                bar.update(whole, total=num_steps)
            else:
                self.phases[phase_name] = bar.add_task(f"  {phase_name}", total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            bar.update(self.phases[phase_name], completed=step + 1)
            return True

        def phase_finish(self, phase_name: str) -> None:
            task = self.phases.pop(phase_name)
            if task != whole:
                bar.remove_task(task)

    return Monitor()
