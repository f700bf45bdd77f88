"""ONNX files for TensorRT."""

import onnx
from onnx import TensorProto, helper


def small(path, nodes, inputs, outputs, weights=(), opset=17):
    """Save an ONNX model; inputs and outputs as {name: (type, shape)}."""
    sides = [[helper.make_tensor_value_info(n, *spec) for n, spec in side.items()] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, "net", *sides, list(weights))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def relu(path, shape=("batch", 4), opset=17):
    spec = {"x": (TensorProto.FLOAT, shape)}
    return small(path, [helper.make_node("Relu", ["x"], ["y"], name="relu")], spec, {"y": spec["x"]}, opset=opset)
