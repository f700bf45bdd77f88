"""Which weights to set to zero and how the others make up for it: CAP (arXiv 2210.09223) on plain tensors.

A weight is cut into `b` blocks of `B` entries. Around trained weights `w`, setting some of a block's entries to zero and
moving the others by `d` costs `1/2 dᵀ F d`, with the damped empirical Fisher matrix `F = λI + (1/m) Σ g gᵀ` of `m`
gradients of that block. Pruning one weight optimally costs `w_q² / (2 H_qq)`, `H = F⁻¹` (optimal brain surgeon), and CAP
prunes greedily, one weight after another, with `H` and `w` brought up to date each time.

That elimination is a pivoted Cholesky factorisation of `H`, the pivots chosen by `w_q² / H_qq` (ours): so the diagonal
and one column are all that a step needs, and the matrix itself is updated for a panel of columns at once, as LAPACK's
`pstrf` does. `magnitude`, WoodFisher (arXiv 2004.14340), SparseGPT (arXiv 2301.00774) and Wanda (arXiv 2306.11695) are
here in the form they take in the same frame.

Masks are bool, True where the weight goes. A pattern `(n, m)` keeps `n` of every `m` consecutive entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...graph.errors import BadInput

PANEL = 32  # columns of a factorisation that are applied to the matrix together
CHUNK = 1 << 21  # elements of the matrices worked on together

Pattern = tuple[int, int]


# --------------------------------------------------------------------------------------------------------------- blocks
def to_blocks(tensor: Tensor, size: int, channels_last: bool = False) -> Tensor:
    """A tensor as blocks `(b, size)` of its flattened entries, the last one filled up with zeros.

    channels_last: dimension 1 runs fastest, so that groups of neighbours lie along the input channels of one output
    channel and kernel position; otherwise the entries stay in their order.
    """
    flat = (tensor.movedim(1, -1) if channels_last else tensor).reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def from_blocks(blocks: Tensor, shape: Sequence[int], channels_last: bool = False) -> Tensor:
    """What `to_blocks` cut, put together again."""
    flat = blocks.reshape(-1)[: math.prod(shape)]
    if not channels_last:
        return flat.view(*shape)
    return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


def chunks(blocks: int, size: int) -> list[slice]:
    """Ranges of blocks whose matrices are worked on together."""
    step = max(1, CHUNK // size**2)
    return [slice(i, min(i + step, blocks)) for i in range(0, blocks, step)]


# --------------------------------------------------------------------------------------------------------------- Fisher
class Fisher:
    """`F = λI + (1/m) Σ g gᵀ` for each of `b` blocks of `B` weights, from a stream of gradients.

    Up to `B` gradients are kept as they are (and inverted through their Gram matrix: sums of so few would hide `λ` in
    their rounding), more of them as `B x B` sums: `b·B·min(m, B)` numbers either way, in the dtype given; inverses are
    computed in float64, since `λ` may lie far below the largest eigenvalue.
    """

    def __init__(self, blocks: int, size: int, count: int, damping: float, dtype: torch.dtype = torch.float32):
        self.size, self.count, self.damping, self.seen = size, count, damping, 0
        self.few = True
        self.sums = torch.zeros(blocks, min(count, size), size, dtype=dtype)

    @staticmethod
    def numbers(weights: int, size: int, count: int) -> int:
        """How many numbers are stored for so many weights."""
        return weights * min(count, size)

    def add(self, gradients: Tensor) -> None:
        """Take `(k, b, B)` gradients in; those beyond the `m` announced are left out."""
        gradients = gradients[: self.count - self.seen].to(self.sums)
        start, self.seen = self.seen, self.seen + len(gradients)
        if self.few and self.seen > self.sums.shape[1]:
            self.few = False
            for part in chunks(len(self.sums), self.size):
                rows = self.sums[part, :start]
                self.sums[part] = rows.transpose(1, 2) @ rows
        if self.few:
            self.sums[:, start : self.seen] = gradients.transpose(0, 1)
        elif len(gradients) == 1:
            self.sums.baddbmm_(gradients[0].unsqueeze(2), gradients[0].unsqueeze(1))
        else:
            self.sums.baddbmm_(gradients.permute(1, 2, 0), gradients.transpose(0, 1))

    def matrix(self, part: slice) -> Tensor:
        """`F` of a range of blocks, `(b, B, B)` in float64."""
        found = self.sums[part].double()
        if self.few:
            found = found[:, : self.seen].transpose(1, 2) @ found[:, : self.seen]
        found = found / max(self.seen, 1)
        found.diagonal(dim1=1, dim2=2).add_(self.damping)
        return found

    def inverse(self, part: slice) -> Tensor:
        """`F⁻¹` of a range of blocks, `(b, B, B)` in float64.

        With few gradients `G` `(m, B)` by the Woodbury identity, `(I − Gᵀ (mλI + G Gᵀ)⁻¹ G) / λ`: what the recursion
        `H -= (H g)(H g)ᵀ / (m + gᵀ H g)` over single gradients reaches.
        """
        if not self.few:
            return torch.cholesky_inverse(cholesky(self.matrix(part)))
        rows = self.sums[part, : self.seen].double()
        gram = rows @ rows.transpose(1, 2)
        gram.diagonal(dim1=1, dim2=2).add_(max(self.seen, 1) * self.damping)
        half = torch.linalg.solve_triangular(cholesky(gram), rows, upper=False)
        found = (half.transpose(1, 2) @ half).neg_()
        found.diagonal(dim1=1, dim2=2).add_(1)
        return found.div_(self.damping)


def cholesky(matrices: Tensor) -> Tensor:
    """Lower Cholesky factors of `(b, n, n)`; a matrix that rounding has made indefinite gets a diagonal of 1e-12 of its
    mean one, then ten times more, until it factors. BadInput where that much is more than rounding: the matrix is not
    finite, or no sum of squares."""
    factors, failed = torch.linalg.cholesky_ex(matrices)
    relative = 1e-12
    while failed.any():
        if relative > 1:
            raise BadInput("Sparsify: a matrix of the statistics cannot be factored; check the data and the loss")
        bad = failed.nonzero()[:, 0]
        shift = relative * matrices[bad].diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(matrices.dtype).tiny)
        raised = matrices[bad] + torch.diag_embed(shift[:, None].expand(-1, matrices.shape[1]))
        factors[bad], failed[bad] = torch.linalg.cholesky_ex(raised)
        relative *= 10
    return factors


# ------------------------------------------------------------------------------------------------------ one at a time
def eliminate(
    weights: Tensor, inverse: Tensor, alive: Tensor | None = None, pattern: Pattern | None = None
) -> tuple[Tensor, Tensor]:
    """The order in which CAP prunes each block and what it costs.

    weights `(b, B)`, inverse `(b, B, B)` (overwritten), alive `(b, B)`: entries that can go; the others are taken for
    pruned before. pattern: no more than the pattern allows go from any group. Returns `(order, losses)`, both `(b, s)`:
    the entries in the order they go, and the cumulated `Σ w_q² / (2 H_qq)`, infinite beyond a block's last one.

    Raises Imprecise where rounding leaves no losses for entries that could go.
    """
    count, size = weights.shape
    inverse = (inverse if inverse.is_contiguous() else inverse.mT).contiguous()  # symmetric; LAPACK's are column-major
    w, rows = weights.to(inverse).clone(), torch.arange(count, device=weights.device)
    diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
    floor = diagonal * torch.finfo(inverse.dtype).eps
    alive = torch.ones_like(w, dtype=torch.bool) if alive is None else alive
    closed = torch.zeros_like(w).masked_fill_(~alive, math.inf)
    n, m = pattern or (0, size)
    left = m - n - (~alive).view(count, -1, m).sum(2)  # that may still go from each group
    closed.view(count, -1, m).masked_fill_((left <= 0)[..., None], math.inf)
    due = left.clamp(min=0).sum(1)
    steps = int(due.max())
    order = torch.zeros(count, steps, dtype=torch.int64, device=w.device)
    losses = torch.zeros(count, steps, dtype=inverse.dtype, device=w.device)
    for start in range(0, steps, PANEL):
        panel = inverse.new_empty(count, min(PANEL, steps - start), size)
        for k in range(panel.shape[1]):
            loss, q = torch.addcdiv(closed, w.square(), diagonal).min(1)
            column = inverse.view(-1, size).index_select(0, rows * size + q)
            if k:
                factors = panel[:, :k].gather(2, q.view(-1, 1, 1).expand(-1, k, 1)).transpose(1, 2)
                column = torch.baddbmm(column.unsqueeze(1), factors, panel[:, :k], alpha=-1).squeeze(1)
            column *= diagonal[rows, q].rsqrt().unsqueeze(1)
            panel[:, k] = column
            w.addcmul_(column, (w[rows, q] / column[rows, q]).unsqueeze(1), value=-1)
            torch.maximum(diagonal.addcmul_(column, column, value=-1), floor, out=diagonal)
            closed[rows, q] = math.inf
            if pattern:
                group = q // m
                left[rows, group] -= 1
                full, groups = (left[rows, group] <= 0).unsqueeze(1), closed.view(count, -1, m)
                groups[rows, group] = groups[rows, group].masked_fill(full, math.inf)
            order[:, start + k], losses[:, start + k] = q, loss.nan_to_num_(math.inf, math.inf)
        if start + PANEL < steps:
            inverse.baddbmm_(panel.transpose(1, 2), panel, alpha=-1)
    losses = losses.div_(2).cumsum(1)
    if not torch.equal(losses.isfinite().sum(1), due):
        raise Imprecise(f"the elimination lost all digits in {losses.dtype}")
    return order, losses


class Imprecise(ArithmeticError):
    """A matrix is too ill-conditioned for the precision that it is worked on in."""


def increments(losses: Tensor) -> Tensor:
    """What each next entry of a block costs, given the cumulated losses `(b, s)`, never less than one before it: `(b, s)`.

    The order in which entries of all blocks should go, when a block must lose its own in their order: with falling
    increments the entries of a block are worth having only together, hence the running maximum (ours). The paper's code
    ranks the cumulated losses, by which a block that has lost much for little stops losing.
    """
    steps = torch.diff(losses, dim=1, prepend=losses.new_zeros(len(losses), 1))
    return steps.nan_to_num(math.inf, math.inf).cummax(1).values  # beyond a block's last entry, inf - inf


def prefixes(losses: Sequence[Tensor], count: int) -> list[Tensor]:
    """How many entries each block loses when `count` go in all, those with the lowest losses: `(b,)` for each tensor of
    `(b, s)` losses, which never fall along a row (cumulated ones, or `increments` of such)."""
    every = torch.cat([found.reshape(-1) for found in losses])
    count = min(count, int(every.isfinite().sum()))
    if not count:
        return [torch.zeros(len(found), dtype=torch.int64) for found in losses]
    threshold = every.kthvalue(count).values
    ties = count - int((every < threshold).sum())
    found = []
    for each in losses:
        below, equal = (each < threshold).sum(1), (each == threshold).sum(1)
        taken = (ties - (equal.cumsum(0) - equal)).clamp(min=0).minimum(equal)
        ties -= int(taken.sum())
        found.append(below + taken)
    return found


def first(order: Tensor, lengths: Tensor, size: int) -> Tensor:
    """The mask `(b, B)` of the first `lengths[i]` entries of each block's order."""
    later = torch.arange(order.shape[1], device=order.device) >= lengths.unsqueeze(1)
    mask = torch.zeros(len(order), size + 1, dtype=torch.bool, device=order.device)
    return mask.scatter_(1, order.long().masked_fill(later, size), True)[:, :size]


