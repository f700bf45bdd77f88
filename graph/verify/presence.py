"""The presence of a tensor's entries: one state per index of every axis. Source: ours.

A pruned tensor is the original with whole indices of its axes left out, so presence is a product over the axes: an entry is
absent if its index along any axis is. `None` for an axis means that all of it is present. Entries that only repeat others
(explicit broadcasting, padding, fills) are *free*: they agree with an operand that has them and with one that has not.
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
    """Raised if the removed indices have no meaning on the original graph; the message names the node."""


@dataclass(frozen=True)
class Held:
    """A tensor of the original size with the presence of its axes; floating-point values at absent entries are NaN."""

    value: torch.Tensor
    states: States

    def __post_init__(self) -> None:
        if any(s is not None and len(s) != n for n, s in zip(self.value.shape, self.states, strict=True)):
            raise ValueError(f"presence does not fit a tensor of shape {tuple(self.value.shape)}")

    @property
    def touched(self) -> bool:
        """Whether anything of it is absent or free."""
        return any(s is not None for s in self.states)

    def kept_shape(self) -> tuple[int | None, ...]:
        """The pruned tensor's shape; None for an axis with free entries, whose size is undetermined."""
        return tuple(
            n if s is None else None if (s == FREE).any() else int((s != ABSENT).sum())
            for n, s in zip(self.value.shape, self.states, strict=True)
        )

    def kept(self) -> torch.Tensor:
        """The pruned tensor: the original without absent indices."""
        value = self.value
        for d, state in enumerate(self.states):
            value = drop_absent(value, d, state)
        return value


def simplified(state: State) -> State:
    """The state, as None if the axis is present throughout or has a single index. Raises Disagreement if nothing of it is
    left."""
    if state is not None and len(state) and (state == ABSENT).all():
        raise Disagreement("nothing is left of the axis")
    return None if state is None or len(state) < 2 or not state.any() else state


def has_absent(state: State) -> bool:
    """Whether some index of an axis is absent."""
    return state is not None and bool((state == ABSENT).any())


def as_array(state: State, n: int) -> np.ndarray:
    """The state as an array of length n, also if it is None (present throughout)."""
    return np.zeros(n, dtype=np.int8) if state is None else state


def indices(state: np.ndarray, device: Any) -> torch.Tensor:
    """The indices that are not absent, as a tensor."""
    return torch.from_numpy(np.flatnonzero(state != ABSENT)).to(device)


def drop_absent(value: torch.Tensor, d: int, state: State) -> torch.Tensor:
    """The tensor without absent indices along d."""
    return value.index_select(d, indices(state, value.device)) if state is not None and has_absent(state) else value


def restore_absent(part: torch.Tensor, d: int, state: State) -> torch.Tensor:
    """Undo `drop_absent`: the original size along d, with NaN (or 0 for integers) at absent indices."""
    if state is None or not has_absent(state):
        return part
    shape = list(part.shape)
    shape[d] = len(state)
    whole = torch.full(shape, math.nan if part.is_floating_point() else 0, dtype=part.dtype, device=part.device)
    return whole.index_copy_(d, indices(state, part.device), part)


def along(vector: Any, d: int, rank: int) -> Any:
    """A vector as a tensor or array of the given rank that varies along d."""
    return vector.reshape([-1 if k == d else 1 for k in range(rank)])


def presence_mask(states: Sequence[State], device: Any) -> torch.Tensor | None:
    """A boolean tensor that broadcasts to the tensor's shape, True where an entry is not absent; None if none is."""
    mask = None
    for d, state in enumerate(states):
        if state is not None and has_absent(state):
            here = along(torch.from_numpy(state != ABSENT).to(device), d, len(states))
            mask = here if mask is None else mask & here
    return mask


def fill_absent(value: torch.Tensor, d: int, state: State, number: float) -> torch.Tensor:
    """A copy with `number` at absent indices along d."""
    states: list[State] = [None] * value.dim()
    states[d] = state
    mask = presence_mask(states, value.device)
    return value if mask is None else torch.where(mask, value, number)


def mark_absent(value: torch.Tensor, states: Sequence[State]) -> Held:
    """The tensor as `Held`; absent floating-point entries become NaN, so that reading them is noticed."""
    if value.is_floating_point() or value.is_complex():
        mask = presence_mask(states, value.device)
        if mask is not None:
            value = torch.where(mask, value, math.nan)
    return Held(value, tuple(states))


