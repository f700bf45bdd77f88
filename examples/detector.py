"""A detector with several outputs: your own loss on the raw outputs, the dense network as teacher. Put your own detector,
batches and loss in the place of these made scenes of one bright square."""

import torch
from torch import nn
from torch.nn import functional as F

import graphcomb
from graphcomb.passes import Distill, RemoveChannels


class Detector(nn.Module):
    """Images (N, 1, 32, 32) to a score and a box (left, top, right, bottom, in pixels) for each of 8 x 8 cells."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        )  # fmt: skip
        self.scores, self.boxes = nn.Conv2d(2 * width, 1, 1), nn.Conv2d(2 * width, 4, 1)

    def forward(self, x):
        x = self.backbone(x)
        return {"scores": self.scores(x), "boxes": 32 * self.boxes(x).sigmoid()}


def scene(count: int = 16):
    images, boxes = 0.1 * torch.rand(count, 1, 32, 32), torch.empty(count, 4)
    for i in range(count):
        side, (left, top) = int(torch.randint(8, 17, ())), torch.randint(0, 16, (2,)).tolist()
        images[i, 0, top : top + side, left : left + side] += 0.8
        boxes[i] = torch.tensor([left, top, left + side, top + side])
    return images, boxes


def loss(outputs, boxes):  # of the cell at each box's centre, and of the box that this cell finds
    column, row = ((boxes[:, :2] + boxes[:, 2:]) / 8).long().clamp(max=7).T
    which = row * 8 + column
    found = outputs["boxes"].flatten(2)[torch.arange(len(boxes)), :, which]
    return F.cross_entropy(outputs["scores"].flatten(1), which) + F.l1_loss(found, boxes) / 32


def main(steps: int = 300, out: str = "small.onnx"):
    data = [scene() for _ in range(20)]
    dense = graphcomb.capture(Detector(), (data[0][0],), dynamic_shapes="batch")
    dense = Distill(alpha=0.0, steps=steps, lr=3e-3)(dense, data=data, loss=loss).program
    removed = RemoveChannels(macs=0.5, importance="repair", repair=True)(dense, data=data).program
    train = Distill(steps=steps, lr=1e-3, alpha=0.2, temperature=1.0, outputs={"scores": "binary", "boxes": "values"})
    result = train(removed, data=data, loss=loss, teacher=dense)
    graphcomb.runtime.export_onnx(result.program, out)
    images, boxes = scene(64)
    before, after = (float(loss(p.module().eval()(images), boxes)) for p in (dense, result.program))
    print(f"{result.program.macs / dense.macs:.0%} of the MACs; loss {before:.2f} before, {after:.2f} after")
    return dense, result


if __name__ == "__main__":
    main()
