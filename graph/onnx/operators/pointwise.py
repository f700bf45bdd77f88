"""Operators that act entry by entry, with broadcasting. Source: the ONNX specification."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import Refused
from ..dtypes import torch_dtype
from ..table import SYMBOLIC, Call, operator

UNARY: dict[str, Callable[[Tensor], Any]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "HardSwish": F.hardswish, "IsNaN": torch.isnan,
    "Log": torch.log, "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Relu": F.relu, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin,
    "Sinh": torch.sinh, "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
    "BitwiseNot": torch.bitwise_not,
}  # fmt: skip
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Pow": torch.pow, "Equal": torch.eq, "Less": torch.lt,
    "LessOrEqual": torch.le, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "And": torch.logical_and,
    "Or": torch.logical_or, "Xor": torch.logical_xor, "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}  # fmt: skip


@operator(*UNARY)
def unary(c: Call) -> Any:
    return UNARY[c.step.op](c.tensor())


@operator("Identity", "Dropout")
def identity(c: Call) -> Any:
    """Identity and Dropout. Dropout's ratio is an attribute before opset 12, then an input; its mask exists in training
    only."""
    if c.step.op == "Identity":
        return c.value()
    if c.used(1) or (c.has(2) and c.number(2, False)):
        raise Refused("a Dropout in training mode, or whose mask is read; export the model in eval mode")
    ratio = float(c.one_of("ratio", 1, 0.5))
    return F.dropout(c.tensor(), ratio, c.store.training) if 0 < ratio < 1 else c.tensor()


@operator(*BINARY, "Div", "Mod")
def binary(c: Call) -> Any:
    a, b = operands(c)
    if c.step.op == "Div":
        whole = all(not x.is_floating_point() if isinstance(x, Tensor) else not isinstance(x, float) for x in (a, b))
        return torch.div(a, b, rounding_mode="trunc" if whole else None)
    if c.step.op == "Mod":
        return torch.fmod(a, b) if c.attribute("fmod", 0) else torch.remainder(a, b)
    if c.step.op == "Pow":
        return torch.pow(a, b).to(a.dtype) if isinstance(a, Tensor) else torch.pow(c.tensor(0), b)
    if c.step.op == "Sub" and not isinstance(a, Tensor):
        return torch.rsub(b, a)
    return BINARY[c.step.op](a, b) if isinstance(a, Tensor) else BINARY[c.step.op](c.tensor(0), b)


def operands(c: Call) -> tuple[Any, Any]:
    """Both inputs; a single number that is combined with a tensor of at least as many dimensions stays a number."""
    a, b = c.value(0), c.value(1)
    ndim = max(x.ndim for x in (a, b) if isinstance(x, Tensor)) if _any_tensor(a, b) else 0

    def number(i: int, x: Any, other: Any) -> Any:
        if isinstance(x, np.ndarray) and x.size == 1 and isinstance(other, Tensor) and x.ndim <= ndim:
            value = x.reshape(-1).tolist()[0]
            if not isinstance(value, SYMBOLIC) or other.is_floating_point():
                return value
        return c.tensor(i)

    return number(0, a, b), number(1, b, a)


def _any_tensor(*values: Any) -> bool:
    return any(isinstance(v, Tensor) for v in values)


@operator("Sum", "Mean", "Max", "Min")
def variadic(c: Call) -> Any:
    if c.step.op in ("Max", "Min") and len(c.values) == 2:
        a, b = operands(c)
        if isinstance(b, float) or isinstance(a, float):  # one of the two is a bound
            x, bound = (a, b) if isinstance(a, Tensor) else (b, a)
            return torch.clamp(x, min=bound) if c.step.op == "Max" else torch.clamp(x, max=bound)
    function = {"Max": torch.maximum, "Min": torch.minimum}.get(c.step.op, torch.add)
    total = reduce(function, [c.tensor(i) for i in range(len(c.values))])
    return total / len(c.values) if c.step.op == "Mean" else total


@operator("Where")
def where(c: Call) -> Any:
    return torch.where(c.tensor(0), c.tensor(1), c.tensor(2))


@operator("Clip")
def clip(c: Call) -> Any:
    """Clipping; the bounds are attributes before opset 11, then inputs, which may be computed."""
    if any(c.has(i) and isinstance(c.value(i), Tensor) for i in (1, 2)):
        return torch.clamp(c.tensor(), c.optional(1), c.optional(2))
    low, high = c.one_of("min", 1), c.one_of("max", 2)
    return c.tensor() if low is None and high is None else torch.clamp(c.tensor(), low, high)


@operator("Cast", "CastLike")
def cast(c: Call) -> Any:
    dtype = c.tensor(1).dtype if c.step.op == "CastLike" else torch_dtype(c.attribute("to"))
    return c.tensor().to(dtype)


@operator("PRelu")
def prelu(c: Call) -> Any:
    """PReLU; a slope for each channel is PyTorch's prelu, other slopes are written out."""
    x, slope = c.tensor(0), c.tensor(1)
    if x.dim() > 1 and slope.numel() == slope.shape[0] and slope.dim() == x.dim() - 1 and slope.dim() > 0:
        return F.prelu(x, slope.reshape(-1))
    if slope.numel() == 1:
        return F.prelu(x, slope.reshape(1))
    return torch.where(x >= 0, x, x * slope)


