"""Which dimension of a program's class scores holds the classes, as far as the graph tells."""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import fx

from ...graph.compat import output_spec, pytree
from ...graph.errors import GraphcombError
from ...graph.nodes import arguments, op_name, shape
from ...graph.program import Program
from .losses import NAMES, logits_of

SAME = ("relu", "gelu", "silu", "sigmoid", "tanh", "dropout", "clone", "contiguous", "to", "float", "softmax", "log_softmax",
        "alias", "detach", "neg", "clamp", "hardtanh", "_to_copy", "type_as")  # fmt: skip
ARITHMETIC = ("add", "sub", "mul", "div", "rsub")
RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view")


def class_axis(program: Program) -> int | None:
    """The dimension of the class scores that lists the outputs of the last linear layer or convolution: the classes of a
    head. None where the way back from the scores to one layer is not plain, or where there are no single scores."""
    node = scores_node(program)
    return None if node is None else _features(node)


def scores_node(program: Program) -> fx.Node | None:
    """The node that computes what `logits_of` takes from the outputs."""
    nodes = pytree.tree_leaves(program.graph.output_node().args)
    spec = output_spec(program.graph)
    values = [n.meta.get("val") if isinstance(n, fx.Node) else n for n in nodes]
    try:
        scores = logits_of(pytree.tree_unflatten(values, spec))
    except GraphcombError:
        return None
    return next(n for n, value in zip(nodes, values, strict=True) if value is scores)


def other_outputs(program: Program) -> list[str]:
    """Names of the floating-point outputs besides the class scores; empty where these cannot be told."""
    if (scores := scores_node(program)) is None:
        return []
    spec = output_spec(program.graph)
    tree = pytree.tree_unflatten(pytree.tree_leaves(program.graph.output_node().args), spec)
    return [
        pytree.keystr(path).strip("[]'\"") or node.name
        for path, node in pytree.tree_flatten_with_path(tree)[0]
        if isinstance(node, fx.Node) and node is not scores and node.name not in NAMES
        if isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].is_floating_point()
    ]


def _features(node: fx.Node) -> int | None:
    """The dimension of a value in which the outputs of the layer it comes from lie whole and in order."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    name, size = op_name(node), shape(node)
    if name == "linear":
        return len(size) - 1
    if name.startswith("conv"):
        return 1 if len(size) == len(shape(arguments(node)["weight"])) else None
    inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if name in ARITHMETIC:
        places = {_features(n) for n in inputs if n.op == "call_function"}
        shapes = {shape(n) for n in inputs if n.op == "call_function"}
        return places.pop() if len(places) == 1 and shapes == {size} else None
    if not inputs or inputs[0].op != "call_function":
        return None
    if name in ("cat", "stack"):
        return _joined(node, inputs)
    d, before = _features(inputs[0]), shape(inputs[0])
    if d is None or name in SAME or name.startswith("upsample"):
        return d
    return _moved(node, name, d, before, size)


def _joined(node: fx.Node, inputs: list[fx.Node]) -> int | None:
    places = {_features(n) for n in inputs}
    d = places.pop()
    if places or d is None:
        return None
    rank = len(shape(node))
    at = arguments(node).get("dim", 0) % rank
    if op_name(node) == "stack":
        return d + (at <= d)
    return None if at == d else d  # parts of other kinds, such as boxes beside classes


def _moved(node: fx.Node, name: str, d: int, before: tuple[int, ...], size: tuple[int, ...]) -> int | None:
    """Where dimension `d` of the input is after an operator that moves dimensions."""
    a, rank = arguments(node), len(before)
    if name == "permute":
        return [i % rank for i in a["dims"]].index(d)
    if name == "transpose":
        swap = {a["dim0"] % rank: a["dim1"] % rank, a["dim1"] % rank: a["dim0"] % rank}
        return swap.get(d, d)
    if name == "slice":
        return d
    if name == "select":
        at = a["dim"] % rank
        return None if at == d else d - (at < d)
    if name in ("mean", "amax", "sum"):
        gone = {i % rank for i in _list(a["dim"])}
        return None if d in gone or not gone else d - (0 if a["keepdim"] else sum(i < d for i in gone))
    if "pool" in name and d == 1:
        return d
    if name in RESHAPES:
        return _regrouped(d, before, size)
    return None


def _list(value: Any) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _regrouped(d: int, before: tuple[int, ...], size: tuple[int, ...]) -> int | None:
    """Where a dimension is after a reshape that leaves it whole: as many entries outside of it, and of the same size."""
    outside = list(accumulate(size, lambda x, y: x * y, initial=1))
    places = [i for i, n in enumerate(size) if n == before[d] and outside[i] == prod(before[:d])]
    return places[0] if len(places) == 1 else None