def repair(weights: Tensor, matrix: Tensor, pruned: Tensor) -> Tensor:
    """The best weights with the pruned ones at zero: `w − H[:, P] (H[P, P])⁻¹ w_P`, for blocks `(b, B)`.

    Computed from `F` itself, `(b, B, B)`, of which it takes the kept part only: `w_K + (F_KK)⁻¹ F_KP w_P` (block
    inversion; ours), which is the same and spares the inverse.
    """
    kept = ~pruned
    most = int(kept.sum(1).max())
    # of the kept ones, first of all
    places = torch.sort(kept.byte(), dim=1, descending=True, stable=True).indices[:, :most]
    real = kept.gather(1, places).to(matrix)  # blocks that keep fewer are filled up with ones of the identity
    rows = matrix.gather(1, places.unsqueeze(2).expand(-1, -1, matrix.shape[2]))
    pull = torch.bmm(rows, (pruned * weights).to(matrix).unsqueeze(2)) * real.unsqueeze(2)
    system = rows.gather(2, places.unsqueeze(1).expand(-1, most, -1))
    system = system.mul_(real.unsqueeze(1)).mul_(real.unsqueeze(2)) + torch.diag_embed(1 - real)
    moved = torch.cholesky_solve(pull, cholesky(system)).squeeze(2)
    return weights.masked_fill(pruned, 0).scatter_add_(1, places, moved.to(weights))


