"""Weights that hide nothing: generic float64 values for every parameter of a program. Source: ours.

An oracle goes blind on a network's own weights: fresh ones are often zero (residual branches, layer scale), equal along an
axis (norms, biases), or kill every ReLU. So weights are redrawn: contraction weights with variance 1.5 / fan-in, scales
around 1, biases and offsets away from 0, anything else multiplied and shifted at random; BatchNorm statistics are measured
on data, with a spread. Integers, booleans and large constants (masks with -100 or -inf) stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ..ops import arguments, op_name
from ..program import Program
from .evaluate import Evaluator, evaluated, invoke, tensors_of, to_double

CONTRACTIONS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul mm bmm addmm einsum "
    "torchvision::deform_conv2d".split()
)
NORMS = frozenset("batch_norm layer_norm group_norm instance_norm rms_norm".split())
LARGEST_CONSTANT = 50.0


def randomise(
    program: Program, inputs: Iterable[Any], seed: int = 0, touched: Iterable[str] = ()
) -> tuple[dict[str, torch.Tensor], Any]:
    """Random float64 tensors by name, and the outputs of the program with them for `inputs` (flattened).

    touched: names of buffers that lose indices; other constants keep their values. The program is not changed.
    """
    source = Source(seed)
    roles, touched = _roles(program), set(touched)
    weights: dict[str, torch.Tensor] = {}
    done: dict[int, torch.Tensor] = {}
    for name, tensor in tensors_of(program).items():
        if id(tensor) not in done:
            value = to_double(tensor)
            if value.is_floating_point():
                free = isinstance(tensor, torch.nn.Parameter) or (name in touched and _harmless(value))
                value = _draw(value, roles.get(name, ""), source).to(value.device) if free else value.clone()
            done[id(tensor)] = value
        weights[name] = done[id(tensor)]
    return weights, Calibration(program, weights, source.generator).run(inputs)


def _harmless(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(value).all()) and float(value.abs().max()) <= LARGEST_CONSTANT


def _roles(program: Program) -> dict[str, str]:
    """What a tensor is to the operator that reads it: "contraction", "scale", "shift", or nothing in particular."""
    found: dict[str, str] = {}
    for node in program.module().graph.nodes:
        if node.op != "get_attr":
            continue
        for user in node.users:
            role = _role(node, user)
            if role:
                found[str(node.target)] = role
    return found


def _role(node: fx.Node, user: fx.Node) -> str:
    name = op_name(user)
    if user.op != "call_function" or not hasattr(user.target, "_schema"):
        return ""
    key = next((k for k, v in arguments(user).items() if v is node), "")
    if name in CONTRACTIONS:
        return "shift" if key == "bias" else "contraction"
    if name in NORMS:
        return {"weight": "scale", "bias": "shift"}.get(key, "")
    return {"mul": "scale", "div": "scale", "add": "shift", "sub": "shift"}.get(name, "")


class Source:
    """Random numbers at the price of a copy: stretches of one pool of prime length, so that no two rows repeat."""

    POOL = 1_048_583

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.normals = torch.randn(self.POOL, generator=self.generator, dtype=torch.float64)
        self.uniforms = torch.rand(self.POOL, generator=self.generator, dtype=torch.float64)

    def normal(self, shape: torch.Size, spread: float) -> torch.Tensor:
        return self._stretch(self.normals, shape).mul_(spread)

    def uniform(self, shape: torch.Size, low: float, high: float) -> torch.Tensor:
        return self._stretch(self.uniforms, shape).mul_(high - low).add_(low)

    def _stretch(self, pool: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        result = torch.empty(math.prod(shape), dtype=torch.float64)
        at = int(torch.randint(self.POOL, (), generator=self.generator))
        done = 0
        while done < len(result):
            part = pool[at : at + len(result) - done]
            result[done : done + len(part)] = part
            done, at = done + len(part), 0
        return result.reshape(shape)


def _draw(value: torch.Tensor, role: str, source: Source) -> torch.Tensor:
    """Random values in the place of a tensor's, by its role and own spread."""
    shape = value.shape
    if not value.numel():
        return value
    if role == "contraction" and value.dim() > 1:
        return source.normal(shape, math.sqrt(1.5 / math.prod(shape[1:])))
    if role == "shift" and value.dim() == 1:
        return source.normal(shape, 0.3) + 0.1
    level = float(value.abs().mean())
    spread = float(value.std()) if value.numel() > 1 else 0.0
    constant = spread <= 1e-3 * level
    if role == "scale" and value.dim() and (constant or level < 0.05):
        return source.uniform(shape, 0.6, 1.4) * (level if level > 0.05 else 0.5)
    if constant:
        return value.cpu() * source.uniform(shape, 0.6, 1.4) if level else source.normal(shape, 0.2)
    return value.cpu() * source.uniform(shape, 0.5, 1.5) + source.normal(shape, 0.3 * spread)


class Calibration(Evaluator):
    """A run that sets the running statistics of every batch_norm to those of what it meets, with a spread."""

    def __init__(self, program: Program, weights: dict[str, torch.Tensor], generator: torch.Generator):
        super().__init__(program, weights)
        self.generator = generator

    def call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if op_name(node) != "batch_norm" or arguments(node)["running_mean"] is None:
            return super().call(node, env)
        a = evaluated(node, env)
        x, along = a["input"], [d for d in range(a["input"].dim()) if d != 1]
        variance, mean = torch.var_mean(x, along, correction=0)
        draw = torch.rand(2, x.shape[1], generator=self.generator, dtype=torch.float64).to(x.device)
        floor = 0.05 * variance.mean() + 1e-6
        a["running_var"].copy_(variance.clamp_min(floor) * (0.5 + draw[0]))
        a["running_mean"].copy_(mean + (draw[1] - 0.7) * a["running_var"].sqrt())
        return invoke(node, a)
