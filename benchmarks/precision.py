"""INT8 for all layers and for chosen regions, on trained networks in ONNX Runtime on one thread of a CPU with VNNI.

    python benchmarks/precision.py                          # resumes; results/precision.json and .md
    python benchmarks/precision.py --networks mobilenet_v2  # only some rows; the others keep their figures
    python benchmarks/precision.py --table                  # only rewrite the table

Networks, photographs and scores are those of `trained.py`, without labels: the score is the share of test images whose first
class is that of the dense network, and the divergence from it is in nats. Calibration images and test images are crops of
different photographs. "all" quantises every layer, "default" all but the first and last ones, both for a CPU; "default for
TensorRT" quantises other values of the same layers; "chosen" has the regions that `choose_precisions` takes for the allowed
divergence, with the seconds of ONNX Runtime itself. All are scored as ONNX Runtime computes them, its fused integer kernels
included. Latencies are medians of runs in turns, at batch 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import revision, save, write
from trained import NETWORKS, Network

import graphcomb
from graphcomb.graph.errors import GraphcombError
from graphcomb.passes import Context, Fuse, Quantize
from graphcomb.passes.joint.precision import choose_precisions
from graphcomb.runtime import bench, export_onnx, load_engine

RESULTS = Path(__file__).parent / "results" / "precision.json"
LOSSES = {"mobilenet_v2": 0.004, "efficientnet_lite0": 0.004}  # the divergences that are allowed, in nats
SAMPLES, TESTED = 48, 192
Program = graphcomb.Program


def export(program: Program, path: Path) -> Path:
    """The file that ONNX Runtime runs; its limits are not the question here, so they are wide."""
    return export_onnx(program, path, tolerance=10.0).path


def seconds(programs: Sequence[Program]) -> list[float]:
    """Median seconds of one image, the programs measured in turns."""
    with tempfile.TemporaryDirectory() as folder:
        files = [export(p, Path(folder) / f"{i}.onnx") for i, p in enumerate(programs)]
        found = bench(files, seconds=1.5 * len(files) + 5, min_runs=8, max_runs=25)
    if found.note:
        print(found.note, flush=True)
    return [t.ms["median"] / 1e3 if t.ms else float("nan") for t in found.timings]


def computed(network: Network, program: Program, backend: str = "onnxruntime") -> torch.Tensor:
    """The first output of a program for all test images, as a library computes it."""
    with tempfile.TemporaryDirectory() as folder:
        engine = load_engine(export(program, Path(folder) / "net.onnx"), backend)
        rows = [engine.run([batch.numpy()])[0] for batch in network.test[0]]
    return torch.from_numpy(np.concatenate(rows))


def scored(network: Network, program: Program, backend: str = "onnxruntime") -> dict[str, float]:
    """The scores of a program as a library computes it."""
    return network.score(computed(network, program, backend), network.dense_outputs, network.test[1])


def measure(name: str) -> dict[str, Any]:
    network = dataclasses.replace(NETWORKS[name], calibrated=2 * SAMPLES, tested=TESTED)
    start = time.process_time()
    dense = Fuse()(network.dense).program
    context = Context(data=network.calibration(0))
    how = Quantize(samples=SAMPLES, placement="cpu")
    programs = {
        "all": dataclasses.replace(how, include=("*",))(dense, context).program,
        "default": how(dense, context).program,
        "default for TensorRT": dataclasses.replace(how, placement="tensorrt")(dense, context).program,
    }
    choice = choose_precisions(dense, context, seconds, LOSSES[name], how, SAMPLES)
    programs = {"fp32": dense, **programs, "chosen": choice.program}
    took = dict(zip(programs, seconds(list(programs.values())), strict=True))
    return {
        "allowed": LOSSES[name], "note": choice.note, "cpu_seconds": round(time.process_time() - start, 1),
        "rows": {k: scored(network, p) | {"ms": 1e3 * took[k]} for k, p in programs.items()},
        "regions": [
            {"layers": len(o.weights), "first": o.weights[0], "gain_ms": 1e3 * o.gain, "loss": o.loss, "int8": o.chosen}
            for o in choice.options
        ],
    }  # fmt: skip


def table(data: dict[str, Any]) -> str:
    lines = [f"# Precision\n\n{(__doc__ or '').split(chr(10) * 2)[2].strip()}\n"]
    for name, found in data.items():
        chosen = [r for r in found["regions"] if r["int8"]]
        lines += [
            f"\n## {name}\n",
            f"At most {found['allowed']:g} nats were allowed; {len(chosen)} of {len(found['regions'])} regions became INT8. "
            f"{found['note']}".strip()
            + f" {found['cpu_seconds']:.0f} s of CPU.\n",
            "| | first class as dense | divergence | ms | times as fast as fp32 |",
            "| --- | --- | --- | --- | --- |",
        ]
        plain = found["rows"]["fp32"]["ms"]
        for kind, row in found["rows"].items():
            lines.append(
                f"| {kind} | {100 * row['agreement']:.1f} % | {row['divergence']:.4f} | {row['ms']:.2f} | "
                f"{plain / row['ms']:.2f} |"
            )
        lines += ["\n| region from | layers | saves ms | divergence alone | |", "| --- | --- | --- | --- | --- |"]
        for r in found["regions"]:
            lines.append(
                f"| {r['first']} | {r['layers']} | {r['gain_ms']:.3f} | {r['loss']:.5f} | {'INT8' if r['int8'] else ''} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--again", action="store_true", help="measure anew what has a result")
    parser.add_argument("--table", action="store_true", help="only rewrite the table")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = json.loads(options.results.read_text()) if options.results.exists() else {}
    for name in options.networks:
        if options.table or (name in data and not options.again):
            continue
        try:
            data[name] = {"commit": revision()} | measure(name)
        except GraphcombError as error:
            print(f"{name}: {error}")
            continue
        save(options.results, data)
        print(name, data[name]["rows"], flush=True)
    if data:
        write(options.results.with_suffix(".md"), table(data))


if __name__ == "__main__":
    main()
