"""Linear layers and attentions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .builder import ANY, Builder, Skip, Weight, operation, same_shape


# ----------------------------------------------------------------------------------------------------------- linear
@operation(*ANY, weight=3)
def linear(b: Builder, i: int) -> None:
    b.add(lambda m, x: m(x), [i], nn.Linear(b.values[i].shape[-1], b.width(), bias=b.chance(0.6)))


@operation(*ANY)
def mlp(b: Builder, i: int) -> None:
    c, mid = b.values[i].shape[-1], b.width()
    b.add(lambda m, x: x + m(x), [i], nn.Sequential(nn.LayerNorm(c), nn.Linear(c, mid), nn.GELU(), nn.Linear(mid, c)))


@operation(*ANY)
def tied(b: Builder, i: int) -> None:
    """Down and up with one matrix."""
    c, mid = b.values[i].shape[-1], b.width()
    b.add(lambda m, x: F.linear(F.linear(x, m.value).relu(), m.value.t()), [i], Weight(mid, c))


@operation(3, 4)
def mixing(b: Builder, i: int) -> None:
    """A linear layer over dimension 1, as token mixing or with einsum."""
    n, out = b.values[i].shape[1], b.width()
    function = b.rng.choice(
        (
            lambda m, x: F.linear(x.transpose(1, -1), m.value).transpose(1, -1),
            lambda m, x: torch.einsum("bn...,kn->bk...".replace("...", "pqr"[: x.dim() - 2]), x, m.value),
            lambda m, x: torch.matmul(m.value, x.flatten(2)),
            lambda m, x: torch.einsum("...n, kn -> ...k", x.transpose(1, -1), m.value).transpose(1, -1),
        )
    )
    b.add(function, [i], Weight(out, n))


@operation(*ANY, weight=1.5)
def shared(b: Builder, i: int) -> None:
    """A module used before, used again on another value of the shape it takes."""
    reads = [
        k
        for k, v in enumerate(b.inputs)
        if len(v) == 1 and b.steps[k].parts and same_shape(b.values[v[0]], b.values[i])
    ]
    if not reads:
        raise Skip
    b.append(b.steps[b.rng.choice(reads)], [i])


# -------------------------------------------------------------------------------------------------------- attention
@operation(3, weight=4)
def attention(b: Builder, i: int) -> None:
    n, c = b.values[i].shape[1:]
    h, d = b.rng.choice((1, 2, 3, 4)), b.rng.choice((2, 3, 4))
    layout = b.rng.choice(("3hd", "h3d", "hd3", "chunk"))
    fused = b.chance(0.5)
    bias = Weight(h, n, n) if b.chance(0.2) else None
    modules = [nn.Linear(c, 3 * h * d, bias=b.chance(0.5)), nn.Linear(h * d, c)] + ([bias] if bias else [])
    normed = b.chance(0.2) and d > 2
    if normed:
        modules += [nn.LayerNorm(d), nn.RMSNorm(d)]

    def function(qkv, proj, *rest):
        *extra, x = rest
        y = qkv(x)
        if layout == "3hd":
            q, k, v = y.reshape(x.shape[0], n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        elif layout == "h3d":
            q, k, v = y.view(-1, n, h, 3, d).transpose(1, 2).unbind(3)
        elif layout == "hd3":
            q, k, v = (y.view(-1, n, h, d, 3).transpose(1, 2)[..., j] for j in range(3))
        else:
            q, k, v = (t.unflatten(-1, (h, d)).transpose(1, 2) for t in y.chunk(3, -1))
        if normed:
            q, k = extra[-2](q), extra[-1](k)
        mask = extra[0].value if bias is not None else None
        if fused:
            z = F.scaled_dot_product_attention(q, k, v, mask)
        else:
            scores = q @ k.transpose(-2, -1) * d**-0.5
            z = (scores if mask is None else scores + mask).softmax(-1) @ v
        return proj(z.transpose(1, 2).reshape(x.shape[0], n, h * d))

    j = b.add(function, [i], *modules)
    if b.chance(0.7):
        b.add(torch.add, [i, j])


@operation(3, weight=3)
def grouped_attention(b: Builder, i: int) -> None:
    """Separate q, k, v; fewer key heads; another width for v; queries from another value."""
    n, c = b.values[i].shape[1:]
    h, rep, d, dv = b.rng.choice((1, 2, 3)), b.rng.choice((1, 2, 3)), b.rng.choice((2, 4)), b.rng.choice((3, 4))
    way = b.rng.choice(("flag", "interleave", "expand", "einsum"))
    j = b.like(i, lambda p, q: p.dim() == 3 and p.shape[2] == q.shape[2]) if b.chance(0.4) else i
    m = b.values[j].shape[1]

    def function(wq, wk, wv, proj, x, y):
        q = wq(y).view(-1, m, h * rep, d).transpose(1, 2)
        k = wk(x).view(-1, n, h, d).transpose(1, 2)
        v = wv(x).view(-1, n, h, dv).transpose(1, 2)
        if way == "flag":
            z = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        elif way == "einsum":
            q = q.unflatten(1, (h, rep))
            scores = torch.einsum("bhrmd,bhnd->bhrmn", q, k).softmax(-1)
            z = torch.einsum("bhrmn,bhne->bhrme", scores, v).flatten(1, 2)
        else:
            if way == "interleave":
                k, v = k.repeat_interleave(rep, 1), v.repeat_interleave(rep, 1)
            else:
                k, v = (t[:, :, None].expand(-1, -1, rep, -1, -1).reshape(-1, h * rep, n, t.shape[-1]) for t in (k, v))
            z = F.scaled_dot_product_attention(q, k, v, scale=0.4)
        return proj(z.transpose(1, 2).flatten(2))

    modules = [nn.Linear(c, h * rep * d), nn.Linear(c, h * d), nn.Linear(c, h * dv), nn.Linear(h * rep * dv, c)]
    b.add(function, [i, j], *modules)


@operation(3, weight=1.5)
def linear_attention(b: Builder, i: int) -> None:
    n, c = b.values[i].shape[1:]
    h, d = b.rng.choice((1, 2, 3)), b.rng.choice((2, 3, 4))

    def function(qkv, mix, proj, x):
        q, k, v = qkv(x).view(-1, n, 3, h, d).permute(2, 0, 3, 1, 4)
        context = k.softmax(-2).mT @ v
        z = torch.einsum("bhnd,hg->bgnd", q.softmax(-1) @ context, mix.value)
        return proj(z.permute(0, 2, 1, 3).reshape(x.shape[0], n, h * d))

    b.add(function, [i], nn.Linear(c, 3 * h * d), Weight(h, h), nn.Linear(h * d, c))


@operation(3)
def torch_attention(b: Builder, i: int) -> None:
    """torch's own module: heads inside a flattened batch, or scaled_dot_product_attention without the weights."""
    c, weights = b.values[i].shape[2], b.chance(0.5)
    layer = nn.MultiheadAttention(c, b.divisor(c), batch_first=True, bias=b.chance(0.7))
    b.add(lambda m, x: x + m(x, x, x, need_weights=weights)[0], [i], layer)


