"""Segmentation networks for the recipes. They map images (N, 3, H, W) to class scores (N, classes, H, W)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClassScores(nn.Module):
    """A network that answers with a mapping or at a lower resolution, brought to plain scores for every pixel."""

    def __init__(self, network: nn.Module, key: str):
        super().__init__()
        self.network, self.key = network, key

    def forward(self, images: Tensor) -> Tensor:
        scores = self.network(images)[self.key]
        if scores.shape[2:] == images.shape[2:]:
            return scores
        return F.interpolate(scores, size=images.shape[2:], mode="bilinear")


def deeplab(classes: int = 150, backbone: str | None = None, checkpoint: str | None = None) -> nn.Module:
    """torchvision's DeepLabV3 on ResNet-50. backbone: ImageNet weights for it; checkpoint: a state dict of the whole."""
    from torchvision.models.segmentation import deeplabv3_resnet50

    network = deeplabv3_resnet50(weights=None, weights_backbone=backbone, num_classes=classes, aux_loss=False)
    if checkpoint is not None:
        network.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    return ClassScores(network, "out")


def segformer(pretrained: str | None = None, **config: Any) -> nn.Module:
    """transformers' SegFormer. pretrained: a name or folder that it loads; otherwise B0 for 150 classes, random weights,
    with `config` as changes."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    if pretrained is not None:
        network = SegformerForSemanticSegmentation.from_pretrained(pretrained)
    else:
        network = SegformerForSemanticSegmentation(SegformerConfig(**{"num_labels": 150} | config))
    return ClassScores(network, "logits")
