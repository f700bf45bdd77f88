"""Generate detection scenes: Fashion-MNIST items pasted on textured backgrounds, with a box and a class for each item.

Scenes are grey images of 48 x 48 with one to three items of 14 to 30 pixels, otherwise as in `scenes.py`. An item of which
later ones hide more than half is no target. Training scenes contain only items of the training images, test scenes only of
the test images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scenes import INK, MOST, SIZE, texture

from graphcomb.data import cache_folder, fashion_mnist

CLASSES = 10
Targets = list[dict[str, torch.Tensor]]


def draw_scenes(items: torch.Tensor, classes: torch.Tensor, count: int, seed: int) -> tuple[torch.Tensor, Targets]:
    """Images (count, 1, SIZE, SIZE), and for each {"boxes": (n, 4) as x1, y1, x2, y2 in pixels, "labels": (n,)}."""
    draw = np.random.default_rng(seed)
    images, targets = torch.empty(count, 1, SIZE, SIZE), []
    for i in range(count):
        images[i, 0] = torch.from_numpy(texture(draw))
        owner, wholes, labels = torch.full((SIZE, SIZE), -1), [], []
        for n in range(draw.integers(1, MOST + 1)):
            which, size = int(draw.integers(len(items))), int(draw.integers(14, 31))
            item = F.interpolate(items[which][None], (size, size), mode="bilinear", antialias=True)[0, 0]
            top, left = (int(draw.integers(0, SIZE - size + 1)) for _ in range(2))
            rows, columns = slice(top, top + size), slice(left, left + size)
            ink = item > 2 * INK - 1
            images[i, 0, rows, columns] = torch.where(ink, item, images[i, 0, rows, columns])
            owner[rows, columns] = torch.where(ink, n, owner[rows, columns])
            ys, xs = ink.nonzero(as_tuple=True)
            wholes.append((left + xs.min(), top + ys.min(), left + xs.max() + 1, top + ys.max() + 1, ink.sum()))
            labels.append(int(classes[which]))
        seen = [n for n, whole in enumerate(wholes) if (owner == n).sum() > 0.5 * whole[4]]
        boxes = torch.tensor([[float(v) for v in wholes[n][:4]] for n in seen]).reshape(-1, 4)
        targets.append({"boxes": boxes, "labels": torch.tensor([labels[n] for n in seen], dtype=torch.int64)})
        images[i, 0] += torch.from_numpy(draw.normal(0, 0.08, (SIZE, SIZE)).astype(np.float32))
    return images, targets


def split(name: str, count: int) -> tuple[torch.Tensor, Targets]:
    """The scenes of "train", "val" (other scenes of the training images, for choices) or "test"; drawn once and kept."""
    path = cache_folder() / "detection" / f"{name}-{count}.pt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        images, classes = fashion_mnist(augment=False)[name == "test"].dataset.tensors
        part = path.with_suffix(".part")
        torch.save(draw_scenes(images, classes, count, ("train", "val", "test").index(name)), part)
        part.replace(path)
    return torch.load(path, weights_only=True)


class Loader:
    """Batches of (images, targets), shuffled and mirrored at random when `train`."""

    def __init__(self, name: str, count: int, batch_size: int, train: bool):
        (self.images, self.targets), self.batch_size, self.train = split(name, count), batch_size, train

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.images)) if self.train else torch.arange(len(self.images))
        for chosen in order.split(self.batch_size):
            images, targets = self.images[chosen], [self.targets[i] for i in chosen.tolist()]
            if self.train and torch.rand(()) < 0.5:
                images = images.flip(3)
                targets = [
                    t | {"boxes": (SIZE - t["boxes"][:, [2, 1, 0, 3]]).abs() * MIRROR + t["boxes"] * (1 - MIRROR)}
                    for t in targets
                ]
            yield images, targets


MIRROR = torch.tensor([1.0, 0.0, 1.0, 0.0])  # the columns of a box that a mirror changes
