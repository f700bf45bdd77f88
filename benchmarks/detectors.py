"""Detectors from end to end: train on generated scenes, prune to half of the MACs, train again, score and export.

    python benchmarks/detectors.py               # resumes; results/detectors.json and .md
    python benchmarks/detectors.py --seeds 0 --methods graphcomb

The detector has one stage, no anchors, two scales, split blocks, a pyramid pooling and a top-down path. It is trained once
with focal loss and generalised IoU on the scenes of `detection_scenes.py`. A seed determines the order of the data. Every
method starts from the dense detector, has the same number of steps, data and schedule, and is scored by COCO's mean
average precision (IoU 0.5 to 0.95) on 2,000 test scenes, as `torchmetrics` computes it. graphcomb removes the channels at
once by what stays lost after repair, and repairs, on 256 images without labels; the score before training is in the table.
"graphcomb" then learns from the dense network's scores and boxes (`Distill(outputs=...)`), "graphcomb labels" only from the
targets, as torch-pruning does. The loss is computed outside of the graph from the detector's raw outputs. The result of the
first seed is exported, and its engine is built.

Needs torch-pruning 1.6.1, torchmetrics and pycocotools (extra "bench") and Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import revision, save, write
from detection_scenes import CLASSES, Loader
from kernel_networks import Pyramid, Split, Unit
from scenes import SIZE
from torch import Tensor, nn
from torchvision.ops import batched_nms, generalized_box_iou_loss, sigmoid_focal_loss

import graphcomb
from graphcomb.data import cache_folder
from graphcomb.passes import Distill, RemoveChannels
from graphcomb.passes.common.scoring import evaluate

RESULTS = Path(__file__).parent / "results"
STRIDES = (4, 8)
LIMIT = 20.0  # boxes with a longer side than this are the coarse scale's
STEPS = {"dense": 3000, "after": 1200}
# Of the training after it, chosen on the validation scenes: rates 1e-3 and 2e-3; temperatures 1 and 2, alphas 0.2 and 0.5.
RATE = 2e-3
CALIBRATION = 8  # batches of training images without labels, for the removal and for torch-pruning's gradients
TP = "torch-pruning"
METHODS = ("graphcomb", "graphcomb labels", f"{TP} magnitude", f"{TP} taylor")
OUTPUTS = {f"{kind}{s}": form for s in STRIDES for kind, form in (("scores", "binary"), ("boxes", "boxes"))}


class Head(nn.Module):
    """Class logits and box distances, in cells and above 0, at each position."""

    def __init__(self, inputs: int, width: int = 32):
        super().__init__()
        self.scores = nn.Sequential(Unit(inputs, width), nn.Conv2d(width, CLASSES, 1))
        self.boxes = nn.Sequential(Unit(inputs, width), nn.Conv2d(width, 4, 1))
        nn.init.constant_(self.scores[1].bias, -4.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(x), F.softplus(self.boxes(x))


class Detector(nn.Module):
    """(N, 1, H, W) to {"scores4": (N, classes, H / 4, W / 4), "boxes4": (N, 4, H / 4, W / 4), "scores8", "boxes8"}."""

    def __init__(self, width: int = 16):
        super().__init__()
        a, b, c = width, 2 * width, 4 * width
        self.low = nn.Sequential(Unit(1, a, 3, 2), Unit(a, b, 3, 2), Split(b, b, 1))
        self.high = nn.Sequential(Unit(b, c, 3, 2), Split(c, c, 1), Pyramid(c))
        self.fine, self.down, self.coarse = Split(b + c, b, 1, False), Unit(b, b, 3, 2), Split(b + c, c, 1, False)
        self.head4, self.head8 = Head(b), Head(c)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.low(x)
        high = self.high(low)
        fine = self.fine(torch.cat([F.interpolate(high, scale_factor=2.0), low], 1))
        coarse = self.coarse(torch.cat([self.down(fine), high], 1))
        (scores4, boxes4), (scores8, boxes8) = self.head4(fine), self.head8(coarse)
        return {"scores4": scores4, "boxes4": boxes4, "scores8": scores8, "boxes8": boxes8}


# --------------------------------------------------------------------------------------------- the user's loss and metric
def centres(stride: int, like: Tensor) -> Tensor:
    """(H * W, 2) positions of cells in pixels, as x, y."""
    rows, columns = (torch.arange(n, device=like.device) + 0.5 for n in like.shape[2:])
    y, x = torch.meshgrid(rows * stride, columns * stride, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def decoded(outputs: dict[str, Tensor], stride: int) -> tuple[Tensor, Tensor]:
    """Class logits (N, H * W, classes) and boxes (N, H * W, 4) in pixels of one scale."""
    boxes = outputs[f"boxes{stride}"]
    at, (left, top, right, bottom) = centres(stride, boxes), (boxes.flatten(2) * stride).unbind(1)
    x, y = at.unbind(1)
    return outputs[f"scores{stride}"].flatten(2).transpose(1, 2), torch.stack(
        [x - left, y - top, x + right, y + bottom], 2
    )


def assigned(stride: int, at: Tensor, target: dict[str, Tensor]) -> Tensor:
    """For each cell the target that it has to find, -1 for none: of the scale's size, near whose centre it is; of several
    the smallest."""
    boxes = target["boxes"]
    if not len(boxes):
        return torch.full((len(at),), -1)
    sides = boxes[:, 2:] - boxes[:, :2]
    mine = (sides.amax(1) > LIMIT) == (stride == max(STRIDES))
    away = (at[:, None] - (boxes[:, :2] + boxes[:, 2:])[None] / 2).abs().amax(2)
    fits = (away < 1.5 * stride) & mine & (away < sides.amin(1) / 2)
    areas = torch.where(fits, sides.prod(1).expand_as(fits), float("inf"))
    return torch.where(fits.any(1), areas.argmin(1), -1)


def detection_loss(outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    """Focal loss of the classes and twice the generalised IoU loss of the boxes, over the number of positive cells."""
    classes, boxes, count = [], [], 0
    for stride in STRIDES:
        logits, found = decoded(outputs, stride)
        at = centres(stride, outputs[f"boxes{stride}"])
        which = torch.stack([assigned(stride, at, t) for t in targets])
        wanted = torch.zeros_like(logits)
        for i, target in enumerate(targets):
            hit = (which[i] >= 0).nonzero().flatten()
            if len(hit):
                wanted[i, hit, target["labels"][which[i, hit]]] = 1
                boxes.append(generalized_box_iou_loss(found[i, hit], target["boxes"][which[i, hit]], reduction="sum"))
                count += len(hit)
        classes.append(sigmoid_focal_loss(logits, wanted, reduction="sum"))
    return (sum(classes) + 2 * sum(boxes)) / max(count, 1)


class MeanAP:
    """COCO's mean average precision, in percent, of what is left after non-maximum suppression."""

    def __init__(self) -> None:
        from torchmetrics.detection import MeanAveragePrecision

        self.inner = MeanAveragePrecision()
        self.inner.warn_on_many_detections = False

    def reset(self) -> None:
        self.inner.reset()

    def update(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> None:
        parts = [decoded(outputs, stride) for stride in STRIDES]
        logits, boxes = (torch.cat([p[i] for p in parts], 1) for i in range(2))
        found = []
        for scores, box in zip(logits.sigmoid(), boxes.clamp(0, SIZE), strict=True):
            cell, label = (scores > 0.02).nonzero(as_tuple=True)
            best = batched_nms(box[cell], scores[cell, label], label, 0.6)[:50]
            found.append({"boxes": box[cell[best]], "scores": scores[cell, label][best], "labels": label[best]})
        self.inner.update(found, targets)

    def compute(self) -> float:
        return 100 * float(self.inner.compute()["map"])


# ------------------------------------------------------------------------------------------------------------ the rows
def loader(name: str = "train") -> Loader:
    return Loader(
        name, {"train": 12_000, "val": 1000, "test": 2000}[name], 32 if name == "train" else 100, name == "train"
    )


def capture(model: nn.Module) -> graphcomb.Program:
    return graphcomb.capture(model.eval(), (torch.zeros(2, 1, SIZE, SIZE),), dynamic_shapes="batch")


def dense() -> nn.Module:
    """The trained detector, from the cache folder or trained now."""
    path = cache_folder() / "detection" / f"dense-{STEPS['dense']}.pt"
    torch.manual_seed(0)
    model = Detector()
    if not path.is_file():
        train = Distill(alpha=0.0, steps=STEPS["dense"], lr=3e-3, weight_decay=0.02)
        done = train(capture(model), data=loader(), loss=detection_loss).program
        torch.save({k: v.detach() for k, v in done.module().state_dict().items()}, path)
    model.load_state_dict(torch.load(path, weights_only=True), strict=False)
    return model.eval()


def training(distilled: bool, steps: int) -> Distill:
    if not distilled:
        return Distill(alpha=0.0, steps=steps, lr=RATE)
    return Distill(
        alpha=0.2, temperature=1.0, steps=steps, lr=RATE, outputs=OUTPUTS, confident=0.3,
        weights={name: 0.5 for name, form in OUTPUTS.items() if form == "boxes"},
    )  # fmt: skip


def torch_pruning(model: nn.Module, importance: str, goal: int, seed: int) -> graphcomb.Program:
    """Pruned by torch-pruning alone to at most so many MACs, by bisection of its ratio."""
    import torch_pruning as tp

    kind = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}[
        importance
    ]
    torch.manual_seed(seed)
    batch = list(itertools.islice(loader(), CALIBRATION))
    low, high, best = 0.0, 0.95, None
    for _ in range(7):
        new, middle = copy.deepcopy(model), (low + high) / 2
        new.zero_grad()
        for images, targets in batch:
            (detection_loss(new(images), targets) / len(batch)).backward()
        last = [m for h in (new.head4, new.head8) for m in (h.scores[1], h.boxes[1])]
        pruner = tp.pruner.BasePruner(
            new, torch.zeros(1, 1, SIZE, SIZE), importance=kind(), global_pruning=True, pruning_ratio=middle,
            max_pruning_ratio=0.9, ignored_layers=last, round_to=4,
        )  # fmt: skip
        pruner.step()
        new.zero_grad()
        pruned = capture(new)
        if pruned.macs <= goal:
            best, high = pruned, middle
        else:
            low = middle
    if best is None:
        raise RuntimeError("no ratio reaches the goal")
    return best


