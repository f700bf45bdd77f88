"""Small ONNX files, as text or exported from PyTorch."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import torch
from onnx import numpy_helper
from torch import nn


def from_text(path: Path, text: str, opset: int = 17, **weights: np.ndarray) -> Path:
    """A file of a graph in ONNX's text form, with initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n{text}')
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    onnx.save(model, str(path))
    return path


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Weights that keep the scale of what they multiply."""
    fan = max(1, int(np.prod(shape[1:])))
    return (np.random.default_rng(seed + sum(shape)).standard_normal(shape) / np.sqrt(fan)).astype(np.float32)


class Small(nn.Module):
    """A stem, a residual block with a squeeze-and-excitation, an upsampled branch and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 24, 3, 1, 1), nn.Hardswish(), nn.Conv2d(24, 16, 1))
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Sigmoid()
        )
        self.down, self.up = nn.Conv2d(16, 12, 3, 2, 1), nn.Upsample(scale_factor=2, mode="nearest")
        self.norm, self.head = nn.LayerNorm(28), nn.Linear(28, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        y = self.body(x)
        x = x + y * self.gate(y)
        x = torch.cat([x, self.up(self.down(x))], 1)
        return self.head(self.norm(x.flatten(2).mean(2)))


def small(seed: int = 0) -> nn.Module:
    """With BatchNorm statistics that are not the ones it starts with."""
    torch.manual_seed(seed)
    model = Small()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 16, 16) * 2 + 1)
    return model.eval()


def export(model: nn.Module, x: torch.Tensor, path: Path, opset: int, dynamic: bool = True, **options: object) -> Path:
    """By torch.onnx, BatchNorm kept as such."""
    names = {"input_names": ["image"], "output_names": ["scores"]}
    if options.get("dynamo"):
        axes = {"dynamic_shapes": ({0: torch.export.Dim("batch")},) if dynamic else None}
    else:
        axes = {"dynamic_axes": {"image": {0: "batch"}} if dynamic else None}
        options = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), str(path), opset_version=opset, **names, **axes, **{"dynamo": False, **options})
    return path
