"""Meanings of operators that make entries which only repeat others: these are free."""

from __future__ import annotations

import torch

from ..presence import ABSENT, FREE, Disagreement, Held, State, as_array, join, mark_absent, simplified
from .registry import Call, all_present, means, need_all


@means(
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty zeros ones full empty",
    repeats=True,
)
def filled(call: Call) -> Held:
    """Every entry repeats the same number, so any of them may be absent."""
    value = call.run()
    return Held(value, tuple(free_where_present(None, n) for n in value.shape))


def free_where_present(state: State, n: int) -> State:
    """The state with present indices made free."""
    grid = as_array(state, n).copy()
    grid[grid != ABSENT] = FREE
    return simplified(grid)


@means("expand expand_as broadcast_to", repeats=True)
def expand(call: Call) -> Held:
    x, value = call.x, call.run()
    states: list[State] = []
    for back in range(value.dim(), 0, -1):
        n = value.shape[-back]
        same = x.value.dim() >= back and x.value.shape[-back] == n
        states.append(x.states[-back] if same else free_where_present(None, n))
    if isinstance(call.a.get("other"), Held):
        states = list(map(join, zip(states, call.a["other"].states, strict=True)))
    return mark_absent(value, states)


@means("repeat tile", repeats=True)
def repeat(call: Call) -> Held:
    x, value = call.x, call.run()
    states: list[State] = []
    for back in range(value.dim(), 0, -1):
        size = x.value.shape[-back] if x.value.dim() >= back else 1
        state = x.states[-back] if x.value.dim() >= back else None
        times = value.shape[-back] // max(size, 1)
        grid = torch.from_numpy(as_array(state, size)).repeat(times).numpy()
        states.append(free_where_present(grid, len(grid)) if times > 1 else state)
    return Held(value, tuple(states))


@means("repeat_interleave", repeats=True)
def repeat_interleave(call: Call) -> Held:
    x, times, d = call.x, call.a.get("repeats"), call.a.get("dim")
    if not isinstance(times, int) or d is None:
        if x.touched:
            raise Disagreement("counts that are data, or a flattened tensor")
        return all_present(call.run())
    value, d = call.run(), d % x.value.dim()
    grid = as_array(x.states[d], x.value.shape[d]).repeat(times)
    state = free_where_present(grid, len(grid)) if times > 1 else x.states[d]
    return Held(value, (*x.states[:d], state, *x.states[d + 1 :]))


@means(
    """pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d""",
    repeats=True,
)
def pad(call: Call) -> Held:
    """Constant padding repeats one number, so it is free; other padding copies entries, none of which may be absent."""
    x, value = call.x, call.run()
    amounts = call.a["pad" if "pad" in call.a else "padding"]
    constant = call.name in ("pad", "constant_pad_nd") and (call.a.get("mode") or "constant") == "constant"
    states, rank = list(x.states), x.value.dim()
    for j in range(len(amounts) // 2):
        d, low, high = rank - 1 - j, amounts[2 * j], amounts[2 * j + 1]
        if low == high == 0:
            continue
        if not constant:
            need_all(x, [d], "it copies entries along the axis")
            continue
        probe = torch.from_numpy(as_array(x.states[d], x.value.shape[d]))
        states[d] = simplified(torch.nn.functional.pad(probe, (low, high), value=int(FREE)).numpy())
    return Held(value, tuple(states))
