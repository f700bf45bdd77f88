"""Build engines with classic TensorRT (8.6, 10, 11) or TensorRT-RTX (package `tensorrt_rtx`).

Both packages have the same API. Whether a version has a feature is looked up (an enum member, a method), not inferred from
the version number. Networks are strongly typed, so the ONNX file decides in which type each layer computes; TensorRT 8.6
has no such networks and gets precision flags instead. TensorRT-RTX builds for any compute capability on any machine, even
without a GPU; classic TensorRT builds for the GPU it runs on.

Sources: TensorRT developer guide, "Strongly typed networks", "Working with dynamic shapes", "Working with DLA",
"Timing cache"; TensorRT-RTX developer guide, "Building engines on CPU".
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from rich.progress import Progress

from ....graph.errors import BadInput, Refused, nearest
from ....graph.files import replacing
from ...devices.dla import dla_report
from ...devices.table import NAMES as LIBRARIES
from ...devices.table import Target, canonical, parsed_opset
from ...engine_summary import Pad, Unfused
from ...kit.calibrate import calibrate, calibrates
from ...kit.cuda import Cuda, CudaError
from ...kit.trt import made, new_logger
from ...onnx_file import opset_of, precision
from ..backends import BACKENDS
from ..base import EngineReport, UnparsedOp
from ..options import NAMES, EngineOptions, three
from .implicit import Implicit, implicit
from .library import library, load_plugins, new_monitor, refusing
from .log import parse_build_log
from .run import TensorRTEngine, sizes_of

if TYPE_CHECKING:  # mypy checks the calls against the stubs of classic TensorRT, whose API both packages have
    import tensorrt as types

# TensorRT 8.6 has no strong typing: it needs these flags to compute in the types of the ONNX file.
WEAK_FLAGS = {"fp16": ("FP16",), "bf16": ("BF16",), "int8": ("INT8", "FP16")}
FLAGS = {
    "sparse": "SPARSE_WEIGHTS",
    "refit": "REFIT",
    "version_compatible": "VERSION_COMPATIBLE",
    "direct_io": "DIRECT_IO",
    "editable_timing_cache": "EDITABLE_TIMING_CACHE",
}
# Options with which a build can fail, so that its error names them.
REQUIRED = *FLAGS, "hardware_compatibility", "engine_capability"
TAKES = tuple(name for name in NAMES if name != "threads")


@dataclass
class TensorRTReport(EngineReport):
    """The report of a build, with these fields in addition.

    - pads: axes that the engine computes with a larger size than the model, and the alignment that avoids it.
    - unfused: quantisation that makes nothing faster.
    - unread: lines of the build log about kernels that could not be parsed.
    - timing_cache: SHA-256 of the timing cache after the build; None without one.
    """

    pads: list[Pad] = field(default_factory=list)
    unfused: list[Unfused] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    timing_cache: str | None = None


def build(
    model: Path,
    target: Target,
    out: Path | None,
    options: EngineOptions,
    *,
    backend: str,
) -> TensorRTReport:
    """Build an engine for a target and report on its kernels, as `build_engine` describes.

    Raises BadInput for a model, target or option that does not fit, UnparsedOp for an operator that the parser does not
    support, Refused for what this version or machine cannot do, MissingBackend without the library.
    """
    out = out or model.with_suffix(BACKENDS[backend].suffixes[0])
    graph = onnx.load(str(model), load_external_data=False)
    kind = precision(graph)
    if options.dla is not None:
        dla_report(graph, target, options.dla, options.batch)  # raises if the DLA can run no layer of this model
    cache = Path(options.timing_cache) if options.timing_cache is not None else None
    if cache is None and options.editable_timing_cache:
        cache = out.with_name(f"{out.name}.timing")
    with refusing(str(model)), contextlib.ExitStack() as stack:
        implied = options.dla is not None and kind == "int8" and calibrates(library(backend))
        work = _Build(backend, target, options, weak=implied)
        stack.callback(work.close)
        work.check_opset(model, graph)
        plain = work.parse_implied(model) if implied else None
        if plain is None:
            work.parse(model)
        work.aim()
        work.allow(kind)
        if plain is not None:
            calibrate(work.trt, work.network, work.config, plain.scales, plain.int8)
            work.notes += plain.notes
        work.shape(model)
        work.tune()
        if options.dla is not None:
            work.use_dla(options.dla)
        if cache is not None:
            work.attach(cache)
        engine = work.run(f"{work.who}: {model.name}")
        if options.log is not None:
            with replacing(Path(options.log)) as part:
                part.write_text(work.logger.text())
        if engine is None:
            asked = "".join(f" with {name}" for name in REQUIRED if getattr(options, name))
            raise Refused(f"{model}: {work.who} builds no engine for {target.name}{asked}: {work.logger.error()}")
        measured = work.measured() if cache is not None else None
    with replacing(out) as part:
        part.write_bytes(engine)
    if cache is not None and measured is not None:
        with replacing(cache) as part:
            part.write_bytes(measured)
    said = parse_build_log(work.logger.text())
    return TensorRTReport(
        version=work.trt.__version__,
        path=out,
        precision=kind,
        kernels=said.kernels(),
        memory=said.memory,
        warnings=work.notes + work.logger.warnings(),
        pads=said.pads(lambda dtype: target.alignment(dtype) if dtype in target.dtypes else 0),
        unfused=said.unfused(),
        unread=said.unread or ([] if said.layers else ["the build log names no kernels"]),
        timing_cache=None if measured is None else hashlib.sha256(measured).hexdigest(),
    )


def load(
    path: Path, *, backend: str, graphs: bool = False, host_code: bool = False, plugins: Sequence[str] | None = None
) -> TensorRTEngine:
    """Load an engine file. This needs the GPU that it was built for.

    - graphs: whether to run the engine as a CUDA graph, which starts all its kernels at once. Inputs of new shapes record
      the graph again; an engine that cannot be recorded runs without a graph, with a warning.
    - host_code: whether to trust the file with code for the CPU, which version-compatible engines contain and execute.
    - plugins: the shared libraries that it was built with.

    Raises MissingBackend without the library or a GPU; BadInput for a file that is no engine for this version of the library
    and this GPU, and for a plugin that cannot be loaded; Refused for an engine that cannot be run here, such as one with
    tensors of 4-bit types.
    """
    return TensorRTEngine(path, backend, graphs, host_code, plugins or ())


class _Build:
    """One build: the objects of the library, and methods that configure them.

    who: name and version of the library, for messages. notes: warnings about the engine for the report.
    """

    def __init__(self, backend: str, target: Target, options: EngineOptions, weak: bool = False):
        self.trt = trt = library(backend)
        self.who = f"{LIBRARIES[backend]} {trt.__version__}"
        self.target, self.options = target, options
        self.notes: list[str] = []
        self.logger = new_logger(trt)
        load_plugins(trt, self.logger, options.plugins or ())
        # TensorRT-RTX builds for the compute capability that is set, classic TensorRT for this machine's GPU.
        self.aims = hasattr(trt.IBuilderConfig, "set_compute_capability")
        if not self.aims:
            self._check_device()
        flags = trt.NetworkDefinitionCreationFlag
        self.strong = hasattr(flags, "STRONGLY_TYPED") and not weak
        wanted = flags.STRONGLY_TYPED if self.strong else flags.EXPLICIT_BATCH  # 8.6 still has implicit batches
        self.builder: types.Builder = trt.Builder(self.logger)
        network = self.builder.create_network(1 << int(wanted))
        self.network: types.INetworkDefinition = made(network, "a network", self.logger)
        config = self.builder.create_builder_config()
        self.config: types.IBuilderConfig = made(config, "a configuration", self.logger)
        self.config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED

    def check_opset(self, path: Path, model: onnx.ModelProto) -> None:
        """Raise BadInput for an opset that the parser does not support.

        Classic TensorRT builds on the target, so its own version decides, which may be newer than the oldest release that
        `Target.opset` allows for.
        """
        version = tuple(int(part) for part in self.trt.__version__.split(".")[:2])
        limit = self.target.opset if self.aims else parsed_opset(version)
        opset = opset_of(model)
        if opset > limit:
            raise BadInput(f"{path}: opset {opset}; {self.who} parses up to {limit}: export it with opset={limit}")

    def parse(self, path: Path) -> None:
        """Parse the file into the network. Raises UnparsedOp with the library's reason."""
        if (error := self._parsing_error(path)) is not None:
            raise UnparsedOp(f"{path}: {self.who} cannot parse it{error}")

    def _parsing_error(self, path: Path) -> str | None:
        """Parse the file and return the end of the error message, or None. The error is not raised here, where its traceback
        would keep the parser."""
        parser: types.OnnxParser = self.trt.OnnxParser(self.network, self.logger)
        if parser.parse_from_file(str(path)):
            return None
        if parser.num_errors == 0:
            return ""
        error = parser.get_error(0)
        if hasattr(error, "node_name"):
            name, op = error.node_name(), error.node_operator()
        else:  # before 10.0 an error has only the index of the node
            nodes = onnx.load(str(path), load_external_data=False).graph.node
            node = nodes[error.node()] if 0 <= error.node() < len(nodes) else None
            name, op = (node.name, node.op_type) if node else ("", "")
        reason = " ".join(error.desc().split("\n")[0].split())[:300]
        reason = reason if reason not in ("", "false") else "operator not supported"
        where = f"node {name or error.node()} ({op}): " if op else ""
        return f": {where}{reason}"

    def parse_implied(self, path: Path) -> Implicit:
        """Parse the model without its Q/DQ nodes, and return what they say."""
        scaled = implicit(onnx.load(str(path)))
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / path.name
            onnx.save(scaled.model, str(plain))
            self.parse(plain)
        return scaled

    def aim(self) -> None:
        """Set the target's compute capability, if the library can build for one that is set."""
        if not self.aims:
            return
        known = {n: m for n, m in self.trt.ComputeCapability.__members__.items() if n.startswith("SM")}
        config: Any = self.config  # the stubs of classic TensorRT lack these attributes
        config.num_compute_capabilities = 1
        # The setter returns False for an unsupported capability; it does not raise.
        if self.target.sm not in known or not config.set_compute_capability(known[self.target.sm], 0):
            raise BadInput(f"target {self._target()}: {self.who} builds for {', '.join(known)} only")

    def allow(self, kind: str) -> None:
        """Allow the library to compute in the types of the ONNX file, if it has no strong typing."""
        if self.strong or kind not in WEAK_FLAGS:
            return
        for name in WEAK_FLAGS[kind]:
            self.flag(name, f"precision {kind}")
        self.notes.append(f"{self.who} has no strongly typed networks: it may compute layers wider than in {kind}")

    def shape(self, path: Path) -> None:
        """Add the optimisation profiles for a model with dynamic shapes."""
        tensors = [self.network.get_input(index) for index in range(self.network.num_inputs)]
        sizes = {t.name: sizes_of(t.shape) for t in tensors}
        profiles = self.options.profiles
        options = [self.options] if profiles is None else [EngineOptions(batch=tuple(batches)) for batches in profiles]
        for ranges in [_ranges(sizes, path, chosen) for chosen in options]:
            if not ranges:
                return
            profile: Any = made(self.builder.create_optimization_profile(), "a profile", self.logger)
            for name, (smallest, best, largest) in ranges.items():  # tuples, although the stubs deny it
                profile.set_shape(name, smallest, best, largest)
            if self.config.add_optimization_profile(profile) < 0:
                raise BadInput(f"shapes: {self.who} refuses the profile {ranges}: {self.logger.error()}")

    def flag(self, name: str, why: str) -> None:
        if not hasattr(self.trt.BuilderFlag, name):
            raise Refused(f"{why}: {self.who} has no builder flag {name}")
        self.config.set_flag(getattr(self.trt.BuilderFlag, name))

    def tune(self) -> None:
        """Set the options for which the library has its own default."""
        options, trt = self.options, self.trt
        for name, flag in FLAGS.items():
            if getattr(options, name):
                self.flag(flag, f"option {name}")
        if options.workspace is not None:
            self.config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
        if options.optimization_level is not None:
            self.config.builder_optimization_level = options.optimization_level
        if options.tf32 is False and hasattr(trt.BuilderFlag, "TF32"):
            self.config.clear_flag(trt.BuilderFlag.TF32)
        if (wanted := options.hardware_compatibility) is not None:
            levels = getattr(trt, "HardwareCompatibilityLevel", None)  # new in 8.6; the second level came later
            if not hasattr(levels, wanted.upper()):
                raise Refused(f"option hardware_compatibility: {self.who} has no level {wanted}")
            self.config.hardware_compatibility_level = getattr(levels, wanted.upper())
        if options.engine_capability is not None:
            self.config.engine_capability = getattr(trt.EngineCapability, options.engine_capability.upper())

    def use_dla(self, core: int) -> None:
        """Assign to a DLA core the layers that it can run, and note which ones run on the GPU."""
        cores = self.builder.num_DLA_cores
        if core >= cores:
            driven = ", ".join("{}.{}".format(*v) for v in self.target.dla.tensorrt) if self.target.dla else "none"
            where = f"{self.target.name}'s DLA is driven by TensorRT {driven}"
            raise Refused(f"option dla: core {core} asked for, {self.who} finds {cores} cores on this machine; {where}")
        self.config.default_device_type = self.trt.DeviceType.DLA
        self.config.DLA_core = core
        alone = self.options.engine_capability == "dla_standalone"
        if not alone:
            self.flag("GPU_FALLBACK", "option dla")
        layers = [self.network.get_layer(index) for index in range(self.network.num_layers)]
        left = [f"{layer.name} ({layer.type.name})" for layer in layers if not self.config.can_run_on_DLA(layer)]
        if left and alone:
            raise Refused(f"option engine_capability: the DLA cannot run {', '.join(left)}, and alone it has no GPU")
        if alone:
            for tensor in self._sides():
                tensor.allowed_formats = 1 << int(self.trt.TensorFormat.DLA_LINEAR)
        if left:
            self.notes.append(f"the DLA cannot run {len(left)} of {len(layers)} layers: {', '.join(left)}")

    def _sides(self) -> list[types.ITensor]:
        """Return the inputs and outputs of the network."""
        inputs = [self.network.get_input(index) for index in range(self.network.num_inputs)]
        return inputs + [self.network.get_output(index) for index in range(self.network.num_outputs)]

    def measured(self) -> bytes | None:
        """Return the timing cache after the build; None, with a note, if the library gives none."""
        cache = self.config.get_timing_cache()
        data = cache.serialize() if cache is not None else None
        if data is None:
            self.notes.append(f"{self.who} gives no timing cache back: {self.logger.error()}")
            return None
        return bytes(data)

    def attach(self, path: Path) -> None:
        """Use the timing cache in the file, or a new one if the file does not exist."""
        cache = self.config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        attached = cache is not None and self.config.set_timing_cache(cache, False)
        if not attached:
            raise BadInput(f"option timing_cache: {path} was made by another version or device; delete it")

    def run(self, title: str) -> Any:
        """Build and return the serialised engine, or None on failure. A progress bar shows phases from 10.0 on."""
        if not self.options.progress:
            return self.builder.build_serialized_network(self.network, self.config)
        with Progress(transient=True) as bar:
            whole = bar.add_task(title, total=None)
            if hasattr(self.config, "progress_monitor"):
                self.config.progress_monitor = new_monitor(self.trt, bar, whole)
            return self.builder.build_serialized_network(self.network, self.config)

    def close(self) -> None:
        """Free the library's objects now, when nothing else runs. A traceback may keep this object for long."""
        del self.config, self.network, self.builder

    def _check_device(self) -> None:
        try:
            major, minor = canonical(Cuda().compute_capability)
        except CudaError as error:
            raise Refused(f"target {self._target()}: {self.who} builds on the device itself; {error}") from error
        if (major, minor) != self.target.compute_capability:
            raise BadInput(f"target {self._target()}: {self.who} builds for the GPU at hand, which is SM{major}{minor}")

    def _target(self) -> str:
        return f"{self.target.name} ({self.target.sm or 'no compute capability'})"


