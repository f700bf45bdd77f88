"""Random networks from the operators that the comb follows: the material of the property tests. Source: ours.

`network(seed)` draws a small network step by step. Every step is an operation on values computed before, so that residuals,
concatenations, broadcasts, shared modules and tied weights arise by themselves; a step that does not fit the shapes at hand
is drawn again. `removal(comb, seed)` draws which indices of which groups go, of every kind and of several factors of one
product at once.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomb import Program, capture, verify
from graphcomb.graph.comb.axes import Factor, monomials
from graphcomb.graph.comb.solve import Comb
from graphcomb.graph.nodes import op_name
from graphcomb.graph.surgery import remove
from graphcomb.passes.base import PassResult

from ..oracles.restriction import restriction

LARGEST = 3000  # entries per sample
HIGHEST = 6  # dimensions


class Skip(Exception):
    """The operation does not fit the value at hand."""


class Weight(nn.Module):
    """A bare parameter or buffer."""

    def __init__(self, *shape: int, trainable: bool = True):
        super().__init__()
        value = torch.randn(shape) * 0.5 + 0.1
        if trainable:
            self.value = nn.Parameter(value)
        else:
            self.register_buffer("value", value)


class Step(nn.Module):
    """`function(*modules, *tensors)`."""

    def __init__(self, function: Callable[..., Any], modules: Sequence[nn.Module]):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*self.parts, *tensors)


class Network(nn.Module):
    """Steps over a growing list of values; `inputs[k]` are the values step k reads."""

    def __init__(self, steps: list[Step], inputs: list[tuple[int, ...]], outputs: list[int], names: list[str]):
        super().__init__()
        self.steps, self.inputs, self.outputs, self.names = nn.ModuleList(steps), inputs, outputs, names

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for step, inputs in zip(self.steps, self.inputs, strict=True):
            result = step(*(values[i] for i in inputs))
            values += result if isinstance(result, (tuple, list)) else [result]
        return tuple(values[i] for i in self.outputs)


class Builder:
    """The network so far, run eagerly on the example so that shapes are known."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.values: list[Tensor] = []
        self.steps: list[Step] = []
        self.inputs: list[tuple[int, ...]] = []
        self.names: list[str] = []

    def add(self, function: Callable[..., Any], inputs: Sequence[int], *modules: nn.Module) -> int:
        """Append a step and return the index of its (last) value."""
        return self.append(Step(function, modules), inputs)

    def append(self, step: Step, inputs: Sequence[int]) -> int:
        step.eval()
        with torch.no_grad():
            result = step(*(self.values[i] for i in inputs))
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        for value in results:
            if value.dim() > HIGHEST or value[0].numel() > LARGEST or not value.numel():
                raise Skip
            if not torch.isfinite(value).all() or value.abs().max() > 1e3:
                raise Skip
        self.steps.append(step)
        self.inputs.append(tuple(inputs))
        self.values += results
        return len(self.values) - 1

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def divisor(self, n: int, largest: int = 64) -> int:
        """A divisor of n that is neither 1 nor n."""
        found = [d for d in range(2, min(n, largest + 1)) if n % d == 0]
        if not found:
            raise Skip
        return self.rng.choice(found)

    def like(self, i: int, fits: Callable[[Tensor, Tensor], bool]) -> int:
        """Another value that fits value i; recent ones are likelier."""
        found = [j for j, v in enumerate(self.values) if j not in (0, i) and fits(v, self.values[i])]
        if not found:
            raise Skip
        return self.rng.choice(found[-6:])

    def width(self) -> int:
        return self.rng.choice((4, 6, 8, 8, 9, 10, 12, 12, 14, 15, 16, 18, 24))


Operation = Callable[[Builder, int], Any]
OPERATIONS: list[tuple[float, tuple[int, ...], Operation]] = []
ANY = (3, 4, 5, 6)


def operation(*ranks: int, weight: float = 1.0) -> Callable[[Operation], Operation]:
    """Register an operation for values of the given ranks (batch dimension included)."""

    def register(function: Operation) -> Operation:
        OPERATIONS.append((weight, ranks, function))
        return function

    return register


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


# ------------------------------------------------------------------------------------------------------ combination
def _same(p: Tensor, q: Tensor) -> bool:
    return p.shape == q.shape


@operation(*ANY, weight=4)
def residual(b: Builder, i: int) -> None:
    j = b.like(i, _same)
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
    j = i if b.chance(0.3) else b.like(i, _same)
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
        k for k, v in enumerate(b.inputs) if len(v) == 1 and b.steps[k].parts and _same(b.values[v[0]], b.values[i])
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


# ------------------------------------------------------------------------------------------------------------ whole
def _head(b: Builder, i: int) -> int:
    """From a value to an output; outputs are frozen, so most heads keep the value's own axes inside."""
    x = b.values[i]
    kind = b.rng.random()
    if kind < 0.45:
        return b.add(lambda m, x: m(x.flatten(1)), [i], nn.Linear(x[0].numel(), 3))
    if kind < 0.85:
        d = b.rng.randrange(1, x.dim())
        others = [k for k in range(1, x.dim()) if k != d]
        return b.add(lambda m, x: m(x.mean(others) if others else x), [i], nn.Linear(x.shape[d], 3))
    if x.dim() == 4 and kind < 0.93:
        return b.add(lambda m, x: m(x), [i], nn.Conv2d(x.shape[1], 2, 1))
    return b.add(lambda m, x: m(x), [i], nn.Linear(x.shape[-1], 2))


