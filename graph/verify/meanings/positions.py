"""Meanings of operators that depend on positions along an axis: look-ups, orderings, windows and sampling."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from ...compat import pytree
from ..presence import (
    Disagreement,
    Held,
    as_array,
    broadcast,
    drop_absent,
    factor,
    has_absent,
    join,
    mark_absent,
    simplified,
)
from .registry import Call, all_present, dims_of, means, need_all


@means("index _unsafe_index")
def index(call: Call) -> Held:
    """x[..., i, j, ...]: the presence of the indexed axes is looked up like their entries."""
    x, picks = call.a["self"], list(call.a["indices"])
    used = [d for d, i in enumerate(picks) if i is not None]
    value = call.run()
    if any(picks[d].value.dtype in (torch.bool, torch.uint8) for d in used):
        if any(has_absent(s) for h in call.held() for s in h.states):
            raise Disagreement("a mask selects entries by data")
        return all_present(value)
    shape = torch.broadcast_shapes(*(picks[d].value.shape for d in used))
    states = list(broadcast([picks[d] for d in used], shape))
    for d in used:
        if x.states[d] is not None:
            looked = torch.from_numpy(x.states[d])[picks[d].value.cpu()].broadcast_to(shape).reshape(-1).numpy()
            pairs = zip(states, factor(looked, shape), shape, strict=True)
            states = [simplified(np.maximum(as_array(s, n), as_array(t, n))) for s, t, n in pairs]
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    rest = [s for d, s in enumerate(x.states) if d not in used]
    return mark_absent(value, [*rest[:at], *states, *rest[at:]])


@means("embedding")
def embedding(call: Call) -> Held:
    table = call.a["weight"]
    need_all(table, [0], "rows are looked up by number")
    return mark_absent(call.run(), [*call.a["indices"].states, table.states[1]])


@means("gather take_along_dim")
def gather(call: Call) -> Held:
    x, picks = call.a["self"], call.a["index" if "index" in call.a else "indices"]
    d = call.a["dim"] % x.value.dim()
    need_all(x, [d], "entries are picked by number")
    states = list(picks.states)
    for k in range(x.value.dim()):
        if k != d and x.value.shape[k] == picks.value.shape[k]:
            states[k] = join([states[k], x.states[k]])
        elif k != d and (has_absent(x.states[k]) or has_absent(picks.states[k])):
            raise Disagreement("absent entries beside the picked axis")
    return mark_absent(call.run(), states)


@means("topk sort argsort argmax argmin cumsum cumprod cummax cummin logcumsumexp roll kthvalue msort")
def ordered(call: Call) -> Any:
    """Operators that depend on positions: nothing along their axis may be absent; the other axes pass through."""
    x = call.x
    dims = dims_of(x, call.a.get("dims", call.a.get("dim")))
    need_all(x, dims, "it depends on positions along the axis")
    result = call.run()
    parts = [result] if isinstance(result, torch.Tensor) else list(result)
    held = []
    for part in parts:
        same = part.dim() == x.value.dim()
        states = [None if d in dims else s for d, s in enumerate(x.states) if same or d not in dims]
        held.append(mark_absent(part, states))
    return held[0] if isinstance(result, torch.Tensor) else held


@means(
    " ".join(
        name.format(n)
        for n in (1, 2, 3)
        for name in (
            "max_pool{}d", "avg_pool{}d", "adaptive_max_pool{}d", "max_pool{}d_with_indices",
            "upsample_nearest{}d", "_upsample_nearest_exact{}d",
        )
    )
    + " fractional_max_pool2d fractional_max_pool3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d"
    " upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)  # fmt: skip
def window(call: Call) -> Any:
    x = call.x
    nd = int(re.search(r"([123])d", call.name).group(1))  # type: ignore[union-attr]
    need_all(x, range(-nd, 0), "a window along the axis")
    result = call.run()
    states = [*x.states[:-nd], *[None] * nd]
    return pytree.tree_map_only(torch.Tensor, lambda t: mark_absent(t, states), result)


@means("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d")
def adaptive_mean(call: Call) -> Held:
    """An output of size 1 is a mean over the present entries; any other is a window."""
    x, sizes = call.x, call.a["output_size"]
    nd, value = len(sizes), call.x.value
    for d in range(value.dim() - nd, value.dim()):
        if sizes[d - value.dim()] == 1:
            value = drop_absent(value, d, x.states[d])
        else:
            need_all(x, [d], "a window along the axis")
    lead = x.states[: value.dim() - nd]
    return mark_absent(call.run(self=value), [*lead, *[None] * nd])


@means("grid_sampler grid_sampler_2d grid_sampler_3d")
def grid_sample(call: Call) -> Held:
    x, grid = call.a["input"], call.a["grid"]
    need_all(x, range(2, x.value.dim()), "it is sampled along the axis")
    need_all(grid, [-1], "coordinates of the sampling grid")
    value = call.run(grid=grid.value.nan_to_num(0.0))
    return mark_absent(value, [join([x.states[0], grid.states[0]]), x.states[1], *grid.states[1:-1]])


@means("torchvision::roi_align torchvision::ps_roi_align torchvision::roi_pool")
def regions(call: Call) -> Any:
    x, boxes = call.a["input"], call.a["rois"]
    need_all(boxes, [0, 1], "the boxes")
    need_all(x, [0, 2, 3], "it is sampled along the axis")
    if call.name != "torchvision::roi_align":
        need_all(x, [1], "it maps channels to positions")
    return pytree.tree_map_only(torch.Tensor, lambda t: mark_absent(t, [None, x.states[1], None, None]), call.run())
