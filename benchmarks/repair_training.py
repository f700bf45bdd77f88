"""Accuracy that repair still gains after training: the same removal and the same training with and without repair.

    python benchmarks/repair_training.py                       # resumes; results/repair_training.json and .md
    python benchmarks/repair_training.py --networks resnet --seeds 0 --steps 0 400
    python benchmarks/repair_training.py --steps 4000          # as long as the dense networks were trained
    python benchmarks/repair_training.py --table               # only rewrite the table

Networks, data, training and scores are those of `accuracy.py`: Fashion-MNIST's classifiers at 4.3 times fewer MACs, one
dense network of each; a seed determines images, order and training. "At once" removes all channels before training, by
Fisher scores or by importance "repair", both from 256 training images; Repair uses the same images without labels.
"Adaptive" prunes during training as in `accuracy.py`, with or without repair at each event.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import torch
from accuracy import SIZES, capture, gradient_batches, loaders, reference, score, training
from common import revision, save, write

from graphcomb.passes import RemoveChannels, Repair

RESULTS = Path(__file__).parent / "results" / "repair_training.json"
TARGET = 4.3
WAYS = {  # what goes how: importance, whether while training, repair
    "at once": ("fisher", False, False),
    "at once, repaired": ("fisher", False, True),
    "at once by what stays lost, repaired": ("repair", False, True),
    "adaptive": ("fisher", True, False),
    "adaptive, repaired": ("fisher", True, True),
}
PAIRS = {"at once, repaired": "at once", "adaptive, repaired": "adaptive"}


def measure(network: str, seed: int, steps: int, way: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    importance, adaptive, repair = WAYS[way]
    size = "long" if steps > 1000 else "small"
    options = replace(SIZES[size], steps=max(steps, 1))
    start, begun = time.process_time(), time.perf_counter()
    model, dense_score = reference(network, seed, size)
    dense = capture(model, "classification")
    data = loaders("classification", size)[0]
    images = gradient_batches("classification", size, seed, options.scored)
    train = training(options, True, "classification")
    removal = RemoveChannels(
        macs=1 / TARGET, importance=importance, scope="global", round_to=options.round_to, samples=options.scored,
        interval=options.interval if adaptive else 50, train=train if adaptive else None, repair=adaptive and repair,
    )  # fmt: skip
    if adaptive:
        program = removal(dense, data=data, seed=seed, teacher=dense).program
    else:
        program = removal(dense, data=images, seed=seed).program
        if repair:
            program = Repair(samples=options.scored)(program, data=images, seed=seed, teacher=dense).program
        if steps:
            program = train(program, data=data, seed=seed, teacher=dense).program
    found = {"score": score(program, network, size), "left": program.macs / dense.macs, "dense": dense_score}
    seconds = {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - start}
    return found | {k: round(v, 1) for k, v in seconds.items()} | {"revision": revision()}


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def table(rows: dict[str, Any]) -> str:
    found: dict[tuple[str, int], dict[str, dict[int, float]]] = {}
    dense = {}
    for key, row in rows.items():
        network, seed, steps, way = key.split("/")
        found.setdefault((network, int(steps)), {}).setdefault(way, {})[int(seed)] = row["score"]
        dense[network] = row["dense"]
    lines = [
        f"# {__doc__.splitlines()[0]}\n", "\n".join(__doc__.split("\n\n")[2].splitlines()) + "\n",
        "Top-1 accuracy in percent, mean and standard deviation over seeds; what repair adds is the mean over seeds of the "
        "difference on the same seed, with its standard deviation.\n",
        "| network | dense | steps | " + " | ".join(WAYS) + " | repair adds, at once | repair adds, adaptive | seeds |",
        "| --- | ---: | ---: |" + " ---: |" * (len(WAYS) + 3),
    ]  # fmt: skip
    for (network, steps), ways in sorted(found.items()):
        cells = [spread(list(ways[w].values())) if w in ways else "-" for w in WAYS]
        for repaired, plain in PAIRS.items():
            both = sorted(ways.get(repaired, {}).keys() & ways.get(plain, {}).keys())
            cells.append(spread([ways[repaired][s] - ways[plain][s] for s in both]) if both else "-")
        cells.append(str(max(map(len, ways.values()))))
        lines.append(f"| {network} | {dense[network]:.2f} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=networks.CLASSIFIERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 400])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = json.loads(options.results.read_text()) if options.results.is_file() else {}
    jobs = [(n, s, t, w) for s in options.seeds for t in options.steps for n in options.networks for w in options.ways]
    for network, seed, steps, way in [] if options.table else jobs:
        key = f"{network}/{seed}/{steps}/{way}"
        if key in rows or (WAYS[way][1] and not steps):
            continue
        rows[key] = measure(network, seed, steps, way)
        save(options.results, rows)
        print(
            f"{key}: {rows[key]['score']:.2f} of {rows[key]['dense']:.2f}, {rows[key]['cpu_seconds']:.0f} s", flush=True
        )
    write(options.results.with_suffix(".md"), table(rows))


if __name__ == "__main__":
    main()
