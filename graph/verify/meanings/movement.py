"""Meanings of operators that only move entries, and their presence with them: reshape, permute, cut, join."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ..presence import (
    Disagreement,
    Held,
    States,
    along,
    as_array,
    factor,
    has_absent,
    join,
    mark_absent,
    moved,
    outer,
    simplified,
)
from .registry import Call, means, need_all


@means(
    "view reshape _unsafe_view flatten unflatten ravel unsqueeze squeeze view_as reshape_as"
    " permute transpose swapaxes swapdims movedim moveaxis t numpy_T mT matrix_H adjoint"
    " slice narrow flip select split chunk split_with_sizes unbind tensor_split unsafe_split unsafe_chunk index_select"
    " unsafe_split_with_sizes diagonal rot90 unfold_copy pixel_shuffle pixel_unshuffle channel_shuffle"
    " native_channel_shuffle"
)
def move(call: Call) -> Any:
    """Move presence as the operator moves entries."""
    x, result = call.x, call.run()
    parts = [result] if isinstance(result, torch.Tensor) else list(result)
    if parts[0].dtype != x.value.dtype:
        raise Disagreement("a view as another dtype")
    states: list[States] = [(None,) * part.dim() for part in parts]
    if x.touched:
        states = moved(x, lambda positions: call.run(**{call.key(x): positions}))
    if isinstance(call.a.get("other"), Held):  # view_as
        states = [tuple(map(join, zip(states[0], call.a["other"].states, strict=True)))]
    picks = call.a.get("index")  # of index_select: an absent position looks up nothing
    if isinstance(picks, Held) and picks.touched:
        d, n = call.a["dim"] % x.value.dim(), len(picks.value)
        looked_up = simplified(np.maximum(as_array(states[0][d], n), as_array(picks.states[0], n)))
        states = [(*states[0][:d], looked_up, *states[0][d + 1 :])]
    held = [mark_absent(part, state) for part, state in zip(parts, states, strict=True)]
    return held[0] if isinstance(result, torch.Tensor) else held


@means("cat concat concatenate hstack vstack")
def cat(call: Call) -> Held:
    parts = [h for h in call.a["tensors"] if h.value.shape != (0,)]
    value = call.run()
    rank = value.dim()
    d = call.a["dim"] % rank if "dim" in call.a else min(1, rank - 1) if call.name == "hstack" else 0
    states = [None if k == d else join([h.states[k] for h in parts]) for k in range(value.dim())]
    if any(h.states[d] is not None for h in parts):
        grid = [torch.from_numpy(as_array(h.states[d], h.value.shape[d])) for h in parts]
        states[d] = simplified(torch.cat(grid).numpy())
    return mark_absent(value, states)


@means("stack")
def stack(call: Call) -> Held:
    value = call.run()
    d = call.a["dim"] % value.dim()
    states = list(map(join, zip(*(h.states for h in call.a["tensors"]), strict=True)))
    return mark_absent(value, [*states[:d], None, *states[d:]])


@means("slice_scatter select_scatter")
def scatter(call: Call) -> Held:
    x, src = call.a["self"], call.a["src"]
    d = call.a["dim"] % x.value.dim()
    mine = src.states
    if call.name == "select_scatter":
        mine = (*mine[:d], None, *mine[d:])
    probe = along(torch.from_numpy(as_array(x.states[d], x.value.shape[d])), d, x.value.dim())
    n = 1 if call.name == "select_scatter" else src.value.shape[d]
    written = torch.from_numpy(as_array(mine[d], n))
    patch = written[0] if call.name == "select_scatter" else written
    patch = along(patch, d, src.value.dim())
    mixed = simplified(call.run(self=probe, src=patch).numpy().reshape(-1))
    states = [mixed if k == d else join([x.states[k], mine[k]]) for k in range(x.value.dim())]
    return mark_absent(call.run(), states)


@means("im2col")
def im2col(call: Call) -> Held:
    x = call.x
    need_all(x, [-2, -1], "a window along the axis")
    taps = math.prod(call.a["kernel_size"])
    channels = outer((x.states[-3], None), (x.value.shape[-3], taps))
    return Held(call.run(), (*x.states[:-3], channels, None))


@means("col2im")
def col2im(call: Call) -> Held:
    x = call.x
    need_all(x, [-1], "a window along the axis")
    taps = math.prod(call.a["kernel_size"])
    channels, window = factor(x.states[-2], (x.value.shape[-2] // taps, taps))
    if has_absent(window):
        raise Disagreement("positions of a window are absent")
    return Held(call.run(), (*x.states[:-2], channels, None, None))


@means("unfold")
def unfold(call: Call) -> Held:
    x = call.x
    need_all(x, [call.a["dimension"]], "a sliding window along the axis")
    d = call.a["dimension"] % x.value.dim()
    return Held(call.run(), (*x.states[:d], None, *x.states[d + 1 :], None))


@means("view_as_complex view_as_real")
def complex_view(call: Call) -> Held:
    x = call.x
    if call.name == "view_as_real":
        return Held(call.run(), (*x.states, None))
    need_all(x, [-1], "real and imaginary parts")
    return Held(call.run(), x.states[:-1])


@means("one_hot")
def one_hot(call: Call) -> Held:
    return Held(call.run(), (*call.x.states, None))


@means("meshgrid")
def meshgrid(call: Call) -> list[Held]:
    result = call.run()
    order = list(range(len(result)))
    if call.a.get("indexing") == "xy" and len(order) > 1:
        order[:2] = 1, 0
    states = [t.states[0] if t.states else None for t in call.a["tensors"]]
    return [mark_absent(r.clone(), [states[i] for i in order]) for r in result]


@means("glu")
def glu(call: Call) -> Held:
    x, d = call.x, call.a["dim"] % call.x.value.dim()
    state, n = x.states[d], x.value.shape[d] // 2
    half = None if state is None else join([state[:n], state[n:]])
    return mark_absent(call.run(), [*x.states[:d], half, *x.states[d + 1 :]])