@dataclass(frozen=True)
class Drawn:
    """A network, an example input, and whether its batch is to be dynamic."""

    model: Network
    x: Tensor
    dynamic: bool

    def capture(self) -> Program:
        return capture(self.model, (self.x,), dynamic_shapes="batch" if self.dynamic else None)


def network(seed: int, smallest: int = 3, largest: int = 10) -> Drawn:
    """The random network of a seed, with `smallest` to `largest` operations and one to three outputs."""
    b = Builder(seed)
    torch.manual_seed(seed)
    batch = b.rng.choice((2, 3, 5))
    if b.chance(0.65):
        side = b.rng.choice((4, 4, 6, 8))
        x = torch.randn(batch, 3, side, side)
        b.values.append(x)
        b.add(lambda m, x: m(x), [0], nn.Conv2d(3, b.width(), b.rng.choice((1, 3)), padding=0 if b.chance(0.3) else 1))
    else:
        x = torch.randn(batch, b.rng.choice((4, 5, 9)), 5)
        b.values.append(x)
        b.add(lambda m, x: m(x), [0], nn.Linear(5, b.width()))
    b.names.append("stem")
    wanted, tries = b.rng.randint(smallest, largest), 0
    while len(b.names) <= wanted and tries < 200:
        tries += 1
        i = len(b.values) - 1 if b.chance(0.7) else b.rng.randrange(1, len(b.values))
        fitting = [(w, f) for w, ranks, f in OPERATIONS if b.values[i].dim() in ranks]
        if not fitting:
            continue
        function = b.rng.choices([f for _, f in fitting], [w for w, _ in fitting])[0]
        marks = len(b.values), len(b.steps)
        try:
            function(b, i)
        except (Skip, RuntimeError, ValueError):
            del b.values[marks[0] :]
            del b.steps[marks[1] :], b.inputs[marks[1] :]
            continue
        b.names.append(function.__name__)
    ends = {len(b.values) - 1} | {b.rng.randrange(1, len(b.values)) for _ in range(b.rng.choice((0, 1, 1, 2)))}
    outputs = [_head(b, i) for i in sorted(ends)]
    return Drawn(Network(b.steps, b.inputs, outputs, b.names), x, b.chance(0.25))


def removal(comb: Comb, seed: int) -> dict[Factor, np.ndarray]:
    """Random masks (True: stays) for a random part of the groups that are not frozen, of every kind."""
    rng = np.random.default_rng(seed)
    free = [g for g in comb.groups if g.frozen is None and g.size > g.least]
    chosen = rng.random(len(free)) < rng.choice([0.3, 0.7, 1.0])
    if free and not chosen.any():
        chosen[rng.integers(len(free))] = True
    masks = {}
    for group in (g for g, yes in zip(free, chosen, strict=True) if yes):
        mask = np.zeros(group.size, dtype=bool)
        mask[rng.choice(group.size, int(rng.integers(group.least, group.size)), replace=False)] = True
        masks[group.atom] = mask
    return masks


@dataclass(frozen=True)
class Trial:
    """What became of one network: "exact", "wrong", "vacuous" (no output could change), or "frozen" (nothing to remove).

    absence, restriction: the errors of the two oracles. why: the first disagreement. kinds: how many groups of each kind
    lost indices; products: axes of parameters of which two factors or more lost some. operators: names in the graph.
    """

    seed: int
    outcome: str
    absence: float = 0.0
    restriction: float = 0.0
    why: str = ""
    kinds: Counter[str] = field(default_factory=Counter)
    products: int = 0
    dynamic: bool = False
    operators: frozenset[str] = frozenset()


def trial(seed: int) -> Trial:
    """Draw the network of a seed and a removal, slice it, and ask both oracles."""
    drawn = network(seed)
    program = drawn.capture()
    comb = Comb(program)
    masks = removal(comb, seed)
    operators = frozenset(op_name(n) for n in program.graph.nodes if n.op == "call_function")
    if not masks:
        return Trial(seed, "frozen", dynamic=drawn.dynamic, operators=operators)
    smaller, removed = remove(comb, masks)
    result = PassResult(smaller, {}, removed)
    verdict = verify.check(program, result, seed=seed)
    second = restriction(program, result, seed=seed, comb=comb) if not verdict.disagreements else float("inf")
    right = max(verdict.error, second) <= verify.TOLERANCE and not verdict.disagreements
    why = verdict.disagreements[0] if verdict.disagreements else "" if right else "the restriction oracle differs"
    distinct = {id(axis): axis for axes in comb.parameters.values() for axis in axes}.values()
    return Trial(
        seed,
        "wrong" if not right else "vacuous" if verdict.vacuous else "exact",
        verdict.error,
        second,
        why,
        Counter(g.kind for g in comb.groups if g.atom in masks),
        sum(any(len(masks.keys() & set(m)) > 1 for m in monomials(axis)) for axis in distinct),
        drawn.dynamic,
        operators,
    )
