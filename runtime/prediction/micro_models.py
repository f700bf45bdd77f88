"""Create ONNX models of one layer or several copies of it, which a latency table measures. Source: ours."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ...graph.workload.layer import Layer

COPIES = 5  # number of copies of the layer in the model that is compared with a single layer
OPSET = 20
TYPES = {"fp32": int(TensorProto.FLOAT), "fp16": int(TensorProto.FLOAT16)}  # precisions that layers are measured in


def model(layer: Layer | None, copies: int, precision: str = "fp32") -> onnx.ModelProto:
    """Return an ONNX model that runs `copies` copies of a layer, each with its own weights or inputs.

    layer: None for a model that does almost nothing. precision: "fp32" or "fp16", that of all tensors.
    """
    graph = _Graph(TYPES[precision])
    if layer is None:
        graph.outputs.append(graph.node("Neg", graph.input("x", (1,))))
    else:
        {"conv": _convs, "matmul": _matmuls, "attention": _attentions, "recurrent": _recurrences, "norm": _norms}.get(
            layer.op, _maps
        )(graph, layer, copies)
    return graph.finish()


class _Graph:
    """An ONNX graph under construction, whose tensors have one type. Random weights are the same on every machine."""

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: dict[str, onnx.ValueInfoProto] = {}
        self.weights: list[TensorProto] = []
        self.outputs: list[str] = []
        self.draw = np.random.default_rng(0)

    def input(self, name: str, shape: Iterable[int]) -> str:
        self.inputs[name] = helper.make_tensor_value_info(name, self.kind, list(shape))
        return name

    def operands(self, copies: int, *shapes: tuple[int, ...]) -> list[list[str]]:
        """Return the names of inputs with these shapes for every copy.

        The graph always gets inputs for COPIES copies, so that models with fewer copies run on the same arrays.
        """
        names = [[self.input(f"x{i}_{j}", shape) for j, shape in enumerate(shapes)] for i in range(COPIES)]
        return names[:copies]

    def weight(self, *shape: int) -> str:
        values = self.draw.standard_normal(shape, np.float32) / math.sqrt(max(math.prod(shape[1:]), 1))
        values = values.astype(helper.tensor_dtype_to_np_dtype(self.kind))
        self.weights.append(numpy_helper.from_array(values, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def constant(self, values: list[int]) -> str:
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), f"w{len(self.weights)}"))
        return self.weights[-1].name

    def node(self, op: str, *inputs: str, **options: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [f"n{len(self.nodes)}"], f"{op}{len(self.nodes)}", **options))
        return self.nodes[-1].output[0]

    def finish(self) -> onnx.ModelProto:
        outputs = [helper.make_tensor_value_info(name, self.kind, None) for name in self.outputs]
        graph = helper.make_graph(self.nodes, "layer", list(self.inputs.values()), outputs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
        return onnx.shape_inference.infer_shapes(model)  # the shapes of the outputs must be stated


def _convs(graph: _Graph, layer: Layer, copies: int) -> None:
    x = graph.input("x", (layer["batch"], layer["inputs"], *layer["image"]))
    groups = layer["groups"]
    into, out = layer["inputs"], layer["outputs"] // groups
    first = (into, out) if layer["transposed"] else (layer["outputs"], into // groups)
    total = ""
    for _ in range(copies):
        y = graph.node(
            "ConvTranspose" if layer["transposed"] else "Conv", x, graph.weight(*first, *layer["kernel"]),
            graph.weight(layer["outputs"]), strides=layer["stride"], pads=[*layer["padding"]] * 2,
            dilations=layer["dilation"], group=groups,
        )  # fmt: skip
        total = graph.node("Add", y, total) if total else y
    graph.outputs.append(total)


def _matmuls(graph: _Graph, layer: Layer, copies: int) -> None:
    batch, rows, into, out = layer["batch"], layer["rows"], layer["inputs"], layer["outputs"]
    if layer["shared"]:
        x = graph.input("x", (1, rows, into))
        for _ in range(copies):
            graph.outputs.append(graph.node("Add", graph.node("MatMul", x, graph.weight(into, out)), graph.weight(out)))
        return
    for a, b in graph.operands(copies, (batch, rows, into), (batch, into, out)):
        graph.outputs.append(graph.node("MatMul", a, b))


def _attentions(graph: _Graph, layer: Layer, copies: int) -> None:
    lead = (layer["batch"], layer["heads"])
    shapes = [(layer["queries"], layer["width"]), (layer["width"], layer["keys"]), (layer["keys"], layer["value"])]
    for q, k, v in graph.operands(copies, *((*lead, *shape) for shape in shapes)):
        scores = graph.node("Softmax", graph.node("MatMul", graph.node("Mul", q, graph.weight(1)), k), axis=-1)
        graph.outputs.append(graph.node("MatMul", scores, v))


def _recurrences(graph: _Graph, layer: Layer, copies: int) -> None:
    op, options = {4: ("LSTM", {}), 3: ("GRU", {"linear_before_reset": 1}), 1: ("RNN", {})}[layer["gates"]]
    x = graph.input("x", (layer["steps"], layer["batch"], layer["inputs"]))
    directions, hidden, rows = layer["directions"], layer["hidden"], layer["gates"] * layer["hidden"]
    both = "bidirectional" if directions == 2 else "forward"
    shape = graph.constant([layer["steps"], layer["batch"], directions * hidden])
    for _ in range(copies):
        y, read = x, layer["inputs"]
        for _ in range(layer["layers"]):
            weights = [graph.weight(directions, rows, n) for n in (read, hidden)]
            weights.append(graph.weight(directions, 2 * rows))
            y = graph.node(op, y, *weights, hidden_size=hidden, direction=both, **options)
            y = graph.node("Transpose", y, perm=[0, 2, 1, 3])  # was (steps, directions, batch, hidden)
            y, read = graph.node("Reshape", y, shape), directions * hidden
        graph.outputs.append(y)


def _norms(graph: _Graph, layer: Layer, copies: int) -> None:
    x = graph.input("x", (layer["rows"], layer["channels"]))
    for _ in range(copies):
        scale, bias = graph.weight(layer["channels"]), graph.weight(layer["channels"])
        graph.outputs.append(graph.node("LayerNormalization", x, scale, bias, axis=-1))


def _maps(graph: _Graph, layer: Layer, copies: int) -> None:
    """Add copies of a layer that maps entries one by one: an activation is measured as a GELU, a copy as an addition."""
    for (x,) in graph.operands(copies, (layer["entries"],)):
        result = (
            graph.node("Gelu", x) if layer.op == "activation" else graph.node("Add", x, graph.weight(layer["entries"]))
        )
        graph.outputs.append(result)
