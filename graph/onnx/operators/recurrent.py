"""LSTM, GRU and RNN: PyTorch's operators, whose gates have another order. Source: the ONNX specification."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import Refused
from ..table import Call, operator

# ONNX's gates in PyTorch's order: LSTM i o f c -> i f c o, GRU z r h -> r z h.
GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def in_torch_order(op: str, w: np.ndarray, r: np.ndarray, b: np.ndarray | None) -> list[list[np.ndarray]]:
    """ONNX's weights (directions, gates * hidden, ...) in PyTorch's form: for each direction, input and hidden weights, and
    both biases if there are any."""

    def ordered(matrix: np.ndarray) -> np.ndarray:
        gates = np.split(matrix, len(GATES[op]))
        return np.ascontiguousarray(np.concatenate([gates[i] for i in GATES[op]]))

    rows = []
    for d in range(len(w)):
        halves = [] if b is None else np.split(b[d], 2)
        rows.append([ordered(w[d]), ordered(r[d]), *(ordered(h) for h in halves)])
    return rows


@operator("LSTM", "GRU", "RNN")
def recurrent(c: Call) -> Any:
    """X (time, batch, inputs) -> Y (time, directions, batch, hidden) and the last states; with layout 1 the batch is first.

    The inputs from `WEIGHTS` on are the weights in the form of `in_torch_order`.
    """
    op, directions = c.step.op, 2 if c.attribute("direction", "forward") == "bidirectional" else 1
    first = bool(c.attribute("layout", 0))
    check(c)
    x = c.tensor(0)
    x = x.transpose(0, 1) if first else x
    backwards = c.attribute("direction", "forward") == "reverse"
    x = x.flip(0) if backwards else x
    parameters = [c.tensor(i) for i in range(WEIGHTS, len(c.values))]
    hidden = parameters[1].shape[1]
    states = [_state(c, i, x, directions, hidden, first) for i in ((5, 6) if op == "LSTM" else (5,))]
    biased = len(parameters) == 4 * directions
    options = (parameters, biased, 1, 0.0, c.store.training, directions == 2, False)
    if op == "LSTM":
        y, *last = torch.lstm(x, states, *options)
    else:
        function = torch.gru if op == "GRU" else torch.rnn_tanh
        y, *last = function(x, states[0], *options)
    y = y.unflatten(-1, (directions, hidden)).permute(0, 2, 1, 3)
    y = y.flip(0) if backwards else y
    if first:
        return [y.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in last)]
    return [y, *last]


WEIGHTS = 8  # index of the first prepared weight among the inputs, after ONNX's own inputs


def check(c: Call) -> None:
    """Raise Refused for variants that PyTorch's operators do not have."""
    op, directions = c.step.op, 2 if c.attribute("direction", "forward") == "bidirectional" else 1
    wanted = [a.lower() for a in ACTIVATIONS[op] * directions]
    if [a.lower() for a in c.attribute("activations") or wanted] != wanted or c.attribute("clip"):
        raise Refused("other activations than the usual ones, or clipping")
    if op == "GRU" and not c.attribute("linear_before_reset", 0):
        raise Refused("linear_before_reset=0, which PyTorch's GRU has not")
    if c.has(7) or c.attribute("input_forget", 0):
        raise Refused("peepholes or coupled gates")
    if c.has(4) and isinstance(c.value(4), Tensor):
        raise Refused("sequence lengths that depend on data")
    if len(c.values) <= WEIGHTS:
        raise Refused("weights that are computed")
    if c.has(4) and len(set(c.numbers(4)) | {c.tensor(0).shape[c.attribute("layout", 0)]}) != 1:
        raise Refused("sequences of several lengths")


def _state(c: Call, index: int, x: Tensor, directions: int, hidden: Any, first: bool) -> Tensor:
    if not c.has(index):
        return x.new_zeros([directions, x.shape[1], hidden])
    state = c.tensor(index)
    state = state.transpose(0, 1) if first else state
    return state.expand(-1, x.shape[1], -1) if c.store.batch == state.shape[1] == 1 else state