def loss(change: Tensor, matrix: Tensor) -> Tensor:
    """`1/2 dᵀ F d` of each block's change of weights, `(b,)`."""
    return torch.einsum("bi,bij,bj->b", change.to(matrix), matrix, change.to(matrix)) / 2


def step_once(weights: Tensor, inverse: Tensor, pruned: Tensor) -> Tensor:
    """WoodFisher's update: every pruned weight moves the others as if it went alone, `w − Σ_q H[:, q] w_q / H_qq`."""
    scaled = weights.to(inverse) / inverse.diagonal(dim1=1, dim2=2)
    moved = torch.bmm(inverse, scaled.masked_fill(~pruned, 0).unsqueeze(2)).squeeze(2)
    return (weights - moved.to(weights)).masked_fill_(pruned, 0)


# ------------------------------------------------------------------------------------------------------- column sweeps
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


def portions(count: int, sizes: Sequence[int]) -> list[int]:
    """`count` things shared out in proportion to the sizes; what rounding leaves over goes to the later ones."""
    found, left = [], sum(sizes)
    for size in sizes:
        found.append(round(count * size / left) if left else 0)
        count, left = count - found[-1], left - size
    return found


# --------------------------------------------------------------------------------------------------------------- scores
def lowest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the `count` lowest scores of all tensors together; of equal ones, the first."""
    if not count:
        return [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    every = torch.cat([s.reshape(-1) for s in scores])
    threshold = every.kthvalue(min(count, len(every))).values
    ties = count - int((every < threshold).sum())
    masks = []
    for each in scores:
        equal = each == threshold
        equal &= (equal.reshape(-1).cumsum(0) <= ties).view_as(each)
        ties -= int(equal.sum())
        masks.append((each < threshold) | equal)
    return masks


def lowest_of_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask of the `m - n` lowest scores of every `m` consecutive entries of `(r, c)` scores."""
    n, m = pattern
    groups = scores.reshape(-1, m)
    order = groups.argsort(dim=1, stable=True)[:, : m - n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view_as(scores)
