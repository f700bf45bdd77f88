"""The networks of `kernels.py`: networks of torchvision, timm and transformers with random weights, and detectors and a
U-Net of our own. A name consists of the library and the model. The fusion rules were developed on the networks in
`DEVELOPED`; those in `HELD_OUT` were used only to count kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Name: image size, and what RemoveChannels takes away first.
DEVELOPED: dict[str, tuple[int, dict[str, Any]]] = {
    "torchvision/resnet18": (128, {}), "torchvision/resnet50": (160, {}), "torchvision/mobilenet_v2": (128, {}),
    "torchvision/densenet121": (128, {}), "torchvision/inception_v3": (160, {}),
    "torchvision/efficientnet_b0": (128, {}), "torchvision/convnext_tiny": (128, {}), "torchvision/swin_t": (224, {}),
    "torchvision/regnet_y_400mf": (128, {}), "torchvision/deeplabv3_mobilenet_v3_large": (128, {}),
    "torchvision/shufflenet_v2_x1_0": (128, {}), "torchvision/vgg11_bn": (128, {}),
    "torchvision/vit_b_16": (224, {}),
    "timm/deit_tiny_patch16_224": (224, {}), "timm/mobilevit_s": (128, {}), "timm/pvt_v2_b0": (224, {}),
    "timm/hrnet_w18_small": (128, {}), "timm/resnest26d": (128, {}), "timm/levit_128s": (224, {}),
    "own/yolo_n": (256, {}), "transformers/segformer": (128, {}),
    "torchvision/resnet50 odd": (160, {"ratio": 0.3, "round_to": 1}),
    "torchvision/mobilenet_v2 2x": (128, {"macs": 0.5}),
}  # fmt: skip
HELD_OUT: dict[str, tuple[int, dict[str, Any]]] = {
    "torchvision/resnet34": (160, {}), "torchvision/resnext50_32x4d": (128, {}),
    "torchvision/mobilenet_v3_large": (128, {}), "torchvision/mnasnet1_0": (128, {}),
    "torchvision/densenet169": (160, {}), "torchvision/googlenet": (128, {}),
    "torchvision/efficientnet_v2_s": (128, {}), "timm/convnextv2_atto": (128, {}), "torchvision/swin_v2_t": (256, {}),
    "torchvision/regnet_x_400mf": (128, {}),
    "torchvision/lraspp_mobilenet_v3_large": (128, {}), "torchvision/fcn_resnet50": (128, {}),
    "torchvision/squeezenet1_1": (128, {}), "timm/res2net50_26w_4s": (128, {}), "timm/ghostnet_100": (128, {}),
    "timm/edgenext_small": (128, {}), "timm/efficientformer_l1": (224, {}), "timm/poolformer_s12": (128, {}),
    "timm/maxvit_tiny_rw_224": (224, {}), "timm/resnet10t": (128, {}), "timm/dla34": (128, {}),
    "timm/cspdarknet53": (128, {}), "own/yolo_csp": (256, {}), "own/unet": (128, {}), "transformers/detr": (128, {}),
    "torchvision/efficientnet_b0 odd": (128, {"ratio": 0.3, "round_to": 1}),
    "torchvision/convnext_tiny 2x": (128, {"macs": 0.5}),
}  # fmt: skip
NETWORKS = DEVELOPED | HELD_OUT


def make(name: str) -> nn.Module:
    """The network with random weights, in eval mode. Its normalisations know the statistics of two random images: with
    those of initialisation the activations of some networks vanish in fp16."""
    torch.manual_seed(0)
    side, _ = NETWORKS[name]
    model = _untrained(name.split()[0])
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
            module.train()
    with torch.no_grad():
        model(torch.randn(2, 3, side, side))
    return model.eval()


def _untrained(name: str) -> nn.Module:
    family, _, rest = name.partition("/")
    if family == "own":
        return OWN[rest]().eval()
    if family == "timm":
        import timm

        return timm.create_model(rest).eval()
    if family == "transformers":
        return Only(TRANSFORMERS[rest]()).eval()
    from torchvision import models

    options: dict[str, Any] = {}
    if rest in models.list_models(module=models.segmentation):
        options["weights_backbone"] = None
    if rest in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": False}
    return models.get_model(rest, weights=None, **options).eval()


# ------------------------------------------------------------------------------------------------------------ detectors
class Unit(nn.Sequential):
    """Convolution, BatchNorm, activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, act: type[nn.Module] = nn.SiLU):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), act())


