"""A DETR-style detector on generated scenes, for `gallery.py`: set prediction without priors or suppression.

    python benchmarks/detr.py        # trains it once, about half an hour on one core; kept in the cache folder

Carion et al., arXiv 2005.12872: a convolutional stem, a transformer encoder, and a decoder whose queries each give one class
and one box. They are matched one to one with the targets, so that nothing has to be suppressed afterwards. As in Anchor DETR
(Wang et al., arXiv 2109.07107) a query starts at a point of a grid, which converges in fewer steps. Scenes and targets are
those of `detection_scenes.py`. The score is COCO's mean average precision (IoU 0.5 to 0.95), as `torchmetrics` computes it.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from detection_scenes import CLASSES, Loader
from scenes import SIZE
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from graphcomb.data import cache_folder

STEPS, GRID = 5000, 6  # steps of training; queries along each side
Outputs = dict[str, Tensor]


class Attention(nn.Module):
    """Multi-head attention of queries over keys and values."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, q), (self.k, k), (self.v, v))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, outputs: int):
        super().__init__()
        self.first, self.second = nn.Linear(dim, hidden), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attend, self.mlp = Attention(dim, heads), MLP(dim, 4 * dim, dim)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attend(y + position, y + position, y)
        return x + self.mlp(self.norm2(x))


class DecoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.among, self.over, self.mlp = Attention(dim, heads), Attention(dim, heads), MLP(dim, 4 * dim, dim)

    def forward(self, x: Tensor, query: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.among(y + query, y + query, y)
        x = x + self.over(self.norm2(x) + query, memory + position, memory)
        return x + self.mlp(self.norm3(x))


class Detr(nn.Module):
    """(N, 1, 48, 48) to {"scores": logits (N, queries, classes), "boxes": (N, queries, 4), centre and size from 0 to 1}."""

    def __init__(self, dim: int = 64, heads: int = 4, encoder: int = 2, decoder: int = 2):
        super().__init__()
        widths = (1, dim // 2, dim, dim)
        self.stem = nn.Sequential(*(
            layer for i, (a, b) in enumerate(itertools.pairwise(widths))
            for layer in (nn.Conv2d(a, b, 3, 2 if i < 2 else 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        ))  # fmt: skip
        self.position = nn.Parameter(torch.randn(1, (SIZE // 4) ** 2, dim) * 0.1)
        self.query = nn.Parameter(torch.randn(1, GRID**2, dim) * 0.1)
        at = torch.logit((torch.arange(GRID) + 0.5) / GRID)
        y, x = torch.meshgrid(at, at, indexing="ij")
        start = torch.stack([x, y, torch.full_like(x, -0.4), torch.full_like(x, -0.4)], -1)
        self.register_buffer("start", start.flatten(0, 1)[None])
        self.encoder = nn.ModuleList(EncoderLayer(dim, heads) for _ in range(encoder))
        self.decoder = nn.ModuleList(DecoderLayer(dim, heads) for _ in range(decoder))
        self.norm, self.last = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.classify, self.place = nn.Linear(dim, CLASSES), MLP(dim, dim, 4)
        nn.init.constant_(self.classify.bias, -4.0)
        nn.init.zeros_(self.place.second.weight)
        nn.init.zeros_(self.place.second.bias)

    def steps(self, x: Tensor) -> list[Outputs]:
        """The outputs after each layer of the decoder, which share their heads."""
        image = self.stem(x)
        x = image.flatten(2).transpose(1, 2)
        for layer in self.encoder:
            x = layer(x, self.position)
        memory = self.norm(x)
        x = F.avg_pool2d(image, image.shape[2] // GRID).flatten(2).transpose(1, 2)
        found = []
        for layer in self.decoder:
            x = layer(x, self.query, memory, self.position)
            y = self.last(x)
            found.append({"scores": self.classify(y), "boxes": (self.start + self.place(y)).sigmoid()})
        return found

    def forward(self, x: Tensor) -> Outputs:
        return self.steps(x)[-1]


def corners(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) as x1, y1, x2, y2 in pixels, from centre and size in 0 to 1."""
    at, size = SIZE * boxes[..., :2], SIZE * boxes[..., 2:]
    return torch.cat([at - size / 2, at + size / 2], -1)


@torch.no_grad()
def matched(scores: Tensor, boxes: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Pairs (query, target) of one image with the least cost: focal, distance in image sides, and overlap."""
    p = scores.sigmoid()[:, target["labels"]]
    focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
    near = torch.cdist(boxes, target["boxes"], p=1) / SIZE
    rows, columns = linear_sum_assignment(2 * focal + 2 * near - 2 * generalized_box_iou(boxes, target["boxes"]))
    return torch.as_tensor(rows), torch.as_tensor(columns)


def detection_loss(outputs: Outputs, targets: list[dict[str, Tensor]]) -> Tensor:
    """Focal loss of all queries, L1 and generalised IoU of the matched ones, over the number of targets."""
    logits, boxes = outputs["scores"], corners(outputs["boxes"])
    wanted, found, true = torch.zeros_like(logits), [], []
    for i, target in enumerate(targets):
        if len(target["boxes"]):
            query, which = matched(logits[i], boxes[i], target)
            wanted[i, query, target["labels"][which]] = 1
            found.append(boxes[i, query])
            true.append(target["boxes"][which])
    count = max(sum(map(len, true)), 1)
    loss = 2 * sigmoid_focal_loss(logits, wanted, reduction="sum")
    if found:
        a, b = torch.cat(found), torch.cat(true)
        loss = loss + 2 * (a - b).abs().sum() / SIZE + 2 * generalized_box_iou_loss(a, b, reduction="sum")
    return loss / count


def best(outputs: Outputs, least: float = 0.02) -> list[dict[str, Tensor]]:
    """For each image its boxes in pixels, scores and labels; a query may give several classes."""
    rows = []
    for scores, boxes in zip(outputs["scores"].sigmoid(), corners(outputs["boxes"]).clamp(0, SIZE), strict=True):
        query, label = (scores > least).nonzero(as_tuple=True)
        rows.append({"boxes": boxes[query], "scores": scores[query, label], "labels": label})
    return rows


def mean_average_precision(outputs: Outputs, targets: list[dict[str, Tensor]]) -> float:
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision()
    metric.warn_on_many_detections = False
    metric.update(best(outputs), targets)
    return 100 * float(metric.compute()["map"])


def trained(steps: int = STEPS) -> nn.Module:
    """The trained detector, from the cache folder or trained now with a loss after each layer of the decoder."""
    path = cache_folder() / "detection" / f"detr-{steps}.pt"
    torch.manual_seed(0)
    model = Detr()
    if not path.is_file():
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.05)
        data, done = Loader("train", 12_000, 32, True), 0
        while done < steps:
            for images, targets in data:
                loss = sum(detection_loss(outputs, targets) for outputs in model.steps(images))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                done += 1
                if done % 500 == 0:
                    print(f"detr: {done} of {steps} steps, loss {loss.item():.2f}", flush=True)
                if done == steps:
                    break
        part = path.with_suffix(".part")
        torch.save(model.state_dict(), part)
        part.replace(path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = trained()
    images, targets = next(iter(Loader("test", 2000, 500, False)))
    with torch.no_grad():
        print(f"mAP of 500 scenes: {mean_average_precision(model(images), targets):.2f}")
