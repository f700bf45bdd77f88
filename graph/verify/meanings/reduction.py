"""Meanings of reductions and normalisations, which run over the present entries."""

from __future__ import annotations

import operator
from typing import Any

import torch

from ...compat import pytree
from ..presence import ABSENT, Held, drop_absent, factor, join, mark_absent, restore_absent
from .entrywise import entrywise
from .positions import ordered
from .registry import Call, dims_of, means


@means(
    """mean sum nansum amax amin var std linalg_vector_norm norm logsumexp prod all any var_mean std_mean aminmax
    frobenius_norm count_nonzero"""
)
def reduce(call: Call) -> Any:
    """The operator over the present entries."""
    x = call.x
    dims, value = dims_of(x, call.a.get("dim")), x.value
    for d in dims:
        value = drop_absent(value, d, x.states[d])
    keep = call.a.get("keepdim", False)
    states = [None if d in dims else s for d, s in enumerate(x.states) if keep or d not in dims]
    result = call.run(**{call.key(x): value})
    return pytree.tree_map_only(torch.Tensor, lambda t: mark_absent(t, states), result)


@means("max min median mode")
def extremum(call: Call) -> Any:
    """Of two tensors, an entrywise operator. Along an axis, a reduction over the present entries; if the positions are
    used, nothing may be absent."""
    if isinstance(call.a.get("other"), Held):
        return entrywise(call)
    if call.a.get("dim") is None:
        return reduce(call)
    positions = [u for u in call.node.users if u.target is operator.getitem and u.args[1] == 1 and u.users]
    return ordered(call) if positions else reduce(call)


@means("softmax log_softmax _softmax _log_softmax _safe_softmax")
def softmax(call: Call) -> Held:
    x, d = call.x, call.a["dim"] % call.x.value.dim()
    value = call.run(**{call.key(x): drop_absent(x.value, d, x.states[d])})
    return mark_absent(restore_absent(value, d, x.states[d]), x.states)


@means("layer_norm rms_norm _fused_rms_norm")
def layer_norm(call: Call) -> Any:
    x, k = call.x, len(call.a["normalized_shape"])
    lead = x.value.dim() - k
    states, override = list(x.states), {}
    for i in range(k):
        parameters = [p.states[i] for p in call.held("weight", "bias")]
        states[lead + i] = join([states[lead + i], *parameters])
    for name in ("input", "weight", "bias"):
        held = call.a.get(name)
        if isinstance(held, Held):
            part = held.value
            for i in range(k):
                part = drop_absent(part, part.dim() - k + i, states[lead + i])
            override[name] = part
    result = call.run(**override, normalized_shape=list(override["input"].shape[lead:]))
    value = result if isinstance(result, torch.Tensor) else result[0]
    for d in range(lead, x.value.dim()):
        value = restore_absent(value, d, states[d])
    if isinstance(result, torch.Tensor):
        return mark_absent(value, states)
    return [mark_absent(value, states), mark_absent(result[1], [*states[:lead], *[None] * k])]


@means("group_norm")
def group_norm(call: Call) -> Held:
    x, groups = call.x, call.a["num_groups"]
    channels = join([x.states[1], *(p.states[0] for p in call.held("weight", "bias"))])
    group, _ = factor(channels, (groups, x.value.shape[1] // groups))
    override = {
        n: drop_absent(call.a[n].value, 0, channels) for n in ("weight", "bias") if isinstance(call.a.get(n), Held)
    }
    left = groups if group is None else int((group != ABSENT).sum())
    states, value = [x.states[0], channels, *x.states[2:]], x.value
    for d in range(1, value.dim()):
        value = drop_absent(value, d, states[d])
    value = call.run(**override, input=value, num_groups=left)
    for d in range(1, value.dim()):
        value = restore_absent(value, d, states[d])
    return mark_absent(value, states)


@means("_weight_norm")
def weight_norm(call: Call) -> Held:
    """A weight of the length g, whose direction is that of the present entries of v."""
    v, g, dim = call.a["v"], call.a["g"], call.a.get("dim", 0)
    states, value, length = list(v.states), v.value, g.value
    for d in range(value.dim()):
        if d == dim and g.states:
            states[d] = join([v.states[d], g.states[d]])
            length = drop_absent(length, d, states[d])
        value = drop_absent(value, d, states[d])
    value = call.run(v=value, g=length)
    for d, state in enumerate(states):
        value = restore_absent(value, d, state)
    return mark_absent(value, states)


@means("batch_norm instance_norm")
def batch_norm(call: Call) -> Held:
    """Normalisation per channel; statistics of the batch are over the present entries."""
    x = call.x
    channels = join([x.states[1], *(p.states[0] for p in call.held("weight", "bias", "running_mean", "running_var"))])
    by_batch = call.a["training"] if call.name == "batch_norm" else call.a["use_input_stats"]
    value, dims = x.value, [d for d in range(x.value.dim()) if d != 1]
    if call.name == "instance_norm":
        dims = dims[1:]
    for d in dims if by_batch else []:
        value = drop_absent(value, d, x.states[d])
    value = call.run(input=value)
    for d in dims if by_batch else []:
        value = restore_absent(value, d, x.states[d])
    return mark_absent(value, [x.states[0], channels, *x.states[2:]])
