"""Networks of the gallery that are not in `trained.py`: a PP-OCR detector and networks for scenes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import detection_scenes
import detr
import numpy as np
import scenes
import torch
import trained
from scipy import ndimage
from torch import Tensor
from trained import Network

import graphcomb
from graphcomb.data import fashion_mnist

trained.PACKAGES["rapidocr-onnxruntime"] = "1.4.4"


@dataclasses.dataclass(frozen=True)
class Imported(Network):
    """A network from an ONNX file."""

    @functools.cached_property
    def dense(self) -> graphcomb.Program:
        file = next(trained.package("rapidocr-onnxruntime").glob("**/ch_PP-OCRv4_det_infer.onnx"))
        return graphcomb.from_onnx(file, shapes={"x": tuple(self.test[0][0][:2].shape)}, dynamic_shapes="batch")


@dataclasses.dataclass(frozen=True)
class Scenes(Network):
    """A network for generated scenes. draw(seen): images and ground truths of training or of test items."""

    draw: Callable[[bool], tuple[Tensor, Any]] = None  # type: ignore[assignment]

    def calibration(self, draw: int) -> list[Tensor]:
        return list(self.draw(True)[0].split(16))

    @functools.cached_property
    def test(self) -> tuple[list[Tensor], Any]:
        images, truths = self.draw(False)
        return list(images.split(50)), truths

    def outputs(self, program: graphcomb.Program) -> Any:
        module = program.module().eval()
        with torch.no_grad():
            found = [module(batch) for batch in self.test[0]]
        return (
            {key: torch.cat([f[key] for f in found]) for key in found[0]}
            if isinstance(found[0], dict)
            else torch.cat(found)
        )


def bgr_page(i: int, generator: np.random.Generator, seen: bool) -> tuple[Tensor, Tensor]:
    """PP-OCR reads blue, green, red."""
    image, boxes = trained.page(i, generator, seen)
    return image.flip(0), boxes


def ppocr_boxes(maps: Tensor, least: float = 0.3, unclip: float = 1.6) -> Tensor:
    """(N, H, W), whether a pixel is in a box: rectangles around what a map joins, grown as PP-OCR does, by area times
    `unclip` over perimeter, since its maps are of shrunk text."""
    found = torch.zeros(maps.shape[0], *maps.shape[2:], dtype=torch.bool)
    for image, pixels in zip(found, (maps[:, 0] > least).numpy(), strict=True):
        for rows, columns in ndimage.find_objects(ndimage.label(pixels)[0]):
            height, width = rows.stop - rows.start, columns.stop - columns.start
            grow = round(height * width * unclip / (2 * (height + width)))
            if height * width >= 9:
                image[
                    max(rows.start - grow, 0) : rows.stop + grow, max(columns.start - grow, 0) : columns.stop + grow
                ] = True
    return found


def ppocr_overlap(outputs: Tensor, _: Tensor, boxes: list[Tensor]) -> dict[str, float]:
    """The overlap of the true boxes and of the found ones."""
    return {"text IoU": trained.pixel_overlap(ppocr_boxes(outputs)[:, ::2, ::2], boxes)}


def segmenter_score(outputs: Tensor, _: Any, labels: list[Tensor]) -> dict[str, float]:
    pairs = torch.stack(labels).flatten() * scenes.CLASSES + outputs.argmax(1).flatten()
    counts = torch.bincount(pairs, minlength=scenes.CLASSES**2).view(scenes.CLASSES, scenes.CLASSES)
    return {"mIoU": scenes.miou(counts.double())}


def segmenter_scenes(seen: bool) -> tuple[Tensor, list[Tensor]]:
    items, classes = fashion_mnist(augment=False)[not seen].dataset.tensors
    images, labels = scenes.scenes(items, classes, 256 if seen else 1000, 1 if seen else 2)
    return images, list(labels)


def detector_scenes(seen: bool) -> tuple[Tensor, list[dict[str, Tensor]]]:
    images, targets = detection_scenes.split("val" if seen else "test", 1000 if seen else 2000)
    return (images[:256], targets[:256]) if seen else (images[:1000], targets[:1000])


def detector_score(outputs: dict[str, Tensor], _: Any, targets: list[dict[str, Tensor]]) -> dict[str, float]:
    return {"mAP": detr.mean_average_precision(outputs, targets) / 100}


def scene_network(build: Callable[[], Any], score: Any, draw: Any) -> Network:
    return Scenes(build, None, score, None, 256, 1000, draw=draw)  # type: ignore[arg-type]
