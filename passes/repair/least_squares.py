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
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .problems import ROUNDED, FromRows, FromSums, Problem

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
START = 1e-2  # the ridge where the choice begins
ALONE = 1e-2  # the ridge for a single sample, where nothing can be held out
EXACT = 1e-14  # a loss below this share of the outputs' squares is a rounding error
WORTH = 1e-3  # a larger ridge is preferred while its loss on held-out samples is at most this share higher
DECIDE = 128  # outputs whose losses decide about the ridge, if there are at least twice as many
PANEL = 256  # columns of a product that are computed at a time
BLOCK = 4096  # rows that are multiplied, perhaps in float32, before their sum is added in float64


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
        s, s_y = x.sum(1).double(), y.sum(1).double()
        mean, mean_y = mean[:, 0].double() + s / n, mean_y[:, 0].double() + s_y / n
        # Further, what the distance of both means adds (Chan et al., 1983).
        earlier, earlier_y = self.means()
        d, d_y, share = mean - earlier, mean_y - earlier_y, self.count * n / (self.count + n)
        right = torch.stack([s, d], 1)
        self.xx += _gram(x)
        self.xx.baddbmm_(torch.stack([-s / n, share * d], 2), right)
        self.yx += y.mT @ x
        self.yx.baddbmm_(torch.stack([-s_y / n, share * d_y], 2), right)
        self.yy += y.square().sum(1, dtype=torch.float64) - s_y.square() / n + share * d_y.square()
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
        """Whether all rows, and with the squares all products, are finite numbers."""
        squares = self.xx.diagonal(dim1=1, dim2=2)
        return all(bool(t.isfinite().all()) for t in (self.count, self.x, self.y, squares, self.yy))

    @property
    def squares(self) -> float:
        """The sum of the squares of all y."""
        return float((self.yy + self.count * self.means()[1].square()).sum())

    def problem(self, weight: Tensor, bias: Tensor | None, fixed: Tensor | None = None) -> Problem:
        """What `fit` asks of these rows."""
        a, b, total, (x, y) = self.xx, self.yx, self.yy, self.means()
        if bias is None:
            a, b = (
                torch.baddbmm(products, mean[:, :, None], x[:, None], alpha=float(self.count))
                for products, mean in ((a, x), (b, y))
            )
            total = total + self.count * y.square()
            x, y = torch.zeros_like(x), torch.zeros_like(y)
        wanted = b - weight @ a
        before = total - (weight * (b + wanted)).sum(2)
        problem = FromSums(weight, self.count, x, y, before, total, a, wanted, fixed)
        return problem.without_constants(self.rounded)


class Stack:
    """The rows themselves, where they are fewer than the inputs; in one process they serve as `Sums` do.

    xs: (groups, n, u) and ys: (groups, n, o) of each addition, in float64.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device):
        self.xs = [torch.zeros(groups, 0, inputs, dtype=torch.float64, device=device)]
        self.ys = [torch.zeros(groups, 0, outputs, dtype=torch.float64, device=device)]
        self.rounded = False

    def add(self, x: Tensor, y: Tensor) -> None:
        """See `Sums.add`."""
        self.rounded |= torch.float64 not in (x.dtype, y.dtype)
        self.xs.append(x.double())
        self.ys.append(y.double())

    @property
    def count(self) -> Tensor:
        return self.xs[0].new_tensor(sum(x.shape[1] for x in self.xs))

    @property
    def finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in (*self.xs, *self.ys))

    @property
    def squares(self) -> float:
        """The sum of the squares of all y."""
        return float(sum(y.square().sum() for y in self.ys))

    def problem(self, weight: Tensor, bias: Tensor | None, fixed: Tensor | None = None) -> Problem:
        """What `fit` asks of these rows. No entry of the weight may be fixed."""
        if fixed is not None and bool(fixed.any()):
            raise ValueError("fixed entries need sums")
        z, goal = torch.cat(self.xs, 1), torch.cat(self.ys, 1)
        if bias is None:
            x, y = torch.zeros_like(z.sum(1)), torch.zeros_like(goal.sum(1))
        else:
            x, y = (rows.sum(1) / self.count.clamp(min=1) for rows in (z, goal))
            z, goal = z - x[:, None], goal - y[:, None]
        rest = goal - z @ weight.mT
        problem = FromRows(weight, self.count, x, y, rest.square().sum(1), goal.square().sum(1), z, rest)
        return problem.without_constants(self.rounded)


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
    halves: tuple[Sums, Sums] | tuple[Stack, Stack],
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
    noise = EXACT * sum(half.squares for half in halves)
    judged, cautious = all(half.count > 0 for half in halves), ridge is None
    problems = [half.problem(weight, bias, fixed) for half in halves]
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
    if whole.before.shape[1] < 2 * DECIDE or whole.masked:
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


def solve(
    sums: Sums, weight: Tensor, bias: Tensor | None, ridge: float, fixed: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The weights and bias of the module's formula for a ridge."""
    problem = sums.problem(weight, bias, fixed)
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
