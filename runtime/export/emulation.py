"""Emulate a half-precision model on a processor without half precision.

ONNX Runtime on a CPU computes most fp16 operators in fp32 and rounds only some results, so an overflow remains unseen. The
emulation is the same graph in fp32 with the result of every operator rounded to fp16. This is what a tensor core computes,
with fp16 operands and fp32 accumulation. Kernels that fuse operators round less often. Source: ours.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .half import FLOAT, HALF, TYPE_ATTRIBUTES
from .operators import MOVES

# Operators whose results are exact in fp16 if their operands are: they move, choose, negate or round values.
EXACT = MOVES | frozenset(
    "Abs Ceil DepthToSpace Expand Floor GatherElements GatherND Max MaxPool Min Neg Pad ReduceMax ReduceMin Relu Round "
    "ScatterElements ScatterND Sign SpaceToDepth Tile TopK Where".split()
)


def emulate(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model in fp32 that rounds every result which is fp16 in the given, strongly typed model.

    Its inputs and outputs are fp32. Tensors keep their names.
    """
    graph = gs.import_onnx(model)
    half = [t for t in graph.tensors().values() if t.dtype == np.float16]
    ids = {id(t) for t in half}
    for tensor in half:
        if isinstance(tensor, gs.Constant):
            tensor.values = tensor.values.astype(np.float32)
        else:
            tensor.dtype = np.dtype(np.float32)
    for tensor in [t for t in graph.inputs if id(t) in ids]:
        users, rounded = list(tensor.outputs), gs.Variable(f"{tensor.name}_rounded", tensor.dtype, tensor.shape)
        for user in users:
            user.inputs = [rounded if t is tensor else t for t in user.inputs]
        graph.outputs = [rounded if t is tensor else t for t in graph.outputs]
        _round(graph, tensor, rounded)
    for node in list(graph.nodes):
        for name in TYPE_ATTRIBUTES:
            if node.attrs.get(name) == HALF and not node.name.startswith(PREFIX):
                node.attrs[name] = FLOAT
        value = node.attrs.get("value")
        if isinstance(value, gs.Constant) and value.dtype == np.float16:
            node.attrs["value"] = gs.Constant(value.name, value.values.astype(np.float32))
        for i, tensor in enumerate(node.outputs):
            if id(tensor) in ids and node.op not in EXACT:
                node.outputs[i] = gs.Variable(f"{tensor.name}_exact", tensor.dtype, tensor.shape)
                _round(graph, node.outputs[i], tensor)
    graph.toposort()
    return gs.export_onnx(graph, do_type_check=False)


PREFIX = "graphcomb_round/"


def _round(graph: gs.Graph, tensor: gs.Variable, rounded: gs.Variable) -> None:
    half = gs.Variable(f"{rounded.name}_half", np.dtype(np.float16), tensor.shape)
    graph.nodes.append(gs.Node("Cast", f"{PREFIX}{half.name}", {"to": HALF}, [tensor], [half]))
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
