"""RT-DETR of transformers from end to end: train on generated scenes, prune to half of the MACs, train again in its class.

    python benchmarks/rtdetr.py               # resumes; results/rtdetr.json and .md
    python benchmarks/rtdetr.py --seeds 0 --methods graphcomb

The detector is `RTDetrForObjectDetection` with a small configuration and random weights, trained once with its own loss
(one-to-one matching, denoising queries) on the scenes of `detection_scenes.py`. Channels are removed at once by what stays
lost after repair, so that its class can hold the rest (`for_class=True`), and repaired, on 256 images without labels.
`transplant` then gives the class back, which trains in a plain loop with its own loss and its own denoising. "graphcomb"
adds the loss of `Distill` from a session (`graphcomb.attach`): the scores of the encoder position by position, and scores
and boxes of the queries after matching them with those of the dense network, whose order differs. "graphcomb labels" has the
targets only. A seed determines images and order of the data. The score is COCO's mean average precision (IoU 0.5 to 0.95) on
2,000 test scenes, as `torchmetrics` computes it. The first seed is exported, its engine is built from the fp32 file, and its
latency is measured in ONNX Runtime in turns with the dense network (batch 1, one thread). Rate, steps and weights were set
beforehand, without a search.

Needs transformers, scipy, torchmetrics, pycocotools (extra "bench") and Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common import revision, save, write
from detection_scenes import CLASSES, Loader
from scenes import SIZE
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert

import graphcomb
from graphcomb.data import cache_folder
from graphcomb.graph.errors import GraphcombError
from graphcomb.passes import Distill, RemoveChannels

RESULTS = Path(__file__).parent / "results"
STEPS = {"dense": 4500, "after": 1200}
RATE, BATCH = 1e-3, 16
CALIBRATION = 16  # batches of training images without labels
METHODS = ("graphcomb", "graphcomb labels")
TEACH = Distill(
    temperature=1.0, confident=0.3, outputs={"positions": "binary", "logits": "binary", "boxes": "boxes"},
    weights={"boxes": 10.0},
)  # fmt: skip


def build() -> nn.Module:
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    widths, dim = [24, 48, 64], 48
    backbone = RTDetrResNetConfig(
        num_channels=1, embedding_size=widths[0], hidden_sizes=widths, depths=[1, 1, 1], layer_type="basic",
        out_features=["stage1", "stage2", "stage3"],
    )  # fmt: skip
    model = RTDetrForObjectDetection(RTDetrConfig(
        backbone_config=backbone, freeze_backbone_batch_norms=False, feat_strides=[4, 8, 16], num_labels=CLASSES,
        encoder_in_channels=widths, encoder_hidden_dim=dim, encoder_ffn_dim=96, encoder_attention_heads=4,
        hidden_expansion=0.5, decoder_in_channels=[dim] * 3, d_model=dim, decoder_ffn_dim=96, decoder_attention_heads=4,
        decoder_layers=2, num_queries=40, num_denoising=12,
    ))  # fmt: skip
    for module in model.modules():  # transformers starts them near 0, from which training from scratch takes long
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return model


# ------------------------------------------------------------------------------------------------------------- the user's
def labels(targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Targets as transformers reads them: centres and sizes from 0 to 1."""
    return [{"class_labels": t["labels"], "boxes": box_convert(t["boxes"], "xyxy", "cxcywh") / SIZE} for t in targets]


def fit(model: nn.Module, steps: int, session: Any = None, distilled: bool = False) -> None:
    """A plain training loop with the model's own loss, in place."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.05)
    epochs = itertools.chain.from_iterable(itertools.repeat(Loader("train", 12_000, BATCH, True)))
    for images, targets in itertools.islice(epochs, steps):
        outputs = model(images, labels=labels(targets))
        loss = outputs.loss
        if distilled:
            loss = loss + session.loss(outputs, images)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if session is not None:
            session.before_step(optimizer)
        optimizer.step()
        if session is not None:
            session.after_step()
        schedule.step()


def lesson(student: Any, teacher: Any) -> Tensor:
    """The loss against the teacher's outputs. Both networks order their queries by score, so the student's are first brought
    into the order that is nearest to the teacher's; denoising queries, which come first in training, have no teacher."""
    logits, boxes = teacher["logits"], teacher["pred_boxes"]
    own, own_boxes = (student[name][:, -logits.shape[1] :] for name in ("logits", "pred_boxes"))
    with torch.no_grad():
        away = torch.cdist(logits.sigmoid(), own.sigmoid(), p=1) + 5 * torch.cdist(boxes, own_boxes, p=1)
        order = torch.stack([torch.as_tensor(linear_sum_assignment(cost)[1]) for cost in away.numpy()])[..., None]
    ours = {"positions": student["enc_outputs_class"], "logits": own.take_along_dim(order, 1)}
    theirs = {"positions": teacher["enc_outputs_class"], "logits": logits, "boxes": boxes}
    return TEACH.lesson(ours | {"boxes": own_boxes.take_along_dim(order, 1)}, theirs)