@operator("Gelu")
def gelu(c: Call) -> Any:
    return F.gelu(c.tensor(), approximate=c.only("approximate", "none", "tanh"))


@operator("HardSigmoid")
def hard_sigmoid(c: Call) -> Any:
    alpha, beta = c.attribute("alpha", 0.2), c.attribute("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-7 and beta == 0.5:
        return F.hardsigmoid(c.tensor())
    return torch.clamp(c.tensor() * alpha + beta, 0.0, 1.0)


@operator("LeakyRelu")
def leaky_relu(c: Call) -> Any:
    return F.leaky_relu(c.tensor(), c.attribute("alpha", 0.01))


@operator("Elu", "Celu")
def elu(c: Call) -> Any:
    alpha = c.attribute("alpha", 1.0)
    return F.elu(c.tensor(), alpha) if c.step.op == "Elu" else F.celu(c.tensor(), alpha)


@operator("Selu")
def selu(c: Call) -> Any:
    alpha, gamma, x = c.attribute("alpha", 1.67326319217681885), c.attribute("gamma", 1.05070102214813232), c.tensor()
    return gamma * F.elu(x, alpha)


@operator("ThresholdedRelu")
def thresholded_relu(c: Call) -> Any:
    return F.threshold(c.tensor(), c.attribute("alpha", 1.0), 0.0)


@operator("Softplus")
def softplus(c: Call) -> Any:
    return F.softplus(c.tensor())


@operator("Swish")
def swish(c: Call) -> Any:
    x, alpha = c.tensor(), c.attribute("alpha", 1.0)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@operator("Shrink")
def shrink(c: Call) -> Any:
    x, bias, edge = c.tensor(), c.attribute("bias", 0.0), c.attribute("lambd", 0.5)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, torch.zeros_like(x)))


@operator("IsInf")
def is_inf(c: Call) -> Any:
    x = c.tensor()
    up, down = c.attribute("detect_positive", 1), c.attribute("detect_negative", 1)
    if up and down:
        return torch.isinf(x)
    sign = float("inf") if up else -float("inf")
    return torch.eq(x, sign) if up or down else torch.zeros_like(x, dtype=torch.bool)


@operator("BitShift")
def bit_shift(c: Call) -> Any:
    left = c.only("direction", "LEFT", "RIGHT") == "LEFT"
    return (torch.bitwise_left_shift if left else torch.bitwise_right_shift)(c.tensor(0), c.tensor(1))
