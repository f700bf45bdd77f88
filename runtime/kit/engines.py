"""Run and measure TensorRT engines of a bench bundle on the device.

Source: TensorRT developer guide, "Working with CUDA graphs".
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .build import builder_flags, described, engine_path, trtexec
from .contents import Failure, complete
from .cuda import Cuda, CudaError
from .measuring import GUARD, TRIES, waited
from .trt import DTYPES, collector_off, inspected, load_plugins, made, new_context, new_logger, profiled, record

if TYPE_CHECKING:
    import tensorrt as types


class Lane:
    """One execution context of an engine, with a stream and buffers of its own.

    feeds: inputs by name, which are copied to the device. Raises Failure or CudaError if that is not possible; close
    releases what was made.
    """

    def __init__(self, trt: Any, engine: Any, feeds: dict[str, np.ndarray], logger: Any) -> None:
        self.cuda = Cuda()
        self._logger = logger
        self._addresses: dict[str, int] = {}
        self.results: dict[str, np.ndarray] = {}
        try:
            self.context = made(new_context(trt, engine), "an execution context", logger)
            self._bind(trt, engine, feeds)
            self.run()  # the first run allocates buffers, so it cannot be captured
        except BaseException:
            self.close()
            raise

    def _bind(self, trt: Any, engine: Any, feeds: dict[str, np.ndarray]) -> None:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        complete(Path("the engine"), inputs, feeds)
        self._kinds = {}
        for name in [*inputs, *(name for name in names if name not in inputs)]:
            kind = engine.get_tensor_dtype(name).name
            if kind not in DTYPES:
                raise Failure(f"tensor {name} is of type {kind}, which numpy does not have; export it in another")
            if name in inputs:
                self._kinds[name] = DTYPES[kind]
                array = np.ascontiguousarray(feeds[name].astype(DTYPES[kind]))
                if not self.context.set_input_shape(name, array.shape):
                    raise Failure(f"input {name}: the engine does not take shape {array.shape}")
            else:
                self.results[name] = array = np.empty(tuple(self.context.get_tensor_shape(name)), DTYPES[kind])
            self._addresses[name] = self.cuda.allocate(max(array.nbytes, 1))
            if not self.context.set_tensor_address(name, self._addresses[name]):
                raise Failure(f"tensor {name} cannot be bound: {self._logger.error()}")
        self.feed(feeds)

    def feed(self, feeds: dict[str, np.ndarray]) -> None:
        """Copy inputs of the same shapes to the device."""
        arrays = {name: np.ascontiguousarray(feeds[name].astype(kind)) for name, kind in self._kinds.items()}
        for name, array in arrays.items():
            self.cuda.to_device(self._addresses[name], array)
        self.cuda.synchronize()

    def enqueue(self) -> None:
        if not self.context.execute_async_v3(self.cuda.stream):
            raise Failure(f"the engine did not run: {self._logger.error()}")

    def run(self) -> None:
        self.enqueue()
        self.cuda.synchronize()

    def fetch(self) -> dict[str, np.ndarray]:
        """Return the outputs of the last run by name; the arrays are filled again by the next call."""
        for name, array in self.results.items():
            self.cuda.to_host(array, self._addresses[name])
        self.cuda.synchronize()
        return self.results

    def close(self) -> None:
        """Release the device's memory. Errors are of earlier work, and were reported there."""
        for address in self._addresses.values():
            with contextlib.suppress(CudaError):
                self.cuda.free(address)
        self._addresses, self.context = {}, None
        with contextlib.suppress(CudaError):
            self.cuda.close()


