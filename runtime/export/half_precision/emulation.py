"""Emulate a half-precision model on a processor without half precision.

ONNX Runtime on a CPU computes most fp16 operators in fp32 and rounds only some results, so an overflow remains unseen. The
emulation is the same graph in fp32 with the result of every operator rounded to fp16 (or bf16). This is what a tensor core
computes, with operands of 16 bits and fp32 accumulation. Kernels that fuse operators round less often. Source: ours.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ..operators import MOVES
from .half import FLOAT, HALVES, TYPE_ATTRIBUTES, Half

# Operators whose results are exact in fp16 if their operands are: they move, choose, negate or round values.
EXACT = MOVES | frozenset(
    "Abs Ceil DepthToSpace Expand Floor GatherElements GatherND Max MaxPool Min Neg Pad ReduceMax ReduceMin Relu Round "
    "ScatterElements ScatterND Sign SpaceToDepth Tile TopK Where".split()
)


def emulate(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model in fp32 that rounds every result which is fp16 or bf16 in the given, strongly typed model.

    Its inputs and outputs are fp32. Tensors keep their names.
    """
    graph = gs.import_onnx(model)
    kinds = {id(t): kind for t in graph.tensors().values() if (kind := _half_type(t))}
    for tensor in [t for t in graph.tensors().values() if id(t) in kinds]:
        if isinstance(tensor, gs.Constant):
            tensor.values = tensor.values.astype(np.float32)
        else:
            tensor.dtype = np.dtype(np.float32)
    for tensor in [t for t in graph.inputs if id(t) in kinds]:
        users, rounded = list(tensor.outputs), gs.Variable(f"{tensor.name}_rounded", tensor.dtype, tensor.shape)
        for user in users:
            user.inputs = [rounded if t is tensor else t for t in user.inputs]
        graph.outputs = [rounded if t is tensor else t for t in graph.outputs]
        _round(graph, tensor, rounded, kinds[id(tensor)])
    for node in list(graph.nodes):
        for name in TYPE_ATTRIBUTES:
            if node.attrs.get(name) in TYPES and not node.name.startswith(PREFIX):
                node.attrs[name] = FLOAT
        value = node.attrs.get("value")
        if isinstance(value, gs.Constant) and _half_type(value):
            node.attrs["value"] = gs.Constant(value.name, value.values.astype(np.float32))
        for i, tensor in enumerate(node.outputs):
            if id(tensor) in kinds and node.op not in EXACT:
                node.outputs[i] = gs.Variable(f"{tensor.name}_exact", tensor.dtype, tensor.shape)
                _round(graph, node.outputs[i], tensor, kinds[id(tensor)])
    graph.toposort()
    return gs.export_onnx(graph, do_type_check=False)


PREFIX = "graphcomb_round/"
TYPES = frozenset(half.onnx for half in HALVES.values())


def _half_type(tensor: gs.Tensor) -> int | None:
    """Return the ONNX type of a tensor in half precision, else None. onnx-graphsurgeon has no numpy type for bf16."""
    return next((h.onnx for h in HALVES.values() if tensor.dtype is not None and str(tensor.dtype) in _names(h)), None)


def _names(half: Half) -> tuple[str, str]:
    return str(half.dtype), str(half.onnx)


def _round(graph: gs.Graph, tensor: gs.Variable, rounded: gs.Variable, to: int) -> None:
    half = gs.Variable(f"{rounded.name}_half", to, tensor.shape)
    graph.nodes.append(gs.Node("Cast", f"{PREFIX}{half.name}", {"to": to}, [tensor], [half]))
    graph.nodes.append(gs.Node("Cast", f"{PREFIX}{rounded.name}", {"to": FLOAT}, [half], [rounded]))


def with_tensors(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of the model whose outputs are the tensors of these names."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {v.name: v for v in (*copy.graph.value_info, *copy.graph.output, *copy.graph.input)}
    del copy.graph.output[:]
    copy.graph.output.extend(known[name] for name in names)
    return copy


def float_tensors(model: onnx.ModelProto) -> list[tuple[str, Any]]:
    """Return (name, node) of every fp32 result of the model's nodes, in order."""
    known = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    return [(name, node) for node in model.graph.node for name in node.output if known.get(name) == FLOAT]
