"""The table of op rules. A rule is a small function that says what an operator means for the axes of its operands.

@rule("linear") def linear(c, node, a): ...

`c` holds the equations so far (`Equations` is the vocabulary), `node` is the fx node, `a` its arguments by schema name. The
rule unifies the axes that must be the same index space, freezes what must not change, registers rewrites for shape
constants, and returns the axes of its result: a list of axes, or a list of such lists for operators with several results.
To refuse, raise `NoRule`.

A rule has a counterpart: the operator's meaning (`graph/verify/meanings/registry.py`), which the oracle uses to judge the
rule, so it must be written without looking at the rule. CONTRIBUTING.md ("An op rule") shows both, and their test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Arguments = dict[str, Any]
Rule = Callable[..., list[Any]]
RULES: dict[str, Rule] = {}


class NoRule(Exception):
    """Raised if the operator, or this use of it, has no rule: then everything that the node reads and computes is
    frozen."""


def either(a: Arguments, *names: str) -> Any:
    """The first of the named arguments that the operator has and that is not None."""
    return next((a[name] for name in names if a.get(name) is not None), None)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under operator names: "conv2d" for ATen, "space::name" for custom operators. A rule that is
    registered again replaces the first one."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name.removeprefix("aten::")] = function
        return function

    return register
