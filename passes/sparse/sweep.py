"""Pruning by a sweep over columns: SparseGPT (arXiv 2301.00774), and FastCAP, which is the same with a Fisher matrix."""

import torch
from torch import Tensor

from .ranking import Pattern, lowest, lowest_of_groups, portions
from .statistics.fisher import cholesky


def sweep(
    weights: Tensor,
    matrix: Tensor,
    count: int,
    pattern: Pattern | None = None,
    alive: Tensor | None = None,
    width: int = 128,
) -> tuple[Tensor, Tensor]:
    """SparseGPT's sweep over the columns of `weights` `(r, c)`, whose rows share one Hessian `matrix` `(c, c)`; FastCAP is
    the same with a Fisher matrix. Returns the new weights and the mask of all zeros, both `(r, c)`.

    `count` more entries go, those with the smallest `w² / U_jj²`, from every `width` columns the same share of the entries
    that can go; with a pattern, instead, `m - n` of every group of every row. The row `U_j` of the upper Cholesky factor of
    the inverse spreads the error of a pruned weight over the columns to its right.

    alive: bool `(r, c)`, entries that can go. The others, pruned before, stay at zero: where an update moves one, its error
    is spread like that of a weight that goes.
    """
    upper = cholesky(torch.cholesky_inverse(cholesky(matrix[None])))[0].mT
    w = weights.to(upper).clone()
    dead = torch.zeros_like(weights, dtype=torch.bool) if alive is None else ~alive
    mask = dead.clone()
    if pattern is not None:
        width = max(width - width % pattern[1], pattern[1])  # no group extends over two ranges of columns
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
