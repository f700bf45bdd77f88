"""Describe the layers of a program as JSON-able rows, for bundles and predictions, and find the ONNX nodes of each layer.

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

# Operators that ONNX Runtime and TensorRT compute in the kernel of the convolution before them.
FOLLOWERS = ("Relu", "Clip", "LeakyRelu", "Add", "HardSigmoid", "Sigmoid")


def describe(program: Program, batch: int = 1, rules: Rules = ONNXRUNTIME) -> list[dict[str, Any]]:
    """Return the layers of a program as JSON-able rows, in execution order.

    A row has name (of the weight, else of the node), node, call (the operator), op, sizes and options (see `Layer`), and
    beside and joined if they are not 0 or False. batch: size of a dynamic batch. rules: which nodes the library computes in
    one kernel.
    """
    return [describe_one(node, layer) for node, layer in Layers(Comb(program), batch, rules).at({})]


def describe_one(node: fx.Node, layer: Layer) -> dict[str, Any]:
    """Return the row of `describe` for a layer and its node."""
    if layer.op == "copy" and (node.op == "placeholder" or classify(node) in ("product", "depthwise", "attention")):
        return {"name": f"copy of {node.name}", "node": node.name, "call": "copy"} | to_dict(layer)
    weight = arguments(node).get("weight") if is_operator(node) else None
    while isinstance(weight, fx.Node) and weight.op == "call_function" and len(weight.all_input_nodes) > 0:
        weight = weight.all_input_nodes[0]  # the weight is computed from the parameter, by quantisation for instance
    name = str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else node.name
    return {"name": name, "node": node.name, "call": op_name(node)} | to_dict(layer)


def to_dict(layer: Layer) -> dict[str, Any]:
    """Return a layer as the JSON-able part of a row of `describe`, which `from_dict` reads."""
    row: dict[str, Any] = {"op": layer.op, "sizes": dict(layer.sizes), "options": dict(layer.options)}
    return row | {key: value for key in ("beside", "joined") if (value := getattr(layer, key))}


def from_dict(row: Mapping[str, Any]) -> Layer:
    """Return the layer of a row of `describe`, which may have been written as JSON and read again.

    Raises KeyError, TypeError or AttributeError for a row that describes no layer.
    """

    def pairs(values: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in values.items())

    beside, joined = row.get("beside", 0), row.get("joined", False)
    return Layer(row["op"], pairs(row["sizes"]), pairs(row["options"]), int(beside), bool(joined))


def name_nodes(rows: Sequence[Mapping[str, Any]], model: onnx.ModelProto) -> list[dict[str, Any]]:
    """Return the rows of `describe` with the key `onnx`: the names of the ONNX nodes that compute the layer and of their
    outputs, as far as the exported model identifies them."""
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
            merged[last.name] = i, last  # the later one of two convolutions that are added computes the sum
    for i, node in merged.values():
        nodes_of[i].append(node)
    names = [[text for node in nodes for text in (node.name, *node.output)] for nodes in nodes_of]
    return [dict(row) | {"onnx": texts} for row, texts in zip(rows, names, strict=True)]


def _nodes(rows: Sequence[Mapping[str, Any]], model: onnx.ModelProto) -> list[list[onnx.NodeProto]]:
    """Return the ONNX nodes of every layer, without those that are fused into its kernel.

    A convolution is found by the name of its weight. Other operators keep their order in the export: if the model has as
    many nodes of an operator as there are layers, they are assigned in order, else the layers get no nodes.
    """
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
        for name, per_layer in parts:
            nodes = list(groups[name].values())
            if len(nodes) == per_layer * len(which) and (name == call or name not in layers):
                for k, i in enumerate(which):
                    nodes_of[i] += [n for part in nodes[per_layer * k : per_layer * (k + 1)] for n in part]
    return nodes_of
