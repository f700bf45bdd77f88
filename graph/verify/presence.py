"""Which entries of a tensor are still there: one state per index of every axis. Source: ours.

A pruned tensor is the original with whole indices of its axes left out, so presence is a product over the axes: an entry
is absent when the index of any of its axes is. `None` for an axis means that all of it is present. Entries that only repeat
others (broadcasting made explicit, padding, fills) are *free*: they agree with an operand that has them and with one that
has not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import GraphcombError

PRESENT, FREE, ABSENT = np.int8(0), np.int8(1), np.int8(2)
State = np.ndarray | None
States = tuple[State, ...]


class Disagreement(GraphcombError):
    """The removed indices have no meaning on the original graph; the message names the node."""


@dataclass(frozen=True)
class Held:
    """A tensor of the original size and the presence of its axes; floating values at absent entries are NaN."""

    value: torch.Tensor
    states: States

    def __post_init__(self) -> None:
        if [len(s) if s is not None else n for n, s in zip(self.value.shape, self.states, strict=True)] != list(
            self.value.shape
        ):
            raise ValueError(f"presence does not fit a tensor of shape {tuple(self.value.shape)}")

    @property
    def touched(self) -> bool:
        return any(s is not None for s in self.states)

    def kept_shape(self) -> tuple[int | None, ...]:
        """The pruned tensor's shape; None for an axis with free entries, whose size is not determined here."""
        return tuple(
            n if s is None else None if (s == FREE).any() else int((s != ABSENT).sum())
            for n, s in zip(self.value.shape, self.states, strict=True)
        )

    def kept(self) -> torch.Tensor:
        """The pruned tensor: absent indices dropped."""
        value = self.value
        for d, state in enumerate(self.states):
            value = take(value, d, state)
        return value


def tidy(state: State) -> State:
    """None for an axis that is present throughout or has a single index. Disagreement when nothing of it is left."""
    if state is not None and len(state) and (state == ABSENT).all():
        raise Disagreement("nothing is left of the axis")
    return None if state is None or len(state) < 2 or not state.any() else state


def lost(state: State) -> bool:
    return state is not None and bool((state == ABSENT).any())


def full(state: State, n: int) -> np.ndarray:
    return np.zeros(n, dtype=np.int8) if state is None else state


def indices(state: np.ndarray, device: Any) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(state != ABSENT)).to(device)


def take(value: torch.Tensor, d: int, state: State) -> torch.Tensor:
    """The indices along d that are not absent."""
    return value.index_select(d, indices(state, value.device)) if state is not None and lost(state) else value


def put(part: torch.Tensor, d: int, state: State) -> torch.Tensor:
    """Undo `take`: back to the original size along d, NaN at absent indices."""
    if state is None or not lost(state):
        return part
    shape = list(part.shape)
    shape[d] = len(state)
    whole = torch.full(shape, math.nan if part.is_floating_point() else 0, dtype=part.dtype, device=part.device)
    return whole.index_copy_(d, indices(state, part.device), part)


def along(vector: Any, d: int, rank: int) -> Any:
    """A vector as a tensor or array of some rank that varies along d."""
    return vector.reshape([-1 if k == d else 1 for k in range(rank)])


def there(states: Sequence[State], device: Any) -> torch.Tensor | None:
    """A boolean tensor that broadcasts to the entries that are not absent; None when all are there."""
    mask = None
    for d, state in enumerate(states):
        if state is not None and lost(state):
            own = along(torch.from_numpy(state != ABSENT).to(device), d, len(states))
            mask = own if mask is None else mask & own
    return mask


def fill(value: torch.Tensor, d: int, state: State, number: float) -> torch.Tensor:
    """A copy with `number` at absent indices along d."""
    states: list[State] = [None] * value.dim()
    states[d] = state
    mask = there(states, value.device)
    return value if mask is None else torch.where(mask, value, number)


def poison(value: torch.Tensor, states: Sequence[State]) -> Held:
    """Hold a tensor; absent floating entries become NaN, so that whatever reads them shows."""
    if value.is_floating_point() or value.is_complex():
        mask = there(states, value.device)
        if mask is not None:
            value = torch.where(mask, value, math.nan)
    return Held(value, tuple(states))


