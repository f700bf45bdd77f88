"""The table of what absent entries mean to operators, and the vocabulary in which a meaning is written."""

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
REPEATING: set[str] = set()  # the operators whose meaning is asked for also where nothing is absent


def means(*names: str, repeats: bool = False) -> Callable[[Rule], Rule]:
    """Register what absent entries mean to operators, by name ("space::name" for custom ones; blanks separate several).

    The rule takes a `Call` and returns the result as `Held`, or a list of them; `entrywise` serves operators that treat
    each entry by itself. Raise `Disagreement` where absence has no meaning. repeats: the operator makes entries that only
    repeat others or one number, which may be there or not whatever the operands have.
    """

    def register(rule: Rule) -> Rule:
        separate = [name.removeprefix("aten::") for name in " ".join(names).split()]
        RULES.update(dict.fromkeys(separate, rule))
        if repeats:
            REPEATING.update(separate)
        return rule

    return register


class Call:
    """One operator application: arguments by schema name (tensors as `Held`), and ways to run it."""

    def __init__(self, node: fx.Node, arguments: dict[str, Any]):
        self.node, self.a = node, arguments
        self.name = op_name(node)

    @property
    def x(self) -> Held:
        """The operand a one-operand operator works on."""
        first = self.a.get("self")
        return first if isinstance(first, Held) else self.a["input"]

    def held(self, *names: str) -> list[Held]:
        """All tensor operands (or those named), absent optional ones left out."""
        chosen = [self.a.get(n) for n in names] if names else list(self.a.values())
        return [h for h in pytree.tree_leaves(chosen, is_leaf=is_held) if isinstance(h, Held)]

    def run(self, /, **override: Any) -> Any:
        """The operator's result on plain tensors, some arguments replaced. RuntimeError where it cannot run."""
        try:
            return invoke(self.node, plain({**self.a, **override}))
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise RuntimeError(str(error)) from error

    def key(self, tensor: Held) -> str:
        """The name of the argument that a tensor is given as."""
        return next(name for name, value in self.a.items() if value is tensor)


def is_held(x: Any) -> bool:
    """Whether a leaf of a nest of values is a tensor with presence."""
    return isinstance(x, Held)


def plain(values: Any) -> Any:
    """A nest of values with plain tensors in it."""
    return pytree.tree_map(lambda x: x.value if isinstance(x, Held) else x, values, is_leaf=is_held)


def all_present(result: Any) -> Any:
    """Wrap the tensors of a result of which nothing is absent."""
    return pytree.tree_map_only(torch.Tensor, lambda t: Held(t, (None,) * t.dim()), result)


def unknown() -> Any:
    """Refuse an operator that no meaning is registered for."""
    raise Disagreement("what absent entries mean to it is not known; say so with graphcomb.verify.means")


def need_all(held: Held, dims: Iterable[int], why: str) -> None:
    """Disagreement, with the reason, where something along one of the dimensions is absent."""
    for d in dims:
        if has_absent(held.states[d]):
            raise Disagreement(f"{why}, and entries along it are absent (dimension {d % held.value.dim()})")


def dims_of(held: Held, dims: int | Sequence[int] | None) -> list[int]:
    """The dimensions that an argument names, counted from the first; all of them where it names none."""
    rank = held.value.dim()
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))]
