"""Built-in data: digits, Fashion-MNIST and random tensors for demos, tests and smoke runs, and folders of images.

Shuffling and augmentation draw from torch's global generator. A resumed training run restores this generator and so gets
the same batches.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from .graph.errors import BadInput, MissingBackend

FASHION_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
Loaders = tuple[DataLoader[Any], DataLoader[Any]]


def cache_folder() -> Path:
    """Return the folder of cached files, such as trained references: `$GRAPHCOMB_CACHE`, else `~/.cache/graphcomb`."""
    return Path(os.environ.get("GRAPHCOMB_CACHE") or Path.home() / ".cache" / "graphcomb")


def digits(batch_size: int = 64, size: int = 16, augment: bool = True) -> Loaders:
    """Return loaders of scikit-learn's 1,797 handwritten digits, 8x8 grey values resized to 1 x size x size; no download.

    The split is fixed: every fifth image is for validation (360 images), the others are for training (1,437). augment:
    whether to shift training images by up to an eighth of the size.
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
    """Return loaders of Fashion-MNIST, 60,000 training and 10,000 test images of 1 x 28 x 28.

    augment: whether to shift training images by up to 2 pixels. root: folder with the files, or with torchvision's
    FashionMNIST/raw; by default the folder of the Debian package `dataset-fashion-mnist`, or FashionMNIST/raw in the cache
    folder or in ./data. Nothing is downloaded. train_samples: number of training images to use, the first ones.

    Raises BadInput if the files are not found or damaged.
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
    """Return batches of Gaussian noise of shape (batch_size, *shape), with random labels if `classes` is given."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches, batch_size, *shape, generator=generator)
    if classes is None:
        return list(x)
    return list(zip(x, torch.randint(classes, (batches, batch_size), generator=generator), strict=True))


def image_folder(
    root: str, size: int = 224, batch_size: int = 64, workers: int = 4, train: str = "train", val: str = "val"
) -> Loaders:
    """Return loaders of photographs in `root/train/CLASS/*.jpg` and `root/val/CLASS/*.jpg`, the usual layout of ImageNet.

    Training images are random resized crops, flipped at random. Validation images are resized to size / 0.875 and cropped
    at the centre. All are normalised with ImageNet's mean and deviation.

    Raises MissingBackend without torchvision (extra "zoo"), BadInput for folders without images and for training and
    validation folders with different classes.
    """
    datasets, transforms = _torchvision()
    last = [transforms.PILToTensor(), transforms.ToDtype(torch.float32, scale=True), transforms.Normalize(*IMAGENET)]
    first = {
        train: [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()],
        val: [transforms.Resize(round(size / 0.875)), transforms.CenterCrop(size)],
    }
    splits = []
    for split, changes in first.items():
        if not (Path(root) / split).is_dir():
            raise BadInput(f"image-folder: {Path(root) / split} is not a folder of one folder per class")
        try:
            splits.append(datasets.ImageFolder(str(Path(root) / split), transforms.Compose([*changes, *last])))
        except (FileNotFoundError, OSError) as error:
            raise BadInput(f"image-folder: {Path(root) / split}: {str(error).splitlines()[0][:200]}") from error
    if splits[0].classes != splits[1].classes:
        odd = sorted(set(splits[0].classes) ^ set(splits[1].classes))
        raise BadInput(f"image-folder: {train} and {val} do not have the same classes; only one of them has {odd[0]}")
    return _file_loaders(splits[0], splits[1], batch_size, workers)


def segmentation_folder(
    root: str, size: int = 512, batch_size: int = 8, workers: int = 4, train: str = "training", val: str = "validation"
) -> Loaders:
    """Return loaders of scenes with a class per pixel, in the layout of ADE20K's challenge data.

    `root/images/training/NAME.jpg` belongs to `root/annotations/training/NAME.png`, and likewise for validation. Grey value
    0 of an annotation means "other" and is ignored (label -100); grey value c is class c - 1. Training images are scaled so
    that the shorter side is 0.5 to 2 times `size`, cropped to size x size and flipped at random; validation images are
    scaled so that the shorter side is `size`, and cropped at the centre.

    Raises MissingBackend without torchvision (extra "zoo"), BadInput for missing folders, images or annotations.
    """
    _torchvision()
    return _file_loaders(Scenes(root, train, size, True), Scenes(root, val, size, False), batch_size, workers)


