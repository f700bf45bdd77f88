"""Build, load or open an engine with whichever backend it is for."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...graph.errors import BadInput
from ...graph.program import Program
from ...graph.program import load as load_program
from ..devices.here import local_target
from ..devices.table import Target, get_target
from ..onnx_file import check_model, input_specs, precision
from .backends import BACKENDS, backend_module, check_options, engine_options, known_options, takes
from .base import Engine, EngineReport
from .origins import read as read_origins


def build_engine(
    onnx_path: str | os.PathLike[str],
    target: str | Target = "cpu",
    out: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    **options: Any,
) -> EngineReport:
    """Build an engine for a target device, write it to a file, and report what the library made of the model.

    - onnx_path: an ONNX file; for the backends of PyTorch (inductor, torch_tensorrt) a saved program (.pt2).
    - target: the device, by name or row of `TARGETS`.
    - out: the engine file; by default beside the ONNX file, with the target in its name. On "cpu" nothing is written:
      the ONNX file itself is the engine.
    - backend: a key of `BACKENDS`; by default the target's.
    - options: those of `EngineOptions` that the backend takes, such as TensorRT's `batch`, `sparse` or `dla`.

    The report has size in bytes, build time in seconds, precision, kernels with the ONNX nodes in each, padding, memory
    in bytes by purpose, warnings, and where the nodes come from.

    Raises BadInput for a damaged file, an unknown target, backend or option, and a precision that the target's GPU
    lacks; MissingBackend where the library is not installed; Refused for what this version or machine cannot do.
    """
    device = target if isinstance(target, Target) else get_target(target)
    path = Path(onnx_path)
    name = backend or device.backend
    module = backend_module(name)
    model = None
    if BACKENDS[name].source == ".onnx":
        model = check_model(path)
        kind = precision(model)
        if device.compute_capability and kind not in device.dtypes:
            has = ", ".join(device.dtypes)
            raise BadInput(f"{path}: target {device.name} does not compute in {kind}; export it in one of {has}")
    elif path.suffix != BACKENDS[name].source:
        raise BadInput(f"{path}: {name} builds from a saved program ({BACKENDS[name].source})")
    wanted = engine_options(name, options)
    if out is not None:
        destination: Path | None = Path(out)
    elif BACKENDS[name].suffixes[0] == path.suffix:
        destination = None
    else:
        destination = path.with_name(f"{path.stem}.{device.name}{BACKENDS[name].suffixes[0]}")
    start = time.perf_counter()
    report = module.build(path, device, destination, wanted, backend=name)
    report.backend, report.target, report.seconds = name, device.name, time.perf_counter() - start
    report.bytes = report.bytes or report.path.stat().st_size
    if model is not None:
        nodes = {node for kernel in report.kernels for node in kernel.nodes}
        report.origins = {node: origin for node, origin in read_origins(model).items() if node in nodes}
    return report


def load_engine(path: str | os.PathLike[str], backend: str | None = None, **options: Any) -> Engine:
    """Load an engine file to run it on this machine. backend: by default the first that knows the file's suffix;
    options: the keyword-only parameters of its `load`.

    Raises BadInput for a file that is missing, of an unknown suffix or no engine of this library and machine,
    MissingBackend without the library or its device.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    backend = backend or _backend_of(path)
    if backend is None:
        suffixes = dict.fromkeys(s for b in BACKENDS.values() for s in b.suffixes)
        raise BadInput(f"{path}: no backend for this suffix (known: {', '.join(suffixes)}); name one with backend=")
    module = backend_module(backend)
    check_options(module.load, options, backend)
    return module.load(path, backend=backend, **options)


def open_engine(
    model: str | os.PathLike[str] | Program,
    backend: str | None = None,
    threads: int = 1,
    shapes: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> Engine:
    """An engine that is ready to run, whatever it takes: an engine file is loaded; an ONNX file or a program is built
    for this machine first, without keeping the engine.

    backend: by default the file's, inductor for a program. threads: of engines on the CPU. shapes: of the inputs that it
    will run on, which an engine that is built here is then optimised for, and takes nothing else.

    Raises BadInput for a file or option that the backend does not take, and what building raises.
    """
    if isinstance(model, Program):
        module = backend_module(backend or "inductor")
        if not hasattr(module, "compile_program"):
            raise BadInput(f"backend {backend}: does not run programs; export an ONNX file")
        if shapes and shapes[0] and "batch" in known_options(module.compile_program):
            options = {"batch": shapes[0][0]} | options
        check_options(module.compile_program, options, backend or "inductor")
        return module.compile_program(model, **_threads(module.compile_program, threads), **options)
    path = Path(model)
    name = backend or _backend_of(path)
    if name is None:
        return load_engine(path)  # which says what is wrong
    module = backend_module(name)
    row = BACKENDS[name]
    if path.suffix in row.suffixes:
        return load_engine(path, name, **_threads(module.load, threads), **options)
    if row.source == ".pt2":
        return open_engine(load_program(path), name, threads, shapes, **options)
    if shapes and not {"batch", "shapes"} & options.keys() and "shapes" in takes(name):
        wanted = zip(input_specs(path) or (), shapes, strict=False)
        ranges = {spec.name: (tuple(s),) * 3 for spec, s in wanted if None in spec.shape}
        options = options | ({"shapes": ranges} if ranges else {})
    with tempfile.TemporaryDirectory() as folder:
        report = build_engine(path, local_target(name), Path(folder) / f"x{row.suffixes[0]}", name, **options)
        trusted = {"host_code": True} if options.get("version_compatible") else {}  # this machine has just built it
        return load_engine(report.path, name, **trusted)


def _backend_of(path: Path) -> str | None:
    """The first backend that loads files of this suffix."""
    return next((name for name, backend in BACKENDS.items() if path.suffix in backend.suffixes), None)


def _threads(function: Callable[..., Any], threads: int) -> dict[str, Any]:
    return {"threads": threads} if "threads" in known_options(function) else {}
