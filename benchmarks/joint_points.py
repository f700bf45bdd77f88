"""At how many budgets tuning by all means is above the best single method: the points of `joint.py`, with their spread.

    python benchmarks/joint_points.py                   # scores what is missing; results/joint_points.json and .md
    python benchmarks/joint_points.py --write           # only rewrite the table

A point is a network and how many times as fast it is to be. Tuned is the network that `joint.py` chose with INT8 on offer
where those rows were measured on the processor of the others, else without it. Single methods are widths, blocks and,
with INT8 on offer, INT8 alone. Networks on Fashion-MNIST have the scores of `joint_training.py`, after training, in
points of accuracy over three seeds. EfficientNet-Lite0 and CRAFT are not trained; they are scored here on more unseen
images than in `joint.py` (384 crops, 128 pages), as ONNX Runtime computes them. Differences are paired, by seed or by
image: the mean with its standard deviation over seeds, or its 95 % interval (bootstrap over images; CRAFT's figures are
means over pages). A point is above if the mean is more than two standard deviations above 0, or if the interval is.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import revision, save, write
from joint import FASHION, INTEGER, NETWORKS, RIVAL, TIMES, network_path
from joint import RESULTS as BUILT
from joint_training import RESULTS as TRAINED_ROWS
from precision import computed
from repair import first
from trained import NETWORKS as TRAINED

import graphcomb

RESULTS = Path(__file__).parent / "results" / "joint_points.json"
TESTED = {"efficientnet_lite0": 384, "craft": 128}
SINGLE = ("widths", "blocks", "INT8 alone")
Rows = dict[str, Any]


def of_images(network: str, name: str) -> list[float]:
    """The score of a stored network on each unseen image."""
    known = replace(TRAINED[network], tested=TESTED[network])
    outputs = computed(known, graphcomb.load(network_path(name)))
    truths = known.test[1]
    parts = (
        (outputs[i : i + 1] for i in range(len(truths))),
        (known.dense_outputs[i : i + 1] for i in range(len(truths))),
    )
    return [100 * first(known.score(o, d, [t])) for o, d, t in zip(*parts, truths, strict=True)]


def points(built: Rows) -> dict[tuple[str, float], Rows]:
    """The networks to compare at each point, by method: those on the processor of the joint one, which is "tuned"."""
    found = {}
    for network in NETWORKS:
        for times in TIMES:
            rows = {k.split("/")[3]: r for k, r in built.items() if k.startswith(f"{network}/0/{times:g}/")}
            here = {m: r for m, r in rows.items() if m not in INTEGER or r["processor"] == rows["joint"]["processor"]}
            here["tuned"] = here.pop("joint with INT8", here["joint"])
            found[network, times] = {m: r for m, r in here.items() if "network" in r}
    return found


def compared(ours: list[float], theirs: list[float], seeds: bool) -> tuple[str, bool]:
    """The paired difference in words, and whether it is above 0 outside its spread."""
    by = np.subtract(ours, theirs)
    if seeds:
        return f"{by.mean():+.2f} ± {by.std(ddof=1):.2f}", bool(by.mean() > 2 * by.std(ddof=1))
    draws = np.random.default_rng(0).choice(by, (10_000, len(by))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{by.mean():+.1f} ({low:+.1f} to {high:+.1f})", bool(low > 0)


def table(built: Rows, scores: dict[str, list[float]]) -> str:
    lines = [
        f"# {(__doc__ or '').splitlines()[0]}", "", " ".join((__doc__ or "").split("\n\n")[-1].split()), "",
        "| network | asked | tuned | best single method | tuned adds | torch-pruning |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    reached = above = same = beaten = rivals = 0
    for (network, times), rows in points(built).items():
        known = {m: scores.get(f"{network}/{r['network']}") for m, r in rows.items()}
        known = {m: s for m, s in known.items() if s}

        def cell(method: str, known: dict[str, Any] = known, rows: Rows = rows) -> str:
            faster = rows[method]["faster"]
            return f"{np.mean(known[method]):.2f} at {'–' if faster is None else f'{faster:.2f}x'}"

        if "tuned" not in known:
            reason = "cannot be reached" if "tuned" not in rows else "its network is not at hand"
            lines.append(f"| {network} | {times:g}x | {reason} | | | |")
            continue
        reached += 1
        cells, seeds = [cell("tuned"), "cannot", "alone", "cannot"], network in FASHION
        single = max((m for m in SINGLE if m in known), key=lambda m: np.mean(known[m]), default=None)
        if single is not None:
            text, more = compared(known["tuned"], known[single], seeds)
            is_same = rows[single]["network"] == rows["tuned"]["network"]
            above, same = above + (more and not is_same), same + is_same
            cells[1:3] = f"{cell(single)}, {single}", "the same network" if is_same else text
        else:
            above += 1
        if RIVAL in known:
            text, more = compared(known["tuned"], known[RIVAL], seeds)
            rivals, beaten = rivals + 1, beaten + more
            cells[3] = f"{cell(RIVAL)}: {text}"
        lines.append(f"| {network} | {times:g}x | {' | '.join(cells)} |")
    lines += [
        "",
        f"Of {reached} points tuned is above the best single method outside the spread on {above}, and the same network on "
        f"{same}. It is above torch-pruning on {beaten} of {rivals}.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="only rewrite the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    built = json.loads(BUILT.read_text())
    for (network, _), rows in points(built).items():
        for row in rows.values():
            key = f"{network}/{row['network']}"
            if options.write or network in FASHION or key in stored or not network_path(row["network"]).is_file():
                continue
            stored[key] = {"scores": of_images(network, row["network"]), "revision": revision()}
            print(key, np.mean(stored[key]["scores"]), flush=True)
            save(RESULTS, stored)
    trained = json.loads(TRAINED_ROWS.read_text())
    scores = {key: [r["score"] for _, r in sorted(seeds.items())] for key, seeds in trained.items()}
    scores |= {key: row["scores"] for key, row in stored.items()}
    write(RESULTS.with_suffix(".md"), table(built, scores))


if __name__ == "__main__":
    main()
