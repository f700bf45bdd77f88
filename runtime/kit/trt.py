"""Build, keep and measure TensorRT engines of a bench bundle on the device.

Sources: TensorRT developer guide, "Working with CUDA graphs"; TensorRT-RTX developer guide, "Working with dynamic shapes".
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .contents import Failure, complete
from .cuda import Cuda, CudaError, NoGraph
from .measuring import GUARD, TRIES, waited

if TYPE_CHECKING:
    import tensorrt as types

OLD_OPSET = 17  # the highest opset that TensorRT 8.5 and 8.6 (JetPack 5 and 6.0) parse
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


def made(thing: Any, what: str, logger: Any) -> Any:
    """Return an object of the library, or raise Failure with the library's reason where it is None. what: its name."""
    if thing is None:
        raise Failure(f"{what} cannot be made: {logger.error()}")
    return thing


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


class TensorRT:
    """An engine of TensorRT (8.5 to 11) or TensorRT-RTX, built here from an ONNX file or kept from an earlier run."""

    modes: tuple[str, ...] = ("stream", "graph")

    def __init__(
        self, path: Path, arguments: argparse.Namespace, feeds: dict[str, np.ndarray], about: dict[str, Any]
    ) -> None:
        self.trt = trt = importlib.import_module(arguments.engine)
        self.version = trt.__version__
        self._who = f"{arguments.engine} {self.version}"
        self._logger = new_logger(trt)
        self._cuda = Cuda()
        self._addresses: list[int] = []
        self._events: tuple[int, ...] = ()
        self._graph = 0
        try:
            self._open(path, arguments, feeds, about)
        except BaseException:
            self.close()
            raise

    def _open(
        self, path: Path, arguments: argparse.Namespace, feeds: dict[str, np.ndarray], about: dict[str, Any]
    ) -> None:
        load_plugins(self.trt, self._logger, arguments.plugins)
        self._wanted = self._flags(arguments, about)
        self.about: dict[str, Any] = {"flags": self._wanted}
        self._runtime: types.Runtime = self.trt.Runtime(self._logger)
        self._engine: Any = self._load(path, arguments, feeds, about)
        self._context: Any = new_context(self.trt, self._engine)
        if self._context is None:
            raise Failure(f"{path.name}: {self._who} makes no execution context: {self._logger.error()}")
        self._inspect()
        self._results: dict[str, tuple[int, np.ndarray]] = {}
        self._bind(feeds)
        self._events = self._cuda.event(), self._cuda.event()
        self._run()  # the first run allocates buffers, so it cannot be captured
        if arguments.graphs:
            self._capture()
        else:
            self.modes = ("stream",)

    def _flags(self, arguments: argparse.Namespace, about: dict[str, Any]) -> list[str]:
        wanted = ["SPARSE_WEIGHTS"] if arguments.sparse or about.get("sparse") else []
        # Without strong typing TensorRT computes in fp32 unless flags permit a lower precision.
        if not hasattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
            wanted += ["FP16"] if about["precision"] != "fp32" else []
            wanted += ["INT8"] if about["precision"] == "int8" else []
        wanted += ["GPU_FALLBACK"] if arguments.dla is not None else []
        for name in wanted:
            if not hasattr(self.trt.BuilderFlag, name):
                raise Failure(f"{self._who} has no builder flag {name}")
        return wanted

    def _load(
        self, path: Path, arguments: argparse.Namespace, feeds: dict[str, np.ndarray], about: dict[str, Any]
    ) -> Any:
        """Load the engine of an earlier run with the same model, options, version and GPU, else build one and keep it."""
        shapes = {name: list(array.shape) for name, array in sorted(feeds.items())}
        depends = [about["sha256"], about.get("data", {}), self._who, self._cuda.compute_capability, arguments.device]
        depends += [self._wanted, arguments.dla, shapes, sorted(arguments.plugins.values())]
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
        file = arguments.out.with_name(f"{Path(about['file']).parent.name}-{key}{SUFFIXES[arguments.engine]}")
        self.about["file"] = file.name
        if file.is_file() and not arguments.rebuild:
            engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
            if engine is not None:
                self.about.update(build_seconds=None, reused=True, bytes=file.stat().st_size)
                return engine
        start = time.perf_counter()
        if arguments.engine == "tensorrt" and self.version.startswith("8.") and about.get("opset", 0) > OLD_OPSET:
            limit = f"parses up to {OLD_OPSET}: bundle it with --opset {OLD_OPSET}"
            raise Failure(f"{path.name}: opset {about['opset']}; {self._who} {limit}")
        plan = self._build(path, arguments, feeds)
        self.about.update(build_seconds=round(time.perf_counter() - start, 3), bytes=len(plan))
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        part.write_bytes(plan)
        part.replace(file)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise Failure(f"{path.name}: the engine that was built cannot be loaded: {self._logger.error()}")
        return engine

    def _build(self, path: Path, arguments: argparse.Namespace, feeds: dict[str, np.ndarray]) -> bytes:
        trt = self.trt
        flags = trt.NetworkDefinitionCreationFlag
        strong = getattr(flags, "STRONGLY_TYPED", None)
        builder: types.Builder = trt.Builder(self._logger)
        wanted = 1 << int(flags.EXPLICIT_BATCH if strong is None else strong)
        network: types.INetworkDefinition = made(builder.create_network(wanted), "a network", self._logger)
        parser: types.OnnxParser = trt.OnnxParser(network, self._logger)
        if not parser.parse_from_file(str(path)):
            reason = parser.get_error(0).desc() if parser.num_errors else self._logger.error()
            raise Failure(f"{path.name}: {self._who} cannot parse it: {reason}")
        config: types.IBuilderConfig = made(builder.create_builder_config(), "a configuration", self._logger)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if arguments.dla is not None:
            if arguments.dla >= getattr(builder, "num_DLA_cores", 0):
                raise Failure(f"--dla {arguments.dla}: {self._who} finds no such core here")
            config.default_device_type = trt.DeviceType.DLA
            config.DLA_core = arguments.dla
        for name in self._wanted:
            config.set_flag(getattr(trt.BuilderFlag, name))
        inputs: list[Any] = [network.get_input(index) for index in range(network.num_inputs)]
        complete(path, [tensor.name for tensor in inputs], feeds)
        if any(-1 in tuple(tensor.shape) for tensor in inputs):
            profile: Any = made(builder.create_optimization_profile(), "a profile", self._logger)
            for tensor in inputs:  # shapes may be tuples, although the stubs deny it
                shape = feeds[tensor.name].shape
                profile.set_shape(tensor.name, shape, shape, shape)
            if config.add_optimization_profile(profile) < 0:
                raise Failure(f"{path.name}: {self._who} refuses these shapes: {self._logger.error()}")
        cache = self._timing_cache(config, arguments)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise Failure(f"{path.name}: {self._who} builds no engine: {self._logger.error()}")
        if cache is not None:
            cache.write_bytes(bytes(config.get_timing_cache().serialize()))
        return bytes(plan)

    def _timing_cache(self, config: Any, arguments: argparse.Namespace) -> Path | None:
        """Attach the timing cache of earlier builds, with which a rebuild of the same network chooses the same kernels.
        Returns the path of the cache; None without one."""
        if arguments.engine != "tensorrt":  # TensorRT-RTX measures no kernels
            return None
        path = arguments.out.with_name(f"timing-{self.version}.cache")
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        return path if cache is not None and config.set_timing_cache(cache, False) else None

    def _inspect(self) -> None:
        """Add to `about` the layers that the library's inspector reports and the memory of a run in bytes."""
        size = getattr(self._engine, "device_memory_size_v2", None) or getattr(self._engine, "device_memory_size", None)
        if size is not None:
            self.about["scratch_bytes"] = int(size)
        with contextlib.suppress(ValueError):
            self.about["inspector"] = inspected(self.trt, self._engine)

    def _bind(self, feeds: dict[str, np.ndarray]) -> None:
        trt = self.trt
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        complete(Path(self.about["file"]), inputs, feeds)
        for name in [*inputs, *(name for name in names if name not in inputs)]:
            kind = self._engine.get_tensor_dtype(name).name
            if kind not in DTYPES:
                raise Failure(f"tensor {name} is of type {kind}, which numpy does not have; export it in another")
            if name in inputs:
                array = np.ascontiguousarray(feeds[name].astype(DTYPES[kind]))
                if not self._context.set_input_shape(name, array.shape):
                    raise Failure(f"input {name}: the engine does not take shape {array.shape}")
            else:
                array = np.empty(tuple(self._context.get_tensor_shape(name)), DTYPES[kind])
            address = self._cuda.allocate(max(array.nbytes, 1))
            self._addresses.append(address)
            self._context.set_tensor_address(name, address)
            if name in inputs:
                self._cuda.to_device(address, array)
                self._cuda.synchronize()
            else:
                self._results[name] = address, array

    def _capture(self) -> None:
        try:
            self._graph = record(self._cuda, self._context, self._enqueue)
        except CudaError as error:  # some layers cannot be captured
            self.modes, self.about["no_graph"] = ("stream",), str(error)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise Failure(f"the engine did not run: {self._logger.error()}")

    def _run(self) -> None:
        self._enqueue()
        self._cuda.synchronize()

    def outputs(self) -> dict[str, np.ndarray]:
        """Run once, as a CUDA graph if there is one, and return the outputs for the reference inputs by name."""
        self._cuda.launch(self._graph) if self._graph else self._enqueue()
        for address, array in self._results.values():
            self._cuda.to_host(array, address)
        self._cuda.synchronize()
        return {name: array for name, (_, array) in self._results.items()}

    def time(self, mode: str) -> tuple[float | None, float]:
        """Run once and return (milliseconds on the GPU, milliseconds on the host). Inputs and outputs stay on the device.

        mode: "graph" or "stream". A run during which this thread had to wait for a processor is repeated, as with ONNX
        Runtime.
        """
        for _ in range(TRIES):
            before, start = waited(), time.perf_counter()
            self._cuda.record(self._events[0])
            self._cuda.launch(self._graph) if mode == "graph" else self._enqueue()
            self._cuda.record(self._events[1])
            self._cuda.synchronize()
            host = time.perf_counter() - start
            if waited() - before <= (1 - GUARD) * host:
                break
        else:
            self.about["contended"] = self.about.get("contended", 0) + 1
        return self._cuda.elapsed(*self._events), 1e3 * host

    def layers(self, runs: int) -> list[dict[str, Any]]:
        """Return the mean milliseconds of each layer over `runs` runs, measured by `profiled`."""
        times = profiled(self.trt, self._context, self._run, runs)
        return [{"name": name, "ms": round(ms, 6)} for name, ms in times.items()]

    def close(self) -> None:
        for address in self._addresses:
            self._cuda.free(address)
        for event in self._events:
            self._cuda.destroy_event(event)
        if self._graph:
            self._cuda.destroy_graph(self._graph)
        self._addresses, self._events, self._graph = [], (), 0
        self._context = self._engine = None
        self._cuda.close()
