"""CAP (arXiv 2210.09223) on plain tensors: the order in which a block's weights go, and how the others make up for them.

Setting some of a block's entries to zero and moving the others by `d` costs `1/2 dᵀ F d` (`fisher`). Pruning one weight
optimally costs `w_q² / (2 H_qq)`, with `H = F⁻¹` (optimal brain surgeon); CAP prunes greedily and brings `H` and `w` up to
date each time. That elimination is a pivoted Cholesky factorisation of `H` whose pivots are chosen by `w_q² / H_qq` (ours):
so a step needs only the diagonal and one column, and the matrix itself is updated for a panel of columns at once, as
LAPACK's `pstrf` does. WoodFisher (arXiv 2004.14340) is here in the form that it takes in the same frame.

Masks are bool, True where the weight goes. A pattern `(n, m)` keeps `n` of every `m` consecutive entries.
"""

import math

import torch
from torch import Tensor

from .ranking import Pattern
from .statistics.fisher import cholesky

PANEL = 32  # columns of a factorisation that are applied to the matrix together


def eliminate(
    weights: Tensor, inverse: Tensor, alive: Tensor | None = None, pattern: Pattern | None = None
) -> tuple[Tensor, Tensor]:
    """The order in which CAP prunes the entries of each block, and what that costs.

    weights: `(b, B)`. inverse: `F⁻¹`, `(b, B, B)`, which is overwritten. alive: bool `(b, B)`, entries that can go; the
    others count as pruned before. pattern: from no group do more entries go than the pattern allows. Returns `(order,
    losses)`, both `(b, s)`: the entries in the order they go, and the cumulated `Σ w_q² / (2 H_qq)`, infinite after a
    block's last entry.

    Raises Imprecise where rounding leaves no finite losses for entries that could go.
    """
    count, size = weights.shape
    inverse = (inverse if inverse.is_contiguous() else inverse.mT).contiguous()  # symmetric; LAPACK's are column-major
    w, rows = weights.to(inverse).clone(), torch.arange(count, device=weights.device)
    diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
    floor = diagonal * torch.finfo(inverse.dtype).eps
    alive = torch.ones_like(w, dtype=torch.bool) if alive is None else alive
    closed = torch.zeros_like(w).masked_fill_(~alive, math.inf)
    n, m = pattern or (0, size)
    left = m - n - (~alive).view(count, -1, m).sum(2)  # number of entries that may still go from each group
    closed.view(count, -1, m).masked_fill_((left <= 0)[..., None], math.inf)
    due = left.clamp(min=0).sum(1)
    steps = int(due.max())
    order = torch.zeros(count, steps, dtype=torch.int64, device=w.device)
    losses = torch.zeros(count, steps, dtype=inverse.dtype, device=w.device)
    for start in range(0, steps, PANEL):
        panel = inverse.new_empty(count, min(PANEL, steps - start), size)
        for k in range(panel.shape[1]):
            # Twice the cost of pruning an entry alone; the cheapest entry of each block goes.
            loss, q = torch.addcdiv(closed, w.square(), diagonal).min(1)
            # The entry's column of the present inverse is the stored column less what the panel has eliminated since.
            # Divided by the root of the pivot, it is the next column of the Cholesky factor, whose square the diagonal
            # loses.
            column = inverse.view(-1, size).index_select(0, rows * size + q)
            if k:
                factors = panel[:, :k].gather(2, q.view(-1, 1, 1).expand(-1, k, 1)).transpose(1, 2)
                column = torch.baddbmm(column.unsqueeze(1), factors, panel[:, :k], alpha=-1).squeeze(1)
            column *= diagonal[rows, q].rsqrt().unsqueeze(1)
            panel[:, k] = column
            # Optimal brain surgeon: all weights move by `−H[:, q] w_q / H_qq`, which sets the entry itself to zero.
            w.addcmul_(column, (w[rows, q] / column[rows, q]).unsqueeze(1), value=-1)
            torch.maximum(diagonal.addcmul_(column, column, value=-1), floor, out=diagonal)
            closed[rows, q] = math.inf
            if pattern:
                group = q // m
                left[rows, group] -= 1
                full, groups = (left[rows, group] <= 0).unsqueeze(1), closed.view(count, -1, m)
                groups[rows, group] = groups[rows, group].masked_fill(full, math.inf)
            order[:, start + k], losses[:, start + k] = q, loss.nan_to_num_(math.inf, math.inf)
        if start + PANEL < steps:  # update for the whole panel: one matrix product instead of `PANEL` outer products
            inverse.baddbmm_(panel.transpose(1, 2), panel, alpha=-1)
    losses = losses.div_(2).cumsum(1)
    if not torch.equal(losses.isfinite().sum(1), due):
        raise Imprecise(f"the elimination lost all digits in {losses.dtype}")
    return order, losses


class Imprecise(ArithmeticError):
    """Raised for a matrix that is too ill-conditioned for the precision of the computation."""


def repair(weights: Tensor, matrix: Tensor, pruned: Tensor) -> Tensor:
    """The best weights with the pruned ones at zero, `w − H[:, P] (H[P, P])⁻¹ w_P`, for blocks `(b, B)`.

    matrix: `F` itself, `(b, B, B)`, of which only the kept rows are used: `w_K + (F_KK)⁻¹ F_KP w_P` is the same (block
    inversion; ours) and needs no inverse. pruned: bool `(b, B)`.
    """
    kept = ~pruned
    most = int(kept.sum(1).max())
    # Places of the kept entries. A block that keeps fewer than the others is filled up with rows of the identity, where
    # `real` is 0.
    places = torch.sort(kept.byte(), dim=1, descending=True, stable=True).indices[:, :most]
    real = kept.gather(1, places).to(matrix)
    rows = matrix.gather(1, places.unsqueeze(2).expand(-1, -1, matrix.shape[2]))
    pull = torch.bmm(rows, (pruned * weights).to(matrix).unsqueeze(2)) * real.unsqueeze(2)
    system = rows.gather(2, places.unsqueeze(1).expand(-1, most, -1))
    system = system.mul_(real.unsqueeze(1)).mul_(real.unsqueeze(2)) + torch.diag_embed(1 - real)
    moved = torch.cholesky_solve(pull, cholesky(system)).squeeze(2)
    return weights.masked_fill(pruned, 0).scatter_add_(1, places, moved.to(weights))


def loss(change: Tensor, matrix: Tensor) -> Tensor:
    """The cost `1/2 dᵀ F d` of each block's change of weights `d` `(b, B)`, as `(b,)`."""
    return torch.einsum("bi,bij,bj->b", change.to(matrix), matrix, change.to(matrix)) / 2


def step_once(weights: Tensor, inverse: Tensor, pruned: Tensor) -> Tensor:
    """WoodFisher's update `w − Σ_q H[:, q] w_q / H_qq`: every pruned weight moves the others as if it alone were pruned."""
    scaled = weights.to(inverse) / inverse.diagonal(dim1=1, dim2=2)
    moved = torch.bmm(inverse, scaled.masked_fill(~pruned, 0).unsqueeze(2)).squeeze(2)
    return (weights - moved.to(weights)).masked_fill_(pruned, 0)
