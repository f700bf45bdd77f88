"""Which weights are sparse for good: those that the records of a program name, each with its pattern. Source: ours."""

from __future__ import annotations

from torch import Tensor

from .ops import fetch
from .program import Program


def sparse_weights(program: Program) -> dict[str, str | None]:
    """The weights that were sparsified and are still there, each with its pattern ("2:4") or None. More zeros outside any
    pattern leave the pattern that a weight has."""
    named: dict[str, str | None] = {}
    for record in program.history:
        for name, pattern in record.get("sparse", {}).items():
            named[name] = pattern or named.get(name)
    return {name: pattern for name, pattern in named.items() if weight(program, name) is not None}


def weight(program: Program, name: str) -> Tensor | None:
    """A stored tensor by name, None where the program has none."""
    try:
        found = fetch(program._module, name)
    except (AttributeError, KeyError):
        return None
    return found.detach() if isinstance(found, Tensor) else None
