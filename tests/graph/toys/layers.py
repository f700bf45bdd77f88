"""Norms, convolutions, flattening; scaling, sharing and mixing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .case import Head, TokenHead, case


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


@case((2, 10), query=(3,), a__weight=(6, 3), b__weight=(4, 6), i__weight=(4, 10))
class VectorQuery(nn.Module):
    """Linear layers over one vector of parameters, without samples, which scales those of the input."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(5))
        self.a, self.b, self.i, self.head = nn.Linear(5, 12), nn.Linear(12, 8), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head((self.i(x) * self.b(self.a(self.query).relu())).relu())


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
class ProjectedLstm(nn.Module):
    """Refused: an LSTM with a projection and what it reads stay whole; the layers before it, beyond its input, shrink."""

    def __init__(self):
        super().__init__()
        self.stem, self.mid = nn.Linear(10, 12), nn.Linear(12, 6)
        self.lstm, self.fc = nn.LSTM(6, 8, proj_size=5, batch_first=True), nn.Linear(5, 3)

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
