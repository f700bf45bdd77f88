"""Generate segmentation scenes: Fashion-MNIST items pasted on textured backgrounds, with the class of every pixel.

    python benchmarks/scenes.py            # writes a sheet of examples to results/scenes.png

Scenes are grey images of 48 x 48. Each has one to three items of 18 to 30 pixels, later ones in front, on a sum of three
oriented waves, whose grey values reach those of the items, and noise on everything. Label 0 is background, 1 to 10 are the
classes of Fashion-MNIST. Training scenes contain only items of its training images, test scenes only of its test images.
Scene number i of a split is the same on every machine.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from graphcomb.data import fashion_mnist

SIZE, MOST, CLASSES = 48, 3, 11
INK = 0.12  # share of full intensity from which on a pixel belongs to the item


def scenes(items: torch.Tensor, classes: torch.Tensor, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(images (count, 1, SIZE, SIZE), about -1 to 1; labels (count, SIZE, SIZE)). items: (N, 1, 28, 28) in -1 to 1."""
    draw = np.random.default_rng(seed)
    images, labels = torch.empty(count, 1, SIZE, SIZE), torch.zeros(count, SIZE, SIZE, dtype=torch.int64)
    for i in range(count):
        images[i, 0] = torch.from_numpy(texture(draw))
        for _ in range(draw.integers(1, MOST + 1)):
            which, size = int(draw.integers(len(items))), int(draw.integers(18, 31))
            item = F.interpolate(items[which][None], (size, size), mode="bilinear", antialias=True)[0, 0]
            top, left = (int(draw.integers(-3, SIZE - size + 4)) for _ in range(2))
            rows, columns = (slice(max(at, 0), min(at + size, SIZE)) for at in (top, left))
            item = item[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
            ink = item > 2 * INK - 1
            images[i, 0, rows, columns] = torch.where(ink, item, images[i, 0, rows, columns])
            labels[i, rows, columns] = torch.where(ink, int(classes[which]) + 1, labels[i, rows, columns])
        images[i, 0] += torch.from_numpy(draw.normal(0, 0.08, (SIZE, SIZE)).astype(np.float32))
    return images, labels


def texture(draw: np.random.Generator) -> np.ndarray:
    """A background: three waves of random direction, length and phase around a random grey."""
    y, x = np.mgrid[:SIZE, :SIZE]
    grey = np.full((SIZE, SIZE), draw.uniform(-0.6, 0.2))
    for _ in range(3):
        angle, length, phase = draw.uniform(0, np.pi), draw.uniform(3, 24), draw.uniform(0, 2 * np.pi)
        wave = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / length + phase
        grey += draw.uniform(0.05, 0.25) * np.sin(wave)
    return grey.astype(np.float32)


def loaders(batch_size: int, train: int, test: int) -> tuple[DataLoader, DataLoader]:
    """Shuffled training scenes and the test scenes."""
    found = []
    for loader, count, seed in zip(fashion_mnist(augment=False), (train, test), (1, 2), strict=True):
        items, classes = loader.dataset.tensors
        found.append(TensorDataset(*scenes(items, classes, count, seed)))
    return DataLoader(found[0], batch_size, shuffle=True, drop_last=True), DataLoader(found[1], 250)


def miou(confusion: torch.Tensor) -> float:
    """Mean over classes of intersection over union, from counts (label, prediction) of pixels."""
    hits = confusion.diagonal()
    return float((hits / (confusion.sum(0) + confusion.sum(1) - hits).clamp(min=1)).mean())


if __name__ == "__main__":
    import matplotlib.pyplot as plt

    images, labels = loaders(8, 8, 8)[1].dataset.tensors
    figure, axes = plt.subplots(2, 8, figsize=(12, 3))
    for i in range(8):
        axes[0, i].imshow(images[i, 0], cmap="gray")
        axes[1, i].imshow(labels[i], cmap="tab20", vmin=0, vmax=CLASSES)
    for axis in axes.flat:
        axis.axis("off")
    figure.savefig(Path(__file__).parent / "results" / "scenes.png", dpi=90)
