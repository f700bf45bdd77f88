"""Regions of layers between which values can stay INT8, and programs in which only some layers are quantised. Source: ours.

A value stays INT8 from one layer to the next if only pointwise operators, pooling and views of that one value lie between
them. Everything else (a residual addition, a gate, a normalisation) computes in floating point, so a region ends there and
pays for its conversions alone: what regions save adds up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from torch import fx

from ...graph.edit import Editor
from ...graph.facts import DROPOUTS, MAPS, POOLS, VIEWS, is_pointwise, names
from ...graph.nodes import arguments, op_name, set_argument
from ...graph.program import Program
from ..common.weights import WeightedLayer

THROUGH = POOLS | VIEWS | DROPOUTS
NONNEGATIVE = names("relu relu_ relu6 relu6_ sigmoid sigmoid_ hardsigmoid hardsigmoid_ softmax")
ADDITIONS = ("add", "add_")
FAKE = "fake_quantize"
Residuals = Literal["skip", "both"]


def regions(known: Sequence[WeightedLayer]) -> list[list[WeightedLayer]]:
    """The layers in regions, in the order of their first layers. Layers that read the same value are in one region."""
    owner = {layer.name: i for i, layer in enumerate(known)}
    layer_of = {node: layer for layer in known for node in layer.nodes}

    def root(i: int) -> int:
        while owner[known[i].name] != i:
            i = owner[known[i].name]
        return i

    def join(a: WeightedLayer, b: WeightedLayer) -> None:
        i, j = sorted((root(owner[a.name]), root(owner[b.name])))
        owner[known[j].name] = i

    first_reader: dict[fx.Node, WeightedLayer] = {}
    for layer in known:
        for node in layer.nodes:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            join(layer, first_reader.setdefault(source, layer))
            source = producer(source)
            if source in layer_of and all(_stays(user, layer_of) for user in source.users):
                join(layer, layer_of[source])
    found: dict[int, list[WeightedLayer]] = {}
    for i, layer in enumerate(known):
        found.setdefault(root(i), []).append(layer)
    return list(found.values())


def passed_on(node: fx.Node) -> fx.Node | None:
    """The value that a node only passes on, entry by entry or by pooling; None for other nodes."""
    if not (op_name(node) in THROUGH or is_pointwise(node)) or op_name(node) in MAPS:
        return None
    inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
    return inputs[0] if len(inputs) == 1 else None


def _stays(node: fx.Node, layer_of: dict[fx.Node, WeightedLayer]) -> bool:
    """Whether all that becomes of a value at a node, and behind it, is read by layers."""
    return node in layer_of or (passed_on(node) is not None and all(_stays(u, layer_of) for u in node.users))


def producer(value: fx.Node) -> fx.Node:
    """The node that computes a value, before the nodes that only pass it on."""
    while (before := passed_on(value)) is not None:
        value = before
    return value


def residual_inputs(graph: fx.Graph, integer: Collection[fx.Node], residuals: Residuals) -> list[tuple[fx.Node, int]]:
    """The additions of a graph, each with the index of an argument, whose arguments are to be quantised, too.

    They are the additions of two values of one shape each of which a layer in `integer` computes or reads, one of them
    computes: so that the sum costs no conversion to floating point. "skip" leaves the argument that is computed last in
    floating point, since TensorRT adds to it inside the layer's own kernel; "both" quantises the two of them, since ONNX
    Runtime has INT8 kernels only for layers whose outputs are quantised. A value that is quantised for layers keeps the one
    scale. integer: the layers in INT8; graph: without quantised additions. Source: TensorRT developer guide, "Q/DQ
    placement".
    """
    found: list[tuple[fx.Node, int]] = []
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        values = node.args[:2]
        if op_name(node) not in ADDITIONS or len(values) < 2 or not all(isinstance(v, fx.Node) for v in values):
            continue
        a, b = values
        if a is b or a.meta["val"].shape != b.meta["val"].shape:
            continue
        computed = [producer(v) in integer for v in values]
        if not any(computed) or not all(c or _is_read(v, integer) for c, v in zip(computed, values, strict=True)):
            continue
        last = max((i for i in (0, 1) if computed[i]), key=lambda i: order[values[i]])
        found += [(node, i) for i in (0, 1) if residuals == "both" or i != last]
    return found


def pads_zeros(node: fx.Node) -> bool:
    """Whether a node pads with zeros, which rounding keeps."""
    if op_name(node) == "constant_pad_nd":
        return not (node.args[2] if len(node.args) > 2 else node.kwargs.get("value", 0))
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    return op_name(node) == "pad" and mode == "constant" and not value


def is_nonnegative(value: fx.Node) -> bool:
    """Whether a value is never negative, for what its operators are: what a ReLU or the like makes, pooled or reshaped."""
    if op_name(value) in THROUGH or pads_zeros(value):
        return is_nonnegative(value.all_input_nodes[0])
    name, rest = op_name(value), value.args[1:]
    if name in ("hardtanh", "hardtanh_", "clamp", "clamp_"):
        low = rest[0] if rest else value.kwargs.get("min", value.kwargs.get("min_val"))
        return isinstance(low, (int, float)) and low >= 0
    return name in NONNEGATIVE


def _is_read(value: fx.Node, integer: Collection[fx.Node]) -> bool:
    """Whether a layer in INT8 reads a value, be it quantised already or not."""
    readers = [r for user in value.users for r in (user.users if op_name(user).startswith(FAKE) else (user,))]
    return any(reader in integer for reader in readers)


def quantised_layers(program: Program) -> Iterator[tuple[fx.Node, str]]:
    """Yield the layers of a program whose weights are quantised, each with the name of its weight."""
    for node in program.graph.nodes:
        if op_name(node) in MAPS and op_name(weight := arguments(node)["weight"]).startswith(FAKE):
            yield node, str(weight.all_input_nodes[0].target)


def quantised_alone(program: Program, weights: Collection[str]) -> Program:
    """A copy of a quantised program in which only the layers with these weights are quantised, with the scales that they
    have, and the additions that `residual_inputs` names for them."""
    new = program.copy()
    edit = Editor(new.module())
    integer = set()
    for node, name in list(quantised_layers(new)):
        if name in weights:
            integer.add(node)
            continue
        a = arguments(node)
        source = next(iter(a))
        set_argument(node, "weight", a["weight"].all_input_nodes[0])
        if op_name(a[source]).startswith(FAKE):
            set_argument(node, source, a[source].all_input_nodes[0])
    additions = {}
    for node in new.graph.nodes:
        read = any(op_name(user).startswith(FAKE) and user.users for user in node.users)
        if pads_zeros(node) and op_name(node.args[0]).startswith(FAKE) and not read:
            node.update_arg(0, node.args[0].args[0])
        fakes = {i: v for i, v in enumerate(node.args[:2]) if isinstance(v, fx.Node) and op_name(v).startswith(FAKE)}
        if op_name(node) in ADDITIONS and fakes:
            additions[node] = fakes
            for i, value in fakes.items():
                node.update_arg(i, value.args[0])
    both = any(len(fakes) > 1 for fakes in additions.values())
    kept = residual_inputs(new.graph, integer, "both" if both else "skip") if additions else []
    for node, i in kept:
        if i in additions.get(node, {}):
            node.update_arg(i, additions[node][i])
    edit.finish()
    return new
