"""Build, load or open an engine with the backend that the target, the file or the caller asks for."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...graph.errors import BadInput, MissingBackend
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
    """Build an engine for a target, write it to a file, and return a report on its kernels, size and memory.

    - onnx_path: an ONNX file, or a saved program (.pt2) for the backends inductor and torch_tensorrt.
    - target: the device, by its name or its row of `TARGETS`.
    - out: path of the engine file; by default beside the ONNX file, with the target in its name. If the ONNX file itself
      is what the backend loads (target "cpu"), nothing is written by default.
    - backend: a key of `BACKENDS`; by default the target's.
    - options: fields of `EngineOptions` that the backend supports, such as TensorRT's `batch`, `sparse` or `dla`.

    Raises BadInput for a damaged file, an unknown target, backend or option, an operator that the library does not
    support, and a precision in which the target's GPU does not compute; MissingBackend if the library is not installed;
    Refused for what the library's version or this machine cannot do.
    """
    device = target if isinstance(target, Target) else get_target(target)
    path = Path(onnx_path)
    name = backend or device.backend
    try:
        module = backend_module(name)
    except MissingBackend as error:
        if name != "tensorrt":
            raise
        raise MissingBackend(
            f"{error}; it builds on the device itself: take a bundle there (graphcomb bundle)"
        ) from None
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
    """Load an engine file to run it on this machine.

    backend: a key of `BACKENDS`, by default the first one that loads files of this suffix. options: keyword-only
    parameters of the backend's `load`.

    Raises BadInput for a missing file, an unknown suffix, backend or option, and a file that is no engine for this library
    and machine; MissingBackend if the library or its device is missing.
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
    """Return an engine that is ready to run on this machine.

    An engine file is loaded. An ONNX file or a program is built for this machine first, into a temporary file.

    - model: an engine file, an ONNX file, a saved program or a program.
    - backend: a key of `BACKENDS`; by default that of the file's suffix, or inductor for a program.
    - threads: number of threads of an engine on the CPU.
    - shapes: shapes of the inputs, in order. An engine with dynamic axes that is built here accepts only these shapes.
    - options: options of the build, or of `load` for an engine file.

    Raises BadInput for a file or option that the backend does not support, and what `build_engine` and `load_engine`
    raise.
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
        return load_engine(path)  # raises the error for this path
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
        # Such an engine contains code of the host; it may run, since this process has built it.
        trusted = {"host_code": True} if options.get("version_compatible") else {}
        return load_engine(report.path, name, **trusted)


def _backend_of(path: Path) -> str | None:
    """Return the first backend that loads files of this suffix; None if there is none."""
    return next((name for name, backend in BACKENDS.items() if path.suffix in backend.suffixes), None)


def _threads(function: Callable[..., Any], threads: int) -> dict[str, Any]:
    return {"threads": threads} if "threads" in known_options(function) else {}
