"""Empirical Fisher matrices of blocks of weights, and their inverses.

A weight is cut into `b` blocks of `B` entries. Around trained weights, moving a block's entries by `d` costs
`1/2 dᵀ F d`, with the damped empirical Fisher matrix `F = λI + (1/m) Σ g gᵀ` of `m` gradients of that block (CAP, arXiv
2210.09223; WoodFisher, arXiv 2004.14340).
"""

import torch
from torch import Tensor

from ....graph.errors import BadInput

CHUNK = 1 << 21  # elements of the matrices that are processed together


def chunks(blocks: int, size: int) -> list[slice]:
    """Ranges of blocks whose `size` x `size` matrices have about `CHUNK` elements together."""
    step = max(1, CHUNK // size**2)
    return [slice(i, min(i + step, blocks)) for i in range(0, blocks, step)]


class Fisher:
    """`F = λI + (1/m) Σ g gᵀ` for each of `b` blocks of `B` weights, from a stream of gradients.

    blocks: `b`. size: `B`. count: `m`, the number of gradients to come. damping: λ. dtype: of what is stored. Up to `B`
    gradients are stored as they are, and inverted through their Gram matrix, since sums of so few would lose `λ` to
    rounding; more are stored as `B x B` sums. Either way `b·B·min(m, B)` numbers are stored. Inverses are computed in
    float64, since `λ` may be far below the largest eigenvalue.
    """

    def __init__(self, blocks: int, size: int, count: int, damping: float, dtype: torch.dtype = torch.float32):
        self.size, self.count, self.damping, self.seen = size, count, damping, 0
        self.few = True
        self.sums = torch.zeros(blocks, min(count, size), size, dtype=dtype)

    @staticmethod
    def numbers(weights: int, size: int, count: int) -> int:
        """How many numbers a `Fisher` of blocks of `size` stores for this many weights and `count` gradients."""
        return weights * min(count, size)

    def add(self, gradients: Tensor) -> None:
        """Take in gradients `(k, b, B)`; those beyond the announced number are ignored."""
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
        total = self.sums[part].double()
        if self.few:
            total = total[:, : self.seen].transpose(1, 2) @ total[:, : self.seen]
        matrix = total / max(self.seen, 1)
        matrix.diagonal(dim1=1, dim2=2).add_(self.damping)
        return matrix

    def inverse(self, part: slice) -> Tensor:
        """`F⁻¹` of a range of blocks, `(b, B, B)` in float64.

        For few gradients `G` `(m, B)`, by the Woodbury identity `(I − Gᵀ (mλI + G Gᵀ)⁻¹ G) / λ`, which is also the result
        of the papers' recursion `H -= (H g)(H g)ᵀ / (m + gᵀ H g)` over single gradients.
        """
        if not self.few:
            return torch.cholesky_inverse(cholesky(self.matrix(part)))
        rows = self.sums[part, : self.seen].double()
        gram = rows @ rows.transpose(1, 2)
        gram.diagonal(dim1=1, dim2=2).add_(max(self.seen, 1) * self.damping)
        half = torch.linalg.solve_triangular(cholesky(gram), rows, upper=False)
        inverse = (half.transpose(1, 2) @ half).neg_()
        inverse.diagonal(dim1=1, dim2=2).add_(1)
        return inverse.div_(self.damping)


def cholesky(matrices: Tensor) -> Tensor:
    """Lower Cholesky factors of matrices `(b, n, n)`.

    To a matrix that rounding has made indefinite, 1e-12 of its mean diagonal is added on the diagonal, then ten times as
    much until it factors. Raises BadInput where more than the mean diagonal would be needed: the matrix is not finite, or
    is no sum of squares.
    """
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
