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
# Precisions that layers are measured in, and the type of the tensors between them. In INT8 these are quantised again.
TYPES = {"fp32": int(TensorProto.FLOAT), "fp16": int(TensorProto.FLOAT16), "int8": int(TensorProto.FLOAT)}
STEP = 1 / 32  # size of a quantisation step in INT8; times do not depend on it


def model(layer: Layer | None, copies: int, precision: str = "fp32") -> onnx.ModelProto:
    """Return an ONNX model that runs `copies` copies of a layer, each with its own weights or inputs.

    layer: None for a model that does almost nothing. precision: "fp32", "fp16" or "int8", that
    of all tensors; INT8 as QuantizeLinear and DequantizeLinear around every node, with weights that are stored in INT8.
    """
    graph = _Graph(TYPES[precision], precision == "int8")
    if layer is None:
        graph.outputs.append(graph.node("Neg", graph.input("x", (1,))))
    else:
        {"conv": _convs, "matmul": _matmuls, "attention": _attentions, "norm": _norms}.get(layer.op, _maps)(
            graph, layer, copies
        )
    return graph.finish()


class _Graph:
    """An ONNX graph under construction, whose tensors have one type. Random weights are the same on every machine."""

    def __init__(self, kind: int, integer: bool = False) -> None:
        self.kind, self.integer = kind, integer
        self._quantised: dict[str, str] = {}
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
        name = f"w{len(self.weights)}"
        if self.integer and len(shape) > 1:
            self.weights.append(numpy_helper.from_array((values * 100).clip(-127, 127).astype(np.int8), name))
            return self._node("DequantizeLinear", name, *self._step())
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def node(self, op: str, *inputs: str, **options: Any) -> str:
        """Add a node and return its output; in INT8 it reads its inputs quantised."""
        return self._node(op, *map(self._quantise, inputs), **options)

    def _quantise(self, name: str) -> str:
        """Return the tensor quantised and back, once for each tensor; weights are stored like that."""
        if not self.integer or any(name == weight.name for weight in self.weights) or name in self._stored():
            return name
        if name not in self._quantised:
            small = self._node("QuantizeLinear", name, *self._step())
            self._quantised[name] = self._node("DequantizeLinear", small, *self._step())
        return self._quantised[name]

    def _stored(self) -> set[str]:
        return {node.output[0] for node in self.nodes if node.op_type == "DequantizeLinear"}

    def _step(self) -> tuple[str, str]:
        """Return the names of a quantisation step and a zero point."""
        if not any(weight.name == "step" for weight in self.weights):
            self.weights.append(numpy_helper.from_array(np.array(STEP, np.float32), "step"))
            self.weights.append(numpy_helper.from_array(np.array(0, np.int8), "zero"))
        return "step", "zero"

    def _node(self, op: str, *inputs: str, **options: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [f"n{len(self.nodes)}"], f"{op}{len(self.nodes)}", **options))
        return self.nodes[-1].output[0]

    def finish(self) -> onnx.ModelProto:
        outputs = [helper.make_tensor_value_info(name, self.kind, None) for name in map(self._quantise, self.outputs)]
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