@operation(*ANY)
def rotary(b: Builder, i: int) -> None:
    """Pairs of entries of the last dimension turned by constant angles, as halves or interleaved."""
    n = b.values[i].shape[-1]
    if n % 2:
        raise Skip
    halves = b.chance(0.5)

    def function(angles, x):
        p, q = x.chunk(2, -1) if halves else (x[..., 0::2], x[..., 1::2])
        turned = torch.cat([-q, p], -1) if halves else torch.stack([-q, p], -1).flatten(-2)
        return x * angles.value.cos() + turned * angles.value.sin()

    b.add(function, [i], Weight(n, trainable=False))


@operation(3)
def class_token(b: Builder, i: int) -> None:
    c = b.values[i].shape[2]

    def function(token, position, x):
        x = torch.cat([token.value.expand(x.shape[0], -1, -1), x], 1) + position.value
        return x, x[:, 0].unsqueeze(1)

    b.add(function, [i], Weight(1, 1, c), Weight(1, b.values[i].shape[1] + 1, c))


@operation(3)
def queries(b: Builder, i: int) -> None:
    """Learned queries, and an einsum mask head."""
    c, k = b.values[i].shape[2], b.rng.choice((3, 4, 5))
    b.add(lambda m, x: torch.einsum("bnc,kc->bnk", x, m.value).softmax(-1), [i], Weight(k, c))
