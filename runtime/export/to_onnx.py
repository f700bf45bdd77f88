"""Export a program to an ONNX file, and check its opset, its types and its outputs against the program's.

`torch.onnx` translates the exported program, and onnx-graphsurgeon folds its constants. The conversion to half precision
works on the ONNX graph, so that the graph is strongly typed, as TensorRT 11 and TensorRT-RTX require, and can be compared
node by node. compare.py makes the comparison.
"""

import contextlib
import dataclasses
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from rich.console import Console
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from ...graph.compat import pytree
from ...graph.errors import BadInput, Refused, nearest
from ...graph.outputs import output_nodes
from ...graph.program import Program
from ..devices.table import Target, get_target
from ..engines import origins
from ..onnx_file import FLOATS, TensorSpec, opset_of
from .compare import LARGE, TOLERANCES, Verdict, ranges_of, verdict
from .half_precision.half import BF16, HALVES, to_half
from .half_precision.islands import islands
from .opset import DEFAULT, choose_opset, is_quantised, lower_to_17
from .parity import Check, cases
from .sparsity import SparseWeight, check_sparsity
from .translate import exportable, quiet, translate

PRECISIONS = ("fp32", *HALVES)


@dataclass
class OnnxReport:
    """The report of an export.

    - path, precision, opset: the file, "fp32" or "fp16", and its opset.
    - bytes: size of the ONNX file and its external weights. seconds: time of the export.
    - inputs, outputs: names, types and shapes.
    - nodes: number of nodes by operator. types: number of weight elements by type.
    - checks: comparisons with the fp32 program in ONNX Runtime on the CPU.
    - tolerance: largest error that was allowed.
    - float32: by node of an fp16 graph that stays in fp32, the reason.
    - clamped: by constant that fp16 cannot represent, what it was changed to.
    - warnings: warnings for the user, for instance that ONNX Runtime could not run the file.
    - sparse: weights that have zeros. All weights that are 2:4 sparse in the program are 2:4 sparse in the file.
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
        """The largest error of all checks (`Check.error`); None without checks."""
        return max((c.error for c in self.checks), default=None)

    @property
    def agreement(self) -> float | None:
        """The lowest `Check.agreement` on real samples; None without real samples or scores."""
        real = [c.agreement for c in self.checks if c.real]
        return min((a for a in real if a is not None), default=None)

    @property
    def cosine(self) -> float | None:
        """The lowest cosine similarity of an output in all checks; None without checks."""
        return min((o.cosine for c in self.checks for o in c.outputs), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values (docs/formats.md, Onnx)."""
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
    """Export a program in eval mode to an ONNX file, after comparing the file's outputs with the program's.

    The program is not changed. Dynamic dimensions stay dynamic. Weights of more than 1.9 GB go to `<path>.data`. Nothing is
    written if a check fails.

    - precision: "fp32", or "fp16" for a strongly typed fp16 graph, whose floating-point inputs and outputs are fp16, too.
      Nodes whose values fp16 cannot represent stay in fp32, as do the layers that `Quantize(layers=)` names, and the
      report names them (`islands`).
      "bf16" is the same with bf16, except that inputs and outputs stay in fp32 (numpy has no bf16). ONNX has bf16
      convolutions from opset 22 on.
    - opset: 17 or higher; by default the one that `choose_opset` chooses for the program and the target.
    - target: a device, which must compute in the precision and parse the opset.
    - tolerance: largest allowed error of an output relative to its largest value; the limit of a channel relative to its
      own scale is ten times as high. The default is in `TOLERANCES`. For a quantised program the limits are looser, since a
      value half-way between two steps may round either way (`compare.EXACT`, `NEAR` and `FURTHER`).
    - progress: whether to show the current stage on stderr.
    - keep_fp32: names of nodes or paths of modules that stay in fp32 in any case; `*` matches any text.
    - keep_io_types: whether all inputs and outputs stay in fp32. By default only those do whose values fp16 cannot
      represent, such as box coordinates in pixels.
    - data: real inputs to compare on in addition to the example and random ones: batches of a data loader, or
      (args, kwargs). On them the largest scores must also agree.

    An fp16 file is judged by an emulation in which every operator rounds to fp16.

    Raises BadInput for a wrong argument and for a file that cannot be written; Refused for an operator that torch.onnx
    cannot translate, for a file whose opset or types are not those asked for, and for outputs that differ by more than the
    tolerance; for fp16 the message names the first node that does.
    """
    start, path = time.perf_counter(), Path(path)
    device = _settings(precision, target, tolerance)
    program = program.on_cpu()
    _check_outputs(program)
    opset = choose_opset(program, device, opset, precision)
    with _status(progress) as say:
        say("translating")
        exported = exportable(program).exported()
        model = translate(exported, max(opset, DEFAULT))
        places = {node.name: origins.scopes(node) for node in model.graph.node}
        say("folding constants")
        with quiet():
            graph = gs.import_onnx(model)
            graph.fold_constants().cleanup().toposort()
        _name(graph, exported, program.history)
        say("running the program")
        known = cases(program, data=data)
        single: onnx.ModelProto | None = None
        float32, clamped = dict[str, str](), dict[str, str]()
        if precision in HALVES:
            half = HALVES[precision]
            say("choosing what stays in fp32")
            single = gs.export_onnx(graph)
            _check_types(single, precision)
            asked = origins.nodes_of_weights(exported, places, _single_layers(program.history))
            keep, io = islands(graph, ranges_of(single, known), keep_fp32, keep_io_types or half is BF16, asked, half)
            float32, clamped = to_half(graph, keep, io, half)
        elif keep_fp32:
            raise BadInput("keep_fp32: is for precisions fp16 and bf16")
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
    """Return the number of elements of the initializers by name of their type ("fp32", "int64", ...)."""
    counts: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        name = FLOATS.get(tensor.data_type, onnx.TensorProto.DataType.Name(tensor.data_type).lower())
        counts[name] += int(np.prod(tensor.dims, dtype=np.int64))
    return dict(counts)


