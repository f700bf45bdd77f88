"""Turn the Q/DQ nodes of an ONNX model into a calibration cache, for INT8 on a DLA up to TensorRT 10.

There a DLA runs no Q/DQ nodes, only implicit quantisation: the network is in floating point, and a text file has the scale
of each tensor that may be stored in INT8 (real value = scale x integer). The model keeps its meaning: a tensor is rounded
where the Q/DQ nodes rounded it, and further only where that changes nothing, because rounding with one scale and an
operator that selects or moves values can be exchanged: round(relu(x)) = relu(round(x)). Sources: TensorRT developer guide,
"INT8 calibration" and "Working with DLA"; the format of the cache as TensorRT writes it.
"""

import struct
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ....graph.errors import Refused

# Operators that select or move values: with one scale they can be exchanged with rounding.
EXCHANGED = frozenset("Relu MaxPool Identity Flatten Reshape Transpose Squeeze Unsqueeze Slice Dropout".split())
COMPUTING = frozenset("Conv ConvTranspose Gemm MatMul".split())
LARGEST = 127
Scales = dict[str, float]


@dataclass(frozen=True)
class Implicit:
    """A model without Q/DQ nodes.

    - model: the model in floating point; its weights are the rounded ones.
    - scales: scale by tensor that may be stored in INT8.
    - int8: names of the nodes that compute in INT8; the others compute in floating point.
    - notes: what a build may compute otherwise than the Q/DQ nodes.
    """

    model: onnx.ModelProto
    scales: Scales
    int8: tuple[str, ...]
    notes: tuple[str, ...]


def implicit(model: onnx.ModelProto) -> Implicit:
    """Return the model without Q/DQ nodes and the scales of its tensors.

    Raises Refused, which names the node, for a zero point other than 0, a type other than INT8, a tensor other than a weight
    with several scales, and a tensor that is rounded in two ways: none of these can be said in a calibration cache.
    """
    graph = gs.import_onnx(model)
    scales: Scales = {}
    notes: list[str] = []
    reading: set[str] = set()  # names of nodes that read a rounded tensor
    for tensor in graph.tensors().values():
        users = {user.op == "QuantizeLinear" for user in tensor.outputs}
        if users == {True, False} and not isinstance(tensor, gs.Constant):
            notes.append(f"{tensor.name}: some nodes read it as it is, and a DLA may store it in INT8 for all of them")
    for node in [n for n in graph.nodes if n.op == "DequantizeLinear"]:
        source, scale = node.inputs[0], _scale(node)
        quantise = source.inputs[0] if source.inputs else None
        before = source if quantise is None else quantise.inputs[0]
        if quantise is not None and (quantise.op != "QuantizeLinear" or not np.array_equal(_scale(quantise), scale)):
            raise Refused(f"node {node.name}: it reads other values than those of a QuantizeLinear with its scale")
        if isinstance(before, gs.Constant):
            value, note = _weight(node, before, scale, quantise is not None)
            notes += [note] if note else []
            replacement: gs.Tensor = gs.Constant(f"{before.name}_rounded", value)
        else:
            if scale.size != 1:
                raise Refused(
                    f"node {node.name}: a calibration cache has one scale per tensor, {before.name} has several"
                )
            if scales.setdefault(before.name, float(scale.ravel()[0])) != float(scale.ravel()[0]):
                raise Refused(f"node {node.name}: {before.name} is rounded in two ways")
            replacement = before
            reading.update(user.name for user in node.outputs[0].outputs)
        for user in list(node.outputs[0].outputs):
            user.inputs = [replacement if tensor is node.outputs[0] else tensor for tensor in user.inputs]
        for index, output in enumerate(graph.outputs):
            if output is node.outputs[0]:
                graph.outputs[index] = replacement
        node.outputs.clear()
    graph.cleanup().toposort()
    _exchange(graph, scales)
    int8 = tuple(node.name for node in graph.nodes if node.name in reading and node.op in COMPUTING)
    return Implicit(gs.export_onnx(graph), scales, int8, tuple(notes))


def _scale(node: gs.Node) -> np.ndarray:
    """Return the scales of a Q/DQ node, after checking that it rounds symmetrically to INT8."""
    scale, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if not isinstance(scale, gs.Constant) or (zero is not None and not isinstance(zero, gs.Constant)):
        raise Refused(f"node {node.name}: its scale is computed")
    kind = zero.values.dtype if zero is not None else np.dtype(np.uint8)  # ONNX's default is UINT8
    if kind != np.int8:
        raise Refused(f"node {node.name}: it rounds to {kind}, and a DLA computes in INT8")
    if zero is not None and np.any(zero.values):
        raise Refused(f"node {node.name}: its zero point is not 0")
    return np.asarray(scale.values, np.float32)


def _weight(node: gs.Node, tensor: gs.Constant, scale: np.ndarray, rounds: bool) -> tuple[np.ndarray, str]:
    """Return rounded weights in floating point, and a note if TensorRT will round them again with another scale.

    TensorRT takes the largest weight of an output channel as 127 of its scale, which is this scale if a weight is 127.
    """
    axis = node.attrs.get("axis", 1)
    values = np.asarray(tensor.values)
    shape = [1] * values.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    steps = scale.reshape(shape) if values.ndim else scale
    integers = np.clip(np.rint(values / steps), -LARGEST - 1, LARGEST) if rounds else values.astype(np.float32)
    axes = tuple(i for i in range(values.ndim) if scale.size == 1 or i != axis)
    reached = np.abs(integers).max(axis=axes)
    again = int((np.atleast_1d(reached) != LARGEST).sum())
    note = f"{tensor.name}: {again} scales of {scale.size} are not those that TensorRT derives from the weights"
    return (integers * steps).astype(node.inputs[1].values.dtype), note if again else ""


def _exchange(graph: gs.Graph, scales: Scales) -> None:
    """Add the tensors before and after operators that can be exchanged with rounding."""
    ends = {tensor.name for tensor in graph.outputs}
    for node in graph.nodes:  # forwards, in the order of the graph
        if node.op in EXCHANGED and node.inputs[0].name in scales:
            scales.setdefault(node.outputs[0].name, scales[node.inputs[0].name])
    for node in reversed(graph.nodes):
        if node.op not in EXCHANGED or node.outputs[0].name not in scales:
            continue
        before = node.inputs[0]
        if len(before.outputs) == 1 and before.name not in ends:
            scales.setdefault(before.name, scales[node.outputs[0].name])


def read_cache(text: str) -> Scales:
    """Return the scales of a calibration cache."""
    rows = [line.rpartition(": ") for line in text.splitlines()[1:] if line.strip()]
    return {name: struct.unpack(">f", bytes.fromhex(value))[0] for name, _, value in rows}
