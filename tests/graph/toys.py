"""One small model per structure that pruners get wrong, with what ratio 0.5 must leave of its parameters.

`CASES` maps a name to a `Case`. Sizes are deliberately odd or prime where that is nasty: 3 heads of width 5, 6 channels in
3 groups, 58 channels shuffled in 2 groups of 29.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """model: makes the module. shape: of the input, batch first. expected: parameter -> shape after ratio 0.5, round_to 1.

    frozen: parameter -> words its reason must hold, for parameters that must stay whole. static: does not export with a
    dynamic batch.
    """

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    expected: dict[str, tuple[int, ...]]
    frozen: dict[str, str] = field(default_factory=dict)
    static: bool = False


CASES: dict[str, Case] = {}


def case(
    shape: tuple[int, ...], frozen: dict[str, str] | None = None, static: bool = False, **expected: tuple[int, ...]
):
    """Register a module class; `a__weight` in keywords stands for the parameter a.weight."""

    def register(model: type[nn.Module]) -> type[nn.Module]:
        sizes = {k.replace("__", "."): v for k, v in expected.items()}
        CASES[model.__name__] = Case(model, shape, sizes, frozen or {}, static)
        return model

    return register


class Head(nn.Module):
    """Global mean over the spatial dimensions and a linear layer: lets every channel before it shrink."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(tuple(range(2, x.dim()))))


class TokenHead(nn.Module):
    """The same for tokens (B, N, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(1))


# -------------------------------------------------------------------------------------------------- cutting and joining
@case((2, 3, 6, 6), a__weight=(4, 3, 3, 3), b__weight=(3, 8, 1, 1))
class CatWithItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 6, 1), Head(6)

    def forward(self, x):
        y = self.a(x).relu()
        return self.head(self.b(torch.cat([y, y], 1)))


@case((2, 3, 6, 6), a__weight=(4, 3, 1, 1), b__weight=(3, 3, 1, 1), c__weight=(3, 7, 1, 1), head__fc__weight=(3, 3))
class CatOfTwo(nn.Module):
    """Each branch loses its own indices; a residual of the whole ties them to the sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(13, 6, 1), Head(6)

    def forward(self, x):
        return self.head(self.c(torch.cat([self.a(x), self.b(x)], 1)))


@case((2, 3, 4, 4), a__weight=(8, 3, 1, 1), head__fc__weight=(3, 4))
class ChunkedGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 16, 1), Head(8)

    def forward(self, x):
        value, gate = self.a(x).chunk(2, 1)
        return self.head(value * gate.sigmoid())


@case((2, 3, 4, 4), a__weight=(6, 3, 1, 1), head__fc__weight=(3, 3))
class Glu(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 12, 1), Head(6)

    def forward(self, x):
        return self.head(F.glu(self.a(x), 1))


@case((2, 3, 6, 6), a__weight=(8, 3, 1, 1), m0__weight=(4, 4, 3, 3), m1__weight=(4, 4, 3, 3), b__weight=(5, 16, 1, 1))
class C2f(nn.Module):
    """The YOLO block: chunk, refine the last piece again and again, concatenate all pieces."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(32, 10, 1), Head(10)
        self.m0, self.m1 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        pieces = list(self.a(x).chunk(2, 1))
        pieces.append(pieces[-1] + self.m0(pieces[-1]).relu())
        pieces.append(pieces[-1] + self.m1(pieces[-1]).relu())
        return self.head(self.b(torch.cat(pieces, 1)))


@case((2, 3, 4, 4), a__weight=(7, 3, 1, 1), b__weight=(2, 3, 1, 1))
class UnevenSplit(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 13, 1), nn.Conv2d(5, 4, 1), Head(12)

    def forward(self, x):
        left, right = self.a(x).split([5, 8], 1)
        return self.head(torch.cat([self.b(left), right], 1))


# ----------------------------------------------------------------------------------------------------------- shuffling
@case((2, 3, 4, 4), a__weight=(16, 3, 1, 1), b__weight=(4, 4, 1, 1))
class PixelShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 32, 1), nn.Conv2d(8, 8, 1), Head(8)

    def forward(self, x):
        return self.head(self.b(F.pixel_shuffle(self.a(x), 2)))


@case((2, 3, 4, 4), a__weight=(4, 3, 1, 1), b__weight=(4, 16, 1, 1))
class PixelUnshuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(32, 8, 1), Head(8)

    def forward(self, x):
        return self.head(self.b(F.pixel_unshuffle(self.a(x), 2)))


@case((2, 3, 4, 4), a__weight=(8, 3, 1, 1), b__weight=(4, 8, 1, 1))
class ChannelShuffle(nn.Module):
    """By view, transpose and view, then by the module."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1), Head(8)
        self.shuffle = nn.ChannelShuffle(4)

    def forward(self, x):
        y = self.a(x)
        b, c, h, w = y.shape
        y = y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(self.b(self.shuffle(y)))


