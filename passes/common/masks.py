"""Sparse weights stay sparse: where the masks live, and what every later pass has to respect.

A mask is the zeros of a weight that `Sparsify` named in its record: the record travels with the program and inside the
`.pt2`, the zeros travel with the weight (a removed channel takes its part of the mask along, folding a scale leaves zeros
zero, symmetric quantisation maps them to zero), so there is no second tensor that could disagree. Training holds them
(`training.fit`), and after every pass `check` proves that none was lost. Source: ours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...graph.errors import Refused
from ...graph.program import Program
from ...graph.sparse import read_pattern, sparse_weights, weight
from ..sparse.cap import allowed


def zeros(program: Program) -> dict[str, Tensor]:
    """The masks: for each sparse weight, True where it is zero for good."""
    return {name: found == 0 for name in sparse_weights(program) if (found := weight(program, name)) is not None}


def legal(tensor: Tensor, pattern: str) -> bool:
    """Whether a weight `(out, in, *kernel)` has its zeros where a sparse kernel needs them: in every group of `m` input
    channels of one output channel and kernel position."""
    return allowed((tensor == 0).movedim(1, -1), read_pattern(pattern))


def check(before: Program, after: Program, removed: dict[str, dict[int, list[int]]], name: str, exact: bool) -> None:
    """Refuse a result that fills up zeros, breaks a pattern, or (in an exact pass) merges a sparse weight away."""
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
