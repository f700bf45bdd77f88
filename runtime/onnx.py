"""From a program to an ONNX file that was checked: opset, types, and outputs equal to the program's.

`torch.onnx` translates the exported program, onnx-graphsurgeon folds its constants. Half precision is made on the ONNX
graph, so that it is strongly typed (which TensorRT 11 and TensorRT-RTX build from) and stays comparable node by node.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils import _pytree as pytree

from ..graph.capture import infer
from ..graph.errors import BadInput, Refused
from ..graph.ops import arguments, hint, op_name
from ..graph.program import Program
from . import origins
from .engine import FLOATS, TensorSpec
from .half import to_half
from .onnxruntime import OrtEngine, inserted_casts
from .opset import lower_to_17
from .parity import Check, half_emulation, parity
from .sparsity import SparseWeight, check_sparsity
from .targets import Target, get_target, nearest

OPSET = 18  # what torch's exporter writes without converting, and every TensorRT from 10.0 parses
PRECISIONS = ("fp32", "fp16")
QUANTISED = 0.02  # error allowed in a quantised program: a few of the 255 steps
EXTERNAL_DATA = 1_900_000_000  # bytes of weights from which they go to a file of their own: protobuf ends at 2 GiB


@dataclass
class OnnxReport:
    """What was written, and the proof.

    bytes: of the ONNX file and its external weights. nodes: count by operator. types: weight elements by type.
    checks: comparisons with the fp32 program, made in ONNX Runtime on the CPU; empty when it cannot run the model
    (`warnings` says why). float32: nodes of an fp16 graph that stay in fp32, and why. clamped: constants that fp16
    cannot hold, and what became of them. sparse: the weights that have zeros; those with the 2:4 pattern in the program
    have it here.
    """

    path: Path
    precision: str
    opset: int
    bytes: int
    seconds: float
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    nodes: dict[str, int]
    types: dict[str, int]
    checks: list[Check] = field(default_factory=list)
    float32: dict[str, str] = field(default_factory=dict)
    clamped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    sparse: list[SparseWeight] = field(default_factory=list)

    @property
    def parity(self) -> float | None:
        """The worst max |a - b| / max |b| of all checks; None when none could be made."""
        return max((c.error for c in self.checks), default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self) | {"path": str(self.path), "parity": self.parity}


def export_onnx(
    program: Program,
    path: str | os.PathLike[str],
    precision: str = "fp32",
    opset: int | None = None,
    target: str | Target | None = None,
    tolerance: float = 1e-4,
    progress: bool = False,
) -> OnnxReport:
    """Write the program (eval mode) as an ONNX file; the program is not changed.

    precision: "fp32", or "fp16" for a strongly typed fp16 graph, whose inputs and outputs are fp16 as well (integer
    ones keep their type). opset: 17 or more, by default 18, or 17 where the target's TensorRT needs it. target: checked
    for the precision and the opset. tolerance: largest error allowed in fp32, or `QUANTISED` if that is more and the
    program is quantised (a value half-way between two steps rounds either way); in fp16 the error is only stated. Dynamic
    dimensions stay dynamic. Weights over 1.9 GB go to `<path>.data`. Nothing is written unless everything holds.

    Raises BadInput for a wrong argument, Refused for an operator that cannot be translated, types or an opset that did
    not come out as asked, outputs that differ by more than the tolerance, or fp16 outputs that overflow.
    """
    start, path = time.perf_counter(), Path(path)
    opset = _settings(precision, opset, target)
    with _status(progress) as say:
        say("translating")
        exported = _exportable(program).exported()
        model = _translate(exported, max(opset, OPSET))
        places = {node.name: origins.scopes(node) for node in model.graph.node}
        say("folding constants")
        with _quiet():
            graph = gs.import_onnx(model)
            graph.fold_constants().cleanup().toposort()
        _name(graph, exported)
        float32, clamped = to_half(graph) if precision == "fp16" else ({}, {})
        if opset == 17:
            lower_to_17(graph)
        model = gs.export_onnx(graph)
        model.producer_name = "graphcomb"
        origins.store(model, origins.trace(program, places))
        _check(model, opset, precision, set(float32))
        sparse = check_sparsity(program, model)
        say("comparing with the program")
        with _saved(model, path) as (file, size):
            report = OnnxReport(
                path,
                precision,
                opset,
                size,
                0.0,
                [_spec(t) for t in graph.inputs],
                [_spec(t) for t in graph.outputs],
                dict(Counter(n.op_type for n in model.graph.node)),
                weight_types(model),
                float32=float32,
                clamped=clamped,
                sparse=sparse,
            )
            quantised = any(op_name(n).startswith("fake_quantize") for n in program.graph.nodes)
            _compare(program, file, report, max(tolerance, QUANTISED) if quantised else tolerance)
    report.seconds = time.perf_counter() - start
    return report


def weight_types(model: onnx.ModelProto) -> dict[str, int]:
    """Elements of the initializers by type name ("fp32", "int64", ...)."""
    counts: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        name = FLOATS.get(tensor.data_type, onnx.TensorProto.DataType.Name(tensor.data_type).lower())
        counts[name] += int(np.prod(tensor.dims, dtype=np.int64))
    return dict(counts)


def _settings(precision: str, opset: int | None, target: str | Target | None) -> int:
    if precision not in PRECISIONS:
        raise BadInput(f"precision {precision}: not known; {nearest(str(precision), PRECISIONS)}")
    if opset is not None and opset < 17:
        raise BadInput(f"opset {opset}: 17 is the lowest that can be written (LayerNormalization came with it)")
    if target is None:
        return opset or OPSET
    device = target if isinstance(target, Target) else get_target(target)
    device.alignment(precision)
    if opset is not None and opset > device.opset:
        raise BadInput(f"opset {opset}: target {device.name} parses up to {device.opset}")
    return opset or min(OPSET, device.opset)


# --------------------------------------------------------------------------------------------------------- translation
def _exportable(program: Program) -> Program:
    """A copy in eval mode, without what torch.onnx translates into shapes that no engine fuses; same arithmetic, plain
    operators."""
    program = program.copy()
    program.module().eval()
    module = program.graph_module
    for node in list(module.graph.nodes):
        if op_name(node) in ("adaptive_avg_pool2d", "adaptive_avg_pool3d"):
            _global_pool(node)
        elif op_name(node) == "scaled_dot_product_attention":
            _attention(node)
    module.recompile()
    return program


def _global_pool(node: fx.Node) -> None:
    """Pooling to 1x1 is a mean; on a channels-last tensor torch.onnx would make it a gather over the whole tensor."""
    a = arguments(node)
    if all(size == 1 for size in a["output_size"]):
        node.target = torch.ops.aten.mean.dim
        node.args, node.kwargs = (a["self"], list(range(-len(a["output_size"]), 0)), True), {}


def _attention(node: fx.Node) -> None:
    """softmax(q k^T s + mask) v; torch.onnx would transpose k by two reshapes, which hides attention from TensorRT."""
    a, aten, graph = arguments(node), torch.ops.aten, node.graph
    mask, query = a["attn_mask"], a["query"].meta["val"]
    if (
        a["is_causal"]
        or a["enable_gqa"]
        or a["dropout_p"]
        or (mask is not None and mask.meta["val"].dtype == torch.bool)
    ):
        return
    scale = a["scale"] if a["scale"] is not None else hint(query.shape[-1]) ** -0.5
    with graph.inserting_before(node):
        found = graph.call_function(aten.mul.Scalar, (a["query"], scale))
        keys = graph.call_function(aten.transpose.int, (a["key"], -2, -1))
        found = graph.call_function(aten.matmul.default, (found, keys))
        if mask is not None:
            found = graph.call_function(aten.add.Tensor, (found, mask))
        found = graph.call_function(aten.softmax.int, (found, -1))
        found = graph.call_function(aten.matmul.default, (found, a["value"]))
    for new in found.graph.nodes:
        if "val" not in new.meta and new.op == "call_function":
            new.meta = {k: v for k, v in node.meta.items() if k != "val"}
            infer(new)
    node.replace_all_uses_with(found)
    graph.erase_node(node)


def _translate(exported: ExportedProgram, opset: int) -> onnx.ModelProto:
    try:
        with _quiet():
            found = torch.onnx.export(exported, dynamo=True, opset_version=opset, verbose=False)
    except Exception as error:  # the exporter's errors carry the reason of the innermost one in their text
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise Refused(f"torch.onnx cannot translate the program: {text[:300]}") from error
    assert found is not None
    model = found.model_proto
    taken: set[str] = set()
    for node in model.graph.node:  # the module's path tells a reader of an engine's report where a kernel comes from
        module, _ = origins.scopes(node)
        name = "/".join([*([module] if module else []), node.name.removeprefix("node_")])
        node.name = name if name not in taken else f"{name}_{len(taken)}"
        taken.add(node.name)
    return model


def _name(graph: gs.Graph, exported: ExportedProgram) -> None:
    """Name inputs after the program's arguments, outputs after its output structure, dynamic dimensions after what they
    are. An output that is an input, a constant or another output gets a tensor of its own."""
    specs = exported.graph_signature.input_specs
    inputs = [s.arg.name for s in specs if s.kind is InputKind.USER_INPUT and isinstance(s.arg, TensorArgument)]
    if len(inputs) != len(graph.inputs):
        raise Refused(f"torch.onnx made {len(graph.inputs)} inputs of the program's {len(inputs)} tensors")
    for tensor, name in zip(graph.inputs, inputs, strict=True):
        _rename(graph, tensor, name)
    for i, name in enumerate(_output_names(exported)):
        tensor = graph.outputs[i]
        if isinstance(tensor, gs.Constant) or any(tensor is t for t in (*graph.inputs, *graph.outputs[:i])):
            graph.outputs[i] = gs.Variable(f"{tensor.name}_{i}", tensor.dtype, tensor.shape)
            graph.nodes.append(gs.Node("Identity", f"{name}/Identity", {}, [tensor], [graph.outputs[i]]))
        while any(name == t.name for t in (*graph.inputs, *graph.outputs[:i])):
            name += "_out"
        _rename(graph, graph.outputs[i], name)
    symbols: dict[str, str] = {}
    for tensor in graph.inputs:
        for d, size in enumerate(tensor.shape or ()):
            if isinstance(size, str) and size.isidentifier() and size not in symbols:
                symbols[size] = f"{tensor.name}_{d}" if d or "batch" in symbols.values() else "batch"
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.shape is not None:
            tensor.shape = [
                re.sub(r"\w+", lambda m: symbols.get(m[0], m[0]), s) if isinstance(s, str) else s for s in tensor.shape
            ]


def _rename(graph: gs.Graph, tensor: gs.Tensor, name: str) -> None:
    for other in graph.tensors().values():
        if other.name == name and other is not tensor:
            other.name += "_inner"
    tensor.name = name


def _output_names(exported: ExportedProgram) -> list[str]:
    spec, results = exported.call_spec.out_spec, exported.graph_signature.user_outputs
    paths = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(len(results))), spec))[0]
    names = []
    for path, index in paths:
        if isinstance(results[index], str):  # a tensor; anything else is a constant of the program
            keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
            name = "_".join(keys)
            names.append(name if name and not name[0].isdigit() else "_".join(["output", *keys]))
    return names


# -------------------------------------------------------------------------------------------------------------- checks
def _check(model: onnx.ModelProto, opset: int, precision: str, float32: set[str]) -> None:
    """Opset and types as they came out; torch's exporter may keep its own opset, and a program may mix types."""
    came = next((o.version for o in model.opset_import if not o.domain), 0)
    if came != opset:
        raise Refused(f"opset {opset} was asked for, torch.onnx wrote {came}")
    exempt: set[str] = set()
    for node in model.graph.node:
        if node.name in float32 or (node.op_type == "Cast" and precision != "fp32"):
            exempt.update((*node.input, *node.output))
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    types = [(v.name, v.type.tensor_type.elem_type) for v in values if v.type.HasField("tensor_type")]
    types += [(t.name, t.data_type) for t in model.graph.initializer]
    for name, kind in types:
        if kind in FLOATS and FLOATS[kind] != precision and not (name in exempt and FLOATS[kind] == "fp32"):
            raise Refused(f"{name} is {FLOATS[kind]} in a graph that should be {precision}; cast the model to one type")


