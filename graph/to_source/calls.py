"""Operators of a program as Python expressions: a sign or a function of torch if it is the same operator, else the ATen
operator itself. Source: ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..compat import OpOverload
from ..errors import Refused
from ..nodes import arguments, fetch, op_name, source
from ..trainable import switch, wanted

SIGNS = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floor_divide": "//", "floordiv": "//", "matmul": "@", "mod": "%",
    "pow": "**", "truediv": "/",
}  # fmt: skip
FUNCTIONAL = frozenset(  # the function F.name has the operator's arguments in the same order
    "relu silu gelu hardswish hardsigmoid hardtanh mish leaky_relu relu6 dropout linear conv1d conv2d conv3d "
    "conv_transpose1d conv_transpose2d conv_transpose3d layer_norm max_pool2d avg_pool2d adaptive_avg_pool2d "
    "adaptive_avg_pool1d pixel_shuffle pixel_unshuffle softplus scaled_dot_product_attention".split()
)
METHODS = frozenset(
    "view reshape permute transpose flatten unsqueeze squeeze expand contiguous mean sum amax amin softmax split chunk "
    "unbind select sigmoid tanh exp sqrt rsqrt clamp repeat roll".split()
)
TORCH = frozenset("cat stack".split())


class Expressions:
    """Writes nodes as expressions. name: gives the variable of a node, or the expression of a stored tensor. device: the
    expression of the inputs' device."""

    def __init__(self, module: fx.GraphModule, name: Callable[[fx.Node], str], device: str):
        self.module, self.name, self.device = module, name, device
        self.libraries: set[str] = set()

    def value(self, value: Any) -> str:
        """An argument as source. Raises Refused for types that cannot be written."""
        if isinstance(value, fx.Node):
            return self.name(value)
        if isinstance(value, (list, tuple)):
            inner = ", ".join(map(self.value, value))
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
        if isinstance(value, slice):
            return f"slice({', '.join(map(self.value, (value.start, value.stop, value.step)))})"
        if isinstance(value, torch.device):
            return self.device
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if value is None or isinstance(
            value, (bool, int, float, str, torch.dtype, torch.layout, torch.memory_format, complex)
        ):
            return repr(value)
        raise Refused(f"to_source: an argument of type {type(value).__name__} cannot be written")

    def call(self, node: fx.Node) -> str:
        """The expression of an operator node. Raises Refused for an operator that PyTorch alone does not have."""
        args, kwargs = self._given(node)
        name, values = op_name(node), [self.value(a) if not isinstance(a, _Source) else a.text for a in args]
        named = {k: self.value(v) if not isinstance(v, _Source) else v.text for k, v in kwargs.items()}
        if name == "getitem":
            return f"{values[0]}[{values[1]}]"
        if name.startswith("sym_size"):
            return f"{values[0]}.shape[{values[1]}]"
        if _is_sign(node, name) and len(values) == 2 and not named:
            left, right = (f"({v})" if v.startswith("-") else v for v in values)
            return f"{left} {SIGNS[name]} {right}"
        written = [*values, *(f"{k}={v}" for k, v in named.items())]
        return f"{self._function(node, name, values, written)}"

    def _function(self, node: fx.Node, name: str, values: list[str], written: list[str]) -> str:
        if not isinstance(node.target, OpOverload):
            if getattr(node.target, "__module__", "") in ("_operator", "operator"):
                self.libraries.add("operator")
                return f"operator.{node.target.__name__}({', '.join(written)})"  # type: ignore[union-attr]
            if getattr(torch, getattr(node.target, "__name__", ""), None) is node.target:
                return f"torch.{node.target.__name__}({', '.join(written)})"
            if node.target is math.floor or node.target is math.ceil or node.target is math.trunc:
                self.libraries.add("math")
                return f"math.{node.target.__name__}({', '.join(written)})"
            raise Refused(
                f"to_source: {source(node)}: {op_name(node)} is no operator of PyTorch's and cannot be written"
            )
        text = ", ".join(written)
        if name == "layer_norm":
            text = ", ".join(written[:5])  # the further arguments only choose a kernel
        if name in FUNCTIONAL:
            return f"F.{name}({text})"
        if name in TORCH:
            return f"torch.{name}({text})"
        if name in METHODS and values and isinstance(node.args[0], fx.Node):
            return f"{values[0]}.{name}({', '.join(written[1:])})"
        space, _, overload = node.target.name().partition("::")
        if space == "torchvision":
            self.libraries.add("torchvision")
        elif space not in ("aten", "prims"):
            raise Refused(f"to_source: {source(node)}: {name} is an operator of a library of its own, {space}")
        return f"torch.ops.{space}.{overload if '.' in overload else f'{overload}.default'}({text})"

    def _given(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The node's arguments, with those that the mode decides as expressions of `self.training`."""
        args: list[Any] = [*node.args]
        kwargs: dict[str, Any] = dict(node.kwargs)
        key = switch(node)
        if key is None:
            return tuple(args), kwargs
        eval_, train = (wanted(node, mode).get(key, arguments(node)[key]) for mode in (False, True))
        if eval_ == train:
            text = repr(eval_)
        elif (eval_, train) == (False, True):
            text = "self.training"
        else:
            text = f"{train!r} if self.training else {eval_!r}"
        place = [a.name for a in node.target._schema.arguments].index(key)  # type: ignore[union-attr]
        if place < len(args):
            args[place] = _Source(text)
        else:
            kwargs[key] = _Source(text)
        return tuple(args), kwargs


def _is_sign(node: fx.Node, name: str) -> bool:
    if isinstance(node.target, OpOverload):
        return name in SIGNS
    return getattr(node.target, "__module__", "") == "_operator" and name in SIGNS


class _Source:
    def __init__(self, text: str):
        self.text = text


def check_writable(module: fx.GraphModule) -> None:
    """Raise Refused for a graph that has no source: with branches, or running statistics that are plain averages."""
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(fetch(module, str(node.target)), fx.GraphModule):
            user = next(iter(node.users), node)
            raise Refused(f"to_source: {source(user)}: the bodies of {op_name(user)} cannot be written")
        if node.op == "call_function" and op_name(node) == "batch_norm" and node.meta.get("cumulative"):
            raise Refused(f"to_source: {source(node)}: momentum None, running statistics that are plain averages")
