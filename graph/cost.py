"""The cost model: MACs and bytes of every node as polynomials in the sizes of its axes.

A polynomial is a list of monomials, a monomial a list of factors: `(node, dim)` references, or plain numbers; the value is
the sum over monomials of the product of the sizes referred to. The same polynomial is evaluated on shapes (here) or on
solved axes (`Comb.cost`), so "what does removing 8 of these save" is exact. An operator that contracts but cannot be
counted is named (`unknown`), never counted as 0. Source: ours; the counts are those of `torch.utils.flop_counter`, halved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from . import compat
from .errors import Refused
from .facts import CELLS, SEQUENCES
from .nodes import arguments, fetch, is_operator, op_name, shape, source, spelled_out

Ref = tuple[fx.Node, int] | int
Polynomial = list[list[Ref]]
Count = Callable[[fx.Node, dict[str, Any]], Polynomial]
COUNTS: dict[str, Count] = {}
NOTHING: Polynomial = []
# Libraries whose multiplying operators are known here.
COUNTED = ("aten", "prims", "torchvision", "quantized_decomposed", "graphcomb")
UNCOUNTED = frozenset(  # operators of these libraries that multiply matrices, but have no count here
    "convolution _convolution convolution_overrideable conv_tbc conv_depthwise3d _conv_depthwise2d _scaled_mm _int_mm "
    "_grouped_mm _native_multi_head_attention _transformer_encoder_layer_fwd _scaled_dot_product_flash_attention "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention _addmm_activation "
    "_scaled_dot_product_cudnn_attention _cudnn_rnn mkldnn_rnn_layer miopen_rnn quantized_lstm quantized_gru _trilinear "
    "chain_matmul linalg_multi_dot matrix_power linalg_matrix_power matrix_exp linalg_matrix_exp cov corrcoef smm hspmm "
    "_weight_int8pack_mm _weight_int4pack_mm _thnn_fused_lstm_cell _thnn_fused_gru_cell sspaddmm mkldnn_linear".split()
)


def counts(*names: str) -> Callable[[Count], Count]:
    """Register the multiply-accumulates of operators, by name ("space::name" for custom ones).

    The function gets the node and its arguments by schema name and returns a polynomial (see the module); for an operator
    that multiplies nothing it returns an empty list.
    """

    def register(function: Count) -> Count:
        COUNTS.update(dict.fromkeys((name.removeprefix("aten::") for name in names), function))
        return function

    return register


def macs(node: fx.Node) -> Polynomial:
    """Multiply-accumulates of one node; empty if it multiplies nothing, and for nodes that `unknown` names."""
    if node.op != "call_function":
        return NOTHING
    if not is_operator(node):
        return _branches(node) if str(node.target) == "cond" else NOTHING
    count = COUNTS.get(op_name(node))
    return NOTHING if count is None else count(node, arguments(node))


def unknown(node: fx.Node) -> str | None:
    """Why the node's multiply-accumulates cannot be counted; None if they can, or if there are none."""
    target, name = node.target, op_name(node)
    if isinstance(target, compat.OpOverload) and name not in COUNTS:
        if name in UNCOUNTED:
            return f"what {name} multiplies is not known"
        if target.namespace not in COUNTED:
            return f"whether {name} multiplies anything is not known; say so with graphcomb.counts"
    if isinstance(target, compat.HigherOrderOperator):
        inner = [n for body in _bodies(node) for n in body.graph.nodes]
        if str(target) == "cond":
            return next((why for n in inner if (why := _inside(n))), None)
        if not inner or any(macs(n) or unknown(n) for n in inner):
            return f"how often {target} runs its body is not known"
    return None


def _inside(node: fx.Node) -> str | None:
    """The result of `unknown` for a node in the body of another, whose shapes may be missing."""
    lost = not isinstance(node.meta.get("val"), torch.Tensor | list | tuple)
    return f"shapes in the body of {node.name} are not known" if lost and op_name(node) in COUNTS else unknown(node)


def uncounted(module: fx.GraphModule) -> list[tuple[fx.Node, str]]:
    """The nodes whose multiply-accumulates cannot be counted, with the reason."""
    return [(node, why) for node in module.graph.nodes if (why := unknown(node))]


def require_counted(module: fx.GraphModule, what: str) -> None:
    """Raise Refused, naming the first such node, for a graph with multiply-accumulates that cannot be counted. what: the
    option that needs them."""
    for node, why in uncounted(module):
        raise Refused(f"{what}: {source(node)}: {why}, so a share of all multiply-accumulates means nothing here")


# ---------------------------------------------------------------------------------------------------------- the table
@counts("linear")
def _linear(node: fx.Node, a: dict[str, Any]) -> Polynomial:
    return [_dims(node) + _dims(a["weight"])[-1:]]  # also of a weight with one dimension, which gives one output


@counts("conv1d", "conv2d", "conv3d", "bilinear", "torchvision::deform_conv2d")
def _weighted(node: fx.Node, a: dict[str, Any]) -> Polynomial:
    return [_dims(node) + _dims(a["weight"])[1:]]