@case((2, 3, 4, 4), a__weight=(30, 3, 1, 1), b__weight=(30, 30, 1, 1), c__weight=(29, 30, 1, 1))
class ShuffleNetUnit(nn.Module):
    """116 channels in two groups of 58, shuffled, and cut in halves again: the half is 29 x 2, with 14 pairs left over."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 58, 1), nn.Conv2d(58, 58, 1), nn.Conv2d(58, 58, 1), Head(116)

    def forward(self, x):
        y = self.a(x)
        y = torch.cat([y, self.b(y)], 1)
        b, c, h, w = y.shape
        y = y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        left, right = y.chunk(2, 1)
        return self.head(torch.cat([left, self.c(right)], 1))


@case((2, 3, 4, 4), a__weight=(8, 3, 1, 1), b__weight=(8, 1, 3, 3), frozen={"a.weight": "1+1"})
class ShuffleIntoItself(nn.Module):
    """A depthwise convolution used before and after a shuffle ties channel k to channel 4 + k // 2, and so on: all eight
    are one, and nothing can go."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), Head(16)

    def forward(self, x):
        y = self.a(x)
        y = nn.ChannelShuffle(2)(torch.cat([y, self.b(y)], 1))
        left, right = y.chunk(2, 1)
        return self.head(torch.cat([left, self.b(right)], 1))


# --------------------------------------------------------------------------------------------------- Swin and windows
@case((2, 3, 8, 8), qkv__weight=(18, 6), proj__weight=(6, 6), stem__weight=(6, 3, 1, 1))
class SwinWindows(nn.Module):
    """Channels last, cyclic shift, window partition, attention inside windows, and everything back."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 1), nn.LayerNorm(12)
        self.qkv, self.proj, self.head = nn.Linear(12, 36), nn.Linear(12, 12), Head(12)
        self.bias = nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        y = self.norm(x).roll((-2, -2), (1, 2))
        b, h, w, c = y.shape
        y = y.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 4, 3).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q * 3**-0.5) @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(-1, 16, c))
        y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.head((x + y.roll((2, 2), (1, 2))).permute(0, 3, 1, 2))


@case((2, 3, 8, 8), stem__weight=(3, 3, 1, 1), reduction__weight=(6, 12), norm__weight=(12,))
class PatchMerging(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.reduction = nn.Conv2d(3, 6, 1), nn.LayerNorm(24), nn.Linear(24, 12, bias=False)
        self.head = Head(12)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.reduction(self.norm(x)).permute(0, 3, 1, 2))


# ---------------------------------------------------------------------------------------------------------- attention
class Attention(nn.Module):
    """Tokens (B, N, 10), 3 heads of width 5."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(10, 45), nn.Linear(15, 10), TokenHead(10)


