"""TensorRT engines, one code for classic TensorRT (8.6, 10, 11) and TensorRT-RTX (package `tensorrt_rtx`).

Both packages have one API; what differs between versions is looked up (an enum member, a method), never inferred from a
version number. Networks are strongly typed, so the ONNX file says what is computed in which type; TensorRT 8.6, which
has no such networks, gets precision flags instead. TensorRT-RTX builds for a compute capability on any machine, without
a GPU; classic TensorRT builds for the GPU it runs on.

Sources: TensorRT developer guide, "Strongly typed networks", "Working with dynamic shapes", "Working with DLA",
"Timing cache"; TensorRT-RTX developer guide, "Building engines on CPU".
"""

from __future__ import annotations

import importlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from rich.progress import Progress, TaskID

from ..graph.errors import BadInput, MissingBackend, Refused
from .build_log import Pad, parse_build_log
from .cuda import Cuda, CudaError
from .engine import BACKENDS, EngineReport, TensorSpec, precision, replacing
from .targets import Target, nearest

NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
# numpy's names of TensorRT's types; sub-byte types have no buffers of their own on the host.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
# Without strong typing (8.6): the flags that let TensorRT compute in the types of the ONNX file.
WEAK_FLAGS = {"fp16": ("FP16",), "bf16": ("BF16",), "int8": ("INT8", "FP16")}
DEFAULT_MAX_BATCH = 8


@dataclass
class TensorRTReport(EngineReport):
    """Also says where the engine computes on wider axes than the model has, and the alignment that would avoid it."""

    pads: list[Pad] = field(default_factory=list)


