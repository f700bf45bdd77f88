"""A small network and how it is captured for export."""

from pathlib import Path

import onnx
import torch
from torch import nn

import graphcomb as g
import graphcomb.runtime.export.to_onnx as onnx_module
from graphcomb.graph.program import Program


class Net(nn.Module):
    """Convolutions with batch norm, channels-last global pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish())
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = (x + self.body(x)).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return self.head(torch.flatten(self.pool(x), 1))


def calibrated(model: nn.Module, *size: int) -> nn.Module:
    """BatchNorm statistics of random data: with fresh ones, deep networks answer almost 0."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        model(torch.randn(4, *size))
    return model.eval()


def captured(model: nn.Module, *size: int, dynamic: bool = True, batch: int = 3) -> Program:
    return g.capture(model, torch.randn(batch, *size), dynamic_shapes="batch" if dynamic else None)


def float_types(path: Path) -> set[int]:
    """Types of all float tensors of a file, intermediate ones inferred."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    kinds = {v.type.tensor_type.elem_type for v in values} | {t.data_type for t in model.graph.initializer}
    return kinds & set(onnx_module.FLOATS)
