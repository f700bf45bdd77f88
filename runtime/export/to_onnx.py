"""From a program to an ONNX file that was checked: opset, types, and outputs equal to the program's.

`torch.onnx` translates the exported program, onnx-graphsurgeon folds its constants. Half precision is made on the ONNX
graph, so that it is strongly typed (which TensorRT 11 and TensorRT-RTX build from) and stays comparable node by node.
The comparison itself is in compare.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import math
import os
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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

from ...graph.compat import pytree
from ...graph.edit import infer
from ...graph.errors import BadInput, Refused, nearest
from ...graph.nodes import arguments, hint, op_name
from ...graph.program import Program
from ..devices.table import Target, get_target
from ..engines import origins
from ..onnx_file import FLOATS, TensorSpec, opset_of
from .compare import TOLERANCES, Verdict, ranges_of, verdict
from .half import to_half
from .islands import islands
from .opset import DEFAULT, choose_opset, is_quantised, lower_to_17
from .parity import Check, cases
from .sparsity import SparseWeight, check_sparsity

PRECISIONS = ("fp32", "fp16")
EXTERNAL_DATA = 1_900_000_000  # bytes of weights from which they go to a file of their own: protobuf ends at 2 GiB


@dataclass
class OnnxReport:
    """What was written, and the proof.

    bytes: of the ONNX file and its external weights. nodes: count by operator. types: weight elements by type.
    checks: comparisons with the fp32 program, made in ONNX Runtime on the CPU (`warnings` says what it could not run).
    tolerance: the error that was allowed. float32: nodes of an fp16 graph that stay in fp32, and why. clamped: constants
    that fp16 cannot hold, and what became of them. sparse: the weights that have zeros; those with the 2:4 pattern in the
    program have it here.
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
    tolerance: float = 0.0
    float32: dict[str, str] = field(default_factory=dict)
    clamped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    sparse: list[SparseWeight] = field(default_factory=list)

    @property
    def parity(self) -> float | None:
        """The worst error of all checks (`Check.error`); None when none could be made."""
        return max((c.error for c in self.checks), default=None)

    @property
    def agreement(self) -> float | None:
        """Share of the real samples whose scores decide as the program's do; None without real samples or scores."""
        real = [c.agreement for c in self.checks if c.real]
        return min((a for a in real if a is not None), default=None)

    @property
    def cosine(self) -> float | None:
        """The lowest of all outputs and checks; None when none could be made."""
        return min((o.cosine for c in self.checks for o in c.outputs), default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        figures = {"parity": self.parity, "agreement": self.agreement, "cosine": self.cosine}
        return dataclasses.asdict(self) | {"path": str(self.path)} | figures


def export_onnx(
    program: Program,
    path: str | os.PathLike[str],
    precision: str = "fp32",
    opset: int | None = None,
    target: str | Target | None = None,
    tolerance: float | None = None,
    progress: bool = False,
    keep_fp32: Sequence[str] = (),
    keep_io_types: bool = False,
    data: Iterable[Any] = (),
) -> OnnxReport:
    """Write the program (eval mode) as an ONNX file; the program is not changed.

    precision: "fp32", or "fp16" for a strongly typed fp16 graph, whose inputs and outputs are fp16 as well (integer
    ones keep their type). Nodes that fp16 would spoil stay in fp32, named in the report (`islands`); keep_fp32 adds
    nodes or modules by pattern. keep_io_types: inputs and outputs stay fp32; of themselves only those do whose values
    fp16 cannot hold, such as box coordinates in pixels. opset: 17 or more, by default what `choose_opset` finds best
    for the target. target: checked for the precision and the opset.

    tolerance: largest error allowed of an output, relative to its largest value; of a channel ten times as much of its
    own scale; by default `TOLERANCES`. A quantised program rounds a value half-way between two steps either way: most
    of its samples must be within the tolerance, and all near (`compare.NEAR`). data: real inputs, batches of a
    loader or (args, kwargs), to compare on besides the example and random ones; what scores decide must be the same
    there. In fp16 the file counts as it runs where every operator rounds. Dynamic dimensions stay dynamic. Weights over
    1.9 GB go to `<path>.data`. Nothing is written unless everything holds.

    Raises BadInput for a wrong argument, Refused for an operator that cannot be translated, types or an opset that did
    not come out as asked, and outputs that differ by more than the tolerance, with the first node that is off in fp16.
    """
    start, path = time.perf_counter(), Path(path)
    device = _settings(precision, target, tolerance)
    opset = choose_opset(program, device, opset)
    with _status(progress) as say:
        say("translating")
        exported = _exportable(program).exported()
        model = _translate(exported, max(opset, DEFAULT))
        places = {node.name: origins.scopes(node) for node in model.graph.node}
        say("folding constants")
        with _quiet():
            graph = gs.import_onnx(model)
            graph.fold_constants().cleanup().toposort()
        _name(graph, exported)
        say("running the program")
        known = cases(program, data=data)
        single: onnx.ModelProto | None = None
        float32, clamped = dict[str, str](), dict[str, str]()
        if precision == "fp16":
            say("choosing what stays in fp32")
            single = gs.export_onnx(graph)
            _check_types(single, precision)
            keep, io = islands(graph, ranges_of(single, known), keep_fp32, keep_io_types)
            float32, clamped = to_half(graph, keep, io)
        elif keep_fp32:
            raise BadInput("keep_fp32: is for precision fp16")
        if opset == 17:
            lower_to_17(graph)
        model = gs.export_onnx(graph)
        model.producer_name = "graphcomb"
        origins.store(model, origins.trace(program, places))
        _check(model, opset, precision, set(float32), {t.name for t in (*graph.inputs, *graph.outputs)})
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
            kind = "int8" if is_quantised(program) else precision
            report.tolerance = TOLERANCES[kind, precision] if tolerance is None else tolerance
            _accept(report, verdict(model, single, file, known, report.tolerance, kind == "int8"))
    report.seconds = time.perf_counter() - start
    return report


def weight_types(model: onnx.ModelProto) -> dict[str, int]:
    """Elements of the initializers by type name ("fp32", "int64", ...)."""
    counts: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        name = FLOATS.get(tensor.data_type, onnx.TensorProto.DataType.Name(tensor.data_type).lower())
        counts[name] += int(np.prod(tensor.dims, dtype=np.int64))
    return dict(counts)


def _settings(precision: str, target: str | Target | None, tolerance: float | None) -> Target | None:
    if precision not in PRECISIONS:
        raise BadInput(f"precision {precision}: not known; {nearest(str(precision), PRECISIONS)}")
    if tolerance is not None and not tolerance > 0:
        raise BadInput(f"tolerance: above 0, not {tolerance}")
    device = get_target(target) if isinstance(target, str) else target
    if device is not None:
        device.alignment(precision)
    return device


def _accept(report: OnnxReport, found: Verdict) -> None:
    """Take over what the comparison found. Raises Refused when it says no."""
    report.checks, report.warnings = found.checks, [*report.warnings, *found.notes]
    if found.wrong:
        cure = "; keep_fp32 and tolerance are the options" if report.precision == "fp16" else ""
        raise Refused("; ".join([f"{report.path}: {report.precision} {found.wrong}", *report.warnings]) + cure)


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
        with _quiet(), _exact_rewrites():
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
def _check(model: onnx.ModelProto, opset: int, precision: str, float32: set[str], io: set[str]) -> None:
    """Opset and types as they came out; torch's exporter may keep its own opset. float32: nodes that are not in the
    precision; io: names of inputs and outputs, which may be fp32 as well."""
    came = opset_of(model)
    if came != opset:
        raise Refused(f"opset {opset} was asked for, torch.onnx wrote {came}")
    exempt = set(io) if precision != "fp32" else set()
    for node in model.graph.node:
        if node.name in float32 or (node.op_type == "Cast" and precision != "fp32"):
            exempt.update((*node.input, *node.output))
    _check_types(model, precision, exempt)


def _check_types(model: onnx.ModelProto, precision: str, exempt: set[str] | None = None) -> None:
    """All float tensors have the precision, or are fp32 where they may be (exempt; None: anywhere)."""
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    types = [(v.name, v.type.tensor_type.elem_type) for v in values if v.type.HasField("tensor_type")]
    types += [(t.name, t.data_type) for t in model.graph.initializer]
    for name, kind in types:
        may = FLOATS.get(kind) == "fp32" and (exempt is None or name in exempt)
        if kind in FLOATS and FLOATS[kind] != precision and not may:
            raise Refused(f"{name} is {FLOATS[kind]} in a graph that should be {precision}; cast the model to one type")


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
            for written in Path(folder).iterdir():  # weights beside are written for their owner only
                written.chmod(file.stat().st_mode & 0o777)
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
def _exact_rewrites() -> Iterator[None]:
    """The exporter's optimiser takes a number within 1e-8 of 0, or 1e-5 of 1, for it, and drops `x + 1e-12`, which keeps
    a norm from dividing by 0. Here only 0 is 0, and 1 is 1."""
    from onnxscript.rewriter import _matcher

    def equal(a: float, b: float, **tolerances: float) -> bool:
        return a == b if {0, 1} & {a, b} else math.isclose(a, b, **tolerances)

    class Exact:
        def __getattr__(self, name: str) -> Any:
            return equal if name == "isclose" else getattr(math, name)

    before = getattr(_matcher, "math", None)
    if before is None:  # another version of onnxscript
        yield
        return
    _matcher.math = Exact()  # type: ignore[assignment]
    try:
        yield
    finally:
        _matcher.math = before


@contextlib.contextmanager
def _status(progress: bool) -> Iterator[Any]:
    """A spinner that names the stage."""
    if not progress:
        yield lambda stage: None
        return
    from rich.console import Console

    with Console(stderr=True).status("ONNX") as status:
        yield lambda stage: status.update(f"ONNX: {stage}")