@counts("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(node: fx.Node, a: dict[str, Any]) -> Polynomial:
    return [_dims(a["input"]) + _dims(a["weight"])[1:]]


@counts(
    "matmul", "bmm", "mm", "mv", "dot", "vdot", "baddbmm", "addmm", "addmv", "linalg_matmul", "linalg_vecdot", "inner",
    "cdist", "_euclidean_dist",
)  # fmt: skip
def _product(node: fx.Node, a: dict[str, Any]) -> Polynomial:
    left = next(a[name] for name in ("batch1", "mat1", "mat", "self", "x", "x1") if name in a)
    return [_dims(node) + _dims(left)[-1:]]


@counts("addbmm")
def _added_up(node: fx.Node, a: dict[str, Any]) -> Polynomial:
    return [_dims(a["batch1"]) + _dims(a["batch2"])[-1:]]


@counts("tensordot")
def _tensordot(node: fx.Node, a: dict[str, Any]) -> Polynomial:
    over: list[Ref] = [(a["self"], d % len(shape(a["self"]))) for d in a["dims_self"]]
    return [_dims(node) + over] if over else NOTHING


@counts(*SEQUENCES)
def _recurrent(node: fx.Node, a: dict[str, Any]) -> Polynomial:
    """Every weight matrix is used once for each step of each sequence; packed sequences have both in one dimension."""
    steps = _dims(a["data"])[:1] if "data" in a else _dims(a["input"])[:-1]
    return [steps + _dims(w) for w in a["params"] if len(shape(w)) == 2]


@counts(*CELLS)
def _cell(node: fx.Node, a: dict[str, Any]) -> Polynomial:
    return [_dims(a["input"])[:-1] + _dims(a[w]) for w in ("w_ih", "w_hh")]


@counts("scaled_dot_product_attention")
def _attention(node: fx.Node, a: dict[str, Any]) -> Polynomial:
    scores = _dims(node)[:-1] + _dims(a["key"])[-2:-1]  # the result's batch, to which queries and keys may broadcast
    return [scores + _dims(a["query"])[-1:], scores + _dims(node)[-1:]]


@counts("einsum")
def _einsum(node: fx.Node, a: dict[str, Any]) -> Polynomial:
    """Operands are contracted two at a time, along the node's path or else always the first two.

    Letters that only one of the two has, and nothing else needs, are summed beforehand; a product entry by entry counts
    nothing.
    """
    terms, result = spelled_out(a["equation"], [len(shape(t)) for t in a["tensors"]])
    left: list[dict[str, Ref]] = [
        {letter: (tensor, d) for d, letter in enumerate(term) if shape(tensor)[d] != 1}
        for term, tensor in zip(terms, a["tensors"], strict=True)
    ]
    named_path, products = a.get("path"), NOTHING
    path = list(named_path or [0, 1] * len(left))
    while len(left) > 1:
        i, j = path.pop(0), path.pop(0)
        one, other = (left.pop(k) for k in sorted((i, j), reverse=True))
        wanted = {*result, *(letter for term in left for letter in term)}
        both = {k: r for k, r in {**one, **other}.items() if k in wanted or (k in one and k in other)}
        if any(letter not in wanted for letter in both):
            products = [*products, list(both.values())]
        left.insert(len(left) if named_path else 0, {k: r for k, r in both.items() if k in wanted})
    return products


def _branches(node: fx.Node) -> Polynomial:
    """The cost of the most expensive branch of a condition, as a number, since everything that branches read is frozen."""
    return [[max(sum(evaluate(macs(n)) for n in body.graph.nodes) for body in _bodies(node))]]


def _bodies(node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that a higher-order operator may run."""
    module = node.graph.owning_module
    stored = [n for n in node.all_input_nodes if n.op == "get_attr"]
    values: Sequence[Any] = [fetch(module, str(n.target)) for n in stored] if module is not None else ()
    return [body for body in values if isinstance(body, fx.GraphModule)]


def _dims(node: fx.Node) -> list[Ref]:
    return [(node, d) for d in range(len(shape(node)))]


def _size(ref: Ref) -> int:
    return ref if isinstance(ref, int) else shape(ref[0])[ref[1]]


def evaluate(polynomial: Sequence[Sequence[Any]], size: Callable[[Any], int] = _size) -> int:
    """The polynomial's value, given the size of each factor, by default that of the example input."""
    return sum(math.prod(map(size, monomial)) for monomial in polynomial)


def terms(module: fx.GraphModule) -> Iterator[tuple[fx.Node, Polynomial, dict[str, int]]]:
    """Yield the parts of a program's cost: a node, a polynomial, and how much one unit of its value adds to each entry
    ("macs", "params", "weight_bytes", "activation_bytes"). Tied parameters count once, their bytes once for each name."""
    parameters, names = {id(p) for p in module.parameters()}, set()
    for node in module.graph.nodes:
        if polynomial := macs(node):
            yield node, polynomial, {"macs": 1}
        value: Any = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        if node.op == "call_function":
            yield node, [_dims(node)], {"activation_bytes": value.element_size()}
        elif node.op == "get_attr" and node.target not in names:
            names.add(node.target)
            stored = id(fetch(module, str(node.target)))
            units = {"weight_bytes": value.element_size(), "params": int(stored in parameters)}
            parameters.discard(stored)
            yield node, [_dims(node)], units


def total(
    parts: Iterable[tuple[fx.Node, Sequence[Sequence[Any]], dict[str, int]]], size: Callable[[Any], int] = _size
) -> dict[str, Any]:
    """MACs, parameters, bytes of weights, and bytes of all written activations: the sum of `terms`, given the size of each
    factor."""
    totals = {"macs": 0, "weight_bytes": 0, "activation_bytes": 0, "params": 0}
    for _, polynomial, units in parts:
        amount = evaluate(polynomial, size)
        for part, unit in units.items():
            totals[part] += amount * unit
    return totals


def unknowns(module: fx.GraphModule) -> dict[str, list[str]]:
    """The entry of a cost that names what was not counted; empty if everything was."""
    reasons = [f"{source(node)}: {why}" for node, why in uncounted(module)]
    return {"unknown": reasons} if reasons else {}
