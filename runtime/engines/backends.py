"""The table of backends: the libraries that engines are built with.

A backend is a module of this package, which is imported only when the backend is used. It has

    TAKES: tuple[str, ...]  # names of the fields of `EngineOptions` that its `build` supports
    build(model: Path, target: Target, out: Path | None, options: EngineOptions, *, backend: str) -> EngineReport
    load(path: Path, *, backend: str, **options) -> Engine  # its keyword-only parameters are the options a user may set

A backend of PyTorch also has `compile_program(program, **options) -> Engine`. CONTRIBUTING.md shows how to add a backend:
its file and one row of `BACKENDS`.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, get_type_hints

from ...graph.errors import BadInput, MissingBackend, nearest
from ...graph.hints import checked
from .options import EngineOptions


@dataclass(frozen=True)
class Backend:
    """A library that builds and runs engines.

    - module: name of its module in this package.
    - package: import name of the library.
    - extra: extra of graphcomb that installs the library; None if graphcomb always requires it.
    - suffixes: suffixes of the engine files that it loads; it writes files with the first one.
    - source: suffix of the files that it builds from: ".onnx", or ".pt2" for saved programs.
    - lacks: options in the module's `TAKES` that this library does not support, with the reason.
    """

    module: str
    package: str
    extra: str | None
    suffixes: tuple[str, ...]
    source: str = ".onnx"
    lacks: Mapping[str, str] = field(default_factory=dict)


RTX_LACKS = {
    "timing_cache": "it measures no kernels when it builds, so it keeps no cache",
    "hardware_compatibility": "it builds for the compute capability of the target",
    "editable_timing_cache": "it measures no kernels when it builds, so it keeps no cache",
    "engine_capability": "it builds engines for its own runtime alone",
}
BACKENDS = {
    "onnxruntime": Backend("ort", "onnxruntime", None, (".onnx",)),
    "tensorrt_rtx": Backend("trt.build", "tensorrt_rtx", "rtx", (".rtx",), lacks=RTX_LACKS),
    "tensorrt": Backend("trt.build", "tensorrt", "tensorrt", (".engine", ".plan", ".trt")),
    "openvino": Backend("ov", "openvino", "openvino", (".xml", ".onnx")),
    "inductor": Backend("torch.inductor", "torch", None, (".aoti",), ".pt2"),
    "torch_tensorrt": Backend("torch.torch_tensorrt", "torch_tensorrt", "tensorrt", (".ep",), ".pt2"),
}


def backend_module(name: str) -> ModuleType:
    """Import and return the module of a backend, by its key in `BACKENDS`.

    Raises BadInput for an unknown name, MissingBackend if the library is not installed.
    """
    if name not in BACKENDS:
        raise BadInput(f"backend {name}: not known; {nearest(name, BACKENDS)}")
    if importlib.util.find_spec(BACKENDS[name].package) is None:
        raise not_installed(name)
    return importlib.import_module(f".{BACKENDS[name].module}", __package__)


def not_installed(name: str) -> MissingBackend:
    """Return the error for a backend whose library is not installed."""
    backend = BACKENDS[name]
    return MissingBackend(f"{backend.package} is not installed; install it with: {install_command(backend)}")


def install_command(backend: Backend) -> str:
    """Return the command that installs a backend's library."""
    extra = f"graphcomb[{backend.extra}]" if backend.extra else "graphcomb"
    return f"pip install '{extra}'"


def takes(backend: str) -> list[str]:
    """Return the names of the `EngineOptions` that a backend supports. Raises what `backend_module` raises."""
    return [name for name in backend_module(backend).TAKES if name not in BACKENDS[backend].lacks]


def engine_options(backend: str, options: Mapping[str, Any]) -> EngineOptions:
    """Return the given options of a build as `EngineOptions`.

    Raises BadInput for an option that the backend does not support and for an invalid value, and what `backend_module`
    raises.
    """
    known = takes(backend)
    for name in options:
        if why := BACKENDS[backend].lacks.get(name):
            raise BadInput(f"option {name}: not one of backend {backend}: {why}; known: {', '.join(known)}")
        if name not in known:
            raise BadInput(
                f"option {name}: not one of backend {backend}; {nearest(name, known) if known else 'it takes none'}"
            )
    return EngineOptions(**options)


def known_options(function: Callable[..., Any]) -> list[str]:
    """Return the names of the options of a backend's `load` or `compile_program`: its keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "backend"]


def check_options(function: Callable[..., Any], options: Mapping[str, Any], backend: str) -> None:
    """Raise BadInput for an option that is no keyword-only parameter of a backend's function, or has the wrong type."""
    known = known_options(function)
    annotations = get_type_hints(function)
    for name, value in options.items():
        if name not in known:
            raise BadInput(f"option {name}: not one of backend {backend}; {nearest(name, known)}")
        checked(annotations[name], value, f"option {name}")
