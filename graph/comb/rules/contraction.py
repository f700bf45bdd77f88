"""Rules of convolutions, matrix products, einsum and attention: contracted axes unify, the others pass through."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from ...facts import CONVS, MATRIX_PRODUCTS, TRANSPOSED_CONVS, VECTOR_PRODUCTS
from ...nodes import op_name, shape, spelled_out
from ..axes import Axis, fresh
from ..equations import WINDOW, Equations, Sizes
from .elementwise import broadcast
from .registry import Arguments, NoRule, either, rule


def is_window(a: Arguments, kernel: tuple[int, ...]) -> bool:
    """Whether a convolution slides a window; not with kernel 1, stride 1 and no padding, where spatial axes pass
    through."""
    padding = a["padding"]
    padded = padding == "same" and any(k > 1 for k in kernel) if isinstance(padding, str) else any(padding)
    extra = any(a.get("output_padding") or ())
    return padded or extra or any(k != 1 for k in kernel) or any(s != 1 for s in a["stride"])


@rule(*CONVS, *TRANSPOSED_CONVS)
def convolution(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    x, w, bias, groups = a["input"], a["weight"], a["bias"], a["groups"]
    nd = len(shape(w)) - 2
    if len(shape(x)) != nd + 2:
        raise NoRule("an unbatched convolution")
    xs, ws = c.axes[x], c.axes[w]
    spatial = c.window(node, x, 2) if is_window(a, shape(w)[2:]) else xs[2:]
    for axis in ws[2:]:
        c.kernel(axis, node)
    group = fresh(groups)
    outer, inner = fresh(shape(w)[0] // groups), fresh(shape(w)[1])
    c.unify(ws[0], group + outer)
    c.unify(ws[1], inner)
    if op_name(node).startswith("conv_transpose"):  # its weight has the inputs first
        outer, inner = inner, outer
    c.unify(xs[1], group + inner)
    result = group + outer
    if bias is not None:
        c.unify(c.axes[bias][0], result)
    if groups > 1:
        c.rewrite(node, lambda s, m: s.assign(m, "groups", s.size(group)))
        if inner:
            c.role(group, "group")
        elif outer:
            c.role(outer, "multiplier")
    c.role(result, "out", w)
    c.role(group + inner, "in", w)
    return [xs[0], result, *spatial]


@rule("torchvision::deform_conv2d")
def deformable(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    """A grouped convolution whose taps are moved by offsets; the offsets' channels hold positions and stay whole."""
    xs, ws, groups = c.axes[a["input"]], c.axes[a["weight"]], a["groups"]
    for axis in (*xs[2:], *ws[2:]):
        c.freeze(axis, node, WINDOW)
    for key in ("offset", "mask"):
        for axis in c.axes[a[key]][1:]:
            c.freeze(axis, node, f"the {key}s of a deformable convolution")
        c.unify(c.axes[a[key]][0], xs[0])
    group, fields = fresh(groups), fresh(a["offset_groups"])
    outer, inner = fresh(shape(node)[1] // groups), fresh(shape(a["weight"])[1])
    c.unify(ws[0], group + outer)
    c.unify(ws[1], inner)
    c.unify(xs[1], group + inner)
    c.unify(xs[1], fields + fresh(shape(a["input"])[1] // a["offset_groups"]))
    c.freeze(fields, node, "every offset field moves its own channels")
    c.unify(c.axes[a["bias"]][0], group + outer)
    c.rewrite(node, lambda s, m: s.assign(m, "groups", s.size(group)))
    c.role(group + outer, "out", a["weight"])
    c.role(group + inner, "in", a["weight"])
    return [xs[0], group + outer, *[c.frozen(node, d, WINDOW) for d in (2, 3)]]


@rule("linear")
def linear(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs, ws = c.axes[a["input"]], c.axes[a["weight"]]
    c.unify(xs[-1], ws[-1])
    c.role(ws[-1], "in", a["weight"])
    if len(ws) == 1:
        return xs[:-1]
    if a["bias"] is not None:
        c.unify(c.axes[a["bias"]][0], ws[0])
    c.role(ws[0], "linear", a["weight"])
    return [*xs[:-1], ws[0]]


@rule("matmul", "bmm", "mm", "mv", "dot")
def matmul(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    p, q = (a[key] for key in {**MATRIX_PRODUCTS, **VECTOR_PRODUCTS}[op_name(node)])
    xs, ys = c.axes[p], c.axes[q]
    c.unify(xs[-1], ys[-2] if len(ys) > 1 else ys[-1])
    c.sums(node, [xs[-1]])
    batch = shape(node)[: max(len(xs), len(ys)) - 2]
    items = [(xs[:-2], shape(p)[:-2]), (ys[:-2], shape(q)[:-2])]
    result = broadcast(c, node, items, batch) if len(batch) else []
    if c.is_parameter(p) or c.is_parameter(q):
        c.role(xs[-1], "in", p if c.is_parameter(p) else q)
        if len(ys) > 1:
            c.role(ys[-1], "out", q)
        if len(xs) > 1:
            c.role(xs[-2], "out", p)
    else:
        for axis in result:
            c.role(axis, "head")
    return result + (xs[-2:-1] if len(xs) > 1 else []) + (ys[-1:] if len(ys) > 1 else [])


@rule("addmm", "baddbmm")
def addmm(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    p, q = (a[key] for key in MATRIX_PRODUCTS[op_name(node)])
    c.unify(c.axes[p][-1], c.axes[q][-2])
    c.sums(node, [c.axes[p][-1]])
    result = [*c.axes[p][:-1], c.axes[q][-1]]
    if len(result) == 3:
        c.unify(result[0], c.axes[q][0])
    c.role(c.axes[p][-1], "in", q)
    c.role(c.axes[q][-1], "out", q)
    broadcast(c, node, [(result, shape(node)), (c.axes[a["self"]], shape(a["self"]))], shape(node))
    return result


@rule("outer", "ger")
def outer(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    return [c.axes[a["self"]][0], c.axes[either(a, "vec2", "other")][0]]


@rule("einsum")
def einsum(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    terms, right = spelled_out(a["equation"], [len(shape(t)) for t in a["tensors"]])
    if any(len(set(t)) != len(t) for t in terms):
        raise NoRule("einsum with a diagonal")
    axis_of: dict[str, Axis] = {}
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, a["tensors"], strict=True):
        for letter, axis, n in zip(term, c.axes[tensor], shape(tensor), strict=True):
            if n == 1 or sizes.get(letter, 1) == 1:
                if n > 1 or letter not in axis_of:
                    axis_of[letter], sizes[letter] = axis, n
            else:
                c.unify(axis_of[letter], axis)
    c.sums(node, [axis for letter, axis in axis_of.items() if letter not in right])
    weights = [t for t in a["tensors"] if c.is_parameter(t)]
    for letter in axis_of:
        everywhere = all(letter in t for t in terms)
        if weights:
            c.role(axis_of[letter], "out" if letter in right else "in", weights[0])
        elif everywhere and letter in right:
            c.role(axis_of[letter], "head")
    return [axis_of[letter] for letter in right]


@rule("scaled_dot_product_attention")
def attention(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    q, k, v = a["query"], a["key"], a["value"]
    qs, ks, vs = c.axes[q], c.axes[k], c.axes[v]
    nq, nk, nv, out = shape(q), shape(k), shape(v), shape(node)
    c.unify(qs[-1], ks[-1])
    c.unify(ks[-2], vs[-2])
    c.sums(node, [qs[-1], ks[-2]])
    if a.get("is_causal"):
        c.unify(qs[-2], ks[-2])
    if a.get("enable_gqa") and nq[-3] != nk[-3]:
        repeat = fresh(nq[-3] // nk[-3])
        c.unify(qs[-3], ks[-3] + repeat)
        c.unify(ks[-3], vs[-3])
        items = [(qs[:-3], nq[:-3]), (ks[:-3], nk[:-3]), (vs[:-3], nv[:-3])]
        batch = [*broadcast(c, node, items, out[:-3]), qs[-3]]
        c.role(repeat, "group")
    else:
        items = [(qs[:-2], nq[:-2]), (ks[:-2], nk[:-2]), (vs[:-2], nv[:-2])]
        batch = broadcast(c, node, items, out[:-2])
    for axis in batch:
        c.role(axis, "head")
    c.role(qs[-1], "width")
    c.role(vs[-1], "width")
    mask = a.get("attn_mask")
    if mask is not None:
        scores = (*out[:-2], nq[-2], nk[-2])
        broadcast(c, node, [([*batch, qs[-2], ks[-2]], scores), (c.axes[mask], shape(mask))], scores)
    if a.get("scale") is None:  # the pruned network keeps the scale it was trained with

        def keep_scale(s: Sizes, m: fx.Node) -> None:
            if not s.full(qs[-1]):
                s.assign(m, "scale", 1 / math.sqrt(nq[-1]))

        c.rewrite(node, keep_scale)
    return [*batch, qs[-2], vs[-1]]
