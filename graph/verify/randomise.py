"""Weights that hide no error: generic float64 values for every parameter of a program. Source: ours.

With a network's own weights an oracle misses errors: fresh ones are often zero (residual branches, layer scale), equal
along an axis (norms, biases), or kill every ReLU. So weights are redrawn: contraction weights with variance 1.5 / fan-in,
scales around 1, biases and offsets away from 0; other tensors are multiplied and shifted at random; BatchNorm statistics
and the biases before a ReLU are set on data. Integers, booleans and large constants (masks with -100 or -inf) stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import fx

from ..nodes import arguments, is_operator, op_name
from ..program import Program
from .absence import Absence
from .evaluate import Observer, tensors_of, to_double
from .presence import ABSENT, Held
from .removal import Removed

CONTRACTIONS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul mm bmm addmm einsum "
    "torchvision::deform_conv2d".split()
)
NORMS = frozenset("batch_norm layer_norm group_norm instance_norm rms_norm".split())
KINKS = frozenset("relu relu6 hardtanh clamp clamp_min hardswish hardsigmoid threshold".split())
LARGEST_CONSTANT = 50.0


def randomise(
    program: Program,
    inputs: Iterable[Any],
    seed: int = 0,
    removed: Removed | None = None,
    observe: Observer | None = None,
) -> tuple[dict[str, torch.Tensor], Any]:
    """Random float64 tensors by name, calibrated on (flattened) `inputs` for the network without the removed indices.

    Constants that lose nothing keep their values. The program is not changed. Also returns the absence oracle's outputs for
    the inputs, or None if they are out of date, since a shared tensor was calibrated after a call had read it; `observe`
    sees the values of that run.
    """
    tensors, removed, roles = tensors_of(program), removed or {}, _roles(program)
    source = Source(seed, max((t.numel() for t in tensors.values()), default=1) or 1)
    weights: dict[str, torch.Tensor] = {}
    done: dict[int, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in done:
            value = to_double(tensor)
            if value.is_floating_point():
                free = isinstance(tensor, torch.nn.Parameter) or (name in removed and _is_small(value))
                value = _draw(value, roles.get(name, ""), source).to(value.device) if free else value.clone()
            done[id(tensor)] = value
        weights[name] = done[id(tensor)]
    calibration = Calibration(program, weights, removed, source)
    outputs = calibration.run(inputs, observe)
    return weights, None if calibration.again else outputs


def _is_small(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(value).all()) and float(value.abs().max()) <= LARGEST_CONSTANT


def _roles(program: Program) -> dict[str, str]:
    """The role of a tensor in the operator that reads it: "contraction", "scale" or "shift"; tensors with another role are
    left out."""
    roles: dict[str, str] = {}
    for node in program.module().graph.nodes:
        if node.op != "get_attr":
            continue
        for user in node.users:
            role = _role(node, user)
            if role:
                roles[str(node.target)] = role
    return roles


def _role(node: fx.Node, user: fx.Node) -> str:
    name = op_name(user)
    if user.op != "call_function" or not is_operator(user):
        return ""
    key = next((k for k, v in arguments(user).items() if v is node), "")
    if name in CONTRACTIONS:
        return "shift" if key == "bias" else "contraction"
    if name in NORMS:
        return {"weight": "scale", "bias": "shift"}.get(key, "")
    return {"mul": "scale", "div": "scale", "add": "shift", "sub": "shift"}.get(name, "")


class Source:
    """Random numbers at the price of a copy: stretches of a pool that is as long as the largest tensor, or of a prime
    length, so that no two rows of a larger tensor are equal."""

    LONGEST = 1_048_583

    def __init__(self, seed: int, largest: int):
        self.generator = torch.Generator().manual_seed(seed)
        n = min(largest, self.LONGEST)
        self.normals = torch.randn(n, generator=self.generator, dtype=torch.float64)
        self.uniforms = torch.rand(n, generator=self.generator, dtype=torch.float64)

    def normal(self, shape: torch.Size, spread: float) -> torch.Tensor:
        """Normally distributed numbers with mean 0 and this standard deviation."""
        return self._stretch(self.normals, shape).mul_(spread)

    def uniform(self, shape: torch.Size, low: float, high: float) -> torch.Tensor:
        """Uniform numbers between two bounds."""
        return self._stretch(self.uniforms, shape).mul_(high - low).add_(low)

    def _stretch(self, pool: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        result = torch.empty(math.prod(shape), dtype=torch.float64)
        at = int(torch.randint(len(pool), (), generator=self.generator))
        done = 0
        while done < len(result):
            part = pool[at : at + len(result) - done]
            result[done : done + len(part)] = part
            done, at = done + len(part), 0
        return result.reshape(shape)


def _draw(value: torch.Tensor, role: str, source: Source) -> torch.Tensor:
    """Random values in place of a tensor's, by its role and its spread."""
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


