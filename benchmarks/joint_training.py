"""The networks of `joint.py` after training: widths and depth together next to each alone, at equal measured latency.

    python benchmarks/joint_training.py                       # resumes; results/joint_training.json and .md
    python benchmarks/joint_training.py --networks resnet --seeds 0
    python benchmarks/joint_training.py --write               # only rewrite the table

The networks on Fashion-MNIST that `joint.py` built, as it left them in the cache, get the same training each: that of
`accuracy.py`, 400 steps with the dense network as the teacher; layers in INT8 are trained as they round. A seed determines
the order of the images; the networks do not depend on it. Scores are accuracies on the 10,000 test images, of networks in
INT8 as ONNX Runtime computes them, mean and standard deviation over seeds; "times as fast" is that of `joint.py`, which
training does not change. "Joint adds" is the mean over seeds of the difference between a joint network and the best of the
networks of a single method, or of torch-pruning, of the same budget, with its standard deviation; those in INT8 count where
they are allowed. Rows with INT8 are there where they were measured on the processor of the other rows.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accuracy import SIZES, loaders, training
from common import revision, save, write
from joint import ALL, FASHION, FLOAT_ROWS, INTEGER, network_path
from joint import RESULTS as NETWORKS
from precision import scored
from repair import first
from repair_training import spread
from trained import NETWORKS as TRAINED

import graphcomb

RESULTS = Path(__file__).parent / "results" / "joint_training.json"
STEPS = 400
Rows = dict[str, Any]


def measure(network: str, name: str, seed: int, quantised: bool) -> Rows:
    """A row: the score of a network after training with a seed, and the seconds. quantised: whether layers are in INT8."""
    start, known = time.process_time(), TRAINED[FASHION[network]]
    options = replace(SIZES["small"], steps=STEPS)
    train = training(options, True, "classification")
    trained = train(
        graphcomb.load(network_path(name)), data=loaders("classification", "small")[0], seed=seed, teacher=known.dense
    )
    score = 100 * first(scored(known, trained.program) if quantised else known.scored(trained.program))
    return {"score": score, "cpu_seconds": round(time.process_time() - start, 1), "revision": revision()}


def budgets(built: Rows) -> dict[tuple[str, float], Rows]:
    """The rows of `joint.py` by network and budget, then by method."""
    found: dict[tuple[str, float], Rows] = {}
    for key, row in built.items():
        network, seed, times, method = key.split("/")
        here = row["processor"] == built[f"{network}/{seed}/{times}/joint"]["processor"]
        if network in FASHION and seed == "0" and "network" in row and (method in FLOAT_ROWS or here):
            found.setdefault((network, float(times)), {})[method] = row
    order = list(FASHION)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def added(scores: dict[str, dict[int, float]], method: str) -> tuple[str, list[float]] | None:
    """The single method with the best scores, and how much the network of a joint one is above it, by seed; None if no
    single method has as many seeds."""
    joint = scores[method]
    single = set(ALL) - {"joint", *INTEGER} | ({"INT8 alone"} if method in INTEGER else set())
    others = {m: s for m, s in scores.items() if m in single and s.keys() == joint.keys()}
    if not others:
        return None
    best = max(others, key=lambda m: sum(others[m].values()))
    return best, [joint[seed] - others[best][seed] for seed in sorted(joint)]


def table(built: Rows, rows: Rows) -> str:
    lines = [
        f"# {(__doc__ or '').splitlines()[0]}", "", " ".join((__doc__ or "").split("\n\n")[-1].split()), "",
        "| network | asked | method | times as fast | before training, % | after, % | seeds | joint adds to the best |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for (network, times), methods in budgets(built).items():
        scores = {
            m: {int(seed): r["score"] for seed, r in rows.get(f"{network}/{row['network']}", {}).items()}
            for m, row in methods.items()
        }
        known = {m: s for m, s in scores.items() if s}
        for method in sorted(known, key=ALL.index):
            row, more = methods[method], ""
            compared = added(known, method) if method.startswith("joint") else None
            if compared is not None:
                best, by = compared
                more = (
                    f"the network of {best}" if methods[best]["network"] == row["network"] else f"{spread(by)} ({best})"
                )
            faster = "–" if row["faster"] is None else f"{row['faster']:.2f}"
            lines.append(
                f"| {network} ({row['dense']:.2f} %) | {times:g}x | {method} | {faster} | {row['score']:.2f} | "
                f"{spread(list(known[method].values()))} | {len(known[method])} | {more} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(FASHION), choices=list(FASHION))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--write", action="store_true", help="only rewrite the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    built = json.loads(NETWORKS.read_text())
    jobs = [
        (network, row["network"], seed, bool(row.get("int8")))
        for seed in options.seeds
        for (network, _), methods in budgets(built).items()
        for row in methods.values()
        if network in options.networks
    ]
    for network, name, seed, quantised in [] if options.write else jobs:
        done = rows.setdefault(f"{network}/{name}", {})
        if str(seed) in done:
            continue
        done[str(seed)] = measure(network, name, seed, quantised)
        print(network, name, seed, done[str(seed)], flush=True)
        save(RESULTS, rows)
        write(RESULTS.with_suffix(".md"), table(built, rows))
    write(RESULTS.with_suffix(".md"), table(built, rows))


if __name__ == "__main__":
    main()
