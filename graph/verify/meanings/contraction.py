"""Meanings of convolutions, matrix products and attention: absent entries count as 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..presence import Held, State, States, broadcast, drop_absent, factor, fill_absent, join, mark_absent, outer
from .registry import Call, means, need_all


@means("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution torchvision::deform_conv2d")
def convolution(call: Call) -> Held:
    """Absent input channels count as 0. A grouped weight serves every group alike, so channels are groups x rest."""
    x, w, bias = call.a["input"], call.a["weight"], call.a.get("bias")
    groups = call.a["groups"]
    swapped = call.name.startswith("conv_transpose") or call.a.get("transposed", False)
    nd = w.value.dim() - 2
    at = x.value.dim() - nd - 1
    need_all(w, range(2, w.value.dim()), "kernel positions")
    for extra in call.held("offset", "mask"):
        need_all(extra, range(extra.value.dim()), "sampling offsets")
    spatial: States = x.states[at + 1 :]
    if not _pointwise(call, w.value.shape[2:]):
        need_all(x, range(at + 1, x.value.dim()), "a window along the axis")
        spatial = (None,) * nd
    channels = x.states[at]
    if swapped:
        channels = join([channels, w.states[0]])
        group, inner = factor(channels, (groups, w.value.shape[0] // groups))
        result = outer((group, w.states[1]), (groups, w.value.shape[1]))
        weight = fill_absent(w.value, 0, channels, 0.0)
    else:
        group, outputs = factor(w.states[0], (groups, w.value.shape[0] // groups))
        given, inner = factor(channels, (groups, x.value.shape[at] // groups))
        group, inner = join([group, given]), join([inner, w.states[1]])
        channels = outer((group, inner), (groups, w.value.shape[1]))
        result = outer((group, outputs), (groups, w.value.shape[0] // groups))
        weight = fill_absent(w.value, 1, inner, 0.0)
    if bias is not None:
        result = join([result, bias.states[0]])
    value = call.run(input=fill_absent(x.value, at, channels, 0.0), weight=weight)
    return mark_absent(value, [*x.states[:at], result, *spatial])


def _pointwise(call: Call, kernel: Sequence[int]) -> bool:
    padding = call.a.get("padding", "deformed")
    padded = isinstance(padding, str) or any(padding) or any(call.a.get("output_padding") or ())
    return not padded and all(k == 1 for k in kernel) and all(s == 1 for s in call.a["stride"])


@means("linear")
def linear(call: Call) -> Held:
    x, w, bias = call.a["input"], call.a["weight"], call.a["bias"]
    inner = join([x.states[-1], w.states[-1]])
    value = call.run(input=fill_absent(x.value, -1, inner, 0.0), weight=fill_absent(w.value, -1, inner, 0.0))
    made = w.states[:-1]
    if bias is not None and made:
        made = (join([made[0], bias.states[0]]),)
    return mark_absent(value, [*x.states[:-1], *made])


@means("matmul bmm mm mv dot addmm baddbmm")
def matmul(call: Call) -> Held:
    a = call.a
    first = next(k for k in ("mat1", "batch1", "self") if k in a)
    second = next(k for k in ("mat2", "batch2", "other", "vec", "tensor") if k in a)
    left, right = a[first], a[second]
    at = -1 if right.value.dim() == 1 else -2
    inner = join([left.states[-1], right.states[at]])
    value = call.run(
        **{first: fill_absent(left.value, -1, inner, 0.0), second: fill_absent(right.value, at, inner, 0.0)}
    )
    rows, columns = left.states[-2:-1], right.states[-1:] if at == -2 else ()
    batch = value.shape[: value.dim() - len(rows) - len(columns)]
    lead = broadcast([Held(h.value[..., 0, 0], h.states[:-2]) for h in (left, right) if h.value.dim() > 2], batch)
    states = (*lead, *rows, *columns)
    if call.name in ("addmm", "baddbmm"):
        states = broadcast([Held(value, states), a["self"]], value.shape)
    return mark_absent(value, states)


@means("outer ger")
def outer_product(call: Call) -> Held:
    return Held(call.run(), (call.a["self"].states[0], call.a["vec2"].states[0]))


@means("einsum")
def einsum(call: Call) -> Held:
    """Summed letters count as 0 where absent; an ellipsis is spelled out with upper-case Greek letters."""
    operands = call.a["tensors"]
    terms, result = spell_out(call.a["equation"], [h.value.dim() for h in operands])
    by_letter: dict[str, list[State]] = {}
    for term, held in zip(terms, operands, strict=True):
        for letter, state, n in zip(term, held.states, held.value.shape, strict=True):
            if n > 1:
                by_letter.setdefault(letter, []).append(state)
    joint = {letter: join(states) for letter, states in by_letter.items()}
    values = []
    for term, held in zip(terms, operands, strict=True):
        value = held.value
        for d, letter in enumerate(term):
            if letter not in result and value.shape[d] > 1:
                value = fill_absent(value, d, joint.get(letter), 0.0)
        values.append(value)
    return mark_absent(call.run(tensors=values), [joint.get(letter) for letter in result])


def spell_out(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """An einsum equation without blanks, ellipses or an implicit output: the letters of each operand and of the result."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spare = "ΓΔΘΛΞΠΣΦΨΩ"
    extra = max(
        (rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=True) if "..." in t), default=0
    )
    dots = spare[:extra]
    if not arrow:
        letters = "".join(terms).replace(".", "")
        right = ("..." if dots else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    spelled = []
    for term, rank in zip(terms, ranks, strict=True):
        dims = rank - len(term.replace("...", ""))
        spelled.append(term.replace("...", dots[len(dots) - dims :] if dims else ""))
    return spelled, right.replace("...", dots)


@means("scaled_dot_product_attention")
def attention(call: Call) -> Held:
    """Attention written out: absent keys leave the softmax; the default scale is that of the original width."""
    a = call.a
    q, k, v, mask = a["query"], a["key"], a["value"], a.get("attn_mask")
    scale = a["scale"] if a.get("scale") is not None else 1 / math.sqrt(q.value.shape[-1])
    if a.get("enable_gqa"):
        k, v = _share_heads(q, k), _share_heads(q, v)
    width, keys = join([q.states[-1], k.states[-1]]), join([k.states[-2], v.states[-2]])
    tokens = q.states[-2]
    if a.get("is_causal"):
        keys = tokens = join([tokens, keys])
    batch = torch.broadcast_shapes(*(h.value.shape[:-2] for h in (q, k, v)))
    lead = broadcast([Held(h.value[..., 0, 0], h.states[:-2]) for h in (q, k, v)], batch)
    shape = (*batch, q.value.shape[-2], k.value.shape[-2])
    if mask is not None:
        scores_like = Held(torch.empty(shape, device="meta"), (*lead, tokens, keys))
        joint = broadcast([scores_like, mask], shape)
        lead, tokens, keys = joint[:-2], joint[-2], joint[-1]
    queries = fill_absent(q.value, -1, width, 0.0)
    scores = queries @ fill_absent(fill_absent(k.value, -1, width, 0.0), -2, keys, 0.0).mT * scale
    if a.get("is_causal"):
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if mask is not None:
        off = mask.value.dtype == torch.bool
        scores = scores.masked_fill(~mask.value, -math.inf) if off else scores + mask.value
    scores = fill_absent(scores, -1, keys, -math.inf)
    weights = torch.where((scores == -math.inf).all(-1, keepdim=True), 0.0, scores.softmax(-1))
    value = fill_absent(weights, -1, keys, 0.0) @ fill_absent(v.value, -2, keys, 0.0)
    return mark_absent(value, [*lead, tokens, v.states[-1]])


def _share_heads(q: Held, x: Held) -> Held:
    """For grouped-query attention, the heads of k or v repeated to those of q, which are groups x repeats."""
    heads, own_heads = q.value.shape[-3], x.value.shape[-3]
    group, rest = factor(q.states[-3], (own_heads, heads // own_heads))
    state = outer((join([group, x.states[-3]]), rest), (own_heads, heads // own_heads))
    return Held(x.value.repeat_interleave(heads // own_heads, dim=-3), (*x.states[:-3], state, *x.states[-2:]))


@means("cosine_similarity pairwise_distance")
def similarity(call: Call) -> Held:
    x, y = call.a["x1"], call.a["x2"]
    both = torch.broadcast_tensors(x.value, y.value)
    states = broadcast([x, y], both[0].shape)
    d = call.a.get("dim", -1) % both[0].dim()
    value = call.run(x1=drop_absent(both[0], d, states[d]), x2=drop_absent(both[1], d, states[d]))
    return mark_absent(value, [s for k, s in enumerate(states) if k != d or call.a.get("keepdim")])


@means("cdist _euclidean_dist")
def cdist(call: Call) -> Held:
    x, y = call.a["x1"], call.a["x2"]
    width = join([x.states[-1], y.states[-1]])
    value = call.run(x1=drop_absent(x.value, -1, width), x2=drop_absent(y.value, -1, width))
    lead = broadcast([Held(h.value[..., 0, 0], h.states[:-2]) for h in (x, y)], value.shape[:-2])
    return mark_absent(value, [*lead, x.states[-2], y.states[-2]])
