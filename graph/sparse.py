"""Which weights are sparse for good: those that the records of a program name, each with its pattern. Source: ours."""

from __future__ import annotations

from torch import Tensor

from .nodes import fetch
from .program import Program


def read_pattern(text: str) -> tuple[int, int]:
    """`(2, 4)` of "2:4": two of every four consecutive input channels stay. ValueError when it is no such thing."""
    n, m = (int(part) for part in text.split(":"))
    if not 0 < n < m:
        raise ValueError(text)
    return n, m


def implies(pattern: str | None, other: str) -> bool:
    """Whether a weight with a pattern has the other one as well, as 1:4, 1:2 and 2:8 have 2:4."""
    if pattern is None:
        return False
    (n, m), (p, q) = read_pattern(pattern), read_pattern(other)
    return n <= p if m % q == 0 else q % m == 0 and n * (q // m) <= p


def stronger(before: str | None, after: str | None) -> str | None:
    """The pattern of a weight that got one after another: zeros stay, so a later one that asks for less adds nothing."""
    return before if after is None or implies(before, after) else after


def sparse_weights(program: Program) -> dict[str, str | None]:
    """The weights that were sparsified and are still there, each with its pattern ("2:4") or None. More zeros outside any
    pattern leave the pattern that a weight has."""
    named: dict[str, str | None] = {}
    for record in program.history:
        for name, pattern in record.get("sparse", {}).items():
            named[name] = stronger(named.get(name), pattern)
    return {name: pattern for name, pattern in named.items() if weight(program, name) is not None}


def weight(program: Program, name: str) -> Tensor | None:
    """A stored tensor by name, None where the program has none."""
    try:
        found = fetch(program._module, name)
    except (AttributeError, KeyError):
        return None
    return found.detach() if isinstance(found, Tensor) else None
