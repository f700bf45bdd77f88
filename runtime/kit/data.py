"""Measure the accuracy of models on a folder of images on the device, with nothing but numpy.

A folder has one sub-folder of images per class, as torchvision's ImageFolder: the classes are numbered in the order of the
names, unless all names are numbers, which are then the classes. Or it has images and, beside each, a mask of the same name
that ends in .mask.npy or .mask.png, with a class per pixel and 255 where there is none. Images are .npy files, which are
taken as they are if they have the shape of the model's input, or .png and .jpg files if Pillow is installed; they are
resized and normalised.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable

import numpy as np

from .contents import Failure

PICTURES = (".png", ".jpg", ".jpeg")
MASKS = (".mask.npy", ".mask.png")
IGNORED = 255  # the class of pixels that do not count
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

Metric = Callable[[Any, Any], float]  # of the outputs for one image, and its target


def find(folder: Path) -> list[tuple[Path, Any]]:
    """Return the images of a folder, each with its target: the number of its class, or the path of its mask.

    Raises Failure for a folder without images, with images of no class, or with files that cannot be read here.
    """
    if not folder.is_dir():
        raise Failure(f"--data: there is no folder {folder}")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    numbered = bool(names) and all(name.isdigit() for name in names)
    pairs: list[tuple[Path, Any]] = []
    for index, name in enumerate(names):
        pairs += [(path, int(name) if numbered else index) for path in _images(folder / name)]
    for path in [] if names else _images(folder):
        masks = [path.with_name(path.stem + end) for end in MASKS if path.with_name(path.stem + end).is_file()]
        if not masks:
            raise Failure(f"--data: {path.name} has no mask beside it, and lies in no folder of a class")
        pairs.append((path, masks[0]))
    if not pairs:
        raise Failure(f"--data: no images in {folder} (.npy, .png, .jpg)")
    return pairs


def _images(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".npy", *PICTURES))
    return [path for path in files if not path.name.endswith(MASKS)]


def read_image(path: Path, shape: Sequence[int], how: dict[str, Any]) -> np.ndarray:
    """Return an image as an array of `shape` (channels, height, width).

    how: "mean" and "std" by channel, for pixels from 0 to 1. Raises Failure for a file that is no image of this shape, or
    that needs Pillow, which is not installed.
    """
    pixels = _pixels(path, (shape[2], shape[1]))
    if pixels.dtype != np.uint8:
        if pixels.shape != tuple(shape):
            raise Failure(f"--data: {path.name} has shape {pixels.shape}, the model takes {tuple(shape)}")
        return pixels
    if pixels.ndim == 2:
        pixels = pixels[:, :, None].repeat(shape[0], axis=2)
    if (pixels.shape[2], *pixels.shape[:2]) != tuple(shape):
        raise Failure(f"--data: {path.name} has shape {pixels.shape}, the model takes {tuple(shape)}")
    mean, std = (np.resize(np.asarray(how[key], np.float32), shape[0]) for key in ("mean", "std"))
    return np.ascontiguousarray(((pixels / np.float32(255) - mean) / std).transpose(2, 0, 1))


def _pixels(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """Return the content of a file of an image or a mask; pictures are resized to (width, height) if `size` is given."""
    try:
        if path.suffix.lower() == ".npy":
            return np.load(str(path), allow_pickle=False)
        from PIL import Image  # imported here, since the device may not have it

        with Image.open(str(path)) as picture:
            return np.asarray(picture.convert("RGB").resize(size, 2) if size else picture)  # 2: linearly
    except ImportError as error:
        raise Failure(f"--data: {path.name}: reading it takes Pillow; give .npy files") from error
    except (OSError, ValueError) as error:
        raise Failure(f"--data: {path.name}: no image ({error})") from error


def batches(pairs: list[tuple[Path, Any]], shape: Sequence[int], how: dict[str, Any]) -> Iterator[Any]:
    """Yield (images, targets) of the batch size of `shape` (batch, channels, height, width). The last images are repeated
    where there are too few, and have no target."""
    for start in range(0, len(pairs), shape[0]):
        part = pairs[start : start + shape[0]]
        images = [read_image(path, shape[1:], how) for path, _ in part]
        images += images[-1:] * (shape[0] - len(part))
        targets = [_pixels(target, None) if isinstance(target, Path) else target for _, target in part]
        yield np.stack(images), targets


def evaluate(
    engine: Any,
    name: str,
    pairs: list[tuple[Path, Any]],
    shape: Sequence[int],
    how: dict[str, Any],
    metric: Metric | None,
) -> dict[str, Any]:
    """Return what an engine reaches on images: {"metric", "value", "images"}.

    The metric is "top1" for classes, "miou" for masks, or the mean of the given function over the images.

    - engine: an engine of the kit. name: the name of its input, of `shape`.
    - metric: a function of the outputs for one image, each without its batch axis, and the target.
    """
    right: list[float] = []
    confusion = np.zeros((0, 0), np.int64)
    for images, targets in batches(pairs, shape, how):
        outputs = list(engine.outputs({name: images}).values())
        for index, target in enumerate(targets):
            one = [output[index] for output in outputs]
            if metric is not None:
                right.append(float(metric(one, target)))
            elif isinstance(target, np.ndarray):
                confusion = confused(confusion, one[0], target)
            else:
                right.append(float(int(one[0].argmax()) == target))
    if metric is None and not right:
        return {"metric": "miou", "value": round(mean_iou(confusion), 6), "images": len(pairs)}
    value = float(np.mean(right))
    return {"metric": "top1" if metric is None else metric.__name__, "value": round(value, 6), "images": len(pairs)}


def confused(confusion: np.ndarray, scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return a confusion matrix (target, prediction) after one more image.

    scores: (classes, height, width), of which the nearest one counts for each pixel of the mask.
    """
    rows, columns = ((np.arange(n) * m) // n for n, m in zip(mask.shape, scores.shape[1:]))
    labels = scores.argmax(0)[np.ix_(rows, columns)]
    counts = mask != IGNORED
    classes = max(scores.shape[0], len(confusion), int(mask[counts].max(initial=0)) + 1)
    grown = np.zeros((classes, classes), np.int64)
    grown[: len(confusion), : len(confusion)] = confusion
    np.add.at(grown, (mask[counts].astype(np.int64), labels[counts]), 1)
    return grown


def mean_iou(confusion: np.ndarray) -> float:
    """Return the mean intersection over union of the classes that occur in targets or predictions."""
    hits = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    return float((hits[union > 0] / union[union > 0]).mean()) if (union > 0).any() else 0.0


def load_metric(text: str) -> Metric:
    """Return a function from "FILE.py:NAME". Its code is executed. Raises Failure if there is none."""
    path, _, name = text.rpartition(":")
    spec = importlib.util.spec_from_file_location("metric", path) if Path(path).is_file() else None
    if spec is None or spec.loader is None:
        raise Failure(f"--metric {text}: expected FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, name)
    except Exception as error:  # the user's file may raise anything
        raise Failure(f"--metric {text}: {type(error).__name__}: {error}") from error
