"""Meanings of operators that treat each entry by itself: a result is present where all of its operands are."""

from __future__ import annotations

from typing import Any

import torch

from ..presence import Held, broadcast, join, mark_absent
from .registry import Call, means, need_all, unknown

HEALING = frozenset(
    "where masked_fill nan_to_num pow fmax fmin sign sgn xlogy heaviside fill zero copy threshold".split()
)


@means(
    """relu relu6 sigmoid tanh gelu silu hardswish hardsigmoid hardtanh clamp clamp_min clamp_max clip exp exp2 log log2
    log10 log1p expm1 sqrt rsqrt neg abs dropout feature_dropout alpha_dropout feature_alpha_dropout clone contiguous alias
    detach lift_fresh_copy leaky_relu elu selu celu softplus mish erf erfc erfinv sin cos tan asin acos atan sinh cosh
    asinh acosh logical_not bitwise_not reciprocal square log_sigmoid  threshold hardshrink softshrink 
    floor ceil
    round trunc frac sign sgn isnan isinf isfinite nan_to_num positive logit rrelu fill zero conj
    real imag angle special_expit digamma lgamma rad2deg deg2rad add sub rsub mul div true_divide floor_divide remainder
    fmod pow maximum minimum fmax fmin atan2 hypot where eq ne lt gt le ge logical_and logical_or logical_xor bitwise_and
    bitwise_or bitwise_xor masked_fill addcmul addcdiv lerp copy greater less greater_equal less_equal not_equal subtract
    multiply divide xlogy logaddexp heaviside __and__ __or__ __xor__ complex polar copysign nextafter native_dropout
    absolute negative fix arccos arccosh arcsin arcsinh arctan arctanh arctan2 special_exp2 special_expm1 special_log1p
    special_erf special_erfc special_erfinv special_sinc special_logit special_round special_xlogy"""
)
def entrywise(call: Call) -> Any:
    result = call.run()
    if not isinstance(result, torch.Tensor):
        states = broadcast(call.held(), result[0].shape)
        return [Held(r, states) for r in result]
    states = broadcast(call.held(), result.shape)
    return mark_absent(result, states) if call.name in HEALING else Held(result, states)


def pointwise(call: Call) -> Held:
    """An operator that PyTorch tags as treating each entry by itself; it may turn NaN into a number, so absent entries are
    marked again."""
    result = call.run()
    if not isinstance(result, torch.Tensor):
        return unknown()
    return mark_absent(result, broadcast(call.held(), result.shape))


@means("to _to_copy type_as")
def cast(call: Call) -> Held:
    return mark_absent(call.run(), call.x.states)


@means("prelu")
def prelu(call: Call) -> Held:
    x, weight = call.x, call.a["weight"]
    states = list(x.states)
    if weight.value.numel() > 1:
        d = min(1, len(states) - 1)
        states[d] = join([states[d], weight.states[0]])
    return mark_absent(call.run(), states)


@means("tril triu")
def triangle(call: Call) -> Held:
    need_all(call.x, [-2, -1], "it depends on positions along the axis")
    return mark_absent(call.run(), call.x.states)