def _compare(program: Program, file: Path, report: OnnxReport, tolerance: float) -> None:
    half, optimized = report.precision == "fp16", file.with_name("optimized.onnx")
    try:
        engine = OrtEngine(file, optimized=optimized if half and report.bytes < EXTERNAL_DATA else None)
        report.checks = parity(program, engine)
        engine.close()
    except BadInput as error:
        if not half:
            raise Refused(f"{report.path}: ONNX Runtime cannot run what was exported ({error})") from error
        report.warnings.append(f"the file was not run: {error}")
    if half:
        if optimized.exists() and inserted_casts(onnx.load(str(optimized))):
            report.warnings.append("ONNX Runtime has no fp16 kernels for this CPU: the file was run in fp32 arithmetic")
        check, notes = half_emulation(program)
        report.checks.append(check)
        report.warnings += notes
        tolerance = np.finfo(np.float64).max
    worst = max(report.checks, key=lambda c: c.error)
    if worst.error > tolerance:
        finite = np.isfinite(worst.error)
        figure = f"differs from the program by {worst.error:.2g}" if finite else "is infinite where the program is not"
        where = f"{worst.inputs} inputs, batch {worst.batch}"
        raise Refused("; ".join([f"{report.path}: {report.precision} {figure} ({where})", *report.warnings]))


