"""The least-squares weights of a linear map, from sums over its inputs and the outputs that are wanted of it.

For rows of inputs x (u numbers) and wanted outputs y (o numbers), the weights W (o, u) and bias b that minimise

    sum |y - W x - b|^2  +  lambda * sum_j D_j |W_j - V_j|^2,        V the weights as they are, D_j = sum x_j^2

are, with A = sum x x^T and B = sum y x^T (both about the means where there is a bias, which has no ridge),

    W = V + (B - V A) (A + lambda D)^-1,        b = mean(y) - W mean(x).

The ridge stays around V, so what the rows say nothing about stays as it is, and W is V where V is already best. Without a
given lambda, each half of the samples is fitted and judged on the other half. Source: ridge regression; see also OSSCAR
(arXiv 2403.12983), OBSPA (arXiv 2403.18955) for its use after pruning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-13, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # shares of the diagonal, among which halves choose
ALONE = 1e-2  # the share where there is but one sample, so that nothing can be held out
EXACT = 1e-14  # a loss below this share of the outputs' squares is rounding
WORTH = 1e-3  # a larger ridge is preferred while its loss on held-out samples is at most this share higher


@dataclass
class Sums:
    """What the solution depends on, of one half of the samples: float64 sums over rows, for each group of the layer.

    count: rows. x: (groups, u). y: (groups, o). xx: (groups, u, u). yx: (groups, o, u). yy: (groups,), of squares.
    """

    count: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor

    @classmethod
    def zeros(cls, groups: int, inputs: int, outputs: int, device: torch.device) -> Sums:
        def make(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        return cls(
            make(), make(groups, inputs), make(groups, outputs), make(groups, inputs, inputs),
            make(groups, outputs, inputs), make(groups),
        )  # fmt: skip

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: x (groups, n, u), y (groups, n, o), in any floating type."""
        x, y = x.double(), y.double()
        self.count += x.shape[1]
        self.x += x.sum(1)
        self.y += y.sum(1)
        self.xx.baddbmm_(x.transpose(1, 2), x)
        self.yx.baddbmm_(y.transpose(1, 2), x)
        self.yy += y.square().sum((1, 2))

    def tensors(self) -> list[Tensor]:
        return [self.count, self.x, self.y, self.xx, self.yx, self.yy]

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    @property
    def finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self.tensors())

    def means(self, centred: bool) -> tuple[Tensor, Tensor]:
        """Of x and y; zeros where there is no bias to take them up."""
        share = 1 / self.count.clamp(min=1) if centred else torch.zeros_like(self.count)
        return self.x * share, self.y * share

    def loss(self, weight: Tensor, bias: Tensor | None) -> float:
        """The summed squared error of weights (groups, o, u) and a bias (groups, o) on these rows."""
        b = torch.zeros_like(self.y) if bias is None else bias
        fits = (weight @ self.xx * weight).sum() + 2 * (b * (weight @ self.x[..., None])[..., 0]).sum()
        total = self.yy.sum() + fits + self.count * b.square().sum()
        return max(float(total - 2 * (weight * self.yx).sum() - 2 * (b * self.y).sum()), 0.0)


@dataclass(frozen=True)
class Fit:
    """weight: (groups, o, u). bias: (groups, o) or None. ridge: the share of the diagonal that was used. before,
    predicted: summed squared error on all rows with the weights as they were, and with these. held_before, held: the same
    on held-out halves; None where nothing could be held out. noise: what rounding may leave of a loss."""

    weight: Tensor
    bias: Tensor | None
    ridge: float
    before: float
    predicted: float
    held_before: float | None
    held: float | None
    noise: float

    @property
    def helps(self) -> bool:
        """Whether there was something to repair, and it is better on samples that it has not seen."""
        before, after = (self.before, self.predicted) if self.held is None else (self.held_before, self.held)
        return self.before > self.noise and bool(after < before)  # type: ignore[operator]

    @property
    def why_not(self) -> str:
        """Why it does not help."""
        return "no better on held-out images" if self.before > self.noise else "nothing is lost here"


def fit(
    halves: tuple[Sums, Sums], weight: Tensor, bias: Tensor | None, ridge: float | None, fixed: Tensor | None = None
) -> Fit:
    """The best weights for two halves of the samples.

    weight: (groups, o, u) and bias: (groups, o) or None, as they are, float64. ridge: a share of the diagonal, None to
    choose it by held-out halves. fixed: entries of the weight that stay as they are (bool, its shape).
    """
    both = halves[0] + halves[1]
    noise = EXACT * float(both.yy.sum())
    held: dict[float, float] = {}
    judged = all(h.count > 0 for h in halves)
    if judged:
        for share in RIDGES if ridge is None else (ridge,):
            fits = [solve(half, weight, bias, share, fixed) for half in halves]
            held[share] = halves[1].loss(*fits[0]) + halves[0].loss(*fits[1])
    if ridge is None:
        ridge = ALONE
        if held:
            best = min(held.values())
            ridge = max(share for share, loss in held.items() if loss <= best * (1 + WORTH))
            if best <= noise:
                ridge = min(held)  # what is left can do all that there was
    found, constant = solve(both, weight, bias, ridge, fixed)
    return Fit(
        found, constant, ridge, both.loss(weight, bias), both.loss(found, constant),
        both.loss(weight, bias) if judged else None, held[ridge] if judged else None, noise,
    )  # fmt: skip


def solve(
    sums: Sums, weight: Tensor, bias: Tensor | None, ridge: float, fixed: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The weights and bias of the module's formula."""
    mean_x, mean_y = sums.means(bias is not None)
    a = sums.xx - sums.count * mean_x[:, :, None] * mean_x[:, None, :]
    b = sums.yx - sums.count * mean_y[:, :, None] * mean_x[:, None, :]
    diagonal = a.diagonal(dim1=1, dim2=2)
    scale = torch.where(diagonal > 0, diagonal, 1.0)  # an input that is constant keeps its weight
    wanted = b - weight @ a
    a = a + torch.diag_embed(ridge * scale)
    if fixed is None or not bool(fixed.any()):
        change = _divided(a, wanted)
    else:
        change = torch.zeros_like(weight)
        for group in range(len(weight)):
            # Rows with the same free entries are solved together; those entries alone are unknowns.
            patterns, which = torch.unique(~fixed[group], dim=0, return_inverse=True)
            for i, free in enumerate(patterns):
                rows = (which == i).nonzero()[:, 0]
                columns = free.nonzero()[:, 0]
                if len(columns):
                    part = _divided(a[group][columns][:, columns][None], wanted[group][rows][:, columns][None])
                    change[group][rows[:, None], columns] = part[0]
    found = weight + change
    constant = None if bias is None else mean_y - (found @ mean_x[..., None])[..., 0]
    return found, constant


def _divided(a: Tensor, b: Tensor) -> Tensor:
    """`b a^-1` for symmetric positive definite matrices; where rounding made one indefinite, the nearest answer to it."""
    factor, failed = torch.linalg.cholesky_ex(a)
    if not bool(failed.any()):
        return torch.cholesky_solve(b.transpose(1, 2), factor).transpose(1, 2)
    values, vectors = torch.linalg.eigh(a)
    least = values[:, -1:] * a.shape[-1] * torch.finfo(a.dtype).eps
    inverse = torch.where(values > least, 1 / values.clamp(min=1e-300), 0.0)
    return (b @ vectors * inverse[:, None, :]) @ vectors.transpose(1, 2)
