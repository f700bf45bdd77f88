"""Windows and attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import Head, TokenHead, case


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
