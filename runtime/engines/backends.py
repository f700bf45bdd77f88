"""The table of backends: the libraries that engines are built with.

A backend is a module of this package, imported only when it is asked for, with

    TAKES: tuple[str, ...]  # which of `EngineOptions` its `build` takes
    build(model: Path, target: Target, out: Path | None, options: EngineOptions, *, backend: str) -> EngineReport
    load(path: Path, *, backend: str, **options) -> Engine  # whose keyword-only parameters are the options a user may set

Adding a backend is its file and one row of `BACKENDS`.
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

    module: its name in this package. package: the library. extra: of graphcomb, that installs the library (None: always
    there). suffixes: of the files that it loads; it writes the first. source: suffix of the files that it builds from, ONNX
    models or saved programs. lacks: options that its module takes for another library, with the reason why not for this.
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
    """Import a backend. Raises BadInput for an unknown name, MissingBackend when its library is not installed."""
    if name not in BACKENDS:
        raise BadInput(f"backend {name}: not known; {nearest(name, BACKENDS)}")
    if importlib.util.find_spec(BACKENDS[name].package) is None:
        raise not_installed(name)
    return importlib.import_module(f".{BACKENDS[name].module}", __package__)


def not_installed(name: str) -> MissingBackend:
    """The error about a backend whose library is absent."""
    backend = BACKENDS[name]
    extra = f"graphcomb[{backend.extra}]" if backend.extra else "graphcomb"
    return MissingBackend(f"{backend.package} is not installed; install it with: pip install '{extra}'")


def takes(backend: str) -> list[str]:
    """The options of a build (`EngineOptions`) that a backend takes. Raises as `backend_module`."""
    return [name for name in backend_module(backend).TAKES if name not in BACKENDS[backend].lacks]


def engine_options(backend: str, options: Mapping[str, Any]) -> EngineOptions:
    """The options of a build, by name. Raises BadInput for one that the backend does not take, or not with this value, and
    as `backend_module`."""
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
    """The options that a backend's `load` or `compile_program` takes."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "backend"]


def check_options(function: Callable[..., Any], options: Mapping[str, Any], backend: str) -> None:
    """Raise BadInput for an option that a backend's function does not take, or not with this value."""
    known = known_options(function)
    annotations = get_type_hints(function)
    for name, value in options.items():
        if name not in known:
            raise BadInput(f"option {name}: not one of backend {backend}; {nearest(name, known)}")
        checked(annotations[name], value, f"option {name}")
