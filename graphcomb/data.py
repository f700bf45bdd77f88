"""Built-in data sets for demos, tests and smoke runs: digits, Fashion-MNIST, and random tensors.

Shuffling and augmentation draw from torch's global generator, so that a resumed training run, which restores that
generator, sees the same batches.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, default_collate

from .graph.errors import BadInput

FASHION_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
Loaders = tuple[DataLoader[Any], DataLoader[Any]]


def cache_folder() -> Path:
    """Where trained references and downloads live: `$GRAPHCOMB_CACHE`, else `~/.cache/graphcomb`."""
    return Path(os.environ.get("GRAPHCOMB_CACHE") or Path.home() / ".cache" / "graphcomb")


def digits(batch_size: int = 64, size: int = 16, augment: bool = True) -> Loaders:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey values upsampled to 1 x size x size; no download.

    The split is fixed: every fifth image validates (360 images), the rest trains (1,437). augment: shifts of the
    training images by up to an eighth of the size.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    x = functional.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    y = torch.tensor(labels, dtype=torch.int64)
    held = torch.arange(len(x)) % 5 == 0
    return _loaders((x[~held], y[~held]), (x[held], y[held]), batch_size, size // 8 if augment else 0)


def fashion_mnist(
    batch_size: int = 128, augment: bool = True, root: str | None = None, train_samples: int | None = None
) -> Loaders:
    """Fashion-MNIST, 60,000 training and 10,000 test images of 1 x 28 x 28.

    Looked for in root, the Debian package `dataset-fashion-mnist` and torchvision's folder layout under the cache
    folder; never downloaded. train_samples: use only the first so many training images.
    """
    folder = _fashion_folder(root)
    train, test = (
        (_idx(folder / images)[:, None].float() / 128 - 1, _idx(folder / labels).long())
        for images, labels in FASHION_FILES.values()
    )
    train = (train[0][:train_samples], train[1][:train_samples])
    return _loaders(train, test, batch_size, 2 if augment else 0)


def random(
    shape: tuple[int, ...] | list[int] = (3, 224, 224),
    batch_size: int = 4,
    batches: int = 4,
    classes: int | None = None,
    seed: int = 0,
) -> list[Any]:
    """Batches of Gaussian noise of shape (batch_size, *shape), with random labels when `classes` is given."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches, batch_size, *shape, generator=generator)
    if classes is None:
        return list(x)
    return list(zip(x, torch.randint(classes, (batches, batch_size), generator=generator), strict=True))


BUILTIN: dict[str, Callable[..., Any]] = {"digits": digits, "fashion-mnist": fashion_mnist, "random": random}


def _loaders(
    train: tuple[torch.Tensor, torch.Tensor], val: tuple[torch.Tensor, torch.Tensor], batch_size: int, shift: int
) -> Loaders:
    def collate(samples: list[Any]) -> Any:
        images, labels = default_collate(samples)
        return _shifted(images, shift), labels

    return (
        DataLoader(TensorDataset(*train), batch_size, shuffle=True, collate_fn=collate, drop_last=True),
        DataLoader(TensorDataset(*val), max(batch_size, 256)),
    )


def _shifted(images: torch.Tensor, most: int) -> torch.Tensor:
    """Each image moved by its own offset of up to `most` pixels; the border repeats."""
    if not most:
        return images
    height, width = images.shape[-2:]
    padded = functional.pad(images, (most,) * 4, mode="replicate")
    offset = torch.randint(0, 2 * most + 1, (2, len(images), 1))
    rows, columns = offset[0] + torch.arange(height), offset[1] + torch.arange(width)
    which = torch.arange(len(images))[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _fashion_folder(root: str | None) -> Path:
    candidates = [
        Path("/usr/share/datasets/fashion-mnist"),
        cache_folder() / "FashionMNIST" / "raw",
        Path("data/FashionMNIST/raw"),
    ]
    if root is not None:
        candidates = [Path(root), Path(root) / "FashionMNIST" / "raw"]
    names = [name for pair in FASHION_FILES.values() for name in pair]
    for folder in candidates:
        if all((folder / name).is_file() for name in names):
            return folder
    raise BadInput(
        f"fashion-mnist: not found in {', '.join(map(str, candidates))}; `apt-get install dataset-fashion-mnist`, or "
        f"torchvision.datasets.FashionMNIST(root={str(root or cache_folder())!r}, download=True)"
    )


def _idx(path: Path) -> torch.Tensor:
    """One gzipped IDX file of unsigned bytes: magic (2 zero bytes, type 8, rank), big-endian sizes, then the values."""
    try:
        raw = gzip.decompress(path.read_bytes())
        rank = raw[3]
        sizes = np.frombuffer(raw, ">u4", rank, 4).astype(int)
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(sizes)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise BadInput(f"{path}: not a gzipped IDX file ({error})") from error
    return torch.from_numpy(values.copy())
