"""Widths and depth decided together, next to widths alone and depth alone, at equal measured latency; repair, no training.

    python benchmarks/joint.py                          # resumes; results/joint.json and .md
    python benchmarks/joint.py --networks resnet        # only some rows; the others keep their figures
    python benchmarks/joint.py --table measured         # layers measured one by one instead of the data sheet
    python benchmarks/joint.py --predict                # rounds by predicted times, for a busy machine
    python benchmarks/joint.py --write                  # only rewrite the table

Networks are the trained references of `accuracy.py` (Fashion-MNIST, 28 x 28). Budgets are shares of the dense network's
latency in ONNX Runtime, one thread, fp32, batch 1. All methods share the tables, the passes (PruneDepth, RemoveChannels,
Repair on 128 images without labels) and the rounds: a choice is built and measured, the budget is corrected by what it
really takes, and the choice is made again. Then all networks of a budget run in turns, and the speed-up is
the paired one. Rows that say so had rounds by predicted times, as on a busy machine.
Accuracy is that on the 10,000 test images.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import accuracy
import torch
from common import revision, save, write

import graphcomb
from graphcomb.passes.joint.rounds import Built, Tuner, builder
from graphcomb.tuning.tables import prepare_tables

RESULTS = Path(__file__).parent / "results" / "joint.json"
NETWORKS = ("resnet", "mobilenet", "deit")
TIMES = (1.5, 2.0, 3.0)  # as fast
METHODS = ("joint", "widths", "blocks")
IMAGES, ROUNDS = 128, 3
Row = dict[str, Any]


def images(seed: int) -> list[torch.Tensor]:
    """Training images without labels, in batches of 32: half repair, half judge."""
    return [x for x, _ in accuracy.gradient_batches("classification", "small", seed, 2 * IMAGES)]


def measure(network: str, seed: int, table: str, timed: bool) -> dict[str, Row]:
    """All rows of a network, by budget and method."""
    model, dense_score = accuracy.reference(network, seed, "small")
    dense = accuracy.capture(model, "classification")
    start = time.perf_counter()
    session = prepare_tables(
        dense, images(seed), table="roofline" if table == "roofline" else None, measure=timed, samples=IMAGES, sizes=6,
        points=2, seed=seed, progress=True,
    )  # fmt: skip
    tables = time.perf_counter() - start
    build = builder(session.tables, "repair", IMAGES, session.tables.losses.context)
    rows: dict[str, Row] = {}
    for times in TIMES:
        start = time.perf_counter()
        networks: dict[str, Built] = {}
        for method in METHODS:
            tuner = Tuner(session.tables, build, session.time, ROUNDS, session.say)
            budget = tuner.dense / times
            try:
                networks[method] = tuner.within(budget, method)
            except graphcomb.Unreachable as error:
                print(error)
        paired = graphcomb.runtime.bench(
            [dense, *(b.program for b in networks.values())], names=["dense", *networks], seconds=60.0
        )
        for method, built in networks.items():
            ratio = paired.ratios.get(method)
            rows[f"{network}/{seed}/{times:g}/{method}"] = {
                "how": built.how, "blocks": list(built.decided.blocks), "widths": dict(built.decided.widths),
                "faster": ratio and ratio["median"], "interval": ratio and [ratio.get("low"), ratio.get("high")],
                "accuracy": accuracy.score(built.program, network, "small"), "dense": dense_score,
                "loss": {"predicted": built.predicted_loss, "measured": built.loss},
                "ms": {
                    "dense": 1e3 * tuner.dense, "predicted": 1e3 * built.predicted_seconds,
                    "measured": 1e3 * built.seconds,
                },
                "macs": built.program.macs / dense.macs, "table": table, "timed": timed, "revision": revision(),
                "seconds": {"tables": tables, "budget": time.perf_counter() - start}, "contended": paired.contended,
            }  # fmt: skip
        missing = [m for m in METHODS if m not in networks]
        rows |= {f"{network}/{seed}/{times:g}/{m}": {"unreachable": True, "table": table} for m in missing}
    return rows


def table(data: dict[str, Row]) -> str:
    """The results as Markdown."""
    lines = [
        "# Widths and depth together, at equal measured latency", "",
        " ".join((__doc__ or "").split("\n\n")[-1].split()), "",
        "| network | asked | method | faster (measured) | accuracy | divergence, predicted and measured | ms by the table "
        "and in the rounds | MACs | blocks gone, groups narrower |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for key, row in sorted(data.items(), key=lambda item: _order(item[0])):
        network, _, times, method = key.split("/")
        if row.get("unreachable"):
            lines.append(f"| {network} | {times}x | {method} | cannot be reached | | | | | |")
            continue
        low, high = row["interval"] or (None, None)
        faster = "–" if row["faster"] is None else f"{row['faster']:.2f}x"
        faster += f" ({low:.2f} to {high:.2f})" if low is not None else ""
        faster += "" if row["timed"] else " predicted rounds"
        chosen = f" (is {row['how']} alone)" if method == "joint" and row["how"] != "joint" else ""
        loss, ms = row["loss"], row["ms"]
        lines.append(
            f"| {network} ({row['dense']:.2f} %) | {times}x | {method}{chosen} | {faster} | {row['accuracy']:.2f} | "
            f"{loss['predicted']:.3f}, {loss['measured']:.3f} | {ms['predicted']:.3g}, {ms['measured']:.3g} | "
            f"{row['macs']:.2f} | {len(row['blocks'])}, {len(row['widths'])} |"
        )
    lines += [
        "",
        "Where the joint choice is that of widths alone, both rows are the same network measured twice: the difference is",
        "the spread that the interval does not show. Blocks come whole, so that blocks alone are often faster than asked.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def stored() -> dict[str, Row]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def _order(key: str) -> tuple[int, str, float, int]:
    network, seed, times, method = key.split("/")
    return NETWORKS.index(network), seed, float(times), METHODS.index(method)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--table", choices=["roofline", "measured"], default="roofline")
    parser.add_argument(
        "--predict", action="store_true", help="predict whole networks in the rounds, measure only in the end"
    )
    parser.add_argument("--write", action="store_true", help="only rewrite the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = stored()
    for seed in range(0 if options.write else options.seeds):
        for network in options.networks:
            keys = [f"{network}/{seed}/{t:g}/{m}" for t in TIMES for m in METHODS]
            if all(data.get(k, {}).get("table") == options.table for k in keys):
                continue
            rows = measure(network, seed, options.table, not options.predict)
            data = stored() | rows  # another process may have written those of another network
            save(RESULTS, data)
            write(RESULTS.with_suffix(".md"), table(data))
    write(RESULTS.with_suffix(".md"), table(data))


if __name__ == "__main__":
    main()
