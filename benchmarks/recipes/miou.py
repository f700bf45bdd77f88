"""Mean IoU of a saved program on a folder of scenes.

    python miou.py out/model.pt2 /data/ADEChallengeData2016 [--size 512] [--batch-size 4]

All validation pixels with a class count. Classes that occur in neither labels nor predictions do not.
"""

from __future__ import annotations

import argparse

import torch
from rich.progress import track

import graphcomb
from graphcomb.data import segmentation_folder
from graphcomb.passes.common.losses import logits_of


def mean_iou(program: graphcomb.Program, batches) -> float:
    """Percent; batches of (images, labels), label -100 is ignored."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = program.module().eval().to(device)
    confusion: torch.Tensor | None = None
    with torch.no_grad():
        for images, labels in track(batches, "scenes"):
            scores = logits_of(module(images.to(device)))
            classes, known = scores.shape[1], labels >= 0
            pairs = labels[known] * classes + scores.argmax(1).cpu()[known]
            found = torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()
            confusion = found if confusion is None else confusion + found
    if confusion is None:
        raise SystemExit("miou: the folder holds no scene")
    hits, either = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return 100 * float((hits / either)[either > 0].mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("root")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()
    scenes = segmentation_folder(options.root, options.size, options.batch_size)[1]
    print(f"mean IoU {mean_iou(graphcomb.load(options.model), scenes):.2f} %")
