"""Layers as JSON-able rows, and which ONNX nodes compute each, as a bundle takes them along and a prediction lists them.

Source: ours.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from torch import fx

from ...graph.comb.solve import Comb
from ...graph.nodes import arguments, is_operator, op_name
from ...graph.program import Program
from ...graph.workload.layer import Layer
from ...graph.workload.layers import Layers
from ...graph.workload.libraries import ONNXRUNTIME, Rules, classify
from ..engines import origins

# What ONNX Runtime and TensorRT compute in the kernel of the convolution before it.
FOLLOWERS = ("Relu", "Clip", "LeakyRelu", "Add", "HardSigmoid", "Sigmoid")


def describe(program: Program, batch: int = 1, rules: Rules = ONNXRUNTIME) -> list[dict[str, Any]]:
    """The layers of a program as JSON-able rows: name (of the weight, else of the node), node, call (the operator), op,
    sizes and options (see `Layer`), and beside and joined where they are not nothing. batch: where it is dynamic. rules:
    which nodes are one kernel."""
    return [describe_one(node, layer) for node, layer in Layers(Comb(program), batch, rules).at({})]


def describe_one(node: fx.Node, layer: Layer) -> dict[str, Any]:
    """A layer and the node that it is of, as `describe` has them."""
    if layer.op == "copy" and (node.op == "placeholder" or classify(node) in ("product", "depthwise", "attention")):
        return {"name": f"copy of {node.name}", "node": node.name, "call": "copy"} | to_dict(layer)
    weight = arguments(node).get("weight") if is_operator(node) else None
    while isinstance(weight, fx.Node) and weight.op == "call_function" and len(weight.all_input_nodes) > 0:
        weight = weight.all_input_nodes[0]  # quantised, or computed from the parameter otherwise
    name = str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else node.name
    return {"name": name, "node": node.name, "call": op_name(node)} | to_dict(layer)


def to_dict(layer: Layer) -> dict[str, Any]:
    row: dict[str, Any] = {"op": layer.op, "sizes": dict(layer.sizes), "options": dict(layer.options)}
    return row | {key: value for key in ("beside", "joined") if (value := getattr(layer, key))}


def from_dict(row: Mapping[str, Any]) -> Layer:
    """The layer of a row of `describe`, also after JSON. Raises KeyError, TypeError or AttributeError for another."""

    def pairs(values: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in values.items())

    beside, joined = row.get("beside", 0), row.get("joined", False)
    return Layer(row["op"], pairs(row["sizes"]), pairs(row["options"]), int(beside), bool(joined))


def name_nodes(rows: Sequence[Mapping[str, Any]], model: onnx.ModelProto) -> list[dict[str, Any]]:
    """The rows of `describe` with `onnx`: names of the ONNX nodes, and of their results, that compute each layer, as far
    as the exported model tells; nothing is guessed."""
    nodes_of = _nodes(rows, model)
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for tensor in node.input:
            readers[tensor].append(node)
    merged: dict[str, tuple[int, onnx.NodeProto]] = {}
    for i, (row, nodes) in enumerate(zip(rows, nodes_of, strict=True)):
        last = nodes[-1] if row["op"] == "conv" and nodes else None
        while last and len(after := readers[last.output[0]]) == 1 and after[0].op_type in FOLLOWERS:
            last = after[0]
            merged[last.name] = i, last  # of two sums into one, the later convolution's
    for i, node in merged.values():
        nodes_of[i].append(node)
    names = [[text for node in nodes for text in (node.name, *node.output)] for nodes in nodes_of]
    return [dict(row) | {"onnx": texts} for row, texts in zip(rows, names, strict=True)]


def _nodes(rows: Sequence[Mapping[str, Any]], model: onnx.ModelProto) -> list[list[onnx.NodeProto]]:
    """The ONNX nodes of every layer itself. Convolutions are known by their weight. Other operators keep their order under
    export, so that where the model has as many nodes of an operator as there are layers of it, the first is the first."""
    groups: dict[str, dict[str, list[onnx.NodeProto]]] = defaultdict(dict)
    origin = origins.read(model)
    for node in model.graph.node:
        if node.name in origin:
            name = origin[node.name].node
            groups[re.sub(r"_\d+$", "", name)].setdefault(name, []).append(node)
    weights = {node.input[1]: node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose")}
    nodes_of: list[list[onnx.NodeProto]] = [[] for _ in rows]
    layers: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row["op"] == "conv":
            nodes_of[i] += [weights[row["name"]]] if row["name"] in weights else []
        else:
            layers[row["call"]].append(i)
    for call, which in layers.items():
        # An attention is exported as two products around a softmax.
        parts = [(call, 1)] if call != "scaled_dot_product_attention" else [("matmul", 2), ("softmax", 1)]
        for name, each in parts:
            nodes = list(groups[name].values())
            if len(nodes) == each * len(which) and (name == call or name not in layers):
                for k, i in enumerate(which):
                    nodes_of[i] += [n for part in nodes[each * k : each * (k + 1)] for n in part]
    return nodes_of
