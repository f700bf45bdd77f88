"""Operations on images and sequences: convolutions, normalisations, activations, constants."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .builder import ANY, Builder, Skip, Weight, operation


# -------------------------------------------------------------------------------------------------------- convolutions
@operation(3, 4, weight=3)
def conv(b: Builder, i: int) -> None:
    x = b.values[i]
    nd, c, out = x.dim() - 2, x.shape[1], b.width()
    kernel = b.rng.choice((1, 1, 3))
    groups = 1
    if b.chance(0.3):
        groups = b.divisor(c)
        out = groups * b.rng.choice((1, 2, 3, 4))
    layer = (nn.Conv1d, nn.Conv2d)[nd - 1]
    stride = 2 if min(x.shape[2:]) > 4 and b.chance(0.2) else 1
    b.add(lambda m, x: m(x), [i], layer(c, out, kernel, stride, kernel // 2, groups=groups, bias=b.chance(0.5)))


@operation(4, weight=1.5)
def depthwise(b: Builder, i: int) -> None:
    c, times = b.values[i].shape[1], b.rng.choice((1, 1, 2, 3))
    b.add(lambda m, x: m(x), [i], nn.Conv2d(c, c * times, 3, padding=1, groups=c, bias=b.chance(0.5)))


@operation(4)
def transposed(b: Builder, i: int) -> None:
    c, out, groups = b.values[i].shape[1], b.width(), 1
    if b.chance(0.5):
        groups = b.divisor(c)
        out = groups * b.rng.choice((1, 2, 3))
    layer = b.rng.choice(
        (
            lambda: nn.ConvTranspose2d(c, out, 3, padding=1, groups=groups),
            lambda: nn.ConvTranspose2d(c, out, 1, groups=groups, bias=False),
            lambda: nn.ConvTranspose2d(c, out, 2, 2, groups=groups),
        )
    )
    b.add(lambda m, x: m(x), [i], layer())


@operation(4)
def squeeze_excite(b: Builder, i: int) -> None:
    c, mid = b.values[i].shape[1], b.rng.choice((2, 3, 4))
    if b.chance(0.5):
        modules = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, mid, 1), nn.ReLU(), nn.Conv2d(mid, c, 1), nn.Sigmoid()
        )
        b.add(lambda m, x: x * m(x), [i], modules)
    else:
        modules = nn.Sequential(nn.Linear(c, mid), nn.ReLU(), nn.Linear(mid, c), nn.Hardsigmoid())
        b.add(lambda m, x: x * m(x.mean((2, 3))).view(x.shape[0], c, 1, 1), [i], modules)


@operation(4)
def bottleneck(b: Builder, i: int) -> None:
    c, mid = b.values[i].shape[1], b.width()
    body = nn.Sequential(
        nn.Conv2d(c, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU(), nn.Conv2d(mid, mid, 3, padding=1), nn.GELU(),
        nn.Conv2d(mid, c, 1),
    )  # fmt: skip
    b.add(lambda m, x: x + m(x), [i], body)


@operation(4)
def c2f(b: Builder, i: int) -> None:
    """Split in two, refine one half again and again, concatenate everything."""
    c = b.values[i].shape[1]
    if c % 2:
        raise Skip
    first, second = (nn.Conv2d(c // 2, c // 2, k, padding=k // 2) for k in (3, 1))

    def function(first, second, x):
        parts = list(x.chunk(2, 1))
        parts.append(first(parts[-1]).relu())
        parts.append(parts[-1] + second(parts[-1]))
        return torch.cat(parts, 1)

    b.add(function, [i], first, second)


# ---------------------------------------------------------------------------------------------- norms and activations
@operation(3, 4, weight=2)
def norm(b: Builder, i: int) -> None:
    x = b.values[i]
    c, spatial = x.shape[1], x.dim() - 2
    batch, instance = ((nn.BatchNorm1d, nn.InstanceNorm1d), (nn.BatchNorm2d, nn.InstanceNorm2d))[spatial - 1]
    kind = b.rng.choice(("batch", "batch", "group", "one group", "instance", "channel", "all"))
    if kind == "batch":
        b.add(lambda m, x: m(x), [i], batch(c))
    elif kind == "group":
        b.add(lambda m, x: m(x), [i], nn.GroupNorm(b.divisor(c), c))
    elif kind == "one group":
        b.add(lambda m, x: m(x), [i], nn.GroupNorm(1, c))
    elif kind == "instance" and min(x.shape[2:]) > 1:
        b.add(lambda m, x: m(x), [i], instance(c, affine=b.chance(0.6)))
    elif kind == "channel":
        b.add(lambda m, x: m(x.movedim(1, -1)).movedim(-1, 1), [i], nn.LayerNorm(c))
    else:
        b.add(lambda m, x: m(x), [i], nn.LayerNorm(x.shape[1:]))


@operation(*ANY, weight=1.5)
def last_norm(b: Builder, i: int) -> None:
    x = b.values[i]
    if x.shape[-1] < 3:
        raise Skip
    layer = b.rng.choice((nn.LayerNorm, nn.LayerNorm, nn.RMSNorm))
    b.add(lambda m, x: m(x), [i], layer(x.shape[-1]))


@operation(*ANY)
def hand_norm(b: Builder, i: int) -> None:
    d = b.rng.randrange(1, b.values[i].dim())
    n = b.values[i].shape[d]
    if n < 4:
        raise Skip

    def standardise(p, x):
        shape = [-1 if k == d else 1 for k in range(x.dim())]
        return (x - x.mean(d, keepdim=True)) * torch.rsqrt(x.var(d, keepdim=True) + 0.1) * p.value.view(shape)

    def l2(p, x):
        return F.normalize(x, dim=d) * p.value.view([-1 if k == d else 1 for k in range(x.dim())])

    b.add(b.rng.choice((standardise, l2)), [i], Weight(n))


ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    torch.relu, F.gelu, F.silu, F.hardswish, torch.sigmoid, torch.tanh, F.leaky_relu, F.relu6, torch.abs, F.softplus,
    lambda x: x.clamp(-1, 2), lambda x: x.masked_fill(x < 0, 0.25), lambda x: torch.where(x > 0.2, x, -x),
    lambda x: x**2 * 0.3, lambda x: x.clone().mul_(0.5).add_(1),
    lambda x: F.relu(x * 1.0, inplace=True), lambda x: x.contiguous().float(),
    lambda x: torch.maximum(x, x * 0.1),
]  # fmt: skip


@operation(*ANY, weight=2)
def activation(b: Builder, i: int) -> None:
    b.add(b.rng.choice(ACTIVATIONS), [i])


@operation(*ANY)
def softmax(b: Builder, i: int) -> None:
    d = b.rng.randrange(1, b.values[i].dim())
    b.add(lambda x: x.softmax(d), [i])


@operation(*ANY)
def prelu(b: Builder, i: int) -> None:
    b.add(lambda m, x: m(x), [i], nn.PReLU(b.values[i].shape[1]))


# ------------------------------------------------------------------------------------------------------- constants
@operation(*ANY, weight=2)
def broadcast_weight(b: Builder, i: int) -> None:
    """Layer scale, position embedding, per-channel offset: a parameter or buffer over a random subset of dimensions."""
    sizes = [n if b.chance(0.5) else 1 for n in b.values[i].shape[1:]]
    while len(sizes) > 1 and sizes[0] == 1 and b.chance(0.5):
        sizes.pop(0)
    p = Weight(*sizes, trainable=b.chance(0.7))
    function = b.rng.choice((lambda p, x: x * p.value, lambda p, x: x + p.value, lambda p, x: p.value - x))
    b.add(function, [i], p)


@operation(*ANY)
def broadcast_mean(b: Builder, i: int) -> None:
    """Context or spatial attention: a reduction broadcast back."""
    rank = b.values[i].dim()
    dims = sorted(b.rng.sample(range(1, rank), b.rng.randint(1, rank - 1)))
    reduce = b.rng.choice((lambda x: x.mean(dims, keepdim=True), lambda x: x.amax(dims, keepdim=True)))
    b.add(b.rng.choice((lambda x: x * reduce(x).sigmoid(), lambda x: x - reduce(x))), [i])
