"""The algebra of axes: the factors that the dimensions of tensors consist of, solved by unification. Source: ours.

axis   = product of factors, outer to inner        view 768 -> 12 x 64 is  h * d;  size 1 is the empty product factor = atom
    | sum of axes                        cat is a sum

An axis is a Python list of `Factor`. A factor is a union-find node: a leaf (an *atom*, a unit that can lose indices), or
bound to a product of finer factors, or to a sum of axes (its *segments*). Unifying two axes makes them the same index
space; whatever cannot be aligned is frozen with a reason, never guessed. Sizes only shrink when factors are split, so
nothing can become cyclic and no occurs check is needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..nodes import source

Axis = list["Factor"]
MAX_CUTS = 64  # most equal pieces that a sum is cut into where its segments do not factor


solving: ContextVar[Any] = ContextVar("solving", default=None)  # the graph node whose equations are being solved


class Misaligned(Exception):
    """Raised where two index spaces have no common refinement."""


@dataclass(frozen=True)
class Reason:
    """Why an atom must not lose indices: the graph node that requires it, the reason, and what to do about it."""

    node: Any
    text: str
    advice: str = ""

    def __str__(self) -> str:
        where = f"{source(self.node)}: " if self.node is not None else ""
        return where + self.text + (f"; {self.advice}" if self.advice else "")


class Factor:
    """A union-find node; a leaf unless `product` or `segments` is set. frozen: the first reason that was given, or None.
    symbolic: whether its size is dynamic."""

    __slots__ = ("frozen", "parent", "product", "segments", "size", "symbolic")

    def __init__(self, size: int, frozen: Reason | None = None, symbolic: bool = False):
        self.size = size
        self.frozen = frozen
        self.symbolic = symbolic
        self.parent: Factor | None = None
        self.product: Axis | None = None
        self.segments: list[Axis] | None = None


def find(factor: Factor) -> Factor:
    """The representative of all factors that were unified with this one."""
    root = factor
    while root.parent is not None:
        root = root.parent
    while factor.parent is not None:
        factor.parent, factor = root, factor.parent
    return root


def size(axis: Axis) -> int:
    """Number of indices of an axis: the product of its factors' sizes, 1 for the empty product."""
    return math.prod([factor.size for factor in axis])


def fresh(n: int, frozen: Reason | None = None, symbolic: bool = False) -> Axis:
    """A new axis of size n: one atom, or the empty product for size 1."""
    return [] if n == 1 and not symbolic else [Factor(n, frozen, symbolic)]


def normal(axis: Axis) -> Axis:
    """The axis as atoms and sums: products are expanded, and factors of size 1 dropped."""
    result: Axis = []
    for factor in axis:
        if factor.parent is not None:
            factor = find(factor)
        if factor.product is not None:
            result += normal(factor.product)
        elif factor.size != 1:
            result.append(factor)
    return result


def segments(factor: Factor) -> list[Axis]:
    """The segments of a sum; nested sums are flattened and leading sums distributed, (a + b)*d = a*d + b*d."""
    result: list[Axis] = []
    for axis in factor.segments or ():
        result += _distributed(axis)
    return result


def _distributed(axis: Axis) -> list[Axis]:
    axis = normal(axis)
    if axis and axis[0].segments is not None:
        return [s + axis[1:] for s in segments(axis[0])]
    return [axis]


def total(parts: list[Axis]) -> Axis:
    """The sum of axes (concatenation of index spaces), without empty ones."""
    parts = [p for p in parts if size(p)] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    factor = Factor(sum(size(p) for p in parts))
    factor.segments = list(parts)
    return [factor]


def freeze(axis: Axis, reason: Reason) -> None:
    """Forbid removing anything along the axis. Where a reason was given before, it stays."""
    for factor in normal(axis):
        if factor.frozen is None:
            factor.frozen = reason
            for part in factor.segments or ():
                freeze(part, reason)


def atoms(axes: Iterable[Axis], into: dict[Factor, None] | None = None) -> dict[Factor, None]:
    """All atoms in the axes, in order of first appearance."""
    into = {} if into is None else into
    for axis in axes:
        for factor in normal(axis):
            if factor.segments is None:
                into[factor] = None
            else:
                atoms(factor.segments, into)
    return into