class Calibration(Absence):
    """A run of the absence oracle that keeps the pruned network alive, by changing weights in place.

    Every batch_norm gets statistics from its inputs, with a random spread; biases of layers that feed a ReLU are shifted.
    So every channel that stays has a positive mean, and is positive somewhere.
    """

    def __init__(self, program: Program, weights: dict[str, torch.Tensor], removed: Removed, source: Source):
        super().__init__(program, weights, removed)
        self.source = source
        self.used: set[int] = set()  # ids of the tensors that have been read or changed so far
        self.again = False  # whether such a tensor was changed (again)

    def call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """The value of a node; the statistics and biases that it reads are set first."""
        name = op_name(node)
        if name == "batch_norm":
            named = arguments(node)
            if named["running_mean"] is not None and named["running_mean"].op == "get_attr":
                self._normalise(named, env)
        result = super().call(node, env)
        if (name == "linear" or name.startswith("conv")) and any(op_name(u) in KINKS for u in node.users):
            bias = arguments(node)["bias"]
            if bias is not None and bias.op == "get_attr":
                result = self._lift(node, bias, result, -1 if name == "linear" else 1)
        self.used |= {id(self.weights.get(str(i.target))) for i in node.all_input_nodes if i.op == "get_attr"}
        return result

    def _normalise(self, named: dict[str, Any], env: dict[fx.Node, Any]) -> None:
        values, present = _by_channel(env[named["input"]], 1)
        variance, mean = torch.var_mean(values, 1, correction=0)
        low, high = self.source.uniform(mean.shape, 0.5, 1.5), self.source.uniform(mean.shape, 0.2, 1.2)
        variance = variance.clamp_min(0.05 * float(variance.mean()) + 1e-6) * low.to(mean.device)
        for key, statistic in (
            ("running_var", variance),
            ("running_mean", mean - high.to(mean.device) * variance.sqrt()),
        ):
            self._write(named[key], statistic, present, env)

    def _lift(self, node: fx.Node, bias: fx.Node, result: Any, channels: int) -> Any:
        """Shift the bias so that every channel has a positive mean; returns the shifted result."""
        values, present = _by_channel(result, channels)
        variance, mean = torch.var_mean(values, 1, correction=0)
        scale = (variance + 0.1 * mean.square().mean() + 1e-12).sqrt()
        target = self.source.uniform(mean.shape, 0.2, 1.0).to(mean.device) * scale
        whole = self._mark(bias)
        before = whole.clone()
        whole[present] += target - mean
        shape = [-1, *[1] * (result.value.dim() - 2)] if channels == 1 else [-1]
        return Held(result.value + (whole - before).reshape(shape), result.states)

    def _write(self, buffer: fx.Node, values: torch.Tensor, present: torch.Tensor, env: dict[fx.Node, Any]) -> None:
        """Set a buffer's present entries; absent ones get the mean, and are NaN in this run."""
        whole = self._mark(buffer)
        whole.fill_(float(values.mean()))
        whole[present] = values
        env[buffer] = self.fetch(str(buffer.target))

    def _mark(self, node: fx.Node) -> torch.Tensor:
        """The tensor that is about to be changed; notes if it has been read or changed before."""
        whole = self.weights[str(node.target)]
        self.again = self.again or id(whole) in self.used
        self.used.add(id(whole))
        return whole


def _by_channel(held: Held, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The present values as (channel, everything else), and a mask of the present channels."""
    d %= held.value.dim()
    state = held.states[d]
    present = np.ones(held.value.shape[d], dtype=bool) if state is None else state != ABSENT
    return held.kept().movedim(d, 0).unsqueeze(-1).flatten(1), torch.from_numpy(present).to(held.value.device)
