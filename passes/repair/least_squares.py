"""The least-squares weights of a linear map, from sums over its inputs and the outputs that it should have.

For rows of inputs x (u numbers) and wanted outputs y (o numbers), the weights W (o, u) and bias b that minimise

sum |y - W x - b|^2  +  lambda * sum_j D_j |W_j - V_j|^2,        V the present weights, D_j = sum x_j^2

are, with A = sum x x^T and B = sum y x^T (both about the means if there is a bias, which has no ridge),

W = V + (B - V A) (A + lambda D)^-1,        b = mean(y) - W mean(x).

The ridge is around V, so what the rows do not determine stays as it is, and W is V where V is already best. If lambda is
not given, each half of the samples is fitted and judged on the other half, and inputs whose new weights gain next to nothing
on these rows and would drown the layer on others keep theirs (`Problem.unproven`). Source: ridge regression; see also OSSCAR
(arXiv 2403.12983), OBSPA (arXiv 2403.18955) for its use after pruning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

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
DECIDE = 128  # outputs whose losses decide about the ridge, if there are at least twice as many
PANEL = 256  # columns of a product that are computed at a time
BLOCK = 4096  # rows that are multiplied, perhaps in float32, before their sum is added in float64
NOTHING = 1e-2  # a change that puts out less than this share of the squared error that is left gains next to nothing
FLAT = 32  # units of rounding, of its mean, below which the deviation of an input is that of a constant


@dataclass
class Sums:
    """The sums over rows that the solution depends on, for one half of the samples and each group of the layer, in float64.

    count: number of rows. x: (groups, u). y: (groups, o). Of products of distances from the means: xx: (groups, u, u).
    yx: (groups, o, u). yy: (groups, o), of squares. (Sums of the products themselves would lose the digits of inputs whose
    mean is large.)
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
            make(groups, outputs, inputs), make(groups, outputs),
        )  # fmt: skip

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: x (groups, n, u), y (groups, n, o), in any floating type. Products of float64 are float64; other types
        are multiplied in float32."""
        kind = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
        self.rounded |= kind == torch.float32
        for block, goal in zip(x.to(kind).split(BLOCK, 1), y.to(kind).split(BLOCK, 1), strict=True):
            if block.shape[1]:
                self._add(block, goal)

    def _add(self, x: Tensor, y: Tensor) -> None:
        n, mean, mean_y = x.shape[1], x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, y = x - mean, y - mean_y
        # sum (x + m)(x + m)^T about its mean is sum x x^T - s s^T / n with s = sum x, which is a rounding error here.
        s, s_y = x.sum(1, dtype=torch.float64), y.sum(1, dtype=torch.float64)
        mean, mean_y = mean[:, 0].double() + s / n, mean_y[:, 0].double() + s_y / n
        # Further, what the distance of both means adds (Chan et al., 1983).
        earlier, earlier_y = self.means()
        d, d_y, share = mean - earlier, mean_y - earlier_y, self.count * n / (self.count + n)
        right = torch.stack([s, d], 1)
        self.xx += _gram(x)
        self.xx.baddbmm_(torch.stack([-s / n, share * d], 2), right)
        self.yx += y.mT @ x
        self.yx.baddbmm_(torch.stack([-s_y / n, share * d_y], 2), right)
        self.yy += y.double().square().sum(1) - s_y.square() / n + share * d_y.square()
        self.count += n
        self.x += n * mean
        self.y += n * mean_y

    def means(self) -> tuple[Tensor, Tensor]:
        """The means of x and y."""
        count = self.count.clamp(min=1)
        return self.x / count, self.y / count

    def join(self, total: Callable[[Tensor], Tensor]) -> None:
        """Make these the sums over the rows of all processes. total: the sum of a tensor over the processes."""
        own, x, y = self.count.clone(), *self.means()
        for tensor in (self.count, self.x, self.y):
            tensor.copy_(total(tensor))
        mean, mean_y = self.means()
        d, d_y = x - mean, y - mean_y
        self.xx.baddbmm_(own * d[:, :, None], d[:, None])
        self.yx.baddbmm_(own * d_y[:, :, None], d[:, None])
        self.yy += own * d_y.square()
        for tensor in (self.xx, self.yx, self.yy):
            tensor.copy_(total(tensor))
        self.rounded = bool(total(torch.tensor(float(self.rounded))))

    @property
    def finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in (self.count, self.x, self.y, self.xx, self.yx, self.yy))


@dataclass(frozen=True)
class Fit:
    """The best weights. weight: (groups, o, u). bias: (groups, o) or None. ridge: the share of the diagonal that was used.
    before, predicted: summed squared error on all rows with the old weights, and with these. held_before, held: the same on
    held-out halves, None where nothing could be held out. total: summed squared error of the best constant output, which is
    zero where there is no bias. rows: how many there were. noise: the largest loss that may be a rounding error.
    unproven: how many inputs keep their weights because the rows say too little of them."""

    weight: Tensor
    bias: Tensor | None
    ridge: float
    before: float
    predicted: float
    held_before: float | None
    held: float | None
    total: float
    rows: int
    noise: float
    unproven: int

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
    rounded = any(half.rounded for half in halves)
    noise = EXACT * sum(float((half.yy + half.count * half.means()[1].square()).sum()) for half in halves)
    judged, cautious = all(half.count > 0 for half in halves), ridge is None
    problems = [Problem.of(half, weight, bias, fixed) for half in halves]
    whole = problems[0].add(problems[1], rounded)
    before = whole.loss_with(bias)
    held: float | None = None
    if judged:
        kind = torch.float32 if rounded else torch.float64
        problems = [problem.to(kind) for problem in problems]
        tried: dict[float, float] = {}
        if ridge is None:
            some = _decisive(whole, problems)
            shares = [r for r in RIDGES if r >= ROUNDED or not rounded]
            ridge = _best(lambda share: _held_out(some, share), tried, noise, shares, start)
            if some is not problems:
                tried.clear()
        held = tried[ridge] if ridge in tried else _held_out(problems, ridge)
    del problems
    ridge = ALONE if ridge is None else ridge
    change, whole = whole.solved(ridge, rounded)
    unproven = torch.zeros_like(change[:, 0], dtype=torch.bool)
    while cautious and bool((more := whole.unproven(change)).any()):
        unproven |= more
        change, whole = whole.without(more).solved(ridge, rounded)
    repaired = weight + change
    return Fit(
        repaired, whole.constant(repaired) if bias is not None else None, ridge, before, whole.loss(whole, change),
        before if judged else None, held, float(whole.total.sum().clamp(min=0)), int(whole.count), noise,
        int(unproven.sum()),
    )  # fmt: skip


def _held_out(problems: list[Problem], ridge: float) -> float:
    """The loss on each half of what the other half's rows give; infinite where float32 cannot solve."""
    loss = sum(problems[1 - k].loss(problem, problem.change(ridge)) for k, problem in enumerate(problems))
    return loss if math.isfinite(loss) else math.inf


