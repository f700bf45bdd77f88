"""Small real networks for `accuracy.py`: three classifiers of 28 x 28 grey images, two segmenters of 48 x 48 scenes.

Each has the structure of a well-known family (residual additions, inverted bottlenecks with depthwise convolutions,
attention over patches, a gated head with two branches, a pyramid of transformer stages that an MLP joins) at a size that a
CPU core trains in minutes. `width` scales every width. Widths of heads are read from tensors and the attention scale is
fixed at construction, so that the module still runs after a tool has sliced its weights in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """Convolution, BatchNorm and, unless told otherwise, ReLU; resolution is kept but for the stride."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if act else nn.Sequential(*layers)


# -------------------------------------------------------------------------------------------------------------- ResNet
class Residual(nn.Module):
    """Two 3x3 convolutions around a skip (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = conv(inputs, outputs, 3, stride)
        self.second = conv(outputs, outputs, 3, act=False)
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else conv(inputs, outputs, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.skip(x))


class ResNet(nn.Module):
    """CIFAR-style: a 3x3 stem, three stages of residual blocks, each of half the resolution; (N, 1, 28, 28) to (N, 10)."""

    def __init__(self, width: int = 32, blocks: int = 1, classes: int = 10):
        super().__init__()
        self.stem = conv(1, width, 3, 2)
        stages: list[nn.Module] = []
        inputs = width
        for i, outputs in enumerate((width, 2 * width, 4 * width)):
            for j in range(blocks):
                stages.append(Residual(inputs, outputs, 2 if i and not j else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


# ----------------------------------------------------------------------------------------------------------- MobileNet
class InvertedResidual(nn.Module):
    """Widen, depthwise 3x3, narrow without activation, skip where shapes agree (Sandler et al., arXiv 1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = expansion * inputs
        self.body = nn.Sequential(
            conv(inputs, hidden, 1), conv(hidden, hidden, 3, stride, groups=hidden), conv(hidden, outputs, 1, act=False)
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNet(nn.Module):
    """MobileNetV2-style; (N, 1, 28, 28) to (N, 10)."""

    def __init__(self, width: int = 16, expansion: int = 4, classes: int = 10):
        super().__init__()
        self.stem = conv(1, width, 3, 2)
        plan = ((width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2), (4 * width, 1))
        blocks: list[nn.Module] = []
        inputs = width
        for outputs, stride in plan:
            blocks.append(InvertedResidual(inputs, outputs, stride, expansion))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = conv(inputs, 8 * width, 1)
        self.head = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))


# ---------------------------------------------------------------------------------------------------------------- DeiT
class Attention(nn.Module):
    """Multi-head self-attention from one fused projection."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(x.transpose(1, 2).reshape(n, t, -1))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, dim: int, heads: int, ratio: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DeiT(nn.Module):
    """Patches of 4 x 4, a class token, learnt positions (Touvron et al., arXiv 2012.12877); (N, 1, 28, 28) to (N, 10)."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4, ratio: int = 4, classes: int = 10):
        super().__init__()
        self.embed = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 1 + 7 * 7, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


