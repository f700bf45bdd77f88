"""Read an ONNX file with care: nothing in it is run, no file outside its folder is opened. `from_onnx` makes the program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import onnx.inliner
from onnx.external_data_helper import load_external_data_for_tensor

from ..errors import BadInput, in_a_line, nearest
from .table import OPERATORS

STANDARD = ("", "ai.onnx")
OLDEST = 7
CONTROL = "control flow, which a pruned graph cannot have; export the model without it"
DATA = "the size of its result depends on data; export the part of the model before it"
QUANTISED = "a quantised network; import the float network, and quantise it with the pass Quantize"
REASONS = {
    **dict.fromkeys(("If", "Loop", "Scan"), CONTROL),
    **dict.fromkeys(("NonMaxSuppression", "NonZero", "Unique", "Compress", "StringNormalizer", "TfIdfVectorizer"), DATA),
    **dict.fromkeys(("QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"), QUANTISED),
    **dict.fromkeys(("ConvInteger", "MatMulInteger"), QUANTISED),
    **dict.fromkeys(("RandomNormal", "RandomUniform", "RandomNormalLike", "Bernoulli", "Multinomial"), "draws at random"),
}  # fmt: skip
ALWAYS = {"Constant", "DequantizeLinear"}  # operators that only occur on constants, which are folded


def read(path: Path, outputs: Sequence[str] | None = None) -> onnx.ModelProto:
    """The model with its weights, checked. outputs: the values to compute, by default the file's own outputs.

    Raises BadInput with one line for a file that is damaged, not ONNX, quantised, has unknown operators (all are named),
    keeps weights outside its folder, or lacks one of `outputs`.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors have no common base class
        raise BadInput(f"{path}: not an ONNX file, or a damaged one ({in_a_line(error)})") from error
    if not model.graph.output or not model.graph.node:
        raise BadInput(f"{path}: not an ONNX file (it holds no graph)")
    _load_weights(model, path)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    if outputs is None:
        _check_operators(model, path)
    try:
        onnx.checker.check_model(model if model.ByteSize() < 2**31 - 1 else str(path))
    except Exception as error:
        raise BadInput(f"{path}: not a valid ONNX file ({in_a_line(error)})") from error
    if outputs is not None:
        _select(model, outputs, path)
        _check_operators(model, path)
    return model


def _select(model: onnx.ModelProto, outputs: Sequence[str], path: Path) -> None:
    """Reduce the graph to what the named values need."""
    graph = model.graph
    known = [name for node in graph.node for name in node.output if name]
    for name in outputs:
        if name not in known:
            raise BadInput(f"{path}: outputs: no node computes {name}; {nearest(name, known[-40:])}")
    if not outputs or len(set(outputs)) != len(outputs):
        raise BadInput(f"{path}: outputs: name each value that is wanted once")
    needed, kept = set(outputs), []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed.update(node.input)
            kept.append(node)
    inputs = [value for value in graph.input if value.name in needed]
    del graph.node[:], graph.output[:], graph.input[:]
    graph.node.extend(reversed(kept))
    graph.input.extend(inputs)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _tensors(inner)


def _load_weights(model: onnx.ModelProto, path: Path) -> None:
    """Load weights from files beside the model, which must be in its folder."""
    folder = path.parent.resolve()
    for tensor in _tensors(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        place = entries.get("location", "")
        file = (folder / place).resolve()
        if not place or not file.is_relative_to(folder) or file == folder:
            raise BadInput(f"{path}: the weight {tensor.name} is kept in {place!r}, outside the model's folder")
        if not file.is_file():
            raise BadInput(f"{path}: its weights are in {place}, which is not there; put it beside the model")
        try:
            load_external_data_for_tensor(tensor, str(folder))
        except Exception as error:
            raise BadInput(f"{path}: the weight {tensor.name} cannot be read ({in_a_line(error)})") from error
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _check_operators(model: onnx.ModelProto, path: Path) -> None:
    opset = opset_of(model)
    if opset < OLDEST:
        raise BadInput(
            f"{path}: opset {opset}; {OLDEST} is the oldest that is read, convert it (onnx.version_converter)"
        )
    unknown: dict[str, list[str]] = {}
    for node in model.graph.node:
        custom = node.domain not in STANDARD
        name = f"{node.domain}::{node.op_type}" if custom else str(node.op_type)  # bytes if the file is damaged
        if custom or node.op_type not in {*OPERATORS, *ALWAYS}:
            unknown.setdefault(name, []).append(node.name or next(iter(node.output), "nameless"))
    if unknown:
        parts = [
            f"{name} ({f'{len(nodes)} nodes' if len(nodes) > 1 else nodes[0]}): {_why(name)}"
            for name, nodes in sorted(unknown.items())
        ]
        raise BadInput(f"{path}: operators that cannot be imported: {'; '.join(parts)}")
    if model.graph.sparse_initializer:
        raise BadInput(f"{path}: sparse initializers are not read; store the weights dense")


def _why(name: str) -> str:
    if "::" in name:
        quantised = any(word in name for word in ("QLinear", "Quant", "Integer", "QAttention"))
        return QUANTISED if quantised else "of a domain of its own; export with ONNX's own operators"
    return REASONS.get(name, "not known")


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators."""
    return max((o.version for o in model.opset_import if o.domain in STANDARD), default=0)