# ---------------------------------------------------------------------------------------------------------- the algebra
def join(states: Sequence[State]) -> State:
    """The common state of operands that share an axis. Raises Disagreement if an index is absent in one and present in
    another."""
    known = [s for s in states if s is not None]
    if not known:
        return None
    if len(known) < len(states):
        known.append(np.zeros_like(known[0]))
    stacked = np.stack(known)
    absent, present = (stacked == ABSENT).any(0), (stacked == PRESENT).any(0)
    clash = np.flatnonzero(absent & present)
    if len(clash):
        few = ", ".join([*map(str, clash[:4]), *["..."] * (len(clash) > 4)])
        raise Disagreement(f"operands disagree on absence at {len(clash)} of {stacked.shape[1]} indices, {few}")
    return simplified(np.where(absent, ABSENT, np.where(present, PRESENT, FREE)))


def outer(states: Sequence[State], sizes: Sequence[int]) -> State:
    """The state of the row-major product of axes."""
    if all(s is None for s in states):
        return None
    result = np.zeros(1, dtype=np.int8)
    for state, n in zip(states, sizes, strict=True):
        result = np.maximum.outer(result, as_array(state, n)).reshape(-1)
    return simplified(result)


def factor(state: State, sizes: Sequence[int]) -> States:
    """The presence of the axes that one axis is cut into. Raises Disagreement if absent entries are not whole indices of
    them."""
    if state is None:
        return (None,) * len(sizes)
    grid = state.reshape(tuple(sizes))
    axes = range(grid.ndim)
    # Free entries (padding) count as absent only if the absent entries cannot be explained otherwise.
    for wild in (False, True):
        gone, result = np.zeros(grid.shape, dtype=bool), []
        for d in axes:
            others = tuple(k for k in axes if k != d)
            spare = (grid != PRESENT).all(others)
            absent = spare & (grid == ABSENT).any(others) if wild else (grid == ABSENT).all(others)
            gone |= along(absent, d, grid.ndim)
            result.append(simplified(np.where(absent, ABSENT, np.where(spare, FREE, PRESENT)).astype(np.int8)))
        if gone[grid == ABSENT].all():
            return tuple(result)
    raise Disagreement(
        f"absent entries are no whole indices of the axes {' x '.join(map(str, sizes))} (unbalanced heads or groups?)"
    )


def broadcast(held: Sequence[Held], shape: Sequence[int]) -> States:
    """The joint presence of operands that are broadcast to a shape; a dimension of size 1 imposes nothing."""
    result: list[State] = []
    for back in range(len(shape), 0, -1):
        n = shape[len(shape) - back]
        states = [h.states[-back] for h in held if h.value.dim() >= back and (h.value.shape[-back] == n != 1)]
        result.append(join(states) if states else None)
    return tuple(result)


def moved(held: Held, move: Callable[[torch.Tensor], Any]) -> list[States]:
    """The presence of every result of an operator that only moves entries.

    PyTorch itself moves the positions along every axis that is not present throughout: the axes of the result along which
    positions vary are where that axis has gone. Axes that share an axis of the result, as in a reshape, are cut together.
    """
    value = held.value
    pieces_of: list[tuple[tuple[int, ...], list[tuple[list[int], np.ndarray]]]] = []
    for d, state in enumerate(held.states):
        if state is None:
            continue
        positions = torch.arange(len(state), dtype=torch.float64, device=value.device)
        results = move(along(positions, d, value.dim()).expand(value.shape))
        parts = [results] if isinstance(results, torch.Tensor) else list(results)
        pieces_of = pieces_of or [(tuple(part.shape), []) for part in parts]
        for part, (_, pieces) in zip(parts, pieces_of, strict=True):
            if part.numel():
                pieces.append(_piece(state, part))
    return [_together(shape, pieces) for shape, pieces in pieces_of]


def _piece(state: np.ndarray, part: torch.Tensor) -> tuple[list[int], np.ndarray]:
    """The axes of a result along which positions vary, and the presence at every index of these; other axes have size 1."""
    axes = [e for e in range(part.dim()) if bool((part != part.narrow(e, 0, 1)).any())]
    for e in set(range(part.dim())) - set(axes):
        part = part.narrow(e, 0, 1)
    return axes, state[part.long().cpu().numpy()]


def _together(shape: tuple[int, ...], pieces: list[tuple[list[int], np.ndarray]]) -> States:
    """The states of a tensor's axes, from presences along some of them; a tensor without entries is free."""
    if 0 in shape:
        return tuple(simplified(np.full(n, FREE)) for n in shape)
    states: list[State] = [None] * len(shape)
    while pieces:
        axes, grid = pieces.pop()
        while (other := next((p for p in pieces if set(p[0]) & set(axes)), None)) is not None:
            pieces = [p for p in pieces if p is not other]
            axes, grid = sorted({*axes, *other[0]}), np.maximum(grid, other[1])
        if not axes and (grid == ABSENT).all():
            raise Disagreement("nothing is left of the axis")
        for e, state in zip(axes, factor(grid.reshape(-1), [shape[e] for e in axes]) if axes else (), strict=True):
            states[e] = state
    return tuple(states)
