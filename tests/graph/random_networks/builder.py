"""A random network while it is drawn, and the table of the operations that it is drawn from."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 3000  # entries per sample
HIGHEST = 6  # dimensions


class Skip(Exception):
    """The operation does not fit the value at hand."""


class Weight(nn.Module):
    """A bare parameter or buffer."""

    def __init__(self, *shape: int, trainable: bool = True):
        super().__init__()
        value = torch.randn(shape) * 0.5 + 0.1
        if trainable:
            self.value = nn.Parameter(value)
        else:
            self.register_buffer("value", value)


class Step(nn.Module):
    """`function(*modules, *tensors)`."""

    def __init__(self, function: Callable[..., Any], modules: Sequence[nn.Module]):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*self.parts, *tensors)


class Network(nn.Module):
    """Steps over a growing list of values; `inputs[k]` are the values step k reads."""

    def __init__(self, steps: list[Step], inputs: list[tuple[int, ...]], outputs: list[int], names: list[str]):
        super().__init__()
        self.steps, self.inputs, self.outputs, self.names = nn.ModuleList(steps), inputs, outputs, names

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for step, inputs in zip(self.steps, self.inputs, strict=True):
            result = step(*(values[i] for i in inputs))
            values += result if isinstance(result, (tuple, list)) else [result]
        return tuple(values[i] for i in self.outputs)


class Builder:
    """The network so far, run eagerly on the example so that shapes are known."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.values: list[Tensor] = []
        self.steps: list[Step] = []
        self.inputs: list[tuple[int, ...]] = []
        self.names: list[str] = []

    def add(self, function: Callable[..., Any], inputs: Sequence[int], *modules: nn.Module) -> int:
        """Append a step and return the index of its (last) value."""
        return self.append(Step(function, modules), inputs)

    def append(self, step: Step, inputs: Sequence[int]) -> int:
        step.eval()
        with torch.no_grad():
            result = step(*(self.values[i] for i in inputs))
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        for value in results:
            if value.dim() > HIGHEST or value[0].numel() > LARGEST or not value.numel():
                raise Skip
            if not torch.isfinite(value).all() or value.abs().max() > 1e3:
                raise Skip
        self.steps.append(step)
        self.inputs.append(tuple(inputs))
        self.values += results
        return len(self.values) - 1

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def divisor(self, n: int, largest: int = 64) -> int:
        """A divisor of n that is neither 1 nor n."""
        found = [d for d in range(2, min(n, largest + 1)) if n % d == 0]
        if not found:
            raise Skip
        return self.rng.choice(found)

    def like(self, i: int, fits: Callable[[Tensor, Tensor], bool]) -> int:
        """Another value that fits value i; recent ones are likelier."""
        found = [j for j, v in enumerate(self.values) if j not in (0, i) and fits(v, self.values[i])]
        if not found:
            raise Skip
        return self.rng.choice(found[-6:])

    def width(self) -> int:
        return self.rng.choice((4, 6, 8, 8, 9, 10, 12, 12, 14, 15, 16, 18, 24))


Operation = Callable[[Builder, int], Any]
OPERATIONS: list[tuple[float, tuple[int, ...], Operation]] = []
ANY = (3, 4, 5, 6)


def operation(*ranks: int, weight: float = 1.0) -> Callable[[Operation], Operation]:
    """Register an operation for values of the given ranks (batch dimension included)."""

    def register(function: Operation) -> Operation:
        OPERATIONS.append((weight, ranks, function))
        return function

    return register


def same_shape(p: Tensor, q: Tensor) -> bool:
    """Whether two values have one shape."""
    return p.shape == q.shape
