"""The vocabulary of the operator tables: a step of the graph, a call of it, and the tables that handlers register in.

A value is a tensor of PyTorch, or a *host* array of NumPy: constants of the file that are not weights, and sizes. Symbolic
sizes are in host arrays of dtype object, so that shape arithmetic, such as Shape -> Gather -> Concat -> Reshape, is done on
Python numbers and leaves no trace in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import Refused

Value: TypeAlias = Tensor | np.ndarray | None
Handler: TypeAlias = Callable[["Call"], Any]

LINEAR = "graphcomb.Linear"  # MatMul or Gemm with a constant matrix, which is the weight of a linear layer
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass
class Step:
    """A node of the file: inputs and outputs by name, "" for one that is left out; attributes as Python values."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    name: str
    opset: int

    @property
    def title(self) -> str:
        """The node's name in messages."""
        name = self.name or next(filter(None, self.outputs), "")
        return f"{name} ({self.op.removeprefix('graphcomb.')})"


class Store(Protocol):
    """The interface of what stores constants that the graph reads as tensors."""

    @property
    def training(self) -> bool: ...

    batch: int | None  # the batch size that the file fixes, if the graph is to take others

    def constant(self, key: str, array: np.ndarray) -> Tensor:
        """The tensor that is stored under a key; at first it is made from the array."""


@dataclass
class Call:
    """A step and the values of its inputs. Its methods raise Refused for inputs and attributes that are not supported."""

    step: Step
    values: Sequence[Value]
    store: Store
    made: int = field(default=0)  # number of constants of this call so far

    @property
    def opset(self) -> int:
        return self.step.opset

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.step.attributes.get(name, default)

    def has(self, index: int) -> bool:
        """Whether an input is given."""
        return index < len(self.values) and self.values[index] is not None

    def value(self, index: int = 0) -> Tensor | np.ndarray:
        if not self.has(index):
            raise Refused(f"input {index} is missing")
        return self.values[index]  # type: ignore[return-value]

    def tensor(self, index: int = 0) -> Tensor:
        """An input as a tensor; a host array becomes a constant of the graph."""
        value = self.value(index)
        if isinstance(value, Tensor):
            return value
        return self.constant(value, self.step.inputs[index] if index < len(self.step.inputs) else "")

    def optional(self, index: int) -> Tensor | None:
        return self.tensor(index) if self.has(index) else None

    def constant(self, array: np.ndarray, name: str = "") -> Tensor:
        """A host array as a tensor."""
        if array.dtype == object:  # sizes, some of them symbolic
            rows = [torch.scalar_tensor(v, dtype=torch.int64) for v in array.reshape(-1).tolist()]
            return torch.stack(rows).reshape(array.shape) if array.ndim else rows[0]
        self.made += 1
        return self.store.constant(name or f"{self.step.outputs[0]}.constant{self.made}", array)

    def host(self, index: int) -> np.ndarray:
        """An input that must be known when the graph is made, as a host array."""
        value = self.value(index)
        if isinstance(value, Tensor):
            raise Refused(f"its input {self.step.inputs[index]} depends on data; graphs have constants and sizes there")
        return value

    def numbers(self, index: int) -> list[Any]:
        """A host input as a flat list of numbers, some of which may be symbolic."""
        return self.host(index).reshape(-1).tolist()

    def number(self, index: int, default: Any) -> Any:
        return self.numbers(index)[0] if self.has(index) else default

    def list_of(self, name: str, index: int, default: Any = None) -> Any:
        """Numbers that are an attribute in some opsets and an input in others."""
        if name in self.step.attributes:
            return list(self.step.attributes[name])
        return self.numbers(index) if self.has(index) else default

    def one_of(self, name: str, index: int, default: Any = None) -> Any:
        """A number that is an attribute in some opsets and an input in others."""
        return self.step.attributes[name] if name in self.step.attributes else self.number(index, default)

    def only(self, name: str, *allowed: Any) -> Any:
        """An attribute that must have one of the allowed values; the first one is the default."""
        value = self.attribute(name, allowed[0])
        if value not in allowed:
            raise Refused(f"{name}={value} is not known; {' or '.join(map(str, allowed))} is")
        return value

    def used(self, index: int) -> bool:
        """Whether something may read an output."""
        return index < len(self.step.outputs) and bool(self.step.outputs[index])


OPERATORS: dict[str, Handler] = {}  # handlers for tensors
HOST: dict[str, Handler] = {}  # handlers for calls whose inputs are all host arrays


def operator(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler that computes nodes of these types on tensors."""

    def register(handler: Handler) -> Handler:
        OPERATORS.update(dict.fromkeys(names, handler))
        return handler

    return register


def on_host(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler that computes nodes of these types if all inputs are host arrays; if it returns NotImplemented,
    the handler in `OPERATORS` is called."""

    def register(handler: Handler) -> Handler:
        HOST.update(dict.fromkeys(names, handler))
        return handler

    return register


def array(values: Sequence[Any]) -> np.ndarray:
    """A host array of sizes: int64, or object if one is symbolic."""
    if not any(isinstance(v, SYMBOLIC) for v in values):
        return np.asarray(list(values), dtype=np.int64)
    result = np.empty(len(values), dtype=object)
    result[:] = list(values)
    return result


def is_static(values: Sequence[Any]) -> bool:
    """Whether no size is symbolic."""
    return not any(isinstance(v, SYMBOLIC) for v in values)


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from the front. Raises Refused if it is out of range."""
    if not -rank <= axis < max(rank, 1):
        raise Refused(f"axis {axis} of a tensor with {rank} dimensions")
    return axis % rank if rank else 0
