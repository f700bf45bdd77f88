"""Meanings of LSTM, GRU and RNN, and of their cells: absent inputs and hidden units count as 0.

A hidden unit whose weights are all 0 stays at 0 from a state of 0 on, and nothing reads it.
"""

from __future__ import annotations

from typing import Any

import torch

from ..presence import Disagreement, Held, State, factor, fill_absent, has_absent, join, mark_absent, outer
from .registry import Call, all_present, means, need_all


@means("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def recurrent(call: Call) -> Any:
    a = call.a
    if "data" in a:
        raise Disagreement("packed sequences")
    x, cell = a["input"], "w_hh" in a
    keys = ("w_ih", "w_hh", "b_ih", "b_hh") if cell else ("params",)
    weights, states = call.held(*keys), call.held("hx")
    width = weights[1].value.shape[1]
    directions = 1 if cell else 2 if a["bidirectional"] else 1
    inputs, units = [x.states[-1]], [s.states[-1] for s in states]
    matrices = [w for w in weights if w.value.dim() == 2]
    if not cell and len(matrices) != 2 * a["num_layers"] * directions:
        for held in call.held():
            need_all(held, range(held.value.dim()), "a projection of the hidden units")
        return all_present(call.run())
    units += [_units(w.states[0], len(w.value), width, "a gate is absent") for w in weights]
    for i, w in enumerate(matrices):
        if i % 2:
            units.append(w.states[1])
        elif i < 2 * directions:
            inputs.append(w.states[1])
        else:
            units.append(_units(w.states[1], w.value.shape[1], width, "a direction is absent"))
    unit, into = join(units), join(inputs)
    if not cell:
        need_all(x, [1 if a["batch_first"] else 0], "a recurrence runs along the axis")
        for s in states:
            need_all(s, [0], "a state for each layer and direction")
    filled = [_zeros(w) for w in weights]
    started = [fill_absent(s.value, -1, unit, 0.0) for s in states]
    changed = dict(zip(keys, filled, strict=False)) if cell else {"params": filled}
    several = isinstance(a["hx"], (list, tuple))
    results = call.run(input=fill_absent(x.value, -1, into, 0.0), hx=started if several else started[0], **changed)
    batch: State = x.states[0 if cell or a["batch_first"] else 1]
    if cell:
        return [mark_absent(r, (batch, unit)) for r in results] if several else mark_absent(results, (batch, unit))
    out = mark_absent(results[0], (*x.states[:-1], outer((None, unit), (directions, width))))
    return [out, *(mark_absent(r, (None, batch, unit)) for r in results[1:])]


def _units(state: State, size: int, width: int, absent: str) -> State:
    """The hidden units of an axis that has them once for each gate or direction. Raises Disagreement if a whole gate or
    direction is absent."""
    around, own = factor(state, (size // width, width))
    if has_absent(around):
        raise Disagreement(absent)
    return own


def _zeros(held: Held) -> torch.Tensor:
    value = held.value
    for d, state in enumerate(held.states):
        value = fill_absent(value, d, state, 0.0)
    return value
