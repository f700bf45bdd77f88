"""Rules of LSTM, GRU and RNN, and of their cells: gates share the hidden units, and so do layers and directions.

Source: ours, from PyTorch's documentation of the shapes.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ...facts import CELLS, RECURRENT
from ...nodes import op_name, recurrence, shape
from ..axes import Axis, fresh
from ..equations import GATES, Equations
from .registry import Arguments, NoRule, rule

STEPS = "a recurrence runs along the axis"


@rule(*RECURRENT)
def recurrent(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    """All layers and directions have the same hidden units, since one tensor holds all of their states."""
    made = recurrence(node)
    if isinstance(made, str):
        raise NoRule(made)
    xs, states = c.axes[a["input"]], a["hx"] if isinstance(a["hx"], (list, tuple)) else [a["hx"]]
    cell = op_name(node) in CELLS
    if len(xs) != (2 if cell else 3):
        raise NoRule("an unbatched input")
    hidden, both, gate = fresh(shape(made.parts[0][1])[1]), fresh(made.directions), fresh(RECURRENT[op_name(node)])
    c.kernel(both, node, GATES)
    c.kernel(gate, node, GATES)
    for i, (w_ih, w_hh, *biases) in enumerate(made.parts):
        read = xs[-1] if i < made.directions else both + hidden
        c.unify(c.axes[w_ih][1], read)
        c.unify(c.axes[w_hh][1], hidden)
        for part in (w_ih, w_hh, *biases):
            c.unify(c.axes[part][0], gate + hidden)
        c.role(gate + hidden, "linear", w_ih)
        c.role(read, "in", w_ih)
        c.role(hidden, "in", w_hh)
    c.sums(node, [xs[-1], hidden])
    lead: list[Axis] = []
    if not cell:
        step = 1 if a["batch_first"] else 0
        c.freeze(xs[step], node, STEPS)
        lead = [fresh(len(made.parts))]
        c.kernel(lead[0], node, GATES)
    batch = xs[0] if cell or a["batch_first"] else xs[1]
    for state in states:
        c.unify_all(c.axes[state], [*lead, batch, hidden])
    last = [[*lead, batch, hidden] for _ in states]
    if cell:
        return last if len(states) > 1 else last[0]
    return [[*xs[:-1], both + hidden], *last]
