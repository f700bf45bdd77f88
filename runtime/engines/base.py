"""The one interface behind which every inference library stands: build an ONNX file for a target, load it, run it.

A backend is a module of this package with two functions, imported only when it is asked for:

    build(model: Path, target: Target, out: Path | None, *, backend: str, **options) -> EngineReport
    load(path: Path, *, backend: str, **options) -> Engine

Its keyword-only parameters are the options a user may set. Adding a backend is one line in `BACKENDS`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import secrets
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, get_type_hints, runtime_checkable

import numpy as np
import onnx

from ...graph.errors import BadInput, MissingBackend
from ...graph.hints import checked
from ...graph.program import Program
from ...graph.program import load as load_program
from ..devices.table import Target, get_target, nearest
from .origins import Origin
from .origins import read as read_origins


class UnparsedOp(BadInput):
    """The library has no form for an operator of the ONNX file; the message names node and operator."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: name, numpy dtype ("float16"; bfloat16 and fp8 as ml_dtypes spells them), and shape with
    None for dynamic dimensions."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@runtime_checkable
class Engine(Protocol):
    """A loaded model that runs on the host's arrays."""

    @property
    def inputs(self) -> list[TensorSpec]: ...

    @property
    def outputs(self) -> list[TensorSpec]: ...

    @property
    def input_names(self) -> list[str]: ...

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs for one set of inputs, both in the order of the specs. Inputs have the dtypes that the specs say.

        Raises BadInput when number, dtype or shape do not fit.
        """

    def close(self) -> None:
        """Release device memory and threads; the engine is unusable afterwards."""


class HostEngine:
    """What engines on host arrays share: the specs, which a subclass puts in `_inputs` and `_outputs`, and the checks of
    what is given to `run`."""

    _inputs: list[TensorSpec]
    _outputs: list[TensorSpec]

    @property
    def inputs(self) -> list[TensorSpec]:
        return self._inputs

    @property
    def outputs(self) -> list[TensorSpec]:
        return self._outputs

    @property
    def input_names(self) -> list[str]:
        return [spec.name for spec in self._inputs]

    def _check_count(self, inputs: Sequence[np.ndarray]) -> None:
        if len(inputs) != len(self._inputs):
            names = ", ".join(self.input_names)
            raise BadInput(f"the engine takes {len(self._inputs)} inputs ({names}), got {len(inputs)}")

    def _check_dtype(self, spec: TensorSpec, array: np.ndarray) -> None:
        if array.dtype != np.dtype(spec.dtype):
            raise BadInput(f"input {spec.name}: the engine takes {spec.dtype}, got {array.dtype}")


@dataclass(frozen=True)
class Kernel:
    """One fused kernel of an engine: what the library made of one or more ONNX nodes.

    kind: the library's own name for it. nodes: names of the ONNX nodes in it. inputs, outputs: tensors as text, type
    and shape first ("fp16[1,64,56,56] NHWC8"). padding: the kernel only pads or re-formats, a cost without MACs.
    """

    name: str
    kind: str
    nodes: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    padding: bool = False


@dataclass
class EngineReport:
    """What came out of a build; everything in it was read from the library or the file, nothing is assumed.

    bytes: size of the engine file. seconds: build time. precision: "fp32", "fp16", "bf16" or "int8" (see `precision`).
    memory: bytes by purpose ("weights", "activations", "scratch", as far as the library tells). origins: where the
    ONNX nodes of the kernels come from, as far as the ONNX file says.
    """

    backend: str
    version: str
    target: str
    path: Path
    bytes: int
    seconds: float
    precision: str
    kernels: list[Kernel] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    origins: dict[str, Origin] = field(default_factory=dict)

    @property
    def padding(self) -> list[Kernel]:
        """The kernels that only pad or re-format."""
        return [k for k in self.kernels if k.padding]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with the count and the list of the padding kernels."""
        return dataclasses.asdict(self) | {"path": str(self.path), "padding": [k.name for k in self.padding]}


@dataclass(frozen=True)
class Backend:
    """module: name in this package; package: the library it drives; extra: of graphcomb, that installs the library
    (None: always there); suffixes: of its engine files, the first is the one written; source: suffix of the files it
    builds from, ONNX models or saved programs."""

    module: str
    package: str
    extra: str | None
    suffixes: tuple[str, ...]
    source: str = ".onnx"


