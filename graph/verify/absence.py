"""The absence oracle: what a pruned program must compute, derived from the original graph. Source: ours.

It knows which indices of which parameters and buffers are gone, nothing else, and shares no code with the comb, its rules
or the removal. The original graph runs at its original sizes; every tensor carries the presence of its axes (see
`presence`). Contractions count absent entries as 0, reductions and normalisations run over present entries, softmax drops
absent keys, everything else passes presence on. Operands must agree on what is absent. Absent values are NaN, so an
operator that reads one by mistake is noticed. Absence that has no meaning (an ordering along an axis that lost indices, a
window over one, an unknown operator) raises `Disagreement`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..compat import pytree
from ..errors import strict
from ..nodes import is_operator, op_name, source
from ..program import Program
from .evaluate import Evaluator, evaluated
from .meanings import REPEATING, RULES, Call
from .meanings.entrywise import pointwise
from .meanings.registry import all_present, is_held, plain, unknown
from .presence import ABSENT, Disagreement, Held, State, as_array, has_absent, mark_absent, simplified
from .removal import Removed


class Absence(Evaluator):
    """Runs the original program with some indices of its parameters and buffers absent.

    weights: float64 tensors by name, of the original sizes. removed: {name: {dim: indices}}. `run` returns the outputs;
    `observe` sees `Held` tensors. Raises `Disagreement` with one line that names the node.
    """

    def __init__(self, program: Program, weights: dict[str, torch.Tensor], removed: Removed):
        super().__init__(program, weights)
        self.removed = removed

    def run(self, inputs: Any, observe: Callable[[fx.Node, Any], None] | None = None) -> Any:
        """The outputs for flattened inputs, as plain tensors. Raises Disagreement if an output has absent entries."""
        outputs = super().run(inputs, observe)
        for i, held in enumerate(pytree.tree_leaves(outputs, is_leaf=is_held)):
            if _lost(held):
                raise Disagreement(f"output {i} has absent entries, in shape {tuple(held.value.shape)}")
        return plain(outputs)

    def enter(self, value: Any) -> Any:
        """An input, all of which is present."""
        return all_present(super().enter(value))

    def fetch(self, name: str) -> Any:
        """A stored tensor; removed entries are absent."""
        value = super().fetch(name)
        if not isinstance(value, torch.Tensor):
            return value
        states: list[State] = [None] * value.dim()
        for d, gone in self.removed.get(name, {}).items():
            state = as_array(None, value.shape[d])
            state[list(gone)] = ABSENT
            states[d] = simplified(state)
        return mark_absent(value, states)

    def call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """The value of an operator node. Raises Disagreement, with the node's name, if absent entries have no meaning to
        it; RuntimeError if it cannot run."""
        try:
            return self._call(node, env)
        except Disagreement as error:
            raise Disagreement(f"{source(node)}: {op_name(node)}: {error}") from None
        except RuntimeError as error:
            raise RuntimeError(f"{source(node)}: {op_name(node)}: {error}") from error
        except Exception as error:
            text = f"{source(node)}: {op_name(node)}: its meaning fails: {type(error).__name__}: {error}"
            raise (AssertionError if strict() else RuntimeError)(text) from error

    def _call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if node.target is operator.getitem:
            return env[node.args[0]][node.args[1]]  # type: ignore[index]
        if not is_operator(node):
            values = {n: env[n] for n in node.all_input_nodes}
            return unknown() if _lost(values) else all_present(super().call(node, plain(values)))
        call = Call(node, evaluated(node, env))
        if call.name.startswith("sym_"):
            return call.run()
        touched = [h for h in call.held() if h.touched]
        if not touched and call.name not in REPEATING:
            return all_present(call.run())
        rule = RULES.get(call.name)
        if rule is not None:
            return rule(call)
        if torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return pointwise(call)
        return unknown() if _lost(touched) else all_present(call.run())


def _lost(values: Any) -> bool:
    """Whether any tensor in a nest of values has absent entries."""
    held = [h for h in pytree.tree_leaves(values, is_leaf=is_held) if isinstance(h, Held)]
    return any(has_absent(s) for h in held for s in h.states)