def _ranges(
    inputs: Mapping[str, tuple[int, ...]],
    path: Path,
    options: EngineOptions,
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return (smallest, the one to optimise for, largest) as shapes of every input with a dynamic axis (-1); empty for a
    static model. Raises BadInput for options that do not fit the inputs."""
    dynamic = {name: shape for name, shape in inputs.items() if -1 in shape}
    shapes = options.shapes or {}
    for name in shapes:
        if name not in inputs:
            raise BadInput(f"shapes: {path} has no input {name}; {nearest(name, inputs)}")
    if options.batch is not None and not dynamic:
        raise BadInput(f"batch: {path} has a fixed batch; export it with a dynamic one")
    ranges: dict[str, tuple[tuple[int, ...], ...]] = {}
    for name, shape in dynamic.items():
        if name in shapes:
            ranges[name] = tuple(tuple(extents) for extents in three(shapes[name], f"shapes.{name}"))
        elif -1 in shape[1:]:
            axes = [axis for axis, extent in enumerate(shape) if extent == -1]
            example = "x".join("N" if extent == -1 else str(extent) for extent in shape)
            give = f"shapes={{'{name}': (smallest, best, largest)}}; on the command line --shape {name}={example}"
            raise BadInput(f"input {name}: axes {axes} are dynamic; give {give}")
        else:
            ranges[name] = tuple((count, *shape[1:]) for count in options.batches)
        for extents in ranges[name]:
            if len(extents) != len(shape) or any(b not in (a, -1) for a, b in zip(extents, shape, strict=True)):
                raise BadInput(f"input {name}: shape {extents} does not fit {shape}")
        if any(not 0 < a <= b <= c for a, b, c in zip(*ranges[name], strict=True)):
            raise BadInput(f"input {name}: {ranges[name]} is not smallest <= best <= largest, from 1 up")
    return ranges