BACKENDS = {
    "onnxruntime": Backend("ort", "onnxruntime", None, (".onnx",)),
    "tensorrt_rtx": Backend("trt.build", "tensorrt_rtx", "rtx", (".rtx",)),
    "tensorrt": Backend("trt.build", "tensorrt", "tensorrt", (".engine", ".plan", ".trt")),
    "openvino": Backend("ov", "openvino", "openvino", (".xml",)),
    "inductor": Backend("torch.inductor", "torch", None, (".aoti",), ".pt2"),
    "torch_tensorrt": Backend("torch.torch_tensorrt", "torch_tensorrt", "tensorrt", (".ep",), ".pt2"),
}


def backend_module(name: str) -> ModuleType:
    """Import a backend. Raises BadInput for an unknown name, MissingBackend when its library is not installed."""
    if name not in BACKENDS:
        raise BadInput(f"backend {name}: not known; {nearest(name, BACKENDS)}")
    found = BACKENDS[name]
    if importlib.util.find_spec(found.package) is None:
        extra = f"graphcomb[{found.extra}]" if found.extra else "graphcomb"
        raise MissingBackend(f"{found.package} is not installed; install it with: pip install '{extra}'")
    return importlib.import_module(f".{found.module}", __package__)


def build_engine(
    onnx_path: str | os.PathLike[str],
    target: str | Target = "cpu",
    out: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    **options: Any,
) -> EngineReport:
    """Build an engine from an ONNX file (for the backends of PyTorch: a saved program) for a target device and say what
    came out.

    out: the engine file; by default next to the ONNX file with the target in its name (on "cpu" nothing is written and
    the ONNX file itself is the engine). backend: by default the target's own. options: the backend's, for TensorRT
    among others the `batch` range of a dynamic model. Raises BadInput for a damaged file, a precision that the target's
    GPU lacks, an unknown target or option, MissingBackend when the target's library is not installed.
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
    check_options(module.build, options, name)
    if out is not None:
        destination: Path | None = Path(out)
    elif BACKENDS[name].suffixes[0] == path.suffix:
        destination = None
    else:
        destination = path.with_name(f"{path.stem}.{device.name}{BACKENDS[name].suffixes[0]}")
    report = module.build(path, device, destination, backend=name, **options)
    if model is not None:
        nodes = {node for kernel in report.kernels for node in kernel.nodes}
        report.origins = {node: origin for node, origin in read_origins(model).items() if node in nodes}
    return report


def load_engine(path: str | os.PathLike[str], backend: str | None = None, **options: Any) -> Engine:
    """Load an engine file to run it here. backend: by default from the file's suffix."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    if backend is None:
        backend = next((name for name, b in BACKENDS.items() if path.suffix in b.suffixes), None)
    if backend is None:
        suffixes = [s for b in BACKENDS.values() for s in b.suffixes]
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
        if shapes and shapes[0] and "batch" in inspect.signature(module.compile_program).parameters:
            options = {"batch": shapes[0][0]} | options
        check_options(module.compile_program, options, backend or "inductor")
        return module.compile_program(model, **_threads(module.compile_program, threads), **options)
    path = Path(model)
    name = backend or next((n for n, b in BACKENDS.items() if path.suffix in b.suffixes), None)
    if name is None:
        return load_engine(path)  # which says what is wrong
    module = backend_module(name)
    found = BACKENDS[name]
    if path.suffix in found.suffixes or name == "openvino":
        return load_engine(path, name, **_threads(module.load, threads), **options)
    if found.source == ".pt2":
        return open_engine(load_program(path), name, threads, shapes, **options)
    if shapes and not {"batch", "shapes"} & options.keys() and "shapes" in inspect.signature(module.build).parameters:
        wanted = zip(input_specs(path) or (), shapes, strict=False)
        ranges = {spec.name: (tuple(s),) * 3 for spec, s in wanted if None in spec.shape}
        options = options | ({"shapes": ranges} if ranges else {})
    with tempfile.TemporaryDirectory() as folder:
        report = build_engine(path, module.local_target(name), Path(folder) / f"x{found.suffixes[0]}", name, **options)
        own = {"host_code": True} if options.get("version_compatible") else {}  # this machine has just built it
        return load_engine(report.path, name, **own)