class Scenes(Dataset[Any]):
    """Pairs of an image (3, size, size) and labels (size, size) from two folders; see `segmentation_folder`."""

    def __init__(self, root: str, split: str, size: int, augment: bool):
        self.size, self.augment = size, augment
        images, labels = (Path(root) / kind / split for kind in ("images", "annotations"))
        if not images.is_dir() or not labels.is_dir():
            raise BadInput(f"segmentation-folder: {images if not images.is_dir() else labels} is not a folder")
        photographs = [p for p in sorted(images.iterdir()) if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
        self.pairs = [(p, labels / f"{p.stem}.png") for p in photographs]
        missing = next((label for _, label in self.pairs if not label.is_file()), None)
        if not self.pairs or missing is not None:
            raise BadInput(f"segmentation-folder: {f'{missing} is missing' if missing else f'{images} holds no image'}")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        from PIL import Image
        from torchvision.transforms.v2 import functional as change

        photograph, labels = (Image.open(path) for path in self.pairs[index])
        image = photograph.convert("RGB")
        shorter = self.size * (2 ** float(torch.rand(()) * 2 - 1) if self.augment else 1)
        scale = shorter / min(image.size)
        sides = [max(round(s * scale), 1) for s in (image.height, image.width)]
        x = change.normalize(change.to_dtype(change.pil_to_tensor(change.resize(image, sides)), scale=True), *IMAGENET)
        y = change.pil_to_tensor(change.resize(labels, sides, change.InterpolationMode.NEAREST))[0].long()
        y = torch.where(y == 0, -100, y - 1)
        short = [max(self.size - s, 0) for s in sides]
        x, y = (functional.pad(t, (0, short[1], 0, short[0]), value=v) for t, v in ((x, 0.0), (y, -100)))
        room = [max(s - self.size, 0) for s in sides]
        top, left = (int(torch.randint(r + 1, ())) if self.augment else r // 2 for r in room)
        x, y = (t[..., top : top + self.size, left : left + self.size] for t in (x, y))
        if self.augment and torch.rand(()) < 0.5:
            x, y = x.flip(-1), y.flip(-1)
        return x.contiguous(), y.contiguous()


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean and deviation of ImageNet's RGB values
BUILTIN: dict[str, Callable[..., Any]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "random": random,
    "image-folder": image_folder,
    "segmentation-folder": segmentation_folder,
}


def _torchvision() -> tuple[Any, Any]:
    try:
        from torchvision import datasets
        from torchvision.transforms import v2
    except ImportError as error:
        raise MissingBackend('folders of images need torchvision: pip install "graphcomb[zoo]"') from error
    return datasets, v2


def _file_loaders(train: Dataset[Any], val: Dataset[Any], batch_size: int, workers: int) -> Loaders:
    pinned = torch.cuda.is_available()
    loader = partial(DataLoader, num_workers=workers, persistent_workers=workers > 0, pin_memory=pinned)
    return loader(train, batch_size, shuffle=True, drop_last=True), loader(val, batch_size)


def _loaders(
    train: tuple[torch.Tensor, torch.Tensor], val: tuple[torch.Tensor, torch.Tensor], batch_size: int, shift: int
) -> Loaders:
    def collate(samples: list[Any]) -> Any:
        images, labels = default_collate(samples)
        return _shifted(images, shift), labels

    shuffled = DataLoader(TensorDataset(*train), batch_size, shuffle=True, collate_fn=collate, drop_last=True)
    return shuffled, DataLoader(TensorDataset(*val), max(batch_size, 256))


def _shifted(images: torch.Tensor, most: int) -> torch.Tensor:
    """Shift each image (N, C, H, W) by its own random offset of up to `most` pixels; border pixels are repeated."""
    if not most:
        return images
    height, width = images.shape[-2:]
    padded = functional.pad(images, (most,) * 4, mode="replicate")
    offset = torch.randint(0, 2 * most + 1, (2, len(images), 1))
    rows, columns = offset[0] + torch.arange(height), offset[1] + torch.arange(width)
    which = torch.arange(len(images))[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _fashion_folder(root: str | None) -> Path:
    raw = Path("FashionMNIST", "raw")
    candidates = [Path("/usr/share/datasets/fashion-mnist"), cache_folder() / raw, "data" / raw]
    if root is not None:
        candidates = [Path(root), Path(root) / raw]
    names = [name for pair in FASHION_FILES.values() for name in pair]
    for folder in candidates:
        if all((folder / name).is_file() for name in names):
            return folder
    raise BadInput(
        f"fashion-mnist: not found in {', '.join(map(str, candidates))}; `apt-get install dataset-fashion-mnist`, or "
        f"torchvision.datasets.FashionMNIST(root={str(root or cache_folder())!r}, download=True)"
    )


def _idx(path: Path) -> torch.Tensor:
    """Read a gzipped IDX file of unsigned bytes: magic (2 zero bytes, type 8, rank), big-endian sizes, then the values.

    Raises BadInput for any other file.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
        rank = raw[3]
        sizes = np.frombuffer(raw, ">u4", rank, 4).astype(int)
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(sizes)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise BadInput(f"{path}: not a gzipped IDX file ({error})") from error
    return torch.from_numpy(values.copy())