def row(method: str, seed: int) -> dict[str, Any]:
    start, model = time.perf_counter(), dense()
    program, steps, data = capture(model), STEPS["after"], loader()
    macs, found = program.macs, {}
    if method.startswith(TP):
        try:
            pruned = torch_pruning(model, method.split()[1], macs // 2, seed)
        except Exception as error:  # whatever it raises: it does not follow channels that are split in two
            return {"failed": f"{type(error).__name__}: {error}", "code": revision()}
        done = training(False, steps)(pruned, data=data, loss=detection_loss, seed=seed).program
    else:
        torch.manual_seed(seed)
        images = [images for images, _ in itertools.islice(loader(), CALIBRATION)]
        remove = RemoveChannels(macs=0.5, importance="repair", repair=True, round_to=4, samples=sum(map(len, images)))
        pruned = remove(program, data=images, seed=seed).program
        found["at_once"] = evaluate(pruned, loader("test"), MeanAP())
        train = training(method == "graphcomb", steps)
        done = train(pruned, data=data, loss=detection_loss, teacher=program, seed=seed).program
    found |= {
        "dense": evaluate(program, loader("test"), MeanAP()), "map": evaluate(done, loader("test"), MeanAP()),
        "fewer_macs": macs / done.macs, "params": done.params, "dense_params": program.params,
    }  # fmt: skip
    if method == "graphcomb" and seed == 0:
        found |= exported(done)
    return found | {"seconds": round(time.perf_counter() - start), "code": revision()}


def exported(program: graphcomb.Program) -> dict[str, Any]:
    """Parity of the ONNX file, and the kernels of the engine that TensorRT-RTX builds of it."""
    with tempfile.TemporaryDirectory() as folder:
        report = graphcomb.runtime.export_onnx(program, Path(folder) / "detector.onnx", "fp16")
        found: dict[str, Any] = {"parity": report.parity}
        try:
            engine = graphcomb.runtime.build_engine(report.path, "rtx-sm86")
            found["engine"] = {"kernels": len(engine.kernels), "bytes": engine.bytes, "version": engine.version}
        except graphcomb.graph.errors.GraphcombError as error:
            found["engine"] = {"failed": str(error)}
    return found


def table(data: dict[str, Any]) -> str:
    lines = ["# Detectors", "", (__doc__ or "").split("\n\n")[2].replace("\n", " "), ""]
    lines += [
        "| method | seeds | fewer MACs | mAP before training | mAP | of dense | points lost |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method in METHODS:
        mine = [r for key, r in sorted(data["rows"].items()) if key.split("/")[0] == method]
        rows = [r for r in mine if "map" in r]
        lines += [f"| {method} | | | | fails: {r['failed']} | | |" for r in mine[:1] if "failed" in r]
        if rows:
            lost = [r["dense"] - r["map"] for r in rows]
            spread = [
                f"{statistics.fmean(v):.2f} ± {statistics.stdev(v) if len(v) > 1 else 0:.2f}"
                for v in ([r["map"] for r in rows], lost)
            ]
            mean = statistics.fmean(r["dense"] for r in rows)
            fewer = statistics.fmean(r["fewer_macs"] for r in rows)
            before = f"{statistics.fmean(r['at_once'] for r in rows):.2f}" if "at_once" in rows[0] else ""
            lines.append(
                f"| {method} | {len(rows)} | {fewer:.2f} | {before} | {spread[0]} | {mean:.2f} | {spread[1]} |"
            )
    for key, r in sorted(data["rows"].items()):
        if "engine" in r:
            lines += ["", f"{key}: parity of the fp16 file {r['parity']}; engine {r['engine']}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS / "detectors.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = json.loads(options.results.read_text()) if options.results.exists() else {"rows": {}}
    for seed in options.seeds:
        for method in options.methods:
            if options.again or f"{method}/{seed}" not in data["rows"]:
                data["rows"][f"{method}/{seed}"] = found = row(method, seed)
                save(options.results, data)
                said = found.get("failed") or f"{found['map']:.2f} of {found['dense']:.2f}, {found['fewer_macs']:.2f}x"
                print(f"{method}/{seed}: {said}", flush=True)
    write(options.results.with_suffix(".md"), table(data))


if __name__ == "__main__":
    main()