def _spec(tensor: gs.Variable) -> TensorSpec:
    shape = tuple(s if isinstance(s, int) else None for s in tensor.shape)
    return TensorSpec(tensor.name, np.dtype(tensor.dtype).name, shape)


# ------------------------------------------------------------------------------------------------------------- writing
@contextlib.contextmanager
def _saved(model: onnx.ModelProto, path: Path) -> Iterator[tuple[Path, int]]:
    """Write the model and run ONNX's checker under a temporary folder beside `path`; moved there on success only.

    Yields the temporary file and the bytes written.
    """
    size = sum(len(t.raw_data) for t in model.graph.initializer)
    data = f"{path.name}.data"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
            file = Path(folder) / path.name
            onnx.save_model(model, str(file), save_as_external_data=size > EXTERNAL_DATA, location=data)
            try:
                onnx.checker.check_model(str(file), full_check=True)
            except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
                raise Refused(f"{path}: the exported graph is not valid ONNX ({str(error).splitlines()[0]})") from error
            files = sorted(Path(folder).iterdir(), key=lambda f: f.name == path.name)  # the model after its weights
            yield file, sum(f.stat().st_size for f in files)
            for written in files:
                written.replace(path.with_name(written.name))
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No chatter of the exporter and of graphsurgeon: prints, warnings, log lines."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    surgeon = gs.logger.G_LOGGER
    severity, surgeon.severity = surgeon.severity, surgeon.ERROR
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        surgeon.severity = severity
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _status(progress: bool) -> Iterator[Any]:
    """A spinner that names the stage."""
    if not progress:
        yield lambda stage: None
        return
    from rich.console import Console

    with Console(stderr=True).status("ONNX") as status:
        yield lambda stage: status.update(f"ONNX: {stage}")
