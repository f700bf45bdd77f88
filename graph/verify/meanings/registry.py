"""The table of what absent entries mean to operators, and the vocabulary in which a meaning is written.

CONTRIBUTING.md ("An op rule") shows how to add one; it is the independent counterpart of a rule of the comb.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from ...compat import pytree
from ...nodes import op_name
from ..evaluate import invoke
from ..presence import Disagreement, Held, has_absent

Rule = Callable[["Call"], Any]
RULES: dict[str, Rule] = {}
REPEATING: set[str] = set()  # operators whose meaning is used even if nothing is absent


def means(*names: str, repeats: bool = False) -> Callable[[Rule], Rule]:
    """Register what absent entries mean to operators, by name ("space::name" for custom ones; blanks separate several).

    The rule takes a `Call` and returns the result as `Held`, or a list of them; `entrywise` serves operators that treat
    each entry by itself. It raises `Disagreement` if absence has no meaning. repeats: the operator makes entries that only
    repeat others or one number, which may be present or not whatever the operands have.
    """

    def register(rule: Rule) -> Rule:
        separate = [name.removeprefix("aten::") for name in " ".join(names).split()]
        RULES.update(dict.fromkeys(separate, rule))
        if repeats:
            REPEATING.update(separate)
        return rule

    return register


class Call:
    """One application of an operator: its arguments `a` by schema name (tensors as `Held`), and ways to run it."""

    def __init__(self, node: fx.Node, arguments: dict[str, Any]):
        self.node, self.a = node, arguments
        self.name = op_name(node)

    @property
    def x(self) -> Held:
        """The operand of an operator with one operand."""
        first = self.a.get("self")
        return first if isinstance(first, Held) else self.a["input"]

    def held(self, *names: str) -> list[Held]:
        """All tensor operands, or the named ones; missing optional ones are left out."""
        chosen = [self.a.get(n) for n in names] if names else list(self.a.values())
        return [h for h in pytree.tree_leaves(chosen, is_leaf=is_held) if isinstance(h, Held)]

    def run(self, /, **override: Any) -> Any:
        """The operator's result on plain tensors, with some arguments replaced. Raises RuntimeError if it cannot run."""
        try:
            return invoke(self.node, plain({**self.a, **override}))
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise RuntimeError(str(error)) from error

    def key(self, tensor: Held) -> str:
        """The name of the argument that a tensor is."""
        return next(name for name, value in self.a.items() if value is tensor)


def is_held(x: Any) -> bool:
    """Whether a leaf of a nest of values is a tensor with presence."""
    return isinstance(x, Held)


def plain(values: Any) -> Any:
    """A nest of values with plain tensors in place of `Held`."""
    return pytree.tree_map(lambda x: x.value if isinstance(x, Held) else x, values, is_leaf=is_held)


def all_present(result: Any) -> Any:
    """A nest of values with its tensors as `Held`, all present."""
    return pytree.tree_map_only(torch.Tensor, lambda t: Held(t, (None,) * t.dim()), result)


def unknown() -> Any:
    """Raise Disagreement for an operator without a registered meaning."""
    raise Disagreement("what absent entries mean to it is not known; say so with graphcomb.verify.means")


def need_all(held: Held, dims: Iterable[int], why: str) -> None:
    """Raise Disagreement, with the reason, if anything along one of the dimensions is absent."""
    for d in dims:
        if has_absent(held.states[d]):
            raise Disagreement(f"{why}, and entries along it are absent (dimension {d % held.value.dim()})")


def dims_of(held: Held, dims: int | Sequence[int] | None) -> list[int]:
    """The dimensions that an argument names, counted from the front; all of them if it is None or empty."""
    rank = held.value.dim()
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))]