# ---------------------------------------------------------------------------------------------------------- the algebra
def join(states: Sequence[State]) -> State:
    """The common state of operands that share an axis. Disagreement when an index is absent in one, present in another."""
    given = [s for s in states if s is not None]
    if not given:
        return None
    if len(given) < len(states):
        given.append(np.zeros_like(given[0]))
    stacked = np.stack(given)
    absent, present = (stacked == ABSENT).any(0), (stacked == PRESENT).any(0)
    clash = np.flatnonzero(absent & present)
    if len(clash):
        raise Disagreement(f"operands disagree on absence at {len(clash)} of {stacked.shape[1]} indices, {_few(clash)}")
    return tidy(np.where(absent, ABSENT, np.where(present, PRESENT, FREE)))


def _few(found: np.ndarray) -> str:
    return ", ".join(map(str, found[:4])) + (", ..." if len(found) > 4 else "")


def outer(states: Sequence[State], sizes: Sequence[int]) -> State:
    """The state of the row-major product of axes."""
    if all(s is None for s in states):
        return None
    result = np.zeros(1, dtype=np.int8)
    for state, n in zip(states, sizes, strict=True):
        result = np.maximum.outer(result, full(state, n)).reshape(-1)
    return tidy(result)


def factor(state: State, sizes: Sequence[int]) -> States:
    """Presence of the axes into which one is cut. Disagreement when absent entries are not whole indices of them."""
    if state is None:
        return (None,) * len(sizes)
    grid = state.reshape(tuple(sizes))
    axes = range(grid.ndim)
    for wild in (
        False,
        True,
    ):  # free entries (padding) are taken for absent only where nothing else explains the others
        gone, result = np.zeros(grid.shape, dtype=bool), []
        for d in axes:
            others = tuple(k for k in axes if k != d)
            spare = (grid != PRESENT).all(others)
            absent = spare & (grid == ABSENT).any(others) if wild else (grid == ABSENT).all(others)
            gone |= along(absent, d, grid.ndim)
            result.append(tidy(np.where(absent, ABSENT, np.where(spare, FREE, PRESENT)).astype(np.int8)))
        if gone[grid == ABSENT].all():
            return tuple(result)
    raise Disagreement(
        f"absent entries are no whole indices of the axes {' x '.join(map(str, sizes))} (unbalanced heads or groups?)"
    )


def regroup(states: States, old: Sequence[int], new: Sequence[int]) -> States:
    """Presence after a row-major reshape."""
    if all(s is None for s in states) or 0 in old:
        return (None,) * len(new)
    result: list[State] = [None] * len(new)
    left = [d for d, n in enumerate(old) if n != 1]
    right = [d for d, n in enumerate(new) if n != 1]
    while left:
        a, b = [left.pop(0)], [right.pop(0)]
        while (m := math.prod(old[d] for d in a)) != (n := math.prod(new[d] for d in b)):
            if m < n:
                a.append(left.pop(0))
            else:
                b.append(right.pop(0))
        whole = outer([states[d] for d in a], [old[d] for d in a])
        for d, state in zip(b, factor(whole, [new[d] for d in b]), strict=True):
            result[d] = state
    return tuple(result)


def broadcast(held: Sequence[Held], shape: Sequence[int]) -> States:
    """Joint presence of operands broadcast to a shape; a dimension of size 1 imposes nothing."""
    result: list[State] = []
    for back in range(len(shape), 0, -1):
        n = shape[len(shape) - back]
        own = [h.states[-back] for h in held if h.value.dim() >= back and (h.value.shape[-back] == n != 1)]
        result.append(join(own) if own else None)
    return tuple(result)


def moved(states: States, shape: Sequence[int], move: Callable[[torch.Tensor], Any]) -> Any:
    """Presence after an operator that only moves entries, found by applying it to the presence of every entry.

    Returns the states of the result, or a list of them for an operator with several results.
    """
    grid = np.zeros((1,) * len(shape), dtype=np.int8)
    for d, state in enumerate(states):
        if state is not None:
            grid = np.maximum(grid, along(state, d, len(shape)))
    result = move(torch.from_numpy(np.ascontiguousarray(np.broadcast_to(grid, tuple(shape)))))
    parts = [result] if isinstance(result, torch.Tensor) else result
    found = [factor(part.numpy().reshape(-1), part.shape) if part.dim() else () for part in parts]
    return found[0] if isinstance(result, torch.Tensor) else found