@case((2, 7, 10), qkv__weight=(30, 10), proj__weight=(5, 10), head__fc__weight=(3, 5))
class FusedQkv(Attention):
    """Static head shape. A head goes from q, k and v together: 2 of 3 stay, with all 5 of their widths."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 3, 5).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) * 5**-0.5).softmax(-1) @ v
        return self.head(self.proj(y.transpose(1, 2).reshape(b, n, 15)))


@case((2, 7, 10), qkv__weight=(30, 10), proj__weight=(5, 10))
class FusedQkvHeadsFirst(Attention):
    """Another layout of the same rows: head, then q/k/v, then width."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 15).permute(0, 2, 1, 3).split(5, -1)
        return self.head(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


@case((2, 7, 10), qkv__weight=(30, 10), proj__weight=(5, 10))
class FusedQkvChunk(Attention):
    def forward(self, x):
        q, k, v = (t.unflatten(-1, (3, 5)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.head(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


@case((2, 7, 10), q__weight=(10, 10), k__weight=(10, 10), v__weight=(14, 10), proj__weight=(5, 14))
class SeparateQkv(nn.Module):
    """v is wider than q and k."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(10, 15), nn.Linear(10, 15), nn.Linear(10, 21)
        self.proj, self.head = nn.Linear(21, 10), TokenHead(10)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 3, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        return self.head(self.proj(y))


class GroupedQueries(nn.Module):
    """6 heads of width 4 share 3 heads of k and v."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(10, 24), nn.Linear(10, 12), nn.Linear(10, 12)
        self.proj, self.head = nn.Linear(24, 10), TokenHead(10)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 6, 4).transpose(1, 2)
        k, v = (f(x).view(b, n, 3, 4).transpose(1, 2) for f in (self.k, self.v))
        return self.head(self.proj(self.attend(q, k, v).transpose(1, 2).reshape(b, n, -1)))


@case((2, 7, 10), q__weight=(16, 10), k__weight=(8, 10), v__weight=(8, 10), proj__weight=(5, 16))
class GqaFlag(GroupedQueries):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@case((2, 7, 10), q__weight=(16, 10), k__weight=(8, 10), v__weight=(8, 10), proj__weight=(5, 16))
class GqaInterleave(GroupedQueries):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


@case((2, 7, 10), q__weight=(16, 10), k__weight=(8, 10), v__weight=(8, 10), proj__weight=(5, 16))
class GqaExpand(GroupedQueries):
    """As the transformers library spells it."""

    def attend(self, q, k, v):
        b, h, n, d = k.shape
        k, v = (t[:, :, None].expand(b, h, 2, n, d).reshape(b, h * 2, n, d) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@case((2, 7, 10), qkv__weight=(48, 10), proj__weight=(5, 16))
class RotaryThroughComplexNumbers(Attention):
    """Pairs of a head's width are complex numbers that the position turns: heads go, widths stay."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(10, 72), nn.Linear(24, 10)
        self.register_buffer(
            "turns", torch.polar(torch.ones(7, 4), torch.outer(torch.arange(7.0), 0.5 ** torch.arange(4)))
        )

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 3, 8).permute(2, 0, 3, 1, 4)
        q, k = (
            torch.view_as_real(torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2)) * self.turns).flatten(3)
            for t in (q, k)
        )
        return self.head(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 24)))


@case((2, 9, 10), qkv__weight=(30, 10), table=(25, 2), proj__weight=(5, 10))
class RelativePositionBias(Attention):
    """A table (positions, heads), looked up and permuted: a head goes from the table as well."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(25, 3))
        at = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")).flatten(1)
        away = at[:, :, None] - at[:, None, :] + 2
        self.register_buffer("index", away[0] * 5 + away[1])

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 3, 5).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        y = (q @ k.transpose(-2, -1) * 5**-0.5 + bias.unsqueeze(0)).softmax(-1) @ v
        return self.head(self.proj(y.transpose(1, 2).reshape(b, n, 15)))


@case(
    (2, 7, 10), stem__weight=(6, 10), att__in_proj_weight=(24, 6), att__out_proj__weight=(6, 8), head__fc__weight=(3, 5)
)
class MultiheadAttention(nn.Module):
    """torch's own, with the attention weights: heads hide in B·h, the first dimension of a batched product."""

    def __init__(self):
        super().__init__()
        self.stem, self.att = nn.Linear(10, 12), nn.MultiheadAttention(12, 3, batch_first=True)
        self.proj, self.head = nn.Linear(12, 10), TokenHead(10)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.proj(self.att(x, x, x)[0]))


# -------------------------------------------------------------------------------------------------------------- norms
@case((2, 3, 5, 5), a__weight=(8, 3, 1, 1), norm__weight=(8,), head__fc__weight=(3, 8))
class GroupNorm(nn.Module):
    """12 channels in 3 groups of 4: whole groups go, 2 of 3 stay, and the norm counts 2."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.head = nn.Conv2d(3, 12, 1), nn.GroupNorm(3, 12), Head(12)

    def forward(self, x):
        return self.head(self.norm(self.a(x)).relu())


@case((2, 3, 5, 5), a__weight=(4, 3, 1, 1), norm__weight=(4,))
class InstanceNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8, affine=True), Head(8)

    def forward(self, x):
        return self.head(self.norm(self.a(x)).relu())


@case((2, 7, 10), a__weight=(6, 10), norm__weight=(6,), scale=(6,), head__fc__weight=(3, 6))
class RmsNorm(nn.Module):
    """The module, and the same by hand."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(10, 12), nn.RMSNorm(12), TokenHead(12)
        self.scale = nn.Parameter(torch.randn(12))

    def forward(self, x):
        y = self.norm(self.a(x))
        return self.head(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale)


# ------------------------------------------------------------------------------------------------------- convolutions
@case((2, 3, 5, 5), a__weight=(6, 3, 1, 1), b__weight=(8, 3, 3, 3), head__fc__weight=(3, 8))
class GroupedConv(nn.Module):
    """4 groups: half of them go, or half of what is inside."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 16, 3, groups=4), Head(16)

    def forward(self, x):
        return self.head(self.b(self.a(x)))


@case((2, 3, 5, 5), a__weight=(4, 3, 1, 1), b__weight=(12, 1, 3, 3), head__fc__weight=(3, 12))
class DepthwiseMultiplier(nn.Module):
    """Every channel gives three: the base shrinks, the multiplier stays."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 7, 1), nn.Conv2d(7, 21, 3, groups=7), Head(21)

    def forward(self, x):
        return self.head(self.b(self.a(x)))


@case((2, 3, 4, 4), a__weight=(3, 3, 2, 2), b__weight=(3, 4, 3, 3), head__fc__weight=(3, 4))
class TransposedConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.ConvTranspose2d(3, 6, 2, 2), nn.ConvTranspose2d(6, 8, 3)
        self.head = Head(8)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()))


