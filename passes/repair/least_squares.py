"""The least-squares weights of a linear map, from sums over its inputs and the outputs that it should have.

For rows of inputs x (u numbers) and wanted outputs y (o numbers), the weights W (o, u) and bias b that minimise

sum |y - W x - b|^2  +  lambda * sum_j D_j |W_j - V_j|^2,        V the present weights, D_j = sum x_j^2

are, with A = sum x x^T and B = sum y x^T (both about the means if there is a bias, which has no ridge),

W = V + (B - V A) (A + lambda D)^-1,        b = mean(y) - W mean(x).

The ridge is around V, so what the rows do not determine stays as it is, and W is V where V is already best. If lambda is
not given, each half of the samples is fitted and judged on the other half. Source: ridge regression; see also OSSCAR (arXiv
2403.12983), OBSPA (arXiv 2403.18955) for its use after pruning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

RIDGES = (
    1e-13,
    1e-7,
    1e-5,
    1e-4,
    1e-3,
    1e-2,
    1e-1,
    1.0,
    10.0,
    100.0,
)  # shares of the diagonal that the held-out halves choose among
ROUNDED = 1e-5  # the least ridge for products in float32, above their rounding errors
START = 1e-2  # the ridge where the choice begins
ALONE = 1e-2  # the ridge for a single sample, where nothing can be held out
EXACT = 1e-14  # a loss below this share of the outputs' squares is a rounding error
WORTH = 1e-3  # a larger ridge is preferred while its loss on held-out samples is at most this share higher
PANEL = 256  # columns of a product that are computed at a time
BLOCK = 4096  # rows that are multiplied in float32 before their sum is added in float64


@dataclass
class Sums:
    """The sums over rows that the solution depends on, for one half of the samples and each group of the layer, in float64.

    count: number of rows. x: (groups, u). y: (groups, o). xx: (groups, u, u). yx: (groups, o, u). yy: (groups,), of
    squares.
    """

    count: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor
    rounded: bool = field(default=False, init=False)  # whether products were taken in float32

    @classmethod
    def zeros(cls, groups: int, inputs: int, outputs: int, device: torch.device) -> Sums:
        def make(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        return cls(
            make(), make(groups, inputs), make(groups, outputs), make(groups, inputs, inputs),
            make(groups, outputs, inputs), make(groups),
        )  # fmt: skip

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: x (groups, n, u), y (groups, n, o), in any floating type. Products of float64 are float64; other types
        are multiplied in float32, in blocks about their own means, so that large means cost no digits."""
        self.count += x.shape[1]
        if x.dtype == torch.float64 or y.dtype == torch.float64:
            self._add(x.double(), y.double())
            return
        self.rounded = True
        for block, goal in zip(x.float().split(BLOCK, 1), y.float().split(BLOCK, 1), strict=True):
            mean, mean_y = block.mean(1, keepdim=True), goal.mean(1, keepdim=True)
            self._add(block - mean, goal - mean_y, mean.double(), mean_y.double())

    def _add(self, x: Tensor, y: Tensor, mean: Tensor | None = None, mean_y: Tensor | None = None) -> None:
        """Add rows x + mean and y + mean_y; products of x and y are computed in their own type."""
        self.xx += _gram(x)
        self.yx += y.mT @ x
        self.yy += y.double().square().sum((1, 2))
        sum_x, sum_y = x.sum(1, dtype=torch.float64), y.sum(1, dtype=torch.float64)
        if mean is not None and mean_y is not None:
            n, x0, y0 = x.shape[1], mean[:, 0], mean_y[:, 0]
            # sum (x + m)(x + m)^T = sum x x^T + m s^T + (s + n m) m^T, with s = sum x, which is a rounding error here
            right = torch.stack([sum_x, x0], 1)
            self.xx.baddbmm_(torch.stack([x0, sum_x + n * x0], 2), right)
            self.yx.baddbmm_(torch.stack([y0, sum_y + n * y0], 2), right)
            self.yy += (2 * y0 * sum_y + n * y0.square()).sum(1)
            sum_x, sum_y = sum_x + n * x0, sum_y + n * y0
        self.x += sum_x
        self.y += sum_y

    def tensors(self) -> list[Tensor]:
        return [self.count, self.x, self.y, self.xx, self.yx, self.yy]

    def __add__(self, other: Sums) -> Sums:
        both = Sums(*(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))
        both.rounded = self.rounded or other.rounded
        return both

    @property
    def finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self.tensors())

    def means(self, centred: bool) -> tuple[Tensor, Tensor]:
        """The means of x and y; zeros without `centred`, where there is no bias to take them up."""
        share = 1 / self.count.clamp(min=1) if centred else torch.zeros_like(self.count)
        return self.x * share, self.y * share

    def variance(self, centred: bool) -> float:
        """The summed squared error of the best constant output: the mean if `centred`, else zero."""
        return float((self.yy - (self.y * self.means(centred)[1]).sum(1)).sum().clamp(min=0))

    def loss(self, weight: Tensor, bias: Tensor | None) -> float:
        """The summed squared error of weights (groups, o, u) and a bias (groups, o) on these rows."""
        b = torch.zeros_like(self.y) if bias is None else bias
        fits = (weight @ self.xx * weight).sum() + 2 * (b * (weight @ self.x[..., None])[..., 0]).sum()
        total = self.yy.sum() + fits + self.count * b.square().sum()
        return max(float(total - 2 * (weight * self.yx).sum() - 2 * (b * self.y).sum()), 0.0)


