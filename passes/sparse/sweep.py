"""Sweeps over columns: SparseGPT (arXiv 2301.00774), and FastCAP, which is the same with a Fisher matrix."""

import torch
from torch import Tensor

from .fisher import cholesky
from .ranking import Pattern, lowest, lowest_of_groups, portions


def sweep(
    weights: Tensor,
    matrix: Tensor,
    count: int,
    pattern: Pattern | None = None,
    alive: Tensor | None = None,
    width: int = 128,
) -> tuple[Tensor, Tensor]:
    """SparseGPT's pass over the columns of rows `(r, c)` that share one Hessian `(c, c)`; FastCAP is the same with a
    Fisher matrix. Returns the new weights and the mask.

    `count` more entries go, in every `width` columns the same share of those that can, with the smallest `w² / U_jj²`
    (with a pattern instead: of every group of every row); a pruned weight's error is spread over the columns to the right
    by the row `U_j` of the upper Cholesky factor of the inverse. alive: entries that can go; the others, pruned before,
    stay at zero: an update that moves one of them on its way is undone like the weight of one that goes.
    """
    upper = cholesky(torch.cholesky_inverse(cholesky(matrix[None])))[0].mT
    w = weights.to(upper).clone()
    dead = torch.zeros_like(weights, dtype=torch.bool) if alive is None else ~alive
    mask = dead.clone()
    if pattern is not None:
        width = max(width - width % pattern[1], pattern[1])  # no group in two blocks
    diagonal = upper.diagonal()
    shares = portions(count, [int((~part).sum()) for part in dead.split(width, 1)])
    for start, share in zip(range(0, w.shape[1], width), shares, strict=True):
        stop = min(start + width, w.shape[1])
        errors = torch.zeros_like(w[:, start:stop])
        if pattern is None:
            gone = dead[:, start:stop]
            scores = (w[:, start:stop] / diagonal[start:stop]).square().masked_fill_(gone, -1)
            mask[:, start:stop] |= lowest([scores], int(gone.sum()) + share)[0]
        for j in range(start, stop):
            if pattern is not None and (j - start) % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                scores = (w[:, group] / diagonal[group]).square().masked_fill_(dead[:, group], -1)
                mask[:, group] |= lowest_of_groups(scores, pattern)
            errors[:, j - start] = w[:, j] * mask[:, j] / diagonal[j]
            w[:, j:stop] -= errors[:, j - start, None] * upper[j, j:stop]
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w.masked_fill_(mask, 0).to(weights), mask
