"""The squared error of a linear map on some rows, as a function of the change of its weight.

Names are those of `least_squares`. From sums over the rows (`FromSums`) the best change for a ridge is

(B - V A) (A + lambda D)^-1,

and the same from the rows themselves (`FromRows`), with Z (n, u) their inputs and E (n, o) what V leaves of their outputs,

E^T (Z D^-1 Z^T + lambda)^-1 Z D^-1,

which takes n x n instead of u x u numbers. Source: the matrix inversion lemma.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

ROUNDED = 1e-5  # the least ridge for products in float32, above their rounding errors
NOTHING = 1e-2  # a change that puts out less than this share of the squared error that is left gains next to nothing
FLAT = 32  # units of rounding, of its mean, below which the deviation of an input is that of a constant


@dataclass(frozen=True)
class Problem(ABC):
    """The squared error for some rows and any change of the weight.

    weight: V, (groups, o, u). count: number of rows. x, y: the means of inputs (groups, u) and outputs (groups, o), zeros
    without a bias to take them up. before, total: (groups, o), the squared error of each output with V and the best
    constant, and with the best constant alone.
    """

    weight: Tensor
    count: Tensor
    x: Tensor
    y: Tensor
    before: Tensor
    total: Tensor

    @property
    @abstractmethod
    def varied(self) -> Tensor:
        """The sum of the squares of each input (groups, u), about its mean if there is a bias."""

    @property
    def masked(self) -> bool:
        """Whether entries of the weight stay as they are."""
        return False

    @abstractmethod
    def gained(self, change: Tensor) -> Tensor:
        """By how much the squared error of each output (groups, o) is larger with a change, next to the best constant."""

    @abstractmethod
    def change(self, ridge: float) -> Tensor:
        """`W - V` for a ridge."""

    @abstractmethod
    def without(self, which: Tensor) -> Self:
        """The problem in which some inputs, `(groups, u)`, keep their weights."""

    @abstractmethod
    def add(self, other: Self, rounded: bool) -> Self:
        """The problem of the rows of both, which have the same weight."""

    @abstractmethod
    def outputs(self, which: Tensor) -> Self:
        """The problem for some outputs alone, `(groups, some)`, of a weight without fixed entries."""

    def to(self, kind: torch.dtype) -> Self:
        """The problem, to be solved in this dtype where that makes it faster."""
        return self

    def solved(self, ridge: float, rounded: bool) -> tuple[Tensor, Self]:
        """`W - V`, and the problem in the dtype that it was found in. rounded: whether the rows had float32."""
        return self.change(ridge), self

    def without_constants(self, rounded: bool) -> Self:
        """The problem in which inputs that only vary by rounding errors count as constant: they keep their weights."""
        least = (FLAT * torch.finfo(torch.float32 if rounded else torch.float64).eps) ** 2
        return self.without(self.varied <= least * (self.varied + self.count * self.x.square()))

    def constant(self, weight: Tensor) -> Tensor:
        """The best bias next to a weight."""
        return self.y - (weight @ self.x[..., None])[..., 0]

    def loss_with(self, bias: Tensor | None) -> float:
        """The summed squared error of V and a bias on these rows."""
        loss = self.before
        if bias is not None:
            loss = loss + self.count * (self.constant(self.weight) - bias).square()
        return max(float(loss.sum()), 0.0)

    def loss(self, other: Self, change: Tensor) -> float:
        """The summed squared error of `V + change` on these rows, with the best constant for the rows of `other`."""
        repaired = self.weight + change
        offset = self.constant(repaired) - other.constant(repaired)
        return max(float((self.before + self.gained(change) + self.count * offset.square()).sum()), 0.0)

    def unproven(self, change: Tensor) -> Tensor:
        """Inputs `(groups, u)` whose change puts out next to nothing on these rows, but on images where they vary as the
        layer's inputs do on average more than the layer does, and than the old weights would.

        Such are channels that are active in a few rows, which determine a weight of any size: a depthwise kernel may
        become a thousand times as large, and no held-out row would tell.
        """
        old, new, usual = self.weight.square().sum(1), change.double().square().sum(1), self.varied.mean()
        most = torch.maximum(usual * torch.maximum(old, old.mean(1, keepdim=True)), self.total.sum(1, keepdim=True))
        large = new * usual > most
        return large & (new * self.varied < NOTHING * self.loss(self, change)) if bool(large.any()) else large

    def _joined(self, other: Self) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """The fields for the rows of both, the distances of their means, `x` and `y - V x`, and the weight that products of
        these have in sums about the common mean."""
        n, m = self.count, other.count
        both = (n + m).clamp(min=1)
        x, y, share = self.x - other.x, self.y - other.y, n * m / both
        rest = y - (self.weight @ x[..., None])[..., 0]
        fields = {
            "count": n + m, "x": (n * self.x + m * other.x) / both, "y": (n * self.y + m * other.y) / both,
            "before": self.before + other.before + share * rest.square(),
            "total": self.total + other.total + share * y.square(),
        }  # fmt: skip
        return fields, x, rest, share


@dataclass(frozen=True)
class FromSums(Problem):
    """a: A, (groups, u, u). wanted: B - V A, (groups, o, u). fixed: entries of the weight that stay, or None. What float32
    cannot solve becomes NaN, if `a` and `wanted` are float32; all else is float64."""

    a: Tensor
    wanted: Tensor
    fixed: Tensor | None = None

    @property
    def varied(self) -> Tensor:
        return self.a.diagonal(dim1=1, dim2=2).double()

    @property
    def masked(self) -> bool:
        return self.fixed is not None and bool(self.fixed.any())

    def gained(self, change: Tensor) -> Tensor:
        return ((change @ self.a - 2 * self.wanted) * change).sum(2, dtype=torch.float64)

    def without(self, which: Tensor) -> FromSums:
        if not bool(which.any()):
            return self
        a = self.a * ~which[:, :, None] * ~which[:, None]
        return replace(self, a=a, wanted=self.wanted * ~which[:, None])

    def add(self, other: FromSums, rounded: bool) -> FromSums:
        # Products about the common mean are those about each part's own, and those of the distance between the two.
        fields, x, rest, share = self._joined(other)
        a = torch.baddbmm(self.a + other.a, share * x[:, :, None], x[:, None])
        wanted = torch.baddbmm(self.wanted + other.wanted, share * rest[:, :, None], x[:, None])
        return replace(self, a=a, wanted=wanted, **fields).without_constants(rounded)

    def to(self, kind: torch.dtype) -> FromSums:
        return replace(self, a=self.a.to(kind), wanted=self.wanted.to(kind))

    def outputs(self, which: Tensor) -> FromSums:
        weight, wanted = (t.take_along_dim(which[..., None], 1) for t in (self.weight, self.wanted))
        y, before, total = (t.gather(1, which) for t in (self.y, self.before, self.total))
        return replace(self, weight=weight, wanted=wanted, y=y, before=before, total=total, fixed=None)

    def solved(self, ridge: float, rounded: bool) -> tuple[Tensor, FromSums]:
        # If `A` is rounded to float32 already and the ridge is large enough, that is exact enough.
        if rounded and ridge >= ROUNDED:
            rough = self.to(torch.float32)
            change = rough.change(ridge)
            if bool(change.isfinite().all()):
                return change, rough
        return self.change(ridge), self

    def change(self, ridge: float) -> Tensor:
        a = self.a.clone()
        diagonal = self.a.diagonal(dim1=1, dim2=2)
        a.diagonal(dim1=1, dim2=2).add_(_scale(diagonal), alpha=ridge)
        if self.fixed is None or not self.masked:
            return _divided(a, self.wanted)
        change = torch.zeros_like(self.wanted)
        for group in range(len(change)):
            # Rows with the same free entries are solved together, with these entries as unknowns.
            patterns, which = torch.unique(~self.fixed[group], dim=0, return_inverse=True)
            for i, free in enumerate(patterns):
                rows = (which == i).nonzero()[:, 0]
                columns = free.nonzero()[:, 0]
                if len(columns):
                    part = _divided(a[group][columns][:, columns][None], self.wanted[group][rows][:, columns][None])
                    change[group][rows[:, None], columns] = part[0]
        return change


@dataclass(frozen=True)
class FromRows(Problem):
    """z: Z, (groups, n, u), and rest: E, (groups, n, o), both less their means if there is a bias."""

    z: Tensor
    rest: Tensor

    @property
    def varied(self) -> Tensor:
        return self.z.square().sum(1)

    def gained(self, change: Tensor) -> Tensor:
        return (self.rest - self.z @ change.mT).square().sum(1) - self.before

    def without(self, which: Tensor) -> FromRows:
        return replace(self, z=self.z * ~which[:, None]) if bool(which.any()) else self

    def add(self, other: FromRows, rounded: bool) -> FromRows:
        fields, x, rest, _ = self._joined(other)
        # Each part's own mean, seen from the common one.
        first, second = (part.count / fields["count"].clamp(min=1) for part in (other, self))
        z = torch.cat([self.z + first * x[:, None], other.z - second * x[:, None]], 1)
        e = torch.cat([self.rest + first * rest[:, None], other.rest - second * rest[:, None]], 1)
        return replace(self, z=z, rest=e, **fields).without_constants(rounded)

    def outputs(self, which: Tensor) -> FromRows:
        weight, rest = self.weight.take_along_dim(which[..., None], 1), self.rest.take_along_dim(which[:, None], 2)
        y, before, total = (t.gather(1, which) for t in (self.y, self.before, self.total))
        return replace(self, weight=weight, rest=rest, y=y, before=before, total=total)

    def change(self, ridge: float) -> Tensor:
        scaled = self.z / _scale(self.varied)[:, None]
        gram = scaled @ self.z.mT
        gram.diagonal(dim1=1, dim2=2).add_(ridge)
        return _divided(gram, self.rest.mT) @ scaled


def _scale(varied: Tensor) -> Tensor:
    """D, with which an input that is constant keeps its weight."""
    return torch.where(varied > 0, varied, 1.0)


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
