"""What graphcomb uses of TensorRT's Python API on a host and on a device: loggers, plug-ins, contexts and profiles.

Sources: TensorRT developer guide, "Working with CUDA graphs"; TensorRT-RTX developer guide, "Working with dynamic shapes".
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .contents import Failure
from .cuda import Cuda, NoGraph

SUFFIXES = {"tensorrt": ".engine", "tensorrt_rtx": ".rtx"}
# By name of a TensorRT type, the name of the numpy type, if there is one.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


def new_logger(trt: Any) -> Any:
    """Return a logger that keeps all messages of the library."""
    base: Any = trt.ILogger

    class Logger(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.records: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.records.append((severity.name, message))

        def text(self) -> str:
            return "\n".join(message for _, message in self.records)

        def error(self) -> str:
            """Return the first error in one line. Errors about the driver are skipped, since they follow from others."""
            errors = [text for kind, text in self.records if kind in ("ERROR", "INTERNAL_ERROR")]
            telling = [text for text in errors if "catchCudaError" not in text] or errors or ["no reason given"]
            return " ".join(telling[0].split())[:300]

        def warnings(self) -> list[str]:
            return list(dict.fromkeys(" ".join(text.split()) for kind, text in self.records if kind == "WARNING"))

    return Logger()


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Collect no garbage within the block. Calls that build or load an engine belong into one.

    TensorRT calls loggers and monitors with its locks held, and Python may collect garbage in any of these calls. A builder
    of an earlier build, which the traceback of an error had kept, would be destroyed there, and its destructor waits for
    the same locks: for ever.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def made(thing: Any, what: str, logger: Any) -> Any:
    """Return an object of the library, or raise Failure with the library's reason where it is None. what: its name."""
    if thing is None:
        raise Failure(f"{what} cannot be made: {logger.error()}")
    return thing


@collector_off()
def load_plugins(trt: Any, logger: Any, paths: Iterable[str]) -> None:
    """Load shared libraries with operators that TensorRT lacks. Their code is executed here.

    Raises Failure for a missing file, one that is no plugin library, and a version of TensorRT that cannot load plugins.
    """
    paths = list(paths)
    registry: Any = trt.get_plugin_registry() if hasattr(trt, "get_plugin_registry") else None
    if paths and not hasattr(registry, "load_library"):
        raise Failure(f"{trt.__name__} {trt.__version__} takes no plugins")
    if paths and hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(logger, "")
    for path in paths:
        if not Path(path).is_file():
            raise Failure(f"{path}: no such file")
        if registry.load_library(str(Path(path).absolute())) is None:
            raise Failure(f"{path}: not a library of plugins for {trt.__name__}: {logger.error()}")


def new_profiler(trt: Any) -> Any:
    """Return a profiler that collects the milliseconds of every layer in each run (`times`)."""
    base: Any = trt.IProfiler

    class Profiler(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.times: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.setdefault(layer_name, []).append(ms)

    return Profiler()


@collector_off()
def profiled(trt: Any, context: Any, run: Callable[[], None], runs: int) -> dict[str, float]:
    """Return the mean milliseconds of every layer of a context, in execution order.

    run: runs the context once and waits for its end. runs: number of calls. The library's profiler remains attached and
    slows the engine down, so the sum of the layers is not its latency.
    """
    context.profiler = profiler = new_profiler(trt)
    for _ in range(runs):
        run()
    return {name: sum(times) / runs for name, times in profiler.times.items()}


def inspected(trt: Any, engine: Any, context: Any = None) -> list[Any]:
    """Return the layers of an engine as the library's inspector describes them; empty if the version has no inspector.

    context: an execution context of the engine, with which dynamic shapes are known.
    """
    if not hasattr(engine, "create_engine_inspector"):
        return []
    inspector = engine.create_engine_inspector()
    if inspector is None:
        return []
    if context is not None:
        inspector.execution_context = context
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return json.loads(text).get("Layers", []) if text else []


@collector_off()
def new_context(trt: Any, engine: Any) -> Any:
    """Return an execution context of an engine, or None on failure.

    TensorRT-RTX compiles kernels for the current shapes. Here it does so before the first run. By default it would do so
    during later runs, which use slower kernels until then and cannot be recorded as a graph.
    """
    strategies = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if strategies is None or not hasattr(engine, "create_runtime_config"):
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    if config is None:
        return None
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    return engine.create_execution_context(config)


def record(cuda: Cuda, context: Any, enqueue: Any) -> int:
    """Record one run of a context as a CUDA graph and return its handle. The context must have run with its current shapes
    before. Raises NoGraph if the run cannot be recorded."""
    # TensorRT-RTX reports whether a capture is possible; if not, the capture would fail or record slow kernels.
    if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(cuda.stream):
        raise NoGraph("the engine says that its runs cannot be recorded with these shapes")
    return cuda.capture(enqueue)