@case((2, 3, 4, 4), a__weight=(8, 3, 1, 1), b__weight=(8, 5, 2, 2), head__fc__weight=(3, 10))
class GroupedTransposedConv(nn.Module):
    """3 groups of 4 to 5 channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 12, 1), nn.ConvTranspose2d(12, 15, 2, 2, groups=3), Head(15)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()))


# --------------------------------------------------------------------------------------------------------- flattening
@case((2, 3, 4, 5), a__weight=(4, 3, 1, 1), fc__weight=(3, 80))
class FlattenNchw(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(160, 3)

    def forward(self, x):
        return self.fc(self.a(x).relu().flatten(1))


@case((2, 3, 4, 5), a__weight=(4, 3, 1, 1), fc__weight=(3, 80))
class FlattenNhwc(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(160, 3)

    def forward(self, x):
        return self.fc(self.a(x).relu().permute(0, 2, 3, 1).reshape(x.shape[0], -1))


# ------------------------------------------------------------------------------------------- scaling, sharing, mixing
@case((2, 3, 5, 5), a__weight=(4, 3, 1, 1), b__weight=(4, 1, 3, 3), up__weight=(8, 4), down__weight=(4, 8), gamma=(4,))
class LayerScale(nn.Module):
    """A ConvNeXt block."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), Head(8)
        self.gamma = nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = self.a(x)
        y = self.norm(self.b(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return self.head(x + y.permute(0, 3, 1, 2))


@case((2, 3, 5, 5), a__weight=(4, 3, 1, 1), down__weight=(2, 4, 1, 1), up__weight=(4, 2, 1, 1))
class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.down, self.up, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1), Head(8)

    def forward(self, x):
        x = self.a(x)
        return self.head(x * self.up(self.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid())


@case((2, 3, 5, 5), a__weight=(4, 3, 1, 1), embed=(5, 4))
class EinsumMaskHead(nn.Module):
    """Mask logits as products of query embeddings and pixels; the queries are outputs."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.embed = nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        return torch.einsum("qc,bchw->bqhw", self.embed, self.a(x))


@case((2, 7, 10), a__weight=(4, 10), b=(3, 4), c=(4, 3), head__fc__weight=(3, 4))
class EinsumEllipsis(nn.Module):
    """With an ellipsis, and with the output left to be inferred."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(10, 8), TokenHead(8)
        self.b, self.c = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        y = torch.einsum("...c, kc -> ...k", self.a(x), self.b)
        return self.head(torch.einsum("btk,zk", y, self.c))


@case((2, 3, 6, 6), a__weight=(4, 3, 1, 1), weight=(4, 2, 3, 3), offset__weight=(36, 3, 3, 3), head__fc__weight=(3, 4))
class DeformableConv(nn.Module):
    """2 weight groups of 4 channels, moved by 2 offset fields that stay."""

    def __init__(self):
        super().__init__()
        self.a, self.offset, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 36, 3, padding=1), Head(8)
        self.weight = nn.Parameter(torch.randn(8, 4, 3, 3))

    def forward(self, x):
        torchvision = pytest.importorskip("torchvision.ops")
        return self.head(torchvision.deform_conv2d(self.a(x), self.offset(x), self.weight, padding=1))


@case((2, 3, 5, 5), a__weight=(4, 3, 1, 1), b__weight=(4, 4, 3, 3))
class SharedModule(nn.Module):
    """One convolution used three times, so that its inputs and outputs are the same channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), Head(8)

    def forward(self, x):
        y = self.a(x)
        for _ in range(3):
            y = self.b(y).relu()
        return self.head(y)


@case((2, 7, 10), encoder__weight=(4, 4), decoder__weight=(4, 4), stem__weight=(4, 10))
class TiedWeights(nn.Module):
    """One tensor under two names, in two layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.encoder, self.decoder = nn.Linear(10, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.decoder.weight = self.encoder.weight
        self.head = TokenHead(8)

    def forward(self, x):
        return self.head(self.decoder(self.encoder(self.stem(x)).relu()))


@case((2, 7, 10), weight=(5, 10))
class TiedTranspose(nn.Module):
    """Down and up with one matrix; its columns are the model's outputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 10))

    def forward(self, x):
        return F.linear(F.linear(x, self.weight).relu(), self.weight.t())


@case(
    (2, 7, 10),
    frozen={"lstm.weight_ih_l0": "lstm", "lstm.weight_hh_l0": "lstm", "fc.weight": "output"},
    stem__weight=(6, 10),
)
class Lstm(nn.Module):
    """Refused: the LSTM and what it reads stay whole; the layers before it, beyond its input, shrink."""

    def __init__(self):
        super().__init__()
        self.stem, self.mid = nn.Linear(10, 12), nn.Linear(12, 6)
        self.lstm, self.fc = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.lstm(self.mid(self.stem(x).relu()))[0])


@case((2, 3, 5, 5), a__weight=(4, 3, 1, 1), b__weight=(1, 2, 3, 3))
class SpatialAttention(nn.Module):
    """Mean and maximum over the channels, as in CBAM."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(2, 1, 3, padding=1), Head(8)

    def forward(self, x):
        x = self.a(x)
        y = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.head(x * self.b(y).sigmoid())


@case((2, 3, 5, 5), a__weight=(4, 3, 1, 1), b__weight=(3, 4, 1, 1))
class ChannelSoftmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), Head(6)

    def forward(self, x):
        return self.head(self.b(self.a(x).softmax(1)))
