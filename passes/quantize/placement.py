"""Which values of a network are quantised so that the layers chosen for INT8 get integer kernels.

Libraries differ. TensorRT wants the inputs of a layer quantised, and of a residual addition the value that is not computed
in the layer's own kernel (source: its developer guide, "Explicit quantization, Q/DQ placement"). ONNX Runtime has a kernel
for a layer only between quantised inputs and a quantised output, which may lie behind a ReLU; it pads, pools, adds and
concatenates integers where what is read and what is written is quantised (source: its guide "Quantize ONNX models").
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import fx

from ...graph.edit import Editor
from ...graph.facts import DROPOUTS, MAPS, POOLS, VIEWS, is_pointwise, names
from ...graph.nodes import op_name
from .calibrate import FP8, INT8, UINT8, Format

THROUGH = POOLS | VIEWS | DROPOUTS
MAXIMA = names("max_pool1d max_pool2d max_pool3d") | VIEWS | DROPOUTS
LIMITS = names("hardtanh hardtanh_ clamp clamp_")
RECTIFIERS = names("relu relu_ relu6 relu6_") | LIMITS  # where they are never negative, ONNX Runtime fuses them
NONNEGATIVE = names("relu relu_ relu6 relu6_ sigmoid sigmoid_ hardsigmoid hardsigmoid_ softmax")
ADDITIONS = names("add add_")


class Grid(NamedTuple):
    """The numbers that a quantised value can have: `scale * (q - zero)` for the numbers q of a format."""

    scale: float
    zero: int
    format: Format


def grid(value: fx.Node, scale: float, cpu: bool, form: Format = INT8) -> Grid:
    """A format around 0, or for a CPU UINT8: there one type is read and written, so what can be negative is UINT8 around
    128."""
    if not cpu:
        return Grid(scale, 0, form)
    return Grid(scale, 0 if is_nonnegative(value) else 128, UINT8)


def grid_of(node: fx.Node) -> Grid:
    """The grid of a node that quantises a value with one scale."""
    _, scale, *numbers = node.args
    if not numbers:
        return Grid(scale, 0, FP8)  # type: ignore[arg-type]
    return Grid(scale, numbers[0], Format(*numbers[1:]))  # type: ignore[arg-type]


def quantised_reads(graph: fx.Graph, integer: Collection[fx.Node], cpu: bool) -> list[tuple[fx.Node, fx.Node]]:
    """The nodes that are to read a value quantised, each with the value, in a graph that has no quantised values yet.

    integer: the layers in INT8. Besides their inputs, values of residual additions are quantised (`_additions`), and for a
    CPU what the layers write, behind a ReLU if there is one; outputs of the network stay in floating point.
    """
    layers = [node for node in graph.nodes if node in integer]
    reads = [(layer, layer.args[0]) for layer in layers] + _additions(graph, integer, cpu)
    if cpu:
        written = map(_written, layers)
        reads += [(reader, value) for value in written for reader in value.users if reader.op != "output"]
        # ONNX Runtime pads integers only between two quantised values.
        reads += [(value, value.args[0]) for _, value in reads if pads_zeros(value)]
    return list(dict.fromkeys(reads))


def place(edit: Editor, reads: Collection[tuple[fx.Node, fx.Node]], grids: Mapping[fx.Node, Grid]) -> None:
    """Let nodes read values quantised, each quantised once; values without a grid stay as they are."""
    made: dict[fx.Node, fx.Node] = {}
    for reader, value in reads:
        if value not in grids:
            continue
        if value not in made:
            with edit.after(value):
                scale, zero, form = grids[value]
                made[value] = edit.call(*form.of_tensor(value, scale, zero), like=value)
        reader.replace_input_with(value, made[value])


def origin(value: fx.Node, values: Collection[fx.Node]) -> fx.Node:
    """The first of some values that a value has the maxima of, or is a view of: with its scale, it needs no new rounding."""
    node = value
    while op_name(node) in MAXIMA or pads_zeros(node):
        node = node.all_input_nodes[0]
        value = node if node in values else value
    return value


def _additions(graph: fx.Graph, integer: Collection[fx.Node], cpu: bool) -> list[tuple[fx.Node, fx.Node]]:
    """The additions of two values of one shape each of which a layer in INT8 computes or reads, at least one computes, each
    with a value to be quantised for it: so the sum costs no conversion to floating point.

    The value that is computed last stays in floating point for TensorRT, which adds to it inside the layer's own kernel.
    """
    reads: list[tuple[fx.Node, fx.Node]] = []
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        values = node.args[:2]
        if op_name(node) not in ADDITIONS or len(values) < 2 or not all(isinstance(v, fx.Node) for v in values):
            continue
        a, b = values
        if a is b or a.meta["val"].shape != b.meta["val"].shape:
            continue
        computed = [v for v in values if producer(v) in integer]
        if not computed or not all(v in computed or any(user in integer for user in v.users) for v in values):
            continue
        last = max(computed, key=lambda v: order[v])
        reads += [(node, v) for v in values if cpu or v is not last]
    return reads


def _written(layer: fx.Node) -> fx.Node:
    """What a layer's kernel writes on a CPU: its output, or a ReLU's that alone reads it."""
    user = next(iter(layer.users)) if len(layer.users) == 1 else layer
    return user if op_name(user) in RECTIFIERS and is_nonnegative(user) else layer


def pads_zeros(node: fx.Node) -> bool:
    """Whether a node pads with zeros, which rounding keeps."""
    name, arguments = op_name(node), dict(enumerate(node.args)) | node.kwargs
    if name not in ("pad", "constant_pad_nd"):
        return False
    mode, value = arguments.get(2, arguments.get("mode", "constant")), arguments.get(3, arguments.get("value"))
    return bool(mode == "constant" and not value) if name == "pad" else bool(arguments.get(2, value or 0) == 0)


def is_nonnegative(value: fx.Node) -> bool:
    """Whether a value is never negative, for what its operators are: what a ReLU or the like makes, pooled or reshaped."""
    if op_name(value) in THROUGH or pads_zeros(value):
        return is_nonnegative(value.all_input_nodes[0])
    if op_name(value) in LIMITS:
        low = value.args[1] if len(value.args) > 1 else value.kwargs.get("min", value.kwargs.get("min_val"))
        return isinstance(low, (int, float)) and low >= 0
    return op_name(value) in NONNEGATIVE


def passed_on(node: fx.Node) -> fx.Node | None:
    """The value that a node only passes on, entry by entry or by pooling; None for other nodes."""
    if not (op_name(node) in THROUGH or is_pointwise(node)) or op_name(node) in MAPS:
        return None
    inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
    return inputs[0] if len(inputs) == 1 else None


def producer(value: fx.Node) -> fx.Node:
    """The node that computes a value, before the nodes that only pass it on."""
    while (before := passed_on(value)) is not None:
        value = before
    return value