# ------------------------------------------------------------------------------------------------------------ ConvNeXt
class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm, two pointwise layers, layer scale, skip (Liu et al., arXiv 2201.03545)."""

    def __init__(self, dim: int, ratio: int = 4):
        super().__init__()
        self.mix, self.norm = nn.Conv2d(dim, dim, 7, padding=3, groups=dim), nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.fc2(F.gelu(self.fc1(y)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """A patchified stem and two stages with a downsampling layer between; (N, 1, 28, 28) to (N, 10)."""

    def __init__(self, width: int = 32, depths: tuple[int, int] = (2, 4), classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 2, 2), nn.BatchNorm2d(width))
        self.fine = nn.Sequential(*(ConvNeXtBlock(width) for _ in range(depths[0])))
        self.down = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, 2 * width, 2, 2))
        self.coarse = nn.Sequential(*(ConvNeXtBlock(2 * width) for _ in range(depths[1])))
        self.norm, self.head = nn.LayerNorm(2 * width), nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.coarse(self.down(self.fine(self.stem(x))))
        return self.head(self.norm(x.mean((2, 3))))


# -------------------------------------------------------------------------------------------------------- segmentation
class LRASPP(nn.Module):
    """An encoder of inverted residuals with the LR-ASPP head: a 1x1 branch gated by pooled context, joined with a finer
    level (Howard et al., arXiv 1905.02244); (N, 1, H, W) to class scores (N, classes, H, W)."""

    def __init__(self, width: int = 24, expansion: int = 3, classes: int = 11):
        super().__init__()
        self.stem = conv(1, width, 3, 2)
        self.fine = nn.Sequential(
            Residual(width, width, 1), InvertedResidual(width, 2 * width, 2, expansion),
            InvertedResidual(2 * width, 2 * width, 1, expansion),
        )  # fmt: skip
        self.coarse = nn.Sequential(
            InvertedResidual(2 * width, 4 * width, 2, expansion), InvertedResidual(4 * width, 4 * width, 1, expansion)
        )
        self.branch = conv(4 * width, 4 * width, 1)
        self.gate = nn.Conv2d(4 * width, 4 * width, 1, bias=False)
        self.high = nn.Conv2d(4 * width, classes, 1)
        self.low = nn.Conv2d(2 * width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(self.stem(x))
        coarse = self.coarse(fine)
        context = self.branch(coarse) * self.gate(coarse.mean((2, 3), keepdim=True)).sigmoid()
        joined = self.low(fine) + F.interpolate(self.high(context), scale_factor=2.0, mode="bilinear")
        return F.interpolate(joined, scale_factor=4.0, mode="bilinear")


class MixBlock(nn.Module):
    """Attention over reduced keys and a feed-forward with a depthwise 3x3 inside (Xie et al., arXiv 2105.15203)."""

    def __init__(self, dim: int, heads: int, reduction: int, ratio: int):
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.reduce = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else None
        self.fc1, self.fc2 = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)
        self.mix = nn.Conv2d(ratio * dim, ratio * dim, 3, padding=1, groups=ratio * dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attend(self.norm1(tokens), height, width)
        hidden = image(self.fc1(self.norm2(tokens)), height, width)
        hidden = F.gelu(self.mix(hidden)).flatten(2).transpose(1, 2)
        return image(tokens + self.fc2(hidden), height, width)

    def attend(self, tokens: Tensor, height: int, width: int) -> Tensor:
        keys = tokens
        if self.reduce is not None:
            keys = self.reduce(image(tokens, height, width)).flatten(2).transpose(1, 2)
        q, k, v = (
            layer(t).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, t in ((self.q, tokens), (self.k, keys), (self.v, keys))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def image(tokens: Tensor, height: int, width: int) -> Tensor:
    """(N, H * W, C) to (N, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


class SegFormer(nn.Module):
    """A pyramid of two transformer stages and an all-MLP decoder; (N, 1, H, W) to class scores (N, classes, H, W)."""

    def __init__(self, width: int = 32, depth: int = 2, heads: int = 2, ratio: int = 4, classes: int = 11):
        super().__init__()
        self.embed = nn.ModuleList([nn.Conv2d(1, width, 7, 4, 3), nn.Conv2d(width, 2 * width, 3, 2, 1)])
        self.stages = nn.ModuleList(
            nn.Sequential(*(MixBlock(dim, h, reduction, ratio) for _ in range(depth)))
            for dim, h, reduction in ((width, heads, 2), (2 * width, 2 * heads, 1))
        )
        self.project = nn.ModuleList([nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, 2 * width, 1)])
        self.fuse = conv(4 * width, 2 * width, 1)
        self.classify = nn.Conv2d(2 * width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for embed, stage, project in zip(self.embed, self.stages, self.project, strict=True):
            x = stage(embed(x))
            levels.append(project(x))
        fine, coarse = levels
        joined = torch.cat([fine, F.interpolate(coarse, scale_factor=2.0, mode="bilinear")], 1)
        return F.interpolate(self.classify(self.fuse(joined)), scale_factor=4.0, mode="bilinear")


CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {"resnet": ResNet, "mobilenet": MobileNet, "deit": DeiT}
SEGMENTERS: dict[str, Callable[..., nn.Module]] = {"lraspp": LRASPP, "segformer": SegFormer}
NETWORKS = CLASSIFIERS | SEGMENTERS
