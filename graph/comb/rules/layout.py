"""Rules of operators that move entries without computing: regroup, reorder, concatenate, cut, repeat, pad."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...nodes import arguments, hint, moved, op_name, shape
from ..axes import Axis, Misaligned, Reason, atoms, cut, freeze, fresh, normal, size, take_inner, total
from ..equations import Equations, Sizes
from .registry import Arguments, NoRule, either, rule


def regroup(c: Equations, node: fx.Node, axes: list[Axis], sizes: tuple[int, ...]) -> list[Axis]:
    """The axes of a tensor as one row-major sequence, cut into dimensions of the given sizes."""
    flat = normal([factor for axis in axes for factor in axis])
    result: list[Axis] = [[] for _ in sizes]
    for d in reversed(range(len(sizes))):
        try:
            flat, result[d] = take_inner(flat, sizes[d])
        except Misaligned as error:
            c.freeze([f for axis in axes for f in axis], node, f"{op_name(node)} cannot be followed ({error})")
            for k in range(d + 1):
                result[k] = c.frozen(node, k, f"{op_name(node)} cannot be followed")
            return result
        flat = normal(flat)
    for d, n in enumerate(node.meta["val"].shape):
        if not isinstance(n, int) and not any(atom.symbolic for atom in atoms([result[d]])):
            raise Misaligned(f"the dynamic dimension {d} of the result is made of fixed sizes")
    return result


SIZE_ARGUMENT = {"view": "size", "reshape": "shape", "_unsafe_view": "size"}


@rule(
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "ravel", "view_as", "reshape_as", "unsqueeze", "squeeze"
)
def view(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    name = op_name(node)
    if name == "view" and "size" not in a:
        raise NoRule("view as another dtype")
    xs = c.axes[a["self"]]
    result = regroup(c, node, xs, shape(node))
    if name in SIZE_ARGUMENT:
        c.resize(node, SIZE_ARGUMENT[name], result)
    elif name == "unflatten":
        d = a["dim"] % len(xs)
        c.resize(node, "sizes", result[d : d + len(a["sizes"])])
    elif name.endswith("_as"):
        c.unify_all(result, c.axes[a["other"]])
    elif name == "squeeze":
        # `squeeze` removes every dimension of size 1, also an axis that is pruned down to 1, so name the dimensions.
        named = a.get("dim", range(len(xs)))
        asked = {d % len(xs) for d in ([named] if isinstance(named, int) else named)} if xs else set()
        dims = [d for d in sorted(asked) if shape(a["self"])[d] == 1]

        def name_dims(s: Sizes, m: fx.Node) -> None:
            m.target = torch.ops.aten.squeeze.dims
            m.args, m.kwargs = (m.args[0], dims), {}

        if len(dims) < len(asked):
            c.rewrite(node, name_dims)
    return result


@rule("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "numpy_T", "mT")
def permute(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    return [c.axes[a["self"]][d] for d in moved(node)]


@rule("cat", "concat", "concatenate", "hstack", "vstack")
def cat(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    rank, tensors = len(shape(node)), [t for t in a["tensors"] if shape(t) != (0,)]
    if any(len(shape(t)) != rank for t in tensors):
        raise NoRule("tensors of several ranks")
    d = a["dim"] % rank if "dim" in a else min(1, rank - 1) if op_name(node) == "hstack" else 0
    c.joins(node)
    first = c.axes[tensors[0]]
    for other in tensors[1:]:
        for k, axis in enumerate(c.axes[other]):
            if k != d:
                c.unify(first[k], axis)
    return [total([c.axes[t][d] for t in tensors]) if k == d else axis for k, axis in enumerate(first)]


@rule("stack")
def stack(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    tensors = a["tensors"]
    d = a["dim"] % len(shape(node))
    c.joins(node)
    first = c.axes[tensors[0]]
    for other in tensors[1:]:
        c.unify_all(first, c.axes[other])
    return [*first[:d], total([[] for _ in tensors]) if len(tensors) > 1 else [], *first[d:]]


def pieces(c: Equations, node: fx.Node, axis: Axis, sizes: list[int]) -> list[Axis]:
    """Cut an axis; if that cannot be followed, freeze it and return frozen pieces."""
    try:
        return cut(axis, sizes)
    except Misaligned as error:
        reason = Reason(node, f"{op_name(node)} cannot be followed ({error})")
        freeze(axis, reason)
        return [fresh(n, reason) for n in sizes]


@rule(
    "split", "chunk", "split_with_sizes", "unbind", "tensor_split", "unsafe_split", "unsafe_chunk",
    "unsafe_split_with_sizes",
)  # fmt: skip
def split(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs = c.axes[a["self"]]
    d = a["dim"] % len(xs)
    values = node.meta["val"]
    if op_name(node) == "unbind":
        pieces(c, node, xs[d], [1] * len(values))
        return [xs[:d] + xs[d + 1 :] for _ in values]
    parts = pieces(c, node, xs[d], [hint(v.shape[d]) for v in values])

    def spell_out(s: Sizes, m: fx.Node) -> None:
        if not s.full(xs[d]):
            m.target = torch.ops.aten.split_with_sizes.default
            m.args, m.kwargs = (m.args[0], [s.size(p) for p in parts], d), {}

    c.rewrite(node, spell_out)
    return [[*xs[:d], part, *xs[d + 1 :]] for part in parts]


def span(a: Arguments) -> tuple[int, int, int, int]:
    """For a slice, narrow, select or their scatter: the dimension, its size n, and start and end as numbers from 0 to n."""
    sizes = shape(a["self"])
    d = a["dim"] % len(sizes)
    n = sizes[d]
    if "index" in a:
        return d, n, hint(a["index"]) % n, hint(a["index"]) % n + 1
    if "length" in a:
        low = hint(a["start"]) % n if n else 0
        return d, n, low, low + hint(a["length"])
    start, end = (None if a.get(key) is None else hint(a[key]) for key in ("start", "end"))
    return d, n, *slice(start, end).indices(n)[:2]


def follow(c: Equations, node: fx.Node, axis: Axis, before: Axis, part: Axis) -> None:
    """After removal, the node reads or writes what is left of `part`, which begins after what is left of `before`."""

    def move(s: Sizes, m: fx.Node) -> None:
        if not s.full(axis):
            place(s, m, s.size(before), s.size(part))

    c.rewrite(node, move)


@rule("slice", "narrow")
def slice_(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs = c.axes[a["self"]]
    d, n, low, high = span(a)
    if (a.get("step") or 1) != 1:
        return strided(c, node, xs, d, n, low, high, a["step"])
    if low >= high:  # nothing is read, so the slice imposes nothing
        c.rewrite(node, lambda s, m: place(s, m, 0, 0))
        return [*xs[:d], c.frozen(node, d, "an empty slice"), *xs[d + 1 :]]
    if (low, high) == (0, n):
        if isinstance(a["self"].meta["val"].shape[d], int):
            c.rewrite(node, lambda s, m: place(s, m, 0, s.size(xs[d])))
        return xs
    moving = not isinstance(node.meta["val"].shape[d], int)
    if moving and all(atom.frozen for atom in atoms([xs[d]])):  # a cut at the example's size would mean nothing
        return [*xs[:d], c.frozen(node, d, "a slice of dynamic length"), *xs[d + 1 :]]
    before, part, _ = pieces(c, node, xs[d], [low, high - low, n - high])
    if moving and not any(atom.symbolic for atom in atoms([part])):
        c.freeze(xs[d], node, "a slice of dynamic length")
        return [*xs[:d], c.frozen(node, d, "a slice of dynamic length"), *xs[d + 1 :]]
    follow(c, node, xs[d], before, part)
    return [*xs[:d], part, *xs[d + 1 :]]


def place(s: Sizes, m: fx.Node, start: int, length: int) -> None:
    """Give a slice, narrow, select or their scatter other indices."""
    if "index" in (a := arguments(m)):
        return s.assign(m, "index", start)
    s.assign(m, "start", start)
    if "length" in a:
        s.assign(m, "length", length)
    else:
        s.assign(m, "end", start + length)


def strided(c: Equations, node: fx.Node, xs: list[Axis], d: int, n: int, low: int, high: int, step: int) -> list[Axis]:
    """`x[low::step]` takes one index of the inner factor of outer * step if it takes all indices of the outer one."""
    if n % step == 0 and low < step and high > n - step + low:
        try:
            outer, inner = take_inner(xs[d], step)
        except Misaligned as error:
            c.freeze(xs[d], node, f"a strided slice cannot be followed ({error})")
        else:
            c.freeze(inner, node, "a strided slice takes one index of it")
            return [*xs[:d], outer, *xs[d + 1 :]]
    c.freeze(xs[d], node, "a strided slice along the axis")
    return [*xs[:d], c.frozen(node, d, "a strided slice along the axis"), *xs[d + 1 :]]


@rule("select")
def select(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs = c.axes[a["self"]]
    d, n, low, high = span(a)
    before, part, _ = pieces(c, node, xs[d], [low, 1, n - high])
    follow(c, node, xs[d], before, part)
    return xs[:d] + xs[d + 1 :]


@rule("slice_scatter", "select_scatter")
def scatter(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs, src = c.axes[a["self"]], c.axes[a["src"]]
    d, n, low, high = span(a)
    if op_name(node) == "select_scatter":
        src = [*src[:d], [], *src[d:]]
    if (a.get("step") or 1) != 1 or low >= high:
        raise NoRule("a strided or empty write")
    c.joins(node)
    before, part, _ = pieces(c, node, xs[d], [low, high - low, n - high])
    c.unify_all([*xs[:d], part, *xs[d + 1 :]], src)
    follow(c, node, xs[d], before, part)
    return xs


@rule("repeat", "tile")
def repeat(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    key = "dims" if op_name(node) == "tile" else "repeats"
    xs = c.axes[a["self"]]
    missing = [1] * max(0, len(xs) - len(a[key]))  # tile may leave out leading dimensions
    repeats = [*missing, *a[key]]
    counts = [hint(r) for r in repeats]
    times = [fresh(n, None, not isinstance(r, int)) for n, r in zip(counts, repeats, strict=True)]
    c.copies(node, times, "multiplier")
    shift = len(counts) - len(xs)
    symbolic = [not isinstance(r, int) for r in repeats]

    def regenerate(s: Sizes, m: fx.Node) -> None:
        old = [*missing, *arguments(m)[key]]
        s.assign(m, key, [n if sym else s.size(t) for n, sym, t in zip(old, symbolic, times, strict=True)])

    c.rewrite(node, regenerate)
    return [times[d] + (xs[d - shift] if d >= shift else []) for d in range(len(counts))]


@rule("repeat_interleave")
def repeat_interleave(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    if not isinstance(a.get("repeats"), int) or a.get("dim") is None:
        raise NoRule("repeat_interleave with counts that are data, or of the flattened tensor")
    xs, times = c.axes[a["self"]], fresh(a["repeats"])
    d = a["dim"] % len(xs)
    c.copies(node, [times], "multiplier")

    def regenerate(s: Sizes, m: fx.Node) -> None:
        s.assign(m, "repeats", s.size(times))
        if a.get("output_size") is not None:
            s.assign(m, "output_size", None)

    c.rewrite(node, regenerate)
    return [*xs[:d], xs[d] + times, *xs[d + 1 :]]


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def pad(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs = list(c.axes[a["self"]])
    amounts = [hint(p) for p in either(a, "pad", "padding")]
    constant = op_name(node) in ("pad", "constant_pad_nd") and (a.get("mode") or "constant") == "constant"
    placed: dict[int, tuple[Axis, Axis]] = {}
    for j in range(len(amounts) // 2):
        d, low, high = len(xs) - 1 - j, amounts[2 * j], amounts[2 * j + 1]
        if low == high == 0:
            continue
        if not constant or low < 0 or high < 0 or not isinstance(node.meta["val"].shape[d], int):
            c.freeze(xs[d], node, "padding along the axis")
            xs[d] = c.frozen(node, d, "padding along the axis")
            continue
        placed[j] = (fresh(low), fresh(high))
        c.copies(node, [part for part in placed[j] if size(part)], "constant")
        xs[d] = total([placed[j][0], xs[d], placed[j][1]])

    def regenerate(s: Sizes, m: fx.Node) -> None:
        values = list(arguments(m)["pad"])  # the amounts of dynamic dimensions stay nodes
        for j, (low, high) in placed.items():
            values[2 * j : 2 * j + 2] = s.size(low), s.size(high)
        s.assign(m, "pad", values)

    if placed:
        c.rewrite(node, regenerate)
    return xs


@rule("new_zeros", "new_ones", "new_full", "new_empty", "zeros", "ones", "full", "empty")
def constant(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    """A uniform tensor, which can lose any index."""
    result = [c.fresh(node, d) for d in range(len(shape(node)))]
    c.copies(node, result, "constant")
    c.resize(node, "size", result)
    return result


@rule("arange", "linspace", "eye", "rand", "randn", "scalar_tensor")
def generated(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    return [c.frozen(node, d, "generated values along the axis") for d in range(len(shape(node)))]


@rule("meshgrid")
def meshgrid(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    axes = [c.axes[t][0] if c.axes[t] else [] for t in a["tensors"]]
    if a.get("indexing") == "xy" and len(axes) > 1:
        axes[0], axes[1] = axes[1], axes[0]
    return [list(axes) for _ in node.meta["val"]]


@rule("view_as_complex")
def view_as_complex(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs = c.axes[a["self"]]
    c.freeze(xs[-1], node, "real and imaginary part")
    return xs[:-1]


@rule("view_as_real")
def view_as_real(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    return [*c.axes[a["self"]], c.frozen(node, len(shape(node)) - 1, "real and imaginary part")]


@rule("glu")
def glu(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs = c.axes[a["self"]]
    d = a["dim"] % len(xs)
    half = shape(node)[d]
    left, right = pieces(c, node, xs[d], [half, half])
    c.unify(left, right)
    return [*xs[:d], left, *xs[d + 1 :]]


@rule("tril", "triu")
def triangle(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs = c.axes[a["self"]]
    for axis in xs[-2:]:
        c.freeze(axis, node, f"{op_name(node)} depends on positions along the axis")
    return xs
