"""Operations that combine values, cut them and move their entries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .builder import ANY, Builder, Skip, operation, same_shape


# ------------------------------------------------------------------------------------------------------ combination
@operation(*ANY, weight=4)
def residual(b: Builder, i: int) -> None:
    j = b.like(i, same_shape)
    b.add(b.rng.choice((torch.add, torch.add, torch.mul, torch.minimum, torch.sub)), b.rng.choice(([i, j], [j, i])))


@operation(*ANY, weight=1.5)
def broadcast_add(b: Builder, i: int) -> None:
    def fits(p: Tensor, q: Tensor) -> bool:
        ok = p.dim() == q.dim() and p.shape != q.shape
        return ok and all(m in (1, n) for m, n in zip(p.shape, q.shape, strict=True))

    b.add(b.rng.choice((torch.add, torch.mul)), [i, b.like(i, fits)])


@operation(*ANY, weight=2)
def concatenate(b: Builder, i: int) -> None:
    d = b.rng.randrange(1, b.values[i].dim())

    def fits(p: Tensor, q: Tensor) -> bool:
        return p.dim() == q.dim() and all(k == d or p.shape[k] == q.shape[k] for k in range(p.dim()))

    chosen = [i, i if b.chance(0.3) else b.like(i, fits)]
    if b.chance(0.2):
        chosen.append(b.rng.choice(chosen))
    b.rng.shuffle(chosen)
    b.add(lambda *xs: torch.cat(xs, d), chosen)


@operation(*ANY)
def stacked(b: Builder, i: int) -> None:
    j = i if b.chance(0.3) else b.like(i, same_shape)
    d = b.rng.randrange(1, b.values[i].dim() + 1)
    function = b.rng.choice(
        (
            lambda x, y: torch.stack([x, y], d),
            lambda x, y: torch.stack([x, y], d).sum(d),
            lambda x, y: torch.stack([x, y, x], d).softmax(d).amax(d),
            lambda x, y: torch.stack([x, y], d).flatten(d - 1, d) if d > 1 else torch.stack([x, y], d).mean(1),
        )
    )
    b.add(function, [i, j])


@operation(*ANY)
def product(b: Builder, i: int) -> None:
    """Matrix product with another value, or its transpose."""

    def fits(p: Tensor, q: Tensor) -> bool:
        return p.shape[:-2] == q.shape[:-2] and (p.shape[-2] == q.shape[-1] or p.shape[-1] == q.shape[-1])

    j = i if b.chance(0.2) else b.like(i, fits)
    if b.values[j].shape[-2] == b.values[i].shape[-1] and b.chance(0.7):
        b.add(lambda x, y: 0.3 * x @ y, [i, j])
    elif b.values[j].shape[-1] == b.values[i].shape[-1]:
        b.add(lambda x, y: 0.3 * x @ y.mT, [i, j])
    else:
        raise Skip


# ----------------------------------------------------------------------------------------------------------- cutting
@operation(*ANY, weight=3)
def splitting(b: Builder, i: int) -> None:
    """Pieces of an axis, as values of their own or combined at once."""
    d = b.rng.randrange(1, b.values[i].dim())
    n = b.values[i].shape[d]
    if n < 2:
        raise Skip
    kind = b.rng.choice(("gate", "glu", "chunk", "sizes", "swap", "split"))
    if kind in ("gate", "glu", "swap") and n % 2:
        raise Skip
    if kind == "gate":
        b.add(lambda x: (lambda p, q: p * q.sigmoid())(*x.chunk(2, d)), [i])
    elif kind == "glu":
        b.add(lambda x: F.glu(x, d), [i])
    elif kind == "swap":
        b.add(lambda x: torch.cat(x.chunk(2, d)[::-1], d), [i])
    elif kind == "chunk":
        k = b.rng.choice((2, 3))
        b.add(lambda x: x.chunk(k, d), [i])
    elif kind == "split":
        k = b.rng.randint(1, n - 1)
        b.add(lambda x: x.split(k, d)[:2], [i])
    else:
        k = b.rng.randint(1, n - 1)
        b.add(lambda x: x.split([k, n - k], d), [i])


@operation(*ANY, weight=2)
def slicing(b: Builder, i: int) -> None:
    d = b.rng.randrange(1, b.values[i].dim())
    n = b.values[i].shape[d]
    if n < 2:
        raise Skip
    low, step = b.rng.randint(0, n - 1), b.rng.choice((2, 2, 3))
    high = b.rng.randint(low + 1, n)
    function = b.rng.choice(
        (
            lambda x: x.narrow(d, low, high - low),
            lambda x: x.movedim(d, 0)[low:high].movedim(0, d),
            lambda x: x.movedim(d, -1)[..., ::step].movedim(-1, d),
            lambda x: x.movedim(d, -1)[..., low - n :].movedim(-1, d),
            lambda x: x.select(d, low - n) if x.dim() > 3 else x.narrow(d, low, 1),
            lambda x: torch.cat([x.movedim(d, -1)[..., 0::2], x.movedim(d, -1)[..., 1::2]], -1).movedim(-1, d),
            lambda x: torch.cat([x.narrow(d, low, n - low), x.narrow(d, 0, low)], d) if low else x * 2,
        )
    )
    b.add(function, [i])


@operation(*ANY)
def writing(b: Builder, i: int) -> None:
    """Assignment to part of a tensor, in place."""
    d = b.rng.randrange(1, b.values[i].dim())
    n = b.values[i].shape[d]
    if n < 3:
        raise Skip
    low = b.rng.randint(0, n - 2)
    high = b.rng.randint(low + 1, n - 1)

    def relu_part(x):
        y = x.clone()
        y.movedim(d, -1)[..., low:high].relu_()
        return y

    def copy_part(x):
        y = x.clone()
        y.narrow(d, low, high - low).copy_(x.narrow(d, low + 1, high - low) * 0.5)
        return y

    def fill_part(x):
        y = x * 1.0
        y.movedim(d, 0)[low] = 0.5
        return y

    b.add(b.rng.choice((relu_part, copy_part, fill_part)), [i])


@operation(*ANY)
def indexing(b: Builder, i: int) -> None:
    d = b.rng.randrange(1, b.values[i].dim())
    n = b.values[i].shape[d]
    order = torch.tensor([b.rng.randrange(n) for _ in range(b.rng.randint(2, 6))])
    holder = nn.Module()
    holder.register_buffer("order", order)
    function = b.rng.choice(
        (
            lambda m, x: x.index_select(d, m.order),
            lambda m, x: x.movedim(d, 1)[:, m.order].movedim(1, d),
            lambda m, x: x.roll(1, d),
            lambda m, x: x.flip(d),
            lambda m, x: x.sort(d)[0],
            lambda m, x: x.cumsum(d) * 0.2,
            lambda m, x: x.topk(min(2, n), d)[0],
            lambda m, x: x.gather(d, x.argsort(d)),
        )
    )
    b.add(function, [i], holder)


@operation(*ANY)
def padding(b: Builder, i: int) -> None:
    d = b.rng.randrange(1, b.values[i].dim())
    low, high = b.rng.choice(((0, 1), (1, 1), (2, 0), (0, 3)))
    amounts = [0, 0] * (b.values[i].dim() - 1 - d) + [low, high]
    b.add(lambda x: F.pad(x, amounts, value=0.5), [i])


@operation(*ANY)
def repeating(b: Builder, i: int) -> None:
    x = b.values[i]
    d, times = b.rng.randrange(1, x.dim()), b.rng.choice((2, 3))
    function = b.rng.choice(
        (
            lambda x: x.repeat([times if k == d else 1 for k in range(x.dim())]),
            lambda x: x.repeat_interleave(times, d),
            lambda x: x.unsqueeze(d).expand([-1] * d + [times] + [-1] * (x.dim() - d)).flatten(d, d + 1),
            lambda x: x.unsqueeze(d + 1).expand([-1] * (d + 1) + [times] + [-1] * (x.dim() - d - 1)).flatten(d, d + 1),
        )
    )
    b.add(function, [i])


# -------------------------------------------------------------------------------------------------------- regrouping
@operation(*ANY, weight=2)
def permuting(b: Builder, i: int) -> None:
    rank = b.values[i].dim()
    order = [0, *b.rng.sample(range(1, rank), rank - 1)]
    b.add(lambda x: x.permute(order), [i])


@operation(*ANY, weight=3)
def unflattening(b: Builder, i: int) -> None:
    d = b.rng.randrange(1, b.values[i].dim())
    n = b.values[i].shape[d]
    k = b.divisor(n)
    sizes = b.rng.choice(((k, n // k), (-1, k), (k, -1)))
    function = b.rng.choice(
        (
            lambda x: x.unflatten(d, sizes),
            lambda x: x.reshape([*x.shape[:d], *sizes, *x.shape[d + 1 :]]),
            lambda x: x.reshape([x.shape[0], *x.shape[1:d], k, n // k, *x.shape[d + 1 :]]),
        )
    )
    b.add(function, [i])


@operation(4, 5, 6, weight=3)
def flattening(b: Builder, i: int) -> None:
    d = b.rng.randrange(1, b.values[i].dim() - 1)
    m = b.values[i].shape[d] * b.values[i].shape[d + 1]
    function = b.rng.choice((lambda x: x.flatten(d, d + 1), lambda x: x.reshape([*x.shape[:d], m, *x.shape[d + 2 :]])))
    b.add(function, [i])


@operation(*ANY, weight=0.7)
def regrouping(b: Builder, i: int) -> None:
    """A view that cuts anew without regard to boundaries."""
    n = b.values[i][0].numel()
    k = b.divisor(n, 48)
    if b.chance(0.4):
        j = b.divisor(n // k)
        b.add(lambda x: x.reshape(x.shape[0], j, k, -1), [i])
    else:
        b.add(lambda x: x.reshape(-1, k, n // k) if k % 2 else x.reshape(x.shape[0], k, n // k), [i])


@operation(*ANY)
def shuffling(b: Builder, i: int) -> None:
    d = b.rng.randrange(1, b.values[i].dim())
    n = b.values[i].shape[d]
    g = b.divisor(n)
    b.add(lambda x: x.unflatten(d, (g, n // g)).transpose(d, d + 1).flatten(d, d + 1), [i])


@operation(4)
def pixels(b: Builder, i: int) -> None:
    x = b.values[i]
    if x.shape[1] % 4 == 0 and b.chance(0.6):
        b.add(lambda x: F.pixel_shuffle(x, 2), [i])
    elif x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0:
        if b.chance(0.5):
            b.add(lambda x: F.pixel_unshuffle(x, 2), [i])
        else:
            b.add(lambda x: torch.cat([x[:, :, p::2, q::2] for q in (0, 1) for p in (0, 1)], 1), [i])
    else:
        raise Skip


@operation(4)
def channel_shuffle(b: Builder, i: int) -> None:
    b.add(lambda m, x: m(x), [i], nn.ChannelShuffle(b.divisor(b.values[i].shape[1])))


@operation(4, weight=2)
def pooling(b: Builder, i: int) -> None:
    x, mode = b.values[i], b.rng.choice(("nearest", "bilinear"))
    function = b.rng.choice(
        (
            lambda x: F.max_pool2d(x, 3, 1, 1),
            lambda x: F.avg_pool2d(x, 2, 2),
            lambda x: F.adaptive_avg_pool2d(x, 1),
            lambda x: F.adaptive_avg_pool2d(x, (2, 1)),
            lambda x: F.adaptive_max_pool2d(x, 2),
            lambda x: F.interpolate(x, scale_factor=2, mode=mode),
            lambda x: F.unfold(x, 3, padding=1).view(x.shape[0], -1, x.shape[2], x.shape[3]),
            lambda x: F.fold(F.unfold(x, 2, stride=2), x.shape[2:], 2, stride=2),
        )
    )
    if min(x.shape[2:]) < 3:
        raise Skip
    b.add(function, [i])


@operation(4, 5, weight=2)
def to_tokens(b: Builder, i: int) -> None:
    b.add(lambda x: x.flatten(2).transpose(1, 2), [i])


@operation(3, weight=2)
def to_image(b: Builder, i: int) -> None:
    n, c = b.values[i].shape[1:]
    side = int(n**0.5)
    if side * side != n or n == 1:
        raise Skip
    b.add(lambda x: x.transpose(1, 2).reshape(x.shape[0], c, side, side), [i])


@operation(4)
def windows(b: Builder, i: int) -> None:
    """Channels last, attention inside 2 x 2 windows."""
    _, c, h, w = b.values[i].shape
    if h % 2 or w % 2 or c % 2:
        raise Skip
    heads = 2

    def function(qkv, proj, x):
        x = x.permute(0, 2, 3, 1).roll((1, 1), (1, 2))
        x = x.view(-1, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = qkv(x).reshape(-1, 4, 3, heads, c // heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = proj(((q @ k.mT) * 0.5).softmax(-1).matmul(v).transpose(1, 2).reshape(-1, 4, c))
        x = x.view(-1, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, c)
        return x.roll((-1, -1), (1, 2)).permute(0, 3, 1, 2)

    b.add(function, [i], nn.Linear(c, 3 * c), nn.Linear(c, c))
