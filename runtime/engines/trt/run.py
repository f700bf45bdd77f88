"""Run an engine of TensorRT or TensorRT-RTX on this machine's GPU.

Source: TensorRT developer guide, "Working with CUDA graphs" and "Working with dynamic shapes".
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ....graph.errors import BadInput, MissingBackend, Refused
from ...devices.table import NAMES
from ...kit.cuda import Cuda, CudaError, NoCuda
from ...kit.trt import DTYPES as NUMPY
from ...kit.trt import inspected, made, new_context, new_logger, profiled, record
from ...onnx_file import TensorSpec
from ..base import HostEngine
from .library import library, load_plugins, refusing

if TYPE_CHECKING:  # mypy checks the calls against the stubs of classic TensorRT, whose API both packages have
    import tensorrt as types

DTYPES = NUMPY | {"BF16": "bfloat16", "FP8": "float8_e4m3fn"}  # names of ml_dtypes; 4-bit types are not supported


class TensorRTEngine(HostEngine):
    """A deserialised engine with one execution context and one CUDA stream. `run` takes and returns numpy arrays.

    `load` describes the arguments and errors.
    """

    on_device = True  # the CPU waits while the engine runs

    def __init__(
        self, path: Path, backend: str, graphs: bool = False, host_code: bool = False, plugins: Sequence[str] = ()
    ):
        self._trt = trt = library(backend)
        self._path, self._graphs = path, graphs
        self._logger = new_logger(trt)
        load_plugins(trt, self._logger, plugins)
        try:
            self._cuda = Cuda()
        except NoCuda as error:
            raise MissingBackend(f"{path}: running an engine takes the GPU it was built for; {error}") from error
        with refusing(str(path)):
            self._open(path, backend, host_code)

    def _open(self, path: Path, backend: str, host_code: bool) -> None:
        trt = self._trt
        self._runtime: types.Runtime = trt.Runtime(self._logger)
        if host_code:
            if not hasattr(self._runtime, "engine_host_code_allowed"):
                raise Refused(
                    f"option host_code: {NAMES[backend]} {trt.__version__} knows no engines with code of their own"
                )
            self._runtime.engine_host_code_allowed = True
        self._engine: types.ICudaEngine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BadInput(f"{path}: not an engine for {NAMES[backend]} {trt.__version__} here: {self._logger.error()}")
        self._context: types.IExecutionContext = new_context(trt, self._engine)
        if self._context is None:
            raise Refused(f"{path}: no execution context: {self._logger.error()}")
        self._buffers: dict[str, tuple[int, int]] = {}
        self._graph, self._profile, self._prepared = 0, 0, 0
        self._recorded: tuple[tuple[int, ...], ...] = ()  # the shapes that the graph was recorded with
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self.inputs if is_input else self.outputs).append(self._spec(name, path))

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        with refusing(str(self._path)):
            arrays, results = self._prepare(inputs)
            self._start(arrays)
            for spec, result in zip(self.outputs, results, strict=True):
                self._cuda.to_host(result, self._buffers[spec.name][0])
            self._cuda.synchronize()
        return results

    def prepared(self, inputs: Sequence[np.ndarray]) -> Callable[[], None]:
        """Copy the inputs to the device and return a function that runs the engine on them without copying outputs.

        A benchmark measures this function. It warns if the engine is optimised for other shapes. Raises BadInput for inputs
        that do not fit the engine.
        """
        with refusing(str(self._path)):
            arrays, _ = self._prepare(inputs)
            mine = self._prepared
            self._start(arrays)
            self._cuda.synchronize()
            optima = [self._shapes(spec, self._profile)[1] for spec in self.inputs]
        for spec, array, best in zip(self.inputs, arrays, optima, strict=True):
            if best != array.shape:
                warnings.warn(
                    f"{self._path}: input {spec.name}: measured with shape {array.shape}, and the engine is optimised for "
                    f"{best}; build it for the former",
                    stacklevel=2,
                )

        def call() -> None:
            nonlocal arrays, mine
            with refusing(str(self._path)):
                if mine != self._prepared:  # another call has overwritten the input buffers
                    arrays, _ = self._prepare(arrays)
                    mine = self._prepared
                self._start(arrays)
                self._cuda.synchronize()

        return call

    def profile(self, inputs: Sequence[np.ndarray], runs: int = 20) -> list[tuple[str, float]]:
        """Return (name, mean milliseconds over `runs` runs) of every layer, in execution order.

        The library's profiler slows the engine down, so the sum of the layers is not its latency.
        """

        def run() -> None:
            self._enqueue()
            self._cuda.synchronize()

        with refusing(str(self._path)):
            self._prepare(inputs)
            times = profiled(self._trt, self._context, run, runs)
            # A profiler cannot be removed from a context.
            self._context = made(new_context(self._trt, self._engine), "an execution context", self._logger)
            self._profile = 0
            for name, (address, _) in self._buffers.items():
                self._address(name, address)
            self._drop_graph()
        return list(times.items())

    def inspect(self) -> list[dict[str, Any]]:
        """Return the layers of the engine as the library's inspector describes them: name, type, tactic, formats, and
        whether the weights are sparse, as far as the version reports it. Empty without an inspector."""
        with refusing(str(self._path)):
            rows = inspected(self._trt, self._engine, self._context)
        return [row if isinstance(row, dict) else {"Name": row} for row in rows]

    def refit(self, model: Path) -> None:
        """Replace the weights of the engine by those of an ONNX file of the same network.

        Raises Refused if the version has no refitter for ONNX files (before 10.0), the engine was not built with `refit`,
        or the library does not replace the weights; BadInput for the file of another network.
        """
        if not hasattr(self._trt, "OnnxParserRefitter"):
            raise Refused(
                f"{self._path}: TensorRT {self._trt.__version__} refits no ONNX files; build the engine again"
            )
        if not self._engine.refittable:
            raise Refused(f"{self._path}: not built with the option refit")
        with refusing(str(self._path)):
            refitter: types.Refitter = self._trt.Refitter(self._engine, self._logger)
            parser: types.OnnxParserRefitter = self._trt.OnnxParserRefitter(refitter, self._logger)
            if not parser.refit_from_file(str(model)):
                reason = parser.get_error(0).desc() if parser.num_errors else self._logger.error()
                raise BadInput(f"{model}: not the network of {self._path}: {' '.join(reason.split())[:300]}")
            if not refitter.refit_cuda_engine():
                raise Refused(f"{self._path}: not refitted: {self._logger.error()}")

    def close(self) -> None:
        """Free the device's memory, context and engine. Errors are of earlier work, and were reported there."""
        steps: list[Callable[[], None]] = [self._drop_graph]
        steps += [functools.partial(self._cuda.free, address) for address, _ in self._buffers.values()]
        for step in (*steps, self._cuda.close):
            with contextlib.suppress(CudaError):
                step()
        self._buffers.clear()
        del self._context, self._engine

    def _prepare(self, inputs: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Check the inputs, copy them to the device, allocate output buffers, and return contiguous inputs and empty arrays
        for the outputs."""
        self._check_count(inputs)
        arrays = [np.ascontiguousarray(array) for array in inputs]
        self._prepared += 1
        self._choose_profile(arrays)
        for spec, array in zip(self.inputs, arrays, strict=True):
            self._check_dtype(spec, array)
            if not self._context.set_input_shape(spec.name, tuple(array.shape)):
                raise BadInput(f"input {spec.name}: shape {array.shape} is outside of the engine's {self._range(spec)}")
            self._cuda.to_device(self._bind(spec.name, array.nbytes), array)
        results = []
        for spec in self.outputs:
            shape = sizes_of(self._context.get_tensor_shape(spec.name))
            if any(extent < 0 for extent in shape):
                raise Refused(f"output {spec.name}: its shape {shape} depends on the data, which is not supported")
            results.append(np.empty(shape, np.dtype(spec.dtype)))
            self._bind(spec.name, results[-1].nbytes)
        return arrays, results

    def _start(self, arrays: list[np.ndarray]) -> None:
        """Enqueue one run on the stream, as a CUDA graph if that is asked for and possible."""
        shapes = tuple(array.shape for array in arrays)
        if self._graphs and shapes != self._recorded:
            self._drop_graph()
            self._enqueue()  # the first run with new shapes allocates resources, which a graph cannot record
            self._cuda.synchronize()
            self._recorded = shapes
            try:
                self._graph = record(self._cuda, self._context, self._enqueue)
            except CudaError as error:
                warnings.warn(f"{self._path}: runs without a CUDA graph: {error}", stacklevel=3)
        if self._graph:
            self._cuda.launch(self._graph)
        else:
            self._enqueue()

    def _choose_profile(self, arrays: list[np.ndarray]) -> None:
        """Select the optimisation profile that is optimised for these shapes, else the first one that allows them."""
        shapes = [array.shape for array in arrays]

        def fit(profile: int) -> int:
            ranges = [self._shapes(spec, profile) for spec in self.inputs]
            if [best for _, best, _ in ranges] == shapes:
                return 2
            return int(all(_within(shape, low, high) for shape, (low, _, high) in zip(shapes, ranges, strict=True)))

        count = self._engine.num_optimization_profiles
        chosen = max(range(count), key=fit, default=0) if count > 1 else self._profile
        if chosen != self._profile:
            self._drop_graph()
            if not self._context.set_optimization_profile_async(chosen, self._cuda.stream):
                raise Refused(f"{self._path}: optimisation profile {chosen} cannot be used: {self._logger.error()}")
            self._cuda.synchronize()
            self._profile = chosen

    def _shapes(self, spec: TensorSpec, profile: int) -> tuple[Any, Any, Any]:
        """Return (smallest, the one it is optimised for, largest) of a profile's shapes for an input."""
        if None not in spec.shape:
            return (spec.shape,) * 3
        smallest, best, largest = map(sizes_of, self._engine.get_tensor_profile_shape(spec.name, profile))
        return smallest, best, largest

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise Refused(f"the engine did not run: {self._logger.error()}")

    def _drop_graph(self) -> None:
        graph, self._graph, self._recorded = self._graph, 0, ()
        if graph:
            try:
                self._cuda.synchronize()
            finally:
                self._cuda.destroy_graph(graph)

    def _address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise Refused(f"{self._path}: tensor {name} cannot be bound: {self._logger.error()}")

    def _spec(self, name: str, path: Path) -> TensorSpec:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise Refused(f"{path}: tensor {name} is of type {kind}, which has no form on the host")
        shape = tuple(extent if extent >= 0 else None for extent in sizes_of(self._engine.get_tensor_shape(name)))
        return TensorSpec(name, DTYPES[kind], shape)

    def _bind(self, name: str, size: int) -> int:
        """Return the address of a tensor's buffer of at least `size` bytes; a smaller buffer is replaced."""
        address, capacity = self._buffers.get(name, (0, 0))
        if capacity < size or not address:
            if address:
                self._cuda.synchronize()
                self._cuda.free(address)
            address = self._cuda.allocate(max(size, 1))
            self._buffers[name] = address, size
            self._address(name, address)
            self._drop_graph()  # the recorded graph uses the old address
        return address

    def _range(self, spec: TensorSpec) -> str:
        smallest, _, largest = self._shapes(spec, self._profile)
        return f"range {smallest} to {largest}" if None in spec.shape else f"shape {spec.shape}"


def _within(shape: tuple[int, ...], smallest: tuple[int, ...], largest: tuple[int, ...]) -> bool:
    fits = zip(smallest, shape, largest, strict=False)
    return len(shape) == len(smallest) and all(a <= b <= c for a, b, c in fits)


def sizes_of(dims: Any) -> tuple[int, ...]:
    """Return a shape of the library's own type as a tuple."""
    return tuple(dims)
