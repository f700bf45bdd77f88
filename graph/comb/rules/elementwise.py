"""Operators that act on each entry by itself: broadcast axes unify, size 1 imposes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...nodes import shape
from ..axes import Axis, normal
from .table import Arguments, NoRule, rule

if TYPE_CHECKING:
    from ..solve import Comb

UNARY = """
relu relu6 sigmoid tanh gelu silu hardswish hardsigmoid hardtanh clamp clamp_min clamp_max clip exp exp2 log log2
log10 log1p expm1 sqrt rsqrt neg abs dropout feature_dropout alpha_dropout feature_alpha_dropout clone contiguous
alias detach lift_fresh_copy leaky_relu elu selu celu softplus mish erf erfc erfinv sin cos tan asin acos atan sinh
cosh asinh acosh logical_not bitwise_not reciprocal square log_sigmoid softsign threshold hardshrink softshrink
tanhshrink floor ceil round trunc frac sign sgn isnan isinf isfinite nan_to_num positive logit rrelu zeros_like
ones_like full_like empty_like rand_like randn_like bernoulli fill zero native_dropout to _to_copy type_as float
double half bool int conj real view_as_complex_copy special_expit digamma lgamma rad2deg deg2rad
absolute negative fix arccos arccosh arcsin arcsinh arctan arctanh special_exp2 special_expm1 special_log1p special_erf
special_erfc special_erfinv special_sinc special_logit special_round special_expit angle
""".split()
BROADCAST = """
add sub rsub mul div true_divide floor_divide remainder fmod pow maximum minimum fmax fmin atan2 hypot where eq ne lt
gt le ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor masked_fill addcmul addcdiv lerp copy
greater less greater_equal less_equal not_equal subtract multiply divide xlogy logaddexp heaviside __and__ __or__
__xor__ complex polar copysign nextafter arctan2 special_xlogy
""".split()


def broadcast(
    c: Comb, node: fx.Node, items: list[tuple[list[Axis], tuple[int, ...]]], out: tuple[int, ...]
) -> list[Axis]:
    """Unify axes under broadcasting to the shape `out`. items: (axes, shape) of each operand."""
    result: list[Axis] = [[] for _ in out]
    for axes, sizes in items:
        shift = len(out) - len(sizes)
        if shift < 0:
            raise NoRule("an operand has more dimensions than the result")
        for d, axis in enumerate(axes):
            if sizes[d] == 1 or sizes[d] != out[shift + d]:
                continue
            if normal(result[shift + d]):
                c.unify(result[shift + d], axis)
            else:
                result[shift + d] = axis
    return result


@rule(*UNARY)
def unary(c: Comb, node: fx.Node, a: Arguments) -> list[Any]:
    x = c.first(node)
    if shape(x) != shape(node):
        raise NoRule("the result has another shape")
    return c.axes[x]


@rule(*BROADCAST)
def binary(c: Comb, node: fx.Node, a: Arguments) -> list[Any]:
    items = [(c.axes[i], shape(i)) for i in node.all_input_nodes if c.axes[i] is not None]
    return broadcast(c, node, items, shape(node))


def pointwise(c: Comb, node: fx.Node, a: Arguments) -> list[Any]:
    """An operator of no table that PyTorch itself tags as acting on each entry by itself."""
    shapes = [shape(i) for i in node.all_input_nodes if c.axes[i] is not None]
    if not isinstance(node.meta["val"], torch.Tensor) or torch.broadcast_shapes(*shapes) != shape(node):
        raise NoRule("the result is not the operands' broadcast")
    return binary(c, node, a)


@rule("expand_as", "broadcast_to", "expand")
def expand(c: Comb, node: fx.Node, a: Arguments) -> list[Any]:
    x, out = c.first(node), shape(node)
    own, shift = shape(x), len(out) - len(shape(x))
    result = []
    for d in range(len(out)):
        if d >= shift and own[d - shift] == out[d]:
            result.append(c.axes[x][d - shift])
        else:
            result.append(c.fresh(node, d))
            c.copies(node, result[-1:], "multiplier")
    if a.get("other") is not None:
        for mine, other in zip(result, c.axes[a["other"]], strict=True):
            c.unify(mine, other)
    else:
        c.resize(node, "size", result)
    return result


@rule("prelu")
def prelu(c: Comb, node: fx.Node, a: Arguments) -> list[Any]:
    x = c.axes[a["self"]]
    if shape(a["weight"])[0] > 1:
        c.unify(c.axes[a["weight"]][0], x[1] if len(x) > 1 else x[0])
    return x