def build(
    model: Path,
    target: Target,
    out: Path | None,
    *,
    backend: str,
    batch: int | Sequence[int] | None = None,
    shapes: Mapping[str, Sequence[Sequence[int]]] | None = None,
    workspace: int | None = None,
    optimization_level: int | None = None,
    sparse: bool = False,
    tf32: bool = True,
    dla: int | None = None,
    refit: bool = False,
    version_compatible: bool = False,
    timing_cache: str | os.PathLike[str] | None = None,
    log: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> TensorRTReport:
    """Build an engine for a target and report what the library made of the model.

    batch: of a model with a dynamic batch: one number or (smallest, the one to optimise for, largest); by default from
    1 to 8 and optimised for the model's example batch. shapes: the same three, as full shapes, for inputs with other
    dynamic axes. workspace: limit in MiB. optimization_level: 0 to 5, the library's own default if None. sparse: allow
    kernels for 2:4 sparse weights. tf32: allow TF32 in fp32 layers. dla: core to run on, with the GPU as fallback.
    refit, version_compatible: engines whose weights can be replaced; that later versions can run. timing_cache: file to
    reuse measurements from and keep them in. log: file for the library's verbose log.

    Raises BadInput for a model, target or option that does not fit, Refused for what this version or machine cannot do,
    MissingBackend without the library.
    """
    trt = library(backend)
    who = f"{NAMES[backend]} {trt.__version__}"
    out = out or model.with_suffix(BACKENDS[backend].suffixes[0])
    parsed = onnx.load(str(model), load_external_data=False)
    kind = precision(parsed)
    notes: list[str] = []
    start = time.perf_counter()

    logger = _logger(trt)
    if not _aims(trt):
        _check_device(target, who)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        raise BadInput(f"{model}: {who} cannot parse it: {_parser_error(parser, parsed)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if _aims(trt):
        _aim(trt, config, target, who)
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") and kind in WEAK_FLAGS:
        for name in WEAK_FLAGS[kind]:
            _set_flag(trt, config, name, f"precision {kind}", who)
        notes.append(f"{who} has no strongly typed networks: it may compute layers in a wider type than {kind}")
    ranges = _ranges(network, model, parsed, batch, shapes or {})
    if ranges:
        profile = builder.create_optimization_profile()
        for name, (smallest, best, largest) in ranges.items():
            profile.set_shape(name, smallest, best, largest)
        if config.add_optimization_profile(profile) < 0:
            raise BadInput(f"shapes: {who} refuses the profile {ranges}: {logger.error()}")
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace << 20)
    if optimization_level is not None:
        _set(config, "builder_optimization_level", optimization_level, "optimization_level", who)
    flags = {"sparse": (sparse, "SPARSE_WEIGHTS"), "refit": (refit, "REFIT")}
    flags["version_compatible"] = (version_compatible, "VERSION_COMPATIBLE")
    for option, (wanted, name) in flags.items():
        if wanted:
            _set_flag(trt, config, name, f"option {option}", who)
    if not tf32 and hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    if dla is not None:
        notes += _use_dla(trt, builder, config, network, target, dla, who)
    cache = _timing_cache(config, Path(timing_cache), who) if timing_cache is not None else None

    with _monitored(trt, config, f"{who}: {model.name}", progress):
        engine = builder.build_serialized_network(network, config)
    text = "\n".join(message for _, message in logger.records)
    if log is not None:
        with replacing(Path(log)) as part:
            part.write_text(text)
    if engine is None:
        wishes = [option for option, (wanted, _) in flags.items() if wanted]
        with_ = f" with {', '.join(wishes)}" if wishes else ""
        raise Refused(f"{model}: {who} builds no engine for {target.name}{with_}: {logger.error()}")
    with replacing(out) as part:
        part.write_bytes(engine)
    if cache is not None and (timings := config.get_timing_cache()) is not None:
        with replacing(cache) as part:
            part.write_bytes(timings.serialize())

    said = parse_build_log(text)
    return TensorRTReport(
        backend=backend,
        version=trt.__version__,
        target=target.name,
        path=out,
        bytes=out.stat().st_size,
        seconds=time.perf_counter() - start,
        precision=kind,
        kernels=said.kernels(),
        memory=said.memory,
        warnings=notes + logger.warnings(),
        pads=said.pads(lambda dtype: target.alignment(dtype) if dtype in target.dtypes else 0),
    )


def load(path: Path, *, backend: str) -> TensorRTEngine:
    """Load an engine file; that takes the GPU it was built for.

    Raises MissingBackend without the library or a GPU, BadInput for a file that is no engine for this library version
    and GPU.
    """
    return TensorRTEngine(path, backend)


def library(backend: str) -> ModuleType:
    """Import `tensorrt` or `tensorrt_rtx`. Raises MissingBackend where it is absent or cannot load its libraries."""
    extra = BACKENDS[backend].extra
    try:
        found = importlib.import_module(backend)
    except Exception as error:  # loading shared libraries fails in many ways
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({' '.join(str(error).split())[:160]})"
        hint = f"pip install 'graphcomb[{extra}]'"
        raise MissingBackend(f"{backend} is not installed{reason}; install it with: {hint}") from error
    if not hasattr(found, "Builder"):
        raise MissingBackend(f"{backend} is installed without its libraries; install them from NVIDIA or JetPack")
    return found


class TensorRTEngine:
    """A deserialised engine with one execution context and one stream. Inputs and outputs are host arrays."""

    def __init__(self, path: Path, backend: str):
        trt = library(backend)
        self._logger = _logger(trt)
        try:
            self._cuda = Cuda()
        except MissingBackend as error:
            raise MissingBackend(f"{path}: running an engine takes the GPU it was built for; {error}") from error
        self._runtime = trt.Runtime(self._logger)
        if hasattr(self._runtime, "engine_host_code_allowed"):  # version-compatible engines carry their own runtime
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BadInput(f"{path}: not an engine for {NAMES[backend]} {trt.__version__} here: {self._logger.error()}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise Refused(f"{path}: no execution context: {self._logger.error()}")
        self._buffers: dict[str, tuple[int, int]] = {}
        self._inputs: list[TensorSpec] = []
        self._outputs: list[TensorSpec] = []
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self._inputs if is_input else self._outputs).append(self._spec(name, path))

    @property
    def inputs(self) -> list[TensorSpec]:
        return self._inputs

    @property
    def outputs(self) -> list[TensorSpec]:
        return self._outputs

    @property
    def input_names(self) -> list[str]:
        return [spec.name for spec in self._inputs]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        if len(inputs) != len(self._inputs):
            names = ", ".join(self.input_names)
            raise BadInput(f"the engine takes {len(self._inputs)} inputs ({names}), got {len(inputs)}")
        # Kept until the copies are done.
        arrays = [np.ascontiguousarray(array) for array in inputs]
        for spec, array in zip(self._inputs, arrays, strict=True):
            if array.dtype != np.dtype(spec.dtype):
                raise BadInput(f"input {spec.name}: the engine takes {spec.dtype}, got {array.dtype}")
            if not self._context.set_input_shape(spec.name, tuple(array.shape)):
                raise BadInput(f"input {spec.name}: shape {array.shape} is outside of the engine's {self._range(spec)}")
            self._cuda.to_device(self._bind(spec.name, array.nbytes), array)
        results = []
        for spec in self._outputs:
            shape = tuple(self._context.get_tensor_shape(spec.name))
            if any(extent < 0 for extent in shape):
                raise Refused(f"output {spec.name}: its shape {shape} depends on the data, which is not supported")
            results.append(np.empty(shape, np.dtype(spec.dtype)))
            self._bind(spec.name, results[-1].nbytes)
        if not self._context.execute_async_v3(self._cuda.stream):
            raise Refused(f"the engine did not run: {self._logger.error()}")
        for spec, result in zip(self._outputs, results, strict=True):
            self._cuda.to_host(result, self._buffers[spec.name][0])
        self._cuda.synchronize()
        return results

    def close(self) -> None:
        """Free the device's memory, context and engine."""
        for address, _ in self._buffers.values():
            self._cuda.free(address)
        self._buffers.clear()
        self._cuda.close()
        self._context = self._engine = None

    def _spec(self, name: str, path: Path) -> TensorSpec:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise Refused(f"{path}: tensor {name} is of type {kind}, which has no form on the host")
        shape = tuple(extent if extent >= 0 else None for extent in self._engine.get_tensor_shape(name))
        return TensorSpec(name, DTYPES[kind], shape)

    def _bind(self, name: str, size: int) -> int:
        """The address of the tensor's buffer, which grows when it must."""
        address, capacity = self._buffers.get(name, (0, 0))
        if capacity < size or not address:
            if address:
                self._cuda.synchronize()
                self._cuda.free(address)
            address = self._cuda.allocate(max(size, 1))
            self._buffers[name] = address, size
            self._context.set_tensor_address(name, address)
        return address

    def _range(self, spec: TensorSpec) -> str:
        if None not in spec.shape:
            return f"shape {spec.shape}"
        smallest, _, largest = (tuple(shape) for shape in self._engine.get_tensor_profile_shape(spec.name, 0))
        return f"range {smallest} to {largest}"


# ------------------------------------------------------------------------------------------------ talking to TensorRT
def _logger(trt: ModuleType) -> Any:
    """A logger that keeps everything the library says."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.records: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.records.append((severity.name, message))

        def error(self) -> str:
            """The first error, on one line; those about the missing driver follow from others and say nothing."""
            errors = [text for kind, text in self.records if kind in ("ERROR", "INTERNAL_ERROR")]
            telling = [text for text in errors if "catchCudaError" not in text] or errors or ["no reason given"]
            return " ".join(telling[0].split())[:300]

        def warnings(self) -> list[str]:
            return list(dict.fromkeys(" ".join(text.split()) for kind, text in self.records if kind == "WARNING"))

    return Logger()


def _network_flags(trt: ModuleType) -> int:
    """Strongly typed where that exists, else explicit batch (8.6, which still has implicit batches)."""
    flags = trt.NetworkDefinitionCreationFlag
    wanted = getattr(flags, "STRONGLY_TYPED", None)
    if wanted is None:
        wanted = getattr(flags, "EXPLICIT_BATCH", None)
    return 0 if wanted is None else 1 << int(wanted)


def _aims(trt: ModuleType) -> bool:
    """Whether this library builds for a named compute capability instead of the GPU at hand."""
    return hasattr(trt.IBuilderConfig, "set_compute_capability")


def _aim(trt: ModuleType, config: Any, target: Target, who: str) -> None:
    known = {name: member for name, member in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    config.num_compute_capabilities = 1
    # The setter answers False, and does not raise, for what it does not support.
    if target.sm not in known or not config.set_compute_capability(known[target.sm], 0):
        capability = target.sm or "no compute capability"
        raise BadInput(f"target {target.name} ({capability}): {who} builds for {', '.join(known)} only")


def _check_device(target: Target, who: str) -> None:
    try:
        cuda = Cuda()
        here = cuda.compute_capability
    except (MissingBackend, CudaError) as error:
        raise Refused(f"target {target.name}: {who} builds on the device itself; {error}") from error
    if here != target.compute_capability:
        wanted = target.sm or "no compute capability"
        raise BadInput(f"target {target.name} ({wanted}): {who} builds for the GPU at hand, SM{here[0]}{here[1]}")


def _parser_error(parser: Any, model: onnx.ModelProto) -> str:
    """The first error with the node it is about; before 10.0 the library knows the node's index only."""
    if parser.num_errors == 0:
        return "no reason given"
    error = parser.get_error(0)
    nodes, index = model.graph.node, error.node()
    node = nodes[index] if 0 <= index < len(nodes) else None
    name = error.node_name() if hasattr(error, "node_name") else node.name if node else ""
    op = error.node_operator() if hasattr(error, "node_operator") else node.op_type if node else ""
    reason = " ".join(error.desc().split("\n")[0].split())
    if reason in ("false", ""):
        reason = "unsupported operator"
    where = f"node {name or index} ({op}): " if op else ""
    return f"{where}{reason[:300]}"


def _set_flag(trt: ModuleType, config: Any, name: str, why: str, who: str) -> None:
    if not hasattr(trt.BuilderFlag, name):
        raise Refused(f"{why}: {who} has no builder flag {name}")
    config.set_flag(getattr(trt.BuilderFlag, name))


def _set(config: Any, attribute: str, value: int, option: str, who: str) -> None:
    if not hasattr(config, attribute):
        raise Refused(f"option {option}: {who} has no {attribute}")
    try:
        setattr(config, attribute, value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"option {option}: {who} refuses {value} ({error})") from error
    if getattr(config, attribute) != value:
        raise BadInput(f"option {option}: {who} refuses {value}")


def _use_dla(
    trt: ModuleType, builder: Any, config: Any, network: Any, target: Target, core: int, who: str
) -> list[str]:
    """Run on a DLA core what it can run; returns which layers it cannot."""
    if target.dla is None:
        raise BadInput(f"option dla: {target.name} has no DLA")
    cores = builder.num_DLA_cores
    if not 0 <= core < cores:
        raise Refused(f"option dla: core {core} asked for; {who} finds {cores} DLA cores on this machine")
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    _set_flag(trt, config, "GPU_FALLBACK", "option dla", who)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    fallback = [f"{layer.name} ({layer.type.name})" for layer in layers if not config.can_run_on_DLA(layer)]
    return [f"DLA cannot run {len(fallback)} of {len(layers)} layers: {', '.join(fallback)}"] if fallback else []


def _timing_cache(config: Any, path: Path, who: str) -> Path:
    """Attach the cache in the file, or an empty one."""
    if not hasattr(config, "create_timing_cache"):
        raise Refused(f"option timing_cache: {who} has none")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        attached = cache is not None and config.set_timing_cache(cache, False)
    if any(issubclass(warning.category, DeprecationWarning) for warning in said):  # TensorRT-RTX: it does nothing
        raise Refused(f"option timing_cache: {who} measures no kernels when it builds, so it keeps no cache")
    if not attached:
        raise BadInput(f"option timing_cache: {path} was made by another version or device; delete it")
    return path


def _ranges(
    network: Any,
    path: Path,
    model: onnx.ModelProto,
    batch: int | Sequence[int] | None,
    shapes: Mapping[str, Sequence[Sequence[int]]],
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Smallest, best and largest shape of every dynamic input, empty for a static model."""
    tensors = {t.name: tuple(t.shape) for t in map(network.get_input, range(network.num_inputs))}
    dynamic = {name: shape for name, shape in tensors.items() if -1 in shape}
    for name in shapes:
        if name not in tensors:
            raise BadInput(f"shapes: {path} has no input {name}; {nearest(name, list(tensors))}")
    if batch is not None and not dynamic:
        raise BadInput(f"batch: {path} has a fixed batch; export it with a dynamic one")
    counts = _three(batch, "batch") if batch is not None else _example_batch(model)
    ranges = {}
    for name, shape in dynamic.items():
        if name in shapes:
            ranges[name] = tuple(tuple(int(extent) for extent in given) for given in _three(shapes[name], name))
        elif -1 in shape[1:]:
            axes = [axis for axis, extent in enumerate(shape) if extent == -1]
            raise BadInput(
                f"input {name}: axes {axes} are dynamic; give shapes={{'{name}': (smallest, best, largest)}}"
            )
        else:
            ranges[name] = tuple((count, *shape[1:]) for count in counts)
        for given in ranges[name]:
            fits = len(given) == len(shape) and all(b in (a, -1) for a, b in zip(given, shape, strict=True))
            if not fits:
                raise BadInput(f"input {name}: shape {given} does not fit {shape}")
        if any(not 0 < a <= b <= c for a, b, c in zip(*ranges[name], strict=True)):
            raise BadInput(f"input {name}: {ranges[name]} is not smallest <= best <= largest, from 1 up")
    return ranges


def _three(given: Any, name: str) -> tuple[Any, Any, Any]:
    values = (given,) * 3 if isinstance(given, int) else tuple(given)
    if len(values) != 3:
        raise BadInput(f"{name}: three are needed (smallest, the one to optimise for, largest), got {len(values)}")
    return values[0], values[1], values[2]


def _example_batch(model: onnx.ModelProto) -> tuple[int, int, int]:
    """From 1 to 8, or to the example batch that the exporter noted in the file, which is the one to optimise for."""
    notes = {entry.key: entry.value for entry in model.metadata_props}
    try:
        example = max(int(json.loads(notes["graphcomb.example_batch"])), 1)
    except (KeyError, TypeError, ValueError):
        example = 1
    return 1, example, max(example, DEFAULT_MAX_BATCH)


@contextmanager
def _monitored(trt: ModuleType, config: Any, title: str, progress: bool) -> Iterator[None]:
    """A progress bar for the build: the phases where the library reports them (from 10.0 on), else a running bar."""
    if not progress:
        yield
        return
    with Progress(transient=True) as bar:
        whole = bar.add_task(title, total=None)
        if hasattr(trt, "IProgressMonitor") and hasattr(config, "progress_monitor"):
            config.progress_monitor = _monitor(trt, bar, whole)
        yield


def _monitor(trt: ModuleType, bar: Progress, whole: TaskID) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
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