def score(model: nn.Module, name: str = "test", count: int = 2000) -> float:
    """COCO's mean average precision in percent; a query may give several classes."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision()
    metric.warn_on_many_detections = False
    model.eval()
    for images, targets in Loader(name, count, 100, False):
        with torch.no_grad():
            outputs = model(images)
        found = []
        for scores, boxes in zip(outputs.logits.sigmoid(), outputs.pred_boxes, strict=True):
            query, label = (scores > 0.02).nonzero(as_tuple=True)
            corners = (box_convert(boxes[query], "cxcywh", "xyxy") * SIZE).clamp(0, SIZE)
            found.append({"boxes": corners, "scores": scores[query, label], "labels": label})
        metric.update(found, targets)
    return 100 * float(metric.compute()["map"])


# --------------------------------------------------------------------------------------------------------------- the rows
def dense() -> nn.Module:
    """The trained detector, from the cache folder or trained now (13 minutes on one core)."""
    path = cache_folder() / "detection" / f"rtdetr-{STEPS['dense']}.pt"
    torch.manual_seed(0)
    model = build()
    if not path.is_file():
        fit(model, STEPS["dense"])
        part = path.with_suffix(".part")
        torch.save(model.state_dict(), part)
        part.replace(path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


@functools.cache
def dense_score() -> float:
    return score(dense())


def capture(model: nn.Module, batch: int = BATCH) -> graphcomb.Program:
    return graphcomb.capture(model.eval(), (torch.zeros(batch, 1, SIZE, SIZE),))  # its code fixes the batch


def row(method: str, seed: int) -> dict[str, Any]:
    start, model = time.perf_counter(), dense()
    program = capture(model)
    torch.manual_seed(seed)
    images = [images for images, _ in itertools.islice(Loader("train", 12_000, BATCH, True), CALIBRATION)]
    remove = RemoveChannels(
        macs=0.5, importance="repair", repair=True, round_to=4, for_class=True, samples=CALIBRATION * BATCH
    )
    smaller = remove(program, data=images, seed=seed).transplant(model)
    found: dict[str, Any] = {"dense": dense_score(), "at_once": score(smaller)}
    session = graphcomb.attach(
        smaller, Distill(outputs=lesson), example=(images[0],), steps=STEPS["after"], dynamic_shapes=None,
        teacher=program,
    )  # fmt: skip
    fit(smaller, STEPS["after"], session, method == "graphcomb")
    done = session.finish().program
    found |= {
        "map": score(smaller), "fewer_macs": program.macs / done.macs, "params": done.params,
        "dense_params": program.params,
    }  # fmt: skip
    if method == "graphcomb" and seed == 0:
        found |= exported(capture(model, 1), capture(smaller, 1))
    return found | {"seconds": round(time.perf_counter() - start), "code": revision()}


def exported(program: graphcomb.Program, smaller: graphcomb.Program) -> dict[str, Any]:
    """Parity of the ONNX files with the smaller program, the engine that TensorRT-RTX builds, and latencies."""
    found: dict[str, Any] = {"parity": {}}
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "fp16"):
            try:
                path = Path(folder) / f"{precision}.onnx"
                found["parity"][precision] = graphcomb.runtime.export_onnx(smaller, path, precision).parity
            except GraphcombError as error:
                found["parity"][precision] = f"fails: {str(error).removeprefix(f'{path}: ')}"
        try:
            engine = graphcomb.runtime.build_engine(Path(folder) / "fp32.onnx", "rtx-sm86")
            found["engine"] = {"kernels": len(engine.kernels), "bytes": engine.bytes, "version": engine.version}
        except (GraphcombError, OSError) as error:
            found["engine"] = {"failed": str(error)}
    timed = graphcomb.runtime.bench([program, smaller], names=["dense", "pruned"], seconds=40)
    found["latency"] = {"ms": [t.ms["median"] for t in timed.timings], "faster": timed.ratio, "note": timed.note}
    return found


def table(data: dict[str, Any]) -> str:
    lines = ["# RT-DETR of transformers", "", (__doc__ or "").split("\n\n")[2].replace("\n", " "), ""]
    lines += [
        "| method | seeds | fewer MACs | mAP before training | mAP | of dense | points lost |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method in METHODS:
        rows = [r for key, r in sorted(data["rows"].items()) if key.split("/")[0] == method]
        if rows:
            spread = [
                f"{statistics.fmean(v):.2f} ± {statistics.stdev(v):.2f}" if len(v) > 1 else f"{v[0]:.2f}"
                for v in ([r["map"] for r in rows], [r["dense"] - r["map"] for r in rows])
            ]
            fewer, before, of = (statistics.fmean(r[k] for r in rows) for k in ("fewer_macs", "at_once", "dense"))
            lines.append(
                f"| {method} | {len(rows)} | {fewer:.2f} | {before:.2f} | {spread[0]} | {of:.2f} | {spread[1]} |"
            )
    for key, r in sorted(data["rows"].items()):
        if "engine" in r:
            lines += ["", f"{key}: parity {r['parity']}; engine {r['engine']}; latency {r['latency']}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS / "rtdetr.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = json.loads(options.results.read_text()) if options.results.exists() else {"rows": {}}
    for seed in options.seeds:
        for method in options.methods:
            if options.again or f"{method}/{seed}" not in data["rows"]:
                data["rows"][f"{method}/{seed}"] = found = row(method, seed)
                save(options.results, data)
                print(method, seed, {k: v for k, v in found.items() if k != "code"}, flush=True)
    write(options.results.with_suffix(".md"), table(data))


if __name__ == "__main__":
    main()
