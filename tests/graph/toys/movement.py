"""Cutting, joining and shuffling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import Head, case


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
