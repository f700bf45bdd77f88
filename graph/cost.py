"""The cost model: MACs and bytes of every node as polynomials in the sizes of its axes.

A polynomial is a list of monomials, a monomial a list of `(node, dim)` references; the value is the sum over monomials
of the product of the sizes referred to. The same polynomial is evaluated on shapes (here) or on solved axes
(`Comb.cost`), so "what does removing 8 of these save" is exact. Source: ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .ops import arguments, op_name, shape

Ref = tuple[fx.Node, int]
Polynomial = list[list[Ref]]


def macs(node: fx.Node) -> Polynomial:
    """Multiply-accumulates of one node; empty for everything that is not a convolution or a matrix product."""
    name = op_name(node)
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return []
    if name.startswith("conv_transpose"):
        a = arguments(node)
        return [_dims(a["input"]) + _dims(a["weight"])[1:]]
    if name in ("conv1d", "conv2d", "conv3d"):
        return [_dims(node) + _dims(arguments(node)["weight"])[1:]]
    if name == "linear":
        return [_dims(node) + _dims(arguments(node)["weight"])[1:]]
    if name in ("matmul", "bmm", "mm", "mv", "baddbmm", "addmm"):
        a = arguments(node)
        left = next(a[name] for name in ("batch1", "mat1", "self") if name in a)
        return [_dims(node) + _dims(left)[-1:]]
    if name == "einsum":
        a = arguments(node)
        letters: dict[str, Ref] = {}
        inputs = a["equation"].replace(" ", "").split("->")[0].split(",")
        if "." in a["equation"]:
            return []
        for term, tensor in zip(inputs, a["tensors"], strict=True):
            for d, letter in enumerate(term):
                if letter not in letters or shape(tensor)[d] != 1:
                    letters[letter] = (tensor, d)
        return [list(letters.values())]
    if name == "scaled_dot_product_attention":
        a = arguments(node)
        keys = _dims(a["key"])[-2:-1]
        return [_dims(a["query"]) + keys, _dims(node) + keys]
    return []


def _dims(node: fx.Node) -> list[Ref]:
    return [(node, d) for d in range(len(shape(node)))]


def evaluate(polynomial: Polynomial) -> int:
    """The polynomial's value for the shapes of the example input."""
    result = 0
    for monomial in polynomial:
        product = 1
        for node, dim in monomial:
            product *= shape(node)[dim]
        result += product
    return result


def total(module: fx.GraphModule) -> dict[str, int]:
    """MACs, bytes of weights, and bytes of all activations written, for the example input."""
    counts, weights, activations, seen = 0, 0, 0, set()
    for node in module.graph.nodes:
        counts += evaluate(macs(node))
        value: Any = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        size = value.element_size()
        for s in shape(node):
            size *= s
        if node.op == "call_function":
            activations += size
        elif node.op == "get_attr" and node.target not in seen:
            seen.add(node.target)
            weights += size
    return {"macs": counts, "weight_bytes": weights, "activation_bytes": activations}