@dataclass(frozen=True)
class Fit:
    """The best weights. weight: (groups, o, u). bias: (groups, o) or None. ridge: the share of the diagonal that was used.
    before, predicted: summed squared error on all rows with the old weights, and with these. held_before, held: the same on
    held-out halves, None where nothing could be held out. noise: the largest loss that may be a rounding error."""

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
        """Whether there was something to repair, and held-out samples (or, without any, all samples) are fitted better."""
        before, after = (self.before, self.predicted) if self.held is None else (self.held_before, self.held)
        return self.before > self.noise and bool(after < before)  # type: ignore[operator]

    @property
    def why_not(self) -> str:
        """The reason why the new weights are not used."""
        return "no better on held-out images" if self.before > self.noise else "nothing is lost here"


def fit(
    halves: tuple[Sums, Sums],
    weight: Tensor,
    bias: Tensor | None,
    ridge: float | None,
    fixed: Tensor | None = None,
    start: float = START,
) -> Fit:
    """The best weights for two halves of the samples.

    weight: (groups, o, u) and bias: (groups, o) or None, the present ones, float64. ridge: a share of the diagonal, None to
    choose it by held-out halves. fixed: entries of the weight that stay as they are (bool, of its shape). start: the ridge
    where the choice begins; fewer are tried if it is near the best.
    """
    both = halves[0] + halves[1]
    noise = EXACT * float(both.yy.sum())
    judged = all(h.count > 0 for h in halves)
    held: dict[float, float] = {}
    if judged:
        kind = torch.float32 if both.rounded else torch.float64
        problems = [Problem(half, weight, bias, fixed, kind) for half in halves]

        def loss(share: float) -> float:
            return sum(problems[1 - k].loss(problem, problem.change(share)) for k, problem in enumerate(problems))

        if ridge is None:
            ridge = _best(loss, held, noise, [r for r in RIDGES if r >= ROUNDED or not both.rounded], start)
        else:
            held[ridge] = loss(ridge)
        del problems
    ridge = ALONE if ridge is None else ridge
    found, constant = solve(both, weight, bias, ridge, fixed)
    before = both.loss(weight, bias)
    return Fit(
        found, constant, ridge, before, both.loss(found, constant),
        before if judged else None, held.get(ridge), noise,
    )  # fmt: skip


def _best(
    loss: Callable[[float], float], held: dict[float, float], noise: float, shares: list[float], start: float
) -> float:
    """The ridge with the least loss on held-out samples.

    Losses are assumed to fall to one minimum and rise behind it. Of ridges that are about as good, the largest is taken; if
    the losses are rounding errors, the smallest. held: a cache of losses by ridge.
    """

    def at(place: int) -> float:
        share = shares[place]
        if share not in held:
            held[share] = value if math.isfinite(value := loss(share)) else math.inf
        return held[share]

    last = len(shares) - 1
    place = shares.index(start) if start in shares else 0
    while place > 0 and at(place - 1) < at(place):
        place -= 1
    while place < last and at(place + 1) < at(place):
        place += 1
    best = at(place)
    if best <= noise:
        place = 0  # the remaining inputs determine the outputs completely
        at(place)
    while best > noise and place < last and at(place + 1) <= best * (1 + WORTH):
        place += 1
    return shares[place]


