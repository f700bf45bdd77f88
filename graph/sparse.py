"""Sparse weights stay sparse: which weights are sparse, where their masks are stored, and what every later pass must
respect.

A mask is the zeros of a weight that `Sparsify` named in its record. The record is part of the program and of the `.pt2`,
and the zeros are in the weight (removing a channel removes its part of the mask, folding a scale leaves zeros zero,
symmetric quantisation maps them to zero), so there is no second tensor that could disagree. Training holds them
(`passes.train.callbacks`), and after every pass `check_masks` proves that none was lost. Source: ours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .errors import Refused
from .nodes import fetch
from .program import Program


def read_pattern(text: str) -> tuple[int, int]:
    """`(2, 4)` for "2:4": two of every four consecutive input channels stay. Raises ValueError for a text that is no
    pattern."""
    n, m = (int(part) for part in text.split(":"))
    if not 0 < n < m:
        raise ValueError(text)
    return n, m


def implies(pattern: str | None, other: str) -> bool:
    """Whether a weight with `pattern` also has the `other` one, as 1:4, 1:2 and 2:8 have 2:4."""
    if pattern is None:
        return False
    (n, m), (p, q) = read_pattern(pattern), read_pattern(other)
    return n <= p if m % q == 0 else q % m == 0 and n * (q // m) <= p


def stronger(before: str | None, after: str | None) -> str | None:
    """The pattern of a weight that got one pattern after another. Zeros stay, so a later pattern that asks for less adds
    nothing."""
    return before if after is None or implies(before, after) else after


def sparse_weights(program: Program) -> dict[str, str | None]:
    """The sparsified weights that are still in the program, each with its pattern ("2:4") or None. Zeros that are added
    without a pattern do not change a weight's pattern."""
    named: dict[str, str | None] = {}
    for record in program.history:
        for name, pattern in record.get("sparse", {}).items():
            named[name] = stronger(named.get(name), pattern)
    return {name: pattern for name, pattern in named.items() if weight(program, name) is not None}


def weight(program: Program, name: str) -> Tensor | None:
    """A stored tensor by name, or None if the program has none."""
    try:
        stored = fetch(program._module, name)
    except (AttributeError, KeyError):
        return None
    return stored.detach() if isinstance(stored, Tensor) else None


def zeros(program: Program) -> dict[str, Tensor]:
    """The masks: for each sparse weight, bool, True where it stays zero."""
    return {name: tensor == 0 for name in sparse_weights(program) if (tensor := weight(program, name)) is not None}


def allowed(mask: Tensor, pattern: tuple[int, int]) -> bool:
    """Whether at least `m - n` of every `m` consecutive entries along the last dimension are in the mask."""
    n, m = pattern
    return mask.shape[-1] % m == 0 and bool((mask.reshape(-1, m).sum(1) >= m - n).all())


def legal(tensor: Tensor, pattern: str) -> bool:
    """Whether a weight `(out, in, *kernel)` has a pattern as sparse kernels need it: in every group of `m` input channels
    of one output channel and kernel position."""
    return allowed((tensor == 0).movedim(1, -1), read_pattern(pattern))


def check_masks(
    before: Program, after: Program, removed: dict[str, dict[int, list[int]]], name: str, exact: bool
) -> None:
    """Raise Refused for a result that fills zeros, breaks a pattern, or (in an exact pass) merges a sparse weight into
    another.

    removed: what the pass removed, in the numbering of `before`. name: of the pass. exact: whether the pass is exact.
    """
    for what, pattern in sparse_weights(before).items():
        label = f"{what}, which Sparsify made {pattern or 'sparse'}"
        old, new = weight(before, what), weight(after, what)
        if old is None:
            continue
        if new is None:
            if exact:
                raise Refused(f"{name}: would merge {label}, into another weight; run {name} before Sparsify")
            continue
        mask = old == 0
        for dim, indices in removed.get(what, {}).items():
            kept = np.delete(np.arange(mask.shape[dim]), indices)
            mask = mask.index_select(dim, torch.from_numpy(kept).to(mask.device))
        if mask.shape != new.shape or bool((new[mask] != 0).any()):
            raise Refused(f"{name}: would fill up zeros of {label}; run {name} before Sparsify")
        if pattern and not legal(new, pattern):
            raise Refused(f"{name}: would break the pattern of {label}; run {name} before Sparsify")
