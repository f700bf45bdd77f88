"""Rules of windows and resampling: spatial axes are frozen, channels pass through."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ...nodes import op_name, shape
from ..axes import Misaligned, fresh, take_inner
from ..equations import WINDOW, Equations
from .registry import Arguments, NoRule, either, rule

POOLS = {
    f"{kind}{nd}d": nd
    for nd in (1, 2, 3)
    for kind in (
        "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_nearest", "_upsample_nearest_exact",
    )
} | {
    "upsample_linear1d": 1, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_trilinear3d": 3,
    "_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2, "max_pool1d_with_indices": 1, "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3, "fractional_max_pool2d": 2, "fractional_max_pool3d": 3,
}  # fmt: skip


@rule(*POOLS)
def pool(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    name = op_name(node)
    nd = POOLS[name]
    x = either(a, "self", "input")
    first = len(shape(x)) - nd
    value = node.meta["val"]
    if name == "adaptive_avg_pool" + f"{nd}d":
        # An output of size 1 is a mean over the whole axis, and so a reduction like any other.
        done: list[Any] = []
        for d in range(first, len(shape(x))):
            if shape(node)[d] == 1:
                c.sums(node, [c.axes[x][d]])
                done.append([])
            elif shape(node)[d] == shape(x)[d] and isinstance(value.shape[d], int):
                done.append(c.axes[x][d])
                c.freeze(c.axes[x][d], node, WINDOW)
            else:
                c.freeze(c.axes[x][d], node, WINDOW)
                done.append(c.frozen(node, d, WINDOW))
        return c.axes[x][:first] + done
    if isinstance(value, torch.Tensor):
        return c.axes[x][:first] + c.window(node, x, first)
    return [c.axes[x][:first] + c.window(node, x, first, k) for k in range(len(value))]


@rule("pixel_shuffle")
def pixel_shuffle(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs, r = c.axes[a["self"]], a["upscale_factor"]
    channels, rows, columns = fresh(shape(node)[-3]), fresh(r), fresh(r)
    c.unify(xs[-3], channels + rows + columns)
    c.freeze(rows + columns, node, "the upscale factor of pixel_shuffle")
    return [*xs[:-3], channels, xs[-2] + rows, xs[-1] + columns]


@rule("pixel_unshuffle")
def pixel_unshuffle(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs, r = c.axes[a["self"]], a["downscale_factor"]
    try:
        (high, rows), (wide, columns) = take_inner(xs[-2], r), take_inner(xs[-1], r)
    except Misaligned as error:
        raise NoRule(str(error)) from None
    c.freeze(rows + columns, node, "the downscale factor of pixel_unshuffle")
    return [*xs[:-3], xs[-3] + rows + columns, high, wide]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs, groups = c.axes[a["self"]], fresh(a["groups"])
    inner = fresh(shape(node)[1] // a["groups"])
    c.unify(xs[1], groups + inner)
    c.rewrite(node, lambda s, m: s.assign(m, "groups", s.size(groups)))
    return [xs[0], inner + groups, *xs[2:]]


@rule("im2col")
def im2col(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    x = a["self"]
    xs, taps = c.axes[x], fresh(math.prod(a["kernel_size"]))
    for axis in xs[-2:]:
        c.freeze(axis, node, WINDOW)
    c.freeze(taps, node, "the positions of a window")
    return [*xs[:-3], xs[-3] + taps, c.frozen(node, len(shape(node)) - 1, "the windows of im2col")]


@rule("col2im")
def col2im(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs, rank = c.axes[a["self"]], len(shape(node))
    channels, taps = fresh(shape(node)[-3]), fresh(math.prod(a["kernel_size"]))
    c.unify(xs[-2], channels + taps)
    c.freeze(taps, node, "the positions of a window")
    c.freeze(xs[-1], node, "the windows of col2im")
    return [*xs[:-2], channels, *[c.frozen(node, d, WINDOW) for d in (rank - 2, rank - 1)]]


@rule("unfold")
def unfold(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs = c.axes[a["self"]]
    d = a["dimension"] % len(xs) if xs else 0
    c.freeze(xs[d], node, WINDOW)
    return [
        *xs[:d], c.frozen(node, d, WINDOW), *xs[d + 1 :],
        c.frozen(node, len(shape(node)) - 1, WINDOW),
    ]  # fmt: skip


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sample(c: Equations, node: fx.Node, a: Arguments) -> list[Any]:
    xs, gs = c.axes[a["input"]], c.axes[a["grid"]]
    for axis in xs[2:]:
        c.freeze(axis, node, "sampled along the axis")
    c.freeze(gs[-1], node, "the coordinates of a sampling grid")
    c.unify(xs[0], gs[0])
    return [xs[0], xs[1], *gs[1:-1]]