# ------------------------------------------------------------------------------------------------------------ splitting
def split_factor(factor: Factor, n: int) -> tuple[Axis, Axis]:
    """Bind the factor to outer * inner with size(inner) == n, and return the two. Raises Misaligned for a sum that does not
    factor."""
    if factor.segments is None:
        outer = [Factor(factor.size // n, factor.frozen, factor.symbolic)]
        inner = [Factor(n, factor.frozen, factor.symbolic)]
    else:
        parts = segments(factor)
        if all(size(p) % n == 0 for p in parts):  # every segment factors: (a + b)*d
            outers, pieces = zip(*(take_inner(p, n) for p in parts), strict=True)
            outer, inner = total(list(outers)), pieces[0]
        else:  # cut into equal pieces: d + d + ... = (1 + 1 + ...)*d
            k = factor.size // n
            if k > MAX_CUTS:
                raise Misaligned(f"a sum of {[size(p) for p in parts]} does not factor by {n}")
            pieces, rest = (), [factor]
            for _ in range(k - 1):
                left, rest = split_at(rest, n)
                pieces += (left,)
            pieces += (rest,)
            outer, inner = [Factor(k)], pieces[0]
            outer[0].segments = [[] for _ in range(k)]
        for piece in pieces[1:]:
            unify(inner, piece)
    factor.product = outer + inner
    factor.segments = None
    return outer, inner


def take_inner(axis: Axis, n: int) -> tuple[Axis, Axis]:
    """Split the axis into outer * inner with size(inner) == n.

    If a boundary falls inside a factor, the smallest run of adjacent factors that contains it is frozen and regrouped.
    Raises Misaligned if no run does.
    """
    axis = normal(axis)
    inner: Axis = []
    while n > 1:
        if not axis:
            raise Misaligned("sizes differ")
        factor = axis.pop()
        if n % factor.size == 0:
            inner, n = [factor, *inner], n // factor.size
        elif factor.size % n == 0:
            outer, cut = split_factor(factor, n)
            return normal(axis + outer), normal(cut + inner)
        else:
            run = [factor]
            while axis and size(run) % n:
                run.insert(0, axis.pop())
            if size(run) % n:
                raise Misaligned(f"a boundary of {n} falls inside a factor of {factor.size}")
            reason = Reason(solving.get(), f"regrouping {size(run)} by {n} cuts across factors {[f.size for f in run]}")
            freeze(run, reason)
            symbolic = any(f.symbolic for f in run)
            axis += fresh(size(run) // n, reason, symbolic)
            inner, n = [Factor(n, reason, symbolic), *inner], 1
    return normal(axis), normal(inner)


def split_at(axis: Axis, offset: int) -> tuple[Axis, Axis]:
    """Split the axis as a sum at an offset strictly inside it. If the boundary falls inside a product, one index of the
    outer factor is isolated and the axis under it is split."""
    axis = normal(axis)
    factor, rest = axis[0], axis[1:]
    inner = size(rest)
    if offset % inner == 0:
        k = offset // inner
        if factor.segments is None:
            left = Factor(k, factor.frozen, factor.symbolic)
            right = Factor(factor.size - k, factor.frozen, factor.symbolic)
            factor.segments = [[left], [right]]
            return [left, *rest], [right, *rest]
        before, after = [], segments(factor)
        while k and size(after[0]) <= k:
            k -= size(after[0])
            before.append(after.pop(0))
        if k:
            low, high = split_at(after[0], k)
            before, after = [*before, low], [high, *after[1:]]
        return total(before) + rest, total(after) + rest
    q = offset // inner
    head, one, tail = cut([factor], [q, 1, factor.size - q - 1])
    low, high = split_at(one + rest, offset - q * inner)
    return total([head + rest, low]), total([high, tail + rest])


def cut(axis: Axis, sizes: list[int]) -> list[Axis]:
    """The axis as consecutive pieces of the given sizes, whose sum is its size (zeros allowed)."""
    pieces, rest = [], axis
    for n in sizes:
        if n == 0:
            pieces.append(fresh(0))
        elif n == size(rest):
            pieces.append(rest)
            rest = fresh(0)
        else:
            piece, rest = split_at(rest, n)
            pieces.append(piece)
    return pieces


# ----------------------------------------------------------------------------------------------------------- unification
def unify(a: Axis, b: Axis) -> None:
    """Make two axes of equal size the same index space, from the innermost factor outwards.

    Products get their common refinement, sums align their segments. The smallest run of adjacent factors that cannot be
    aligned is frozen on both sides. Raises Misaligned, without changes, for axes of unequal sizes.
    """
    a, b = normal(a), normal(b)
    if size(a) != size(b):
        raise Misaligned(f"an axis of size {size(a)} cannot be the same as one of size {size(b)}")
    while a and b:
        x, y = a.pop(), b.pop()
        if x is y:
            continue
        try:
            if x.size == y.size:
                _join(x, y)
            elif x.size % y.size == 0:
                outer, inner = split_factor(x, y.size)
                a += outer
                unify(inner, [y])
            elif y.size % x.size == 0:
                outer, inner = split_factor(y, x.size)
                b += outer
                unify(inner, [x])
            else:
                raise Misaligned(f"{x.size} against {y.size}")
        except Misaligned as error:
            run_a, run_b = [x], [y]
            while size(run_a) != size(run_b):
                if size(run_a) < size(run_b):
                    run_a.insert(0, a.pop())
                else:
                    run_b.insert(0, b.pop())
            freeze(run_a + run_b, Reason(solving.get(), f"its operands do not align ({error})"))
        a, b = normal(a), normal(b)


def _join(x: Factor, y: Factor) -> None:
    if x.segments is not None and y.segments is None:
        x, y = y, x
    if x.segments is None:
        y.symbolic = y.symbolic and x.symbolic
        return _bind(x, y)
    left, right = segments(x)[::-1], segments(y)[::-1]
    while left and right:
        p, q = left.pop(), right.pop()
        n, m = size(p), size(q)
        if n > m:
            p, more = split_at(p, m)
            left.append(more)
        elif m > n:
            q, more = split_at(q, n)
            right.append(more)
        unify(p, q)
    x, y = find(x), find(y)
    if x is not y and x.segments is not None and y.segments is not None:
        if len(segments(x)) > len(segments(y)):
            x, y = y, x
        _bind(x, y)


def _bind(x: Factor, y: Factor) -> None:
    """Make y the representative of x."""
    x.parent = y
    if x.frozen is not None:
        freeze([y], x.frozen)


# ------------------------------------------------------------------------------------------------------------ evaluation
Sizes = Mapping[Factor, int]
Masks = Mapping[Factor, np.ndarray]


def kept_size(axis: Axis, sizes: Sizes) -> int:
    """Size of the axis if each atom in `sizes` has the given size."""
    kept = [
        sizes.get(f, f.size) if f.segments is None else sum(kept_size(part, sizes) for part in f.segments)
        for f in normal(axis)
    ]
    return math.prod(kept)


def kept_mask(axis: Axis, masks: Masks) -> np.ndarray:
    """The indices of the axis that stay (bool, length size(axis)) if each atom keeps those of its mask."""
    result = np.ones(1, dtype=bool)
    for factor in normal(axis):
        if factor.segments is not None:
            mask = np.concatenate([kept_mask(part, masks) for part in factor.segments])
        else:
            mask = masks[factor] if factor in masks else np.ones(factor.size, dtype=bool)
        result = mask if len(result) == 1 else np.logical_and.outer(result, mask).reshape(-1)
    return result


def touches(axis: Axis, changed: Mapping[Factor, Any]) -> bool:
    """Whether any atom of the axis is in `changed`."""
    return any(atom in changed for atom in atoms([axis]))


def fold(axis: Axis, values: np.ndarray, sums: dict[Factor, np.ndarray]) -> None:
    """Add `values` (one number per index of the axis) to each atom's indices in `sums`, summed over all other factors."""
    factors = normal(axis)
    sizes = [f.size for f in factors]
    grid = values.reshape(sizes) if sizes else values
    for i, factor in enumerate(factors):
        along = grid.sum(axis=tuple(j for j in range(len(sizes)) if j != i))
        if factor.segments is None:
            sums[factor] = sums[factor] + along if factor in sums else along
            continue
        ends = np.cumsum([size(part) for part in factor.segments])
        for part, piece in zip(factor.segments, np.split(along, ends[:-1]), strict=True):
            fold(part, piece, sums)


def monomials(axis: Axis) -> list[tuple[Factor, ...]]:
    """The axis multiplied out: a list of products of atoms, whose sizes add up to the axis's."""
    factors = [
        [(f,)] if f.segments is None else [m for part in f.segments for m in monomials(part)] for f in normal(axis)
    ]
    return [tuple(itertools.chain(*parts)) for parts in itertools.product(*factors)]


def show(axis: Axis, name: Any = None) -> str:
    """The axis as text, `12·64`, `(16+16)·4`, frozen atoms marked with `!`."""

    def one(factor: Factor) -> str:
        if factor.segments is not None:
            return "(" + "+".join(show(part, name) for part in factor.segments) + ")"
        label = name(factor) if name else str(factor.size)
        return label + ("!" if factor.frozen else "")

    return "·".join(one(f) for f in normal(axis)) or "1"