def _threads(function: Callable[..., Any], threads: int) -> dict[str, Any]:
    return {"threads": threads} if "threads" in inspect.signature(function).parameters else {}


def known_options(function: Callable[..., Any]) -> list[str]:
    """The options that a backend's `build` or `load` takes."""
    kinds = inspect.signature(function).parameters.values()
    return [p.name for p in kinds if p.kind is p.KEYWORD_ONLY and p.name != "backend"]


def check_options(function: Callable[..., Any], options: Mapping[str, Any], backend: str) -> None:
    """Raise BadInput for an option that a backend's function does not take, or not with this value."""
    known = known_options(function)
    annotations = get_type_hints(function)
    for name, value in options.items():
        if name not in known:
            raise BadInput(f"option {name}: not one of backend {backend}; {nearest(name, known)}")
        checked(annotations[name], value, f"option {name}")


# ---------------------------------------------------------------------------------------------------------- ONNX files
def check_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file (without its external weights) and run the ONNX checker. Raises BadInput with one line."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.graph.output:
            raise BadInput(f"{path}: not an ONNX file (it holds no graph)")
        onnx.checker.check_model(str(path))
    except BadInput:
        raise
    except Exception as error:  # protobuf, checker and I/O errors have no common base
        text = next((line for line in str(error).splitlines() if line.strip()), "no message")
        raise BadInput(f"{path}: not a valid ONNX file ({type(error).__name__}: {text[:200]})") from error
    return model


def unparsed(path: Path, library: str, ops: Collection[str]) -> UnparsedOp:
    """The error about operators that a library lacks, with the first node that is one."""
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    node = next((n for n in nodes if n.op_type in ops), None)
    where = f"node {node.name} ({node.op_type})" if node else ", ".join(ops)  # else it lies in a subgraph
    return UnparsedOp(f"{path}: {library} cannot parse it: {where}: operator not supported")


def input_specs(path: Path) -> list[TensorSpec] | None:
    """The inputs of an ONNX file, without its weights; None for another file."""
    if path.suffix != ".onnx":
        return None
    graph = check_model(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    found = []
    for value in graph.input:
        if value.name not in weights:
            kind = value.type.tensor_type
            dtype = (
                "bfloat16"
                if kind.elem_type == onnx.TensorProto.BFLOAT16
                else (onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name)
            )
            shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
            found.append(TensorSpec(value.name, dtype, shape))
    return found


FLOATS = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.DOUBLE: "fp64",
}


def precision(model: onnx.ModelProto) -> str:
    """The precision a strongly typed engine of this model computes in: "int8" or "fp8" with Q/DQ nodes, by the type they
    quantise to, else the float type that most weight elements have ("fp32" when there are none)."""
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return "fp8" if _quantises_to_floats(model) else "int8"
    counts: dict[str, int] = {}
    constants = [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    for tensor in (*model.graph.initializer, *constants):
        if tensor.data_type in FLOATS:
            kind = FLOATS[tensor.data_type]
            counts[kind] = counts.get(kind, 0) + int(np.prod(tensor.dims, dtype=np.int64))
    return max(counts, key=lambda k: counts[k]) if counts else "fp32"


def _quantises_to_floats(model: onnx.ModelProto) -> bool:
    """Whether the first QuantizeLinear gives 8-bit floats: by its zero point, its attribute, or the inferred type."""
    node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    kinds |= {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    asked = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
    found = asked or kinds.get(node.output[0], 0) or (kinds.get(node.input[2], 0) if len(node.input) > 2 else 0)
    constants = {n.output[0]: n.attribute[0].t.data_type for n in model.graph.node if n.op_type == "Constant"}
    found = found or (constants.get(node.input[2], 0) if len(node.input) > 2 else 0)
    return found in FLOATS8


FLOATS8 = {
    onnx.TensorProto.FLOAT8E4M3FN,
    onnx.TensorProto.FLOAT8E4M3FNUZ,
    onnx.TensorProto.FLOAT8E5M2,
    onnx.TensorProto.FLOAT8E5M2FNUZ,
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of `path`, renamed to it on success and removed on failure.

    Raises BadInput when the folder cannot be written.
    """
    part = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.part{path.suffix}")
        # A new file, never what a link under that name leads to, with the rights that new files have.
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield part
        part.replace(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if part != path:
            with suppress(OSError):
                part.unlink(missing_ok=True)
