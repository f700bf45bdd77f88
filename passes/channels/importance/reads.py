"""Where a graph reads the indices of an axis: in products, statistics, and other operators whose results lack the axis.

`gates` says what this is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ....graph.comb import axes as ax
from ....graph.comb.axes import Axis, Factor, Misaligned
from ....graph.comb.solve import Comb
from ....graph.facts import CONVS, MATRIX_PRODUCTS, PARTS, RECURRENT, VECTOR_PRODUCTS
from ....graph.nodes import arguments, is_operator, op_name, shape, spelled_out
from .gated_statistics import STATISTICS, gated_attention, statistics_dims

PRODUCTS = {**MATRIX_PRODUCTS, **VECTOR_PRODUCTS}


@dataclass(frozen=True)
class Operand:
    """A tensor operand of a node: the argument's key, its place if the argument is a list, and one of the tensor's
    dimensions."""

    source: fx.Node
    key: str
    place: int | None
    dim: int


@dataclass(frozen=True)
class Read:
    """Products that a node adds up along an axis.

    For any one of the operands, the sum of value * gradient over the other dimensions, times `share`, is the derivative
    with respect to the gates of these atoms.
    """

    node: fx.Node
    operands: tuple[Operand, ...]
    atoms: frozenset[Factor]
    share: float = 1.0


@dataclass(frozen=True)
class Moments:
    """Statistics that a node takes along some dimensions of an operand. `function(arguments, gates)` computes the node with
    the weights `{dim: vector}` in its statistics."""

    node: fx.Node
    source: fx.Node
    dims: tuple[int, ...]
    function: Callable[[dict[str, Any], dict[int, Tensor]], Any]


def find_reads(comb: Comb, wanted: dict[Factor, None]) -> tuple[list[Read], list[Moments]]:
    """Every place of the graph that reads an axis with one of the wanted atoms."""
    reads: list[Read] = []
    moments: list[Moments] = []
    for node in comb.module.graph.nodes:
        if node.op != "call_function" or not is_operator(node) or comb.axes[node] is None:
            continue
        if not any(ax.touches(axis, wanted) for i in node.all_input_nodes for axis in comb.axes[i] or () if _plain(i)):
            continue
        own_reads, own_moments = _reads_of(comb, node, wanted)
        reads += [r for r in own_reads if r.atoms]
        moments += own_moments
    return reads, moments


def _plain(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor) or node.op == "get_attr"


def _reads_of(comb: Comb, node: fx.Node, wanted: dict[Factor, None]) -> tuple[list[Read], list[Moments]]:
    name, a = op_name(node), arguments(node)

    def atoms(axis: Axis) -> frozenset[Factor]:
        return frozenset(atom for atom in ax.atoms([axis]) if atom in wanted)

    def operand(key: str, dim: int) -> Operand:
        return Operand(a[key], key, None, dim % len(shape(a[key])))

    def read(*operands: Operand, of: Axis | None = None, share: float = 1.0) -> Read:
        first = operands[0]
        return Read(node, operands, atoms(comb.axes[first.source][first.dim] if of is None else of), share)

    def over(key: str, dims: Iterable[int], function: Callable[..., Any]) -> list[Moments]:
        axes = comb.axes[a[key]]
        touched = tuple(d for d in sorted({d % len(axes) for d in dims}) if atoms(axes[d]))
        return [Moments(node, a[key], touched, function)] if touched else []

    if name in (*CONVS, "torchvision::deform_conv2d"):
        return [read(operand("weight", 1), operand("input", 1), of=comb.axes[a["weight"]][1])], []
    if name.startswith("conv_transpose"):
        try:
            _, inner = ax.take_inner(comb.axes[a["weight"]][0], shape(a["weight"])[0] // a["groups"])
        except Misaligned:  # such an axis is frozen
            inner = []
        return [read(operand("weight", 0), operand("input", 1), of=inner)], []
    if name == "linear":
        return [read(operand("weight", 1), operand("input", -1))], []
    if name in PRODUCTS:
        left, right = PRODUCTS[name]
        place = max(len(shape(a[right])) - 2, 0)  # a vector has one dimension
        return [read(operand(left, -1), operand(right, place))], []
    if name == "einsum":
        terms, result = spelled_out(a["equation"], [len(shape(t)) for t in a["tensors"]])
        reads = []
        for letter in dict.fromkeys("".join(terms)):
            if letter not in result:
                pairs = enumerate(zip(terms, a["tensors"], strict=True))
                operands = [Operand(t, "tensors", i, term.index(letter)) for i, (term, t) in pairs if letter in term]
                summed = [o for o in operands if shape(o.source)[o.dim] > 1]
                reads += [read(*summed)] if summed else []
        return reads, []
    if name in RECURRENT:  # the inputs and the hidden units are read where a weight multiplies them
        weights: list[tuple[fx.Node, str, int | None]] = [(w, "params", i) for i, w in enumerate(a.get("params", ()))]
        weights += [(a[key], key, None) for key in ("w_ih", "w_hh") if key in a]
        return [read(Operand(w, key, place, 1)) for w, key, place in weights if len(shape(w)) == 2], []
    if name == "scaled_dot_product_attention":
        return [read(operand("query", -1), operand("key", -1))], over("key", [-2], gated_attention)
    key = "self" if "self" in a else "input"
    if name in STATISTICS and isinstance(a.get(key), fx.Node) and not isinstance(a.get("other"), fx.Node):
        return [], over(key, statistics_dims(name, a, len(shape(a[key]))), STATISTICS[name])
    share = 0.5 if name in ("cosine_similarity", "cdist", "pairwise_distance") else 1.0
    if name in ("linalg_vector_norm", "norm", "frobenius_norm"):
        order = a.get("ord", a.get("p"))
        order = 2 if order is None else order
        share = 1 / order if isinstance(order, (int, float)) and 0 < order < math.inf else 1.0
    return [] if name in (*PARTS, "getitem") else _vanished(comb, node, atoms, share), []


def _vanished(comb: Comb, node: fx.Node, atoms: Callable[[Axis], frozenset[Factor]], share: float) -> list[Read]:
    """Reads of the operands' axes that the node's results lack."""
    left = frozenset(ax.atoms(comb.flat(node)))
    reads = []
    for key, value in arguments(node).items():
        several = isinstance(value, (list, tuple))
        for place, source in enumerate(value if several else [value]):
            if isinstance(source, fx.Node) and _plain(source) and comb.axes[source] is not None:
                for d, axis in enumerate(comb.axes[source]):
                    operand = Operand(source, key, place if several else None, d)
                    reads.append(Read(node, (operand,), atoms(axis) - left, share))
    return reads