class Problem:
    """The module's formula for some rows and any ridge: `A` and `B - V A` are computed once.

    kind: the dtype to solve in; what float32 cannot solve becomes NaN.
    """

    def __init__(
        self,
        sums: Sums,
        weight: Tensor,
        bias: Tensor | None,
        fixed: Tensor | None = None,
        kind: torch.dtype = torch.float64,
    ):
        self.weight, self.fixed, self.count = weight, fixed, sums.count
        self.mean_x, self.mean_y = sums.means(bias is not None)
        a, b = (
            torch.baddbmm(products, mean[:, :, None], self.mean_x[:, None], alpha=-float(sums.count))
            for products, mean in ((sums.xx, self.mean_x), (sums.yx, self.mean_y))
        )
        wanted = b - weight @ a
        self.before = sums.variance(bias is not None) - float(
            (weight * (b + wanted)).sum()
        )  # the loss of V with the best constant
        diagonal = a.diagonal(dim1=1, dim2=2)
        self.scale = torch.where(diagonal > 0, diagonal, 1.0).to(kind)  # an input that is constant keeps its weight
        self.a, self.wanted = a.to(kind), wanted.to(kind)

    def loss(self, other: Problem, change: Tensor) -> float:
        """The summed squared error of `V + change` on these rows, with the best constant for the rows of `other`."""
        squares = ((change @ self.a - 2 * self.wanted) * change).sum(dtype=torch.float64)
        found = self.weight + change
        offset = self.mean_y - other.mean_y - (found @ (self.mean_x - other.mean_x)[..., None])[..., 0]
        return max(self.before + float(squares + self.count * offset.square().sum()), 0.0)

    def change(self, ridge: float) -> Tensor:
        """`W - V` for a ridge."""
        a = self.a.clone()
        a.diagonal(dim1=1, dim2=2).add_(self.scale, alpha=ridge)
        fixed = self.fixed
        if fixed is None or not bool(fixed.any()):
            return _divided(a, self.wanted)
        change = torch.zeros_like(self.wanted)
        for group in range(len(change)):
            # Rows with the same free entries are solved together, with these entries as unknowns.
            patterns, which = torch.unique(~fixed[group], dim=0, return_inverse=True)
            for i, free in enumerate(patterns):
                rows = (which == i).nonzero()[:, 0]
                columns = free.nonzero()[:, 0]
                if len(columns):
                    part = _divided(a[group][columns][:, columns][None], self.wanted[group][rows][:, columns][None])
                    change[group][rows[:, None], columns] = part[0]
        return change


def solve(
    sums: Sums, weight: Tensor, bias: Tensor | None, ridge: float, fixed: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The weights and bias of the module's formula for a ridge."""
    problem = Problem(sums, weight, bias, fixed)
    found = weight + problem.change(ridge)
    constant = None if bias is None else problem.mean_y - (found @ problem.mean_x[..., None])[..., 0]
    return found, constant


def _gram(x: Tensor) -> Tensor:
    """`x^T x` of (groups, n, u); for many columns, only the upper triangle of blocks is multiplied."""
    u = x.shape[-1]
    if u < 2 * PANEL:
        return x.mT @ x
    found = x.new_empty(len(x), u, u)
    for start in range(0, u, PANEL):
        panel = slice(start, start + PANEL)
        found[:, panel, start:] = x[..., panel].mT @ x[..., start:]
        found[:, start:, panel] = found[:, panel, start:].mT
    return found


def _divided(a: Tensor, b: Tensor) -> Tensor:
    """`b a^-1` for symmetric positive definite matrices. Where rounding made one indefinite, the pseudo-inverse is used, or
    in float32 the result is NaN."""
    factor, failed = torch.linalg.cholesky_ex(a)
    if not bool(failed.any()):
        return torch.cholesky_solve(b.transpose(1, 2), factor).transpose(1, 2)
    if a.dtype == torch.float32:
        return torch.full_like(b, torch.nan)
    values, vectors = torch.linalg.eigh(a)
    least = values[:, -1:] * a.shape[-1] * torch.finfo(a.dtype).eps
    inverse = torch.where(values > least, 1 / values.clamp(min=1e-300), 0.0)
    return (b @ vectors * inverse[:, None, :]) @ vectors.transpose(1, 2)