class Bottleneck(nn.Module):
    def __init__(self, width: int, add: bool, act: type[nn.Module] = nn.SiLU):
        super().__init__()
        self.first, self.second, self.add = Unit(width, width, act=act), Unit(width, width, act=act), add

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return x + y if self.add else y


class Split(nn.Module):
    """The block of recent detectors that splits the channels, passes one half through bottlenecks and joins all of their
    results ("C2f")."""

    def __init__(self, inputs: int, outputs: int, count: int, add: bool = True):
        super().__init__()
        self.half = outputs // 2
        self.into, self.out = Unit(inputs, outputs, 1), Unit((2 + count) * self.half, outputs, 1)
        self.blocks = nn.ModuleList(Bottleneck(self.half, add) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        found = list(self.into(x).chunk(2, 1))
        for block in self.blocks:
            found.append(block(found[-1]))
        return self.out(torch.cat(found, 1))


class Pyramid(nn.Module):
    """Three max pools in a row, joined ("SPPF")."""

    def __init__(self, width: int, act: type[nn.Module] = nn.SiLU):
        super().__init__()
        self.into, self.out = Unit(width, width // 2, 1, act=act), Unit(2 * width, width, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.into(x)]
        for _ in range(3):
            found.append(F.max_pool2d(found[-1], 5, 1, 2))
        return self.out(torch.cat(found, 1))


class YoloN(nn.Module):
    """A detector in the form of the smallest of 2023's one-stage detectors: 3.2 M parameters, three scales, boxes as
    distributions over 16 bins, 80 classes. (N, 3, H, W) to (N, 4 + classes, anchors); H, W multiples of 32."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128, 256), classes: int = 80, bins: int = 16):
        super().__init__()
        a, b, c, d, e = widths
        self.bins = bins
        self.low = nn.Sequential(Unit(3, a, 3, 2), Unit(a, b, 3, 2), Split(b, b, 1), Unit(b, c, 3, 2), Split(c, c, 2))
        self.middle = nn.Sequential(Unit(c, d, 3, 2), Split(d, d, 2))
        self.high = nn.Sequential(Unit(d, e, 3, 2), Split(e, e, 1), Pyramid(e))
        self.up4, self.up3 = Split(d + e, d, 1, False), Split(c + d, c, 1, False)
        self.down4, self.out4 = Unit(c, c, 3, 2), Split(c + d, d, 1, False)
        self.down5, self.out5 = Unit(d, d, 3, 2), Split(d + e, e, 1, False)
        hidden, inner = max(c, min(classes, 100)), max(16, c, 4 * bins)
        self.boxes = nn.ModuleList(
            nn.Sequential(Unit(n, inner), Unit(inner, 4 * bins), nn.Conv2d(4 * bins, 4 * bins, 1)) for n in (c, d, e)
        )
        self.classes = nn.ModuleList(
            nn.Sequential(Unit(n, hidden), Unit(hidden, hidden), nn.Conv2d(hidden, classes, 1)) for n in (c, d, e)
        )
        self.register_buffer("steps", torch.arange(bins, dtype=torch.float32).view(1, 1, bins, 1))

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        middle = self.middle(low)
        high = self.high(middle)
        up = self.up4(torch.cat([F.interpolate(high, scale_factor=2.0), middle], 1))
        out3 = self.up3(torch.cat([F.interpolate(up, scale_factor=2.0), low], 1))
        out4 = self.out4(torch.cat([self.down4(out3), up], 1))
        out5 = self.out5(torch.cat([self.down5(out4), high], 1))
        found = [
            torch.cat([box(y), head(y)], 1).flatten(2)
            for y, box, head in zip((out3, out4, out5), self.boxes, self.classes, strict=True)
        ]
        whole = torch.cat(found, 2)
        boxes, scores = whole[:, : 4 * self.bins], whole[:, 4 * self.bins :]
        n, _, count = boxes.shape
        ends = (boxes.view(n, 4, self.bins, count).softmax(2) * self.steps).sum(2)
        near, far = ends.chunk(2, 1)
        return torch.cat([(far - near) / 2, far + near, scores.sigmoid()], 1)


class Csp(nn.Module):
    """Two 1x1 branches, one with bottlenecks, joined ("C3")."""

    def __init__(self, inputs: int, outputs: int, count: int, add: bool = True):
        super().__init__()
        half, act = outputs // 2, nn.Hardswish
        self.left, self.right = Unit(inputs, half, 1, act=act), Unit(inputs, half, 1, act=act)
        self.blocks = nn.Sequential(*(Bottleneck(half, add, act) for _ in range(count)))
        self.out = Unit(2 * half, outputs, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.blocks(self.left(x)), self.right(x)], 1))


class YoloCsp(nn.Module):
    """A detector with a space-to-depth stem, CSP blocks, hard swish and raw outputs of three scales."""

    def __init__(self, width: int = 24, outputs: int = 85):
        super().__init__()
        act, w = nn.Hardswish, width
        self.stem = Unit(12, w, 3, act=act)
        self.low = nn.Sequential(
            Unit(w, 2 * w, 3, 2, act), Csp(2 * w, 2 * w, 1), Unit(2 * w, 4 * w, 3, 2, act), Csp(4 * w, 4 * w, 2)
        )
        self.middle = nn.Sequential(Unit(4 * w, 8 * w, 3, 2, act), Csp(8 * w, 8 * w, 2))
        self.high = nn.Sequential(Unit(8 * w, 16 * w, 3, 2, act), Pyramid(16 * w, act), Unit(16 * w, 8 * w, 1, act=act))
        self.up4, self.up3 = Csp(16 * w, 8 * w, 1, False), Csp(12 * w, 4 * w, 1, False)
        self.heads = nn.ModuleList(nn.Conv2d(n, outputs, 1) for n in (4 * w, 8 * w, 8 * w))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = torch.cat([x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)
        low = self.low(self.stem(x))
        middle = self.middle(low)
        high = self.high(middle)
        up = self.up4(torch.cat([F.interpolate(high, scale_factor=2.0), middle], 1))
        fine = self.up3(torch.cat([F.interpolate(up, scale_factor=2.0), low], 1))
        found = []
        for y, head in zip((fine, up, high), self.heads, strict=True):
            y = head(y)
            n, c, h, w = y.shape
            found.append(y.view(n, 1, c, h, w).permute(0, 1, 3, 4, 2).sigmoid())
        return tuple(found)


class UNet(nn.Module):
    """Four resolutions of two convolutions each, transposed convolutions up, skips joined."""

    def __init__(self, width: int = 24, depth: int = 4, classes: int = 7):
        super().__init__()
        widths = [width * 2**i for i in range(depth)]
        self.down = nn.ModuleList(
            nn.Sequential(Unit(i, o, act=nn.ReLU), Unit(o, o, act=nn.ReLU))
            for i, o in zip([3, *widths], widths, strict=False)
        )
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in pairs)
        self.join = nn.ModuleList(nn.Sequential(Unit(2 * o, o, act=nn.ReLU), Unit(o, o, act=nn.ReLU)) for _, o in pairs)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, stage in enumerate(self.down):
            x = stage(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = join(torch.cat([up(x), skip], 1))
        return self.head(x)


OWN: dict[str, Callable[[], nn.Module]] = {"yolo_n": YoloN, "yolo_csp": YoloCsp, "unet": UNet}


# --------------------------------------------------------------------------------------------------------- transformers
class Only(nn.Module):
    """A model of transformers that takes images alone and gives its tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = self.model(x)
        return tuple(found[key] for key in ("logits", "pred_boxes") if key in found)


def _segformer() -> nn.Module:
    import transformers

    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=19))


def _detr() -> nn.Module:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[64, 128, 192, 256], depths=[1, 1, 2, 1], out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=128,
        encoder_layers=2, decoder_layers=2, encoder_ffn_dim=256, decoder_ffn_dim=256, encoder_attention_heads=4,
        decoder_attention_heads=4, num_queries=50,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {"segformer": _segformer, "detr": _detr}