class TensorRT:
    """An engine of TensorRT (8.5 to 11) or TensorRT-RTX, built here from an ONNX file or kept from an earlier run.

    about: the description of the engine in the results (docs/formats.md, DeviceEngine).
    """

    modes: tuple[str, ...] = ("stream", "graph")

    def __init__(
        self, path: Path, arguments: argparse.Namespace, feeds: dict[str, np.ndarray], about: dict[str, Any]
    ) -> None:
        self.trt = trt = importlib.import_module(arguments.engine)
        self.version = trt.__version__
        self._logger = new_logger(trt)
        self._cuda = Cuda()
        self._events: tuple[int, ...] = ()
        self._graph = 0
        self._feeds = feeds
        self._engine: Any = None
        self._lane: Any = None
        self.about: dict[str, Any] = {}
        try:
            with collector_off():
                self._open(path, arguments, about)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, arguments: argparse.Namespace, about: dict[str, Any]) -> None:
        load_plugins(self.trt, self._logger, arguments.plugins)
        flags = builder_flags(self.trt, arguments, about)
        free = self._cuda.free_memory()
        self._runtime: types.Runtime = self.trt.Runtime(self._logger)
        file = engine_path(self.trt, arguments, self._feeds, about, self._cuda.compute_capability)
        self.about.update(flags=flags, file=file.name)
        start = time.perf_counter()
        if file.is_file() and not arguments.rebuild:
            self._engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is not None:
            self.about.update(described(file), build_seconds=None, reused=True, bytes=file.stat().st_size)
        else:
            arguments.build(path, file, arguments, self._feeds, about)
            self.about.update(described(file))
            start = time.perf_counter()
            self._engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            raise Failure(f"{path.name}: the engine that was built cannot be loaded: {self._logger.error()}")
        loaded = time.perf_counter()
        self._lane = Lane(self.trt, self._engine, self._feeds, self._logger)
        self.about["cold_ms"] = {
            "load": round(1e3 * (loaded - start), 3), "first_run": round(1e3 * (time.perf_counter() - loaded), 3)
        }  # fmt: skip
        self.about["device_bytes"] = max(free - self._cuda.free_memory(), 0)
        self._inspect()
        shapes = {name: x.shape for name, x in self._feeds.items() if -1 in tuple(self._engine.get_tensor_shape(name))}
        self.about["trtexec"] = trtexec(Path(about["file"]), arguments, about, flags, shapes, self.trt)
        self._events = self._lane.cuda.event(), self._lane.cuda.event()
        if arguments.graphs:
            self._capture()
        else:
            self.modes = ("stream",)

    def _inspect(self) -> None:
        """Add to `about` the layers that the library's inspector reports and the memory of a run in bytes."""
        size = getattr(self._engine, "device_memory_size_v2", None) or getattr(self._engine, "device_memory_size", None)
        if size is not None:
            self.about["scratch_bytes"] = int(size)
        with contextlib.suppress(ValueError):
            self.about["inspector"] = inspected(self.trt, self._engine)

    def _capture(self) -> None:
        try:
            self._graph = record(self._lane.cuda, self._lane.context, self._lane.enqueue)
        except CudaError as error:  # some layers cannot be captured
            self.modes, self.about["no_graph"] = ("stream",), str(error)

    def outputs(self, feeds: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Run once, as a CUDA graph if there is one, and return the outputs by name.

        feeds: inputs by name with the shapes of the reference inputs, which are the default.
        """
        if feeds is not None:
            self._lane.feed(feeds)
        self._lane.cuda.launch(self._graph) if self._graph else self._lane.enqueue()
        arrays = {name: array.copy() for name, array in self._lane.fetch().items()}
        if feeds is not None:
            self._lane.feed(self._feeds)
        return arrays

    def time(self, mode: str) -> tuple[float | None, float]:
        """Run once and return (milliseconds on the GPU, milliseconds on the host). Inputs and outputs stay on the device.

        mode: "graph" or "stream". A run during which this thread had to wait for a processor is repeated, as with ONNX
        Runtime.
        """
        lane = self._lane
        for _ in range(TRIES):
            before, start = waited(), time.perf_counter()
            lane.cuda.record(self._events[0])
            lane.cuda.launch(self._graph) if mode == "graph" else lane.enqueue()
            lane.cuda.record(self._events[1])
            lane.cuda.synchronize()
            host = time.perf_counter() - start
            if waited() - before <= (1 - GUARD) * host:
                break
        else:
            self.about["contended"] = self.about.get("contended", 0) + 1
        return lane.cuda.elapsed(*self._events), 1e3 * host

    def throughput(self, streams: int, seconds: float) -> float:
        """Return the runs per second of `streams` contexts at once, each with a stream of its own, over `seconds`."""
        lanes: list[Lane] = []
        try:
            for _ in range(streams):
                lanes.append(Lane(self.trt, self._engine, self._feeds, self._logger))
            start, runs = time.perf_counter(), 0
            while not runs or time.perf_counter() - start < seconds:
                for lane in lanes:  # every stream has its next run waiting while the first one is awaited
                    lane.enqueue()
                for lane in lanes:
                    lane.enqueue()
                    lane.cuda.synchronize()
                runs += 2 * len(lanes)
            return runs / (time.perf_counter() - start)
        finally:
            for lane in lanes:
                lane.close()

    def layers(self, runs: int) -> list[dict[str, Any]]:
        """Return the mean milliseconds of each layer over `runs` runs, measured by `profiled`."""
        times = profiled(self.trt, self._lane.context, self._lane.run, runs)
        return [{"name": name, "ms": round(ms, 6)} for name, ms in times.items()]

    def close(self) -> None:
        """Release the device's memory. Errors are of earlier work, and were reported there."""
        for event in self._events:
            with contextlib.suppress(CudaError):
                self._cuda.destroy_event(event)
        if self._graph:
            with contextlib.suppress(CudaError):
                self._cuda.destroy_graph(self._graph)
        self._events, self._graph = (), 0
        if self._lane is not None:
            self._lane.close()
        self._lane = self._engine = None
        with contextlib.suppress(CudaError):
            self._cuda.close()