def _decisive(whole: Problem, problems: list[Problem]) -> list[Problem]:
    """The problems with the outputs alone that lose most at present, whose losses decide about the ridge. Of few outputs,
    and where entries of the weight are fixed, all."""
    if whole.wanted.shape[1] < 2 * DECIDE or (whole.fixed is not None and bool(whole.fixed.any())):
        return problems
    most = whole.before.topk(DECIDE).indices
    return [problem.outputs(most) for problem in problems]


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
            held[share] = loss(share)
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


@dataclass(frozen=True)
class Problem:
    """The module's formula for some rows and any ridge: `A` and `B - V A` are computed once.

    weight: V, (groups, o, u). count: number of rows. x, y: the means of inputs (groups, u) and outputs (groups, o), zeros
    without a bias to take them up. a: A. wanted: B - V A. before, total: (groups, o), the squared error of each output with
    V and the best constant, and with the best constant alone. fixed: entries of the weight that stay, or None. What
    float32 cannot solve becomes NaN, if `a` and `wanted` are float32; all else is float64.
    """

    weight: Tensor
    count: Tensor
    x: Tensor
    y: Tensor
    a: Tensor
    wanted: Tensor
    before: Tensor
    total: Tensor
    fixed: Tensor | None = None

    @classmethod
    def of(cls, sums: Sums, weight: Tensor, bias: Tensor | None, fixed: Tensor | None = None) -> Problem:
        a, b, total, (x, y) = sums.xx, sums.yx, sums.yy, sums.means()
        if bias is None:
            a, b = (
                torch.baddbmm(products, mean[:, :, None], x[:, None], alpha=float(sums.count))
                for products, mean in ((a, x), (b, y))
            )
            total = total + sums.count * y.square()
            x, y = torch.zeros_like(x), torch.zeros_like(y)
        wanted = b - weight @ a
        before = total - (weight * (b + wanted)).sum(2)
        return cls(weight, sums.count, x, y, a, wanted, before, total, fixed)._without_constants(sums.rounded)

    def _without_constants(self, rounded: bool) -> Problem:
        """The problem in which inputs that only vary by rounding errors count as constant: they keep their weights."""
        diagonal = self.a.diagonal(dim1=1, dim2=2)
        least = (FLAT * torch.finfo(torch.float32 if rounded else torch.float64).eps) ** 2
        return self.without(diagonal <= least * (diagonal + self.count * self.x.square()))

    def without(self, which: Tensor) -> Problem:
        """The problem in which some inputs, `(groups, u)`, keep their weights."""
        if not bool(which.any()):
            return self
        a = self.a * ~which[:, :, None] * ~which[:, None]
        return replace(self, a=a, wanted=self.wanted * ~which[:, None])

    def unproven(self, change: Tensor) -> Tensor:
        """Inputs `(groups, u)` whose change puts out next to nothing on these rows, but on images where they vary as the
        layer's inputs do on average more than the layer does, and than the old weights would.

        Such are channels that are active in a few rows, which determine a weight of any size: a depthwise kernel may
        become a thousand times as large, and no held-out row would tell.
        """
        varied, old = self.a.diagonal(dim1=1, dim2=2).double(), self.weight.square().sum(1)
        new, layer = change.double().square().sum(1), self.total.sum(1, keepdim=True)
        most = torch.maximum(varied.mean() * torch.maximum(old, old.mean(1, keepdim=True)), layer)
        return (new * varied < NOTHING * self.loss(self, change)) & (new * varied.mean() > most)

    def add(self, other: Problem, rounded: bool) -> Problem:
        """The problem of the rows of both, which have the same weight."""
        n, m = self.count, other.count
        both = (n + m).clamp(min=1)
        # Products about the common mean are those about each part's own, and those of the distance between the two.
        x, y, share = self.x - other.x, self.y - other.y, n * m / both
        rest = y - (self.weight @ x[..., None])[..., 0]
        return replace(
            self, count=n + m, x=(n * self.x + m * other.x) / both, y=(n * self.y + m * other.y) / both,
            a=torch.baddbmm(self.a + other.a, share * x[:, :, None], x[:, None]),
            wanted=torch.baddbmm(self.wanted + other.wanted, share * rest[:, :, None], x[:, None]),
            before=self.before + other.before + share * rest.square(),
            total=self.total + other.total + share * y.square(),
        )._without_constants(rounded)  # fmt: skip

    def to(self, kind: torch.dtype) -> Problem:
        """The problem, to be solved in this dtype."""
        return replace(self, a=self.a.to(kind), wanted=self.wanted.to(kind))

    def outputs(self, which: Tensor) -> Problem:
        """The problem for some outputs alone, `(groups, some)`, of a weight without fixed entries."""
        weight, wanted = (t.take_along_dim(which[..., None], 1) for t in (self.weight, self.wanted))
        y, before, total = (t.gather(1, which) for t in (self.y, self.before, self.total))
        return replace(self, weight=weight, wanted=wanted, y=y, before=before, total=total, fixed=None)

    def constant(self, weight: Tensor) -> Tensor:
        """The best bias next to a weight."""
        return self.y - (weight @ self.x[..., None])[..., 0]

    def loss_with(self, bias: Tensor | None) -> float:
        """The summed squared error of V and a bias on these rows."""
        loss = self.before
        if bias is not None:
            loss = loss + self.count * (self.constant(self.weight) - bias).square()
        return max(float(loss.sum()), 0.0)

    def loss(self, other: Problem, change: Tensor) -> float:
        """The summed squared error of `V + change` on these rows, with the best constant for the rows of `other`."""
        squares = ((change @ self.a - 2 * self.wanted) * change).sum(dtype=torch.float64)
        repaired = self.weight + change
        offset = self.constant(repaired) - other.constant(repaired)
        return max(float(self.before.sum() + squares + self.count * offset.square().sum()), 0.0)

    def solved(self, ridge: float, rounded: bool) -> tuple[Tensor, Problem]:
        """`W - V`, and the problem in the dtype that it was found in: float32 if `A` is rounded to that already and the
        ridge is large enough, else float64."""
        if rounded and ridge >= ROUNDED:
            rough = self.to(torch.float32)
            change = rough.change(ridge)
            if bool(change.isfinite().all()):
                return change, rough
        return self.change(ridge), self

    def change(self, ridge: float) -> Tensor:
        """`W - V` for a ridge."""
        a = self.a.clone()
        diagonal = self.a.diagonal(dim1=1, dim2=2)
        scale = torch.where(diagonal > 0, diagonal, 1.0)  # an input that is constant keeps its weight
        a.diagonal(dim1=1, dim2=2).add_(scale, alpha=ridge)
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
    problem = Problem.of(sums, weight, bias, fixed)
    repaired = weight + problem.change(ridge)
    return repaired, None if bias is None else problem.constant(repaired)


def _gram(x: Tensor) -> Tensor:
    """`x^T x` of (groups, n, u); for many columns, only the upper triangle of blocks is multiplied."""
    u = x.shape[-1]
    if u < 2 * PANEL:
        return x.mT @ x
    gram = x.new_empty(len(x), u, u)
    for start in range(0, u, PANEL):
        panel = slice(start, start + PANEL)
        gram[:, panel, start:] = x[..., panel].mT @ x[..., start:]
        gram[:, start:, panel] = gram[:, panel, start:].mT
    return gram


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