def _settings(precision: str, target: str | Target | None, tolerance: float | None) -> Target | None:
    if precision not in PRECISIONS:
        if precision == "int8":
            raise BadInput(
                "precision int8: Quantize makes a program INT8; give the precision of the rest, fp32 or fp16"
            )
        raise BadInput(f"precision {precision}: not known; {nearest(str(precision), PRECISIONS)}")
    if tolerance is not None and not tolerance > 0:
        raise BadInput(f"tolerance: above 0, not {tolerance}")
    device = get_target(target) if isinstance(target, str) else target
    if device is not None:
        device.alignment(precision)
    return device


def _accept(report: OnnxReport, result: Verdict) -> None:
    """Add the result of the comparison to the report. Raises Refused if the file is not good enough."""
    report.checks, report.warnings = result.checks, [*report.warnings, *result.notes]
    if result.wrong:
        cure = "; keep_fp32 and tolerance are the options" if report.precision in HALVES else ""
        raise Refused("; ".join([f"{report.path}: {report.precision} {result.wrong}", *report.warnings]) + cure)


def _single_layers(history: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the names of the weights whose layers `Quantize(layers=)` keeps in fp32."""
    return {name for record in history if record.get("pass") == "Quantize" for name in record.get("fp32", ())}


def _name(graph: gs.Graph, exported: ExportedProgram, history: Sequence[Mapping[str, Any]]) -> None:
    """Name the inputs after the program's arguments, the outputs after its output structure, and dynamic dimensions after
    the input that has them ("batch" for the first).

    A program that was imported from an ONNX file keeps the names of inputs and outputs in that file. An output that is also
    an input, a constant or another output gets a tensor of its own.
    """
    specs = exported.graph_signature.input_specs
    inputs = [s.arg.name for s in specs if s.kind is InputKind.USER_INPUT and isinstance(s.arg, TensorArgument)]
    if len(inputs) != len(graph.inputs):
        raise Refused(f"torch.onnx made {len(graph.inputs)} inputs of the program's {len(inputs)} tensors")
    outputs = _output_names(exported)
    for record in history:
        as_many = [len(inputs), len(outputs)] == [len(record.get(k, ())) for k in ("inputs", "outputs")]
        if record.get("pass") == "from_onnx" and as_many:
            inputs, outputs = record["inputs"], record["outputs"]
    for tensor, name in zip(graph.inputs, inputs, strict=True):
        _rename(graph, tensor, name)
    for i, name in enumerate(outputs):
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
        if isinstance(results[index], str):  # the name of a tensor; any other result is a constant
            keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
            name = "_".join(keys)
            names.append(name if name and not name[0].isdigit() else "_".join(["output", *keys]))
    return names


def _check(model: onnx.ModelProto, opset: int, precision: str, float32: set[str], io: set[str]) -> None:
    """Raise Refused if the opset, which torch's exporter may keep at its own, or the types are not those asked for.

    float32: names of nodes that stay in fp32. io: names of inputs and outputs, which may be fp32 in an fp16 graph.
    """
    came = opset_of(model)
    if came != opset:
        raise Refused(f"opset {opset} was asked for, torch.onnx wrote {came}")
    exempt = set(io) if precision != "fp32" else set()
    for node in model.graph.node:
        if node.name in float32 or (node.op_type == "Cast" and precision != "fp32"):
            exempt.update((*node.input, *node.output))
    _check_types(model, precision, exempt)


def _check_outputs(program: Program) -> None:
    for name, node in output_nodes(program.graph).items():
        if node is not None and not (isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)):
            raise Refused(
                f"the output {name} is a number, not a tensor, which no ONNX file gives; capture the model with outputs=, "
                "the names of its tensors"
            )


def _check_types(model: onnx.ModelProto, precision: str, exempt: set[str] | None = None) -> None:
    """Raise Refused for a float tensor of another precision. exempt: names of tensors that may be fp32; None: all."""
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


@contextlib.contextmanager
def _saved(model: onnx.ModelProto, path: Path) -> Iterator[tuple[Path, int]]:
    """Write the model to a temporary folder beside `path`, check it with ONNX's checker, and yield the file and its bytes.

    On leaving the context without an exception the files move to `path` and beside it.
    """
    size = sum(len(t.raw_data) for t in model.graph.initializer)
    data = f"{path.name}.data"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
            file = Path(folder) / path.name
            onnx.save_model(model, str(file), save_as_external_data=size > LARGE, location=data)
            try:
                onnx.checker.check_model(str(file), full_check=True)
            except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
                raise Refused(f"{path}: the exported graph is not valid ONNX ({str(error).splitlines()[0]})") from error
            for written in Path(folder).iterdir():  # onnx writes external weights readable for their owner only
                written.chmod(file.stat().st_mode & 0o777)
            files = sorted(Path(folder).iterdir(), key=lambda f: f.name == path.name)  # the weights move first
            yield file, sum(f.stat().st_size for f in files)
            for written in files:
                written.replace(path.with_name(written.name))
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def _status(progress: bool) -> Iterator[Any]:
    """Yield a function that shows the name of a stage beside a spinner."""
    if not progress:
        yield lambda stage: None
        return
    with Console(stderr=True).status("ONNX") as status:
        yield lambda stage: status.update(f"ONNX: {stage}")
