"""Compare the group sizes that the adaptive schedule leaves with those that selection at once leaves, on five networks.

    python benchmarks/selection.py                              # results/selection.json and .md
    python benchmarks/selection.py --networks digits resnet10t  # only some; the others keep their figures
    python benchmarks/selection.py --label before               # under a name, for instance with an older graphcomb
    python benchmarks/selection.py --table                      # only rewrite the table

A residual CNN is trained on scikit-learn's digits and pruned by the adaptive schedule, or before the first step with the
same training. Its lost accuracy is measured on the 500 images held out, for each of three seeds. The other networks have
random weights, images and labels, so that only the sizes are meaningful. A group is at its minimum if it has one step of
the alignment left, by default 8 channels; groups that began at this size do not count. Other figures are means.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import revision, save, write
from torch import Tensor, nn

import graphcomb
from graphcomb.graph.comb.groups import DEFAULT_KINDS
from graphcomb.passes import Distill, RemoveChannels
from graphcomb.passes.channels.groups import movable, steps

RESULTS = Path(__file__).parent / "results" / "selection.json"
SCHEDULES = {"adaptive": {"interval": 2, "prune_share": 1.0}, "at once": {"schedule": "one-shot"}}
TARGETS = {"digits": 0.4, "resnet10t": 0.3, "mobilenetv2_100": 0.4, "efficientnet_b0": 0.4, "convnext_atto": 0.4}
STEP, SIZE, STEPS, SEEDS = 8, 64, 16, 3  # alignment; of the images; of training; of digits


class Residual(nn.Module):
    """Three residual blocks of one width, so that one group reaches every layer; (N, 1, 8, 8) to (N, 10)."""

    def __init__(self, width: int = 16, inner: int = 32):
        super().__init__()
        self.stem = self.conv(1, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(self.conv(width, inner), nn.ReLU(), self.conv(inner, width)) for _ in range(3)
        )
        self.head = nn.Linear(width, 10)

    @staticmethod
    def conv(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def digits(seed: int) -> tuple[Any, list[Any], list[Any]]:
    """A trained network, its training batches and the batches held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(found.target)[order]
    batches = [(images[i : i + 64], labels[i : i + 64]) for i in range(0, 1280, 64)]
    torch.manual_seed(seed)
    program = graphcomb.capture(Residual(), (images[:4],), dynamic_shapes="batch")
    program = Distill(epochs=8, lr=5e-3, alpha=0.0)(program, data=batches).program
    return program, batches, [(images[1297:], labels[1297:])]


def accuracy(program: Any, held: list[Any]) -> float:
    module = program.module().eval()
    with torch.no_grad():
        return statistics.mean(float((module(x).argmax(1) == y).float().mean()) for x, y in held)


def measure(name: str, schedule: str) -> dict[str, Any]:
    """Sizes and, for digits, accuracies, by seed."""
    rows: list[dict[str, Any]] = []
    for seed in range(SEEDS if name == "digits" else 1):
        if name == "digits":
            program, batches, held = digits(seed)
            train = Distill(epochs=5, lr=3e-3, warmup=0.0)
            options = {
                **SCHEDULES[schedule],
                **({"interval": 10, "prune_share": 0.5} if schedule == "adaptive" else {}),
            }
        else:
            import timm

            torch.manual_seed(seed)
            model = timm.create_model(name, pretrained=False, num_classes=10)
            program = graphcomb.capture(model, (torch.randn(2, 3, SIZE, SIZE),), dynamic_shapes="batch")
            batches = [(torch.randn(4, 3, SIZE, SIZE), torch.randint(10, (4,))) for _ in range(STEPS)]
            train, options, held = Distill(steps=STEPS, lr=1e-4, alpha=0.0), SCHEDULES[schedule], []
        start = time.perf_counter()
        pass_ = RemoveChannels(macs=TARGETS[name], round_to=STEP, train=train, **options)
        result = pass_(program, data=batches, seed=seed, teacher=program)
        row = {"seed": seed, "seconds": time.perf_counter() - start, "macs": result.program.macs / program.macs}
        row["groups"] = sizes(program, {r["what"]: r["after"] for r in result.record["changed"]})
        if held:
            row |= {"accuracy": accuracy(result.program, held), "dense": accuracy(program, held)}
        rows.append(row)
    return {"rows": rows, "revision": revision()}


def sizes(program: Any, after: dict[str, int]) -> list[dict[str, Any]]:
    """Of every group that may shrink: its size, what is left, and the step that the alignment asks for."""
    comb = graphcomb.comb(program)
    groups = movable(comb, DEFAULT_KINDS)
    step = steps(comb, groups, STEP)
    return [
        {"name": g.name, "size": g.size, "kept": after.get(g.name, g.size), "step": step[g.atom]}
        for g in groups
        if g.size > step[g.atom]
    ]


def summary(rows: list[dict[str, Any]]) -> dict[str, str]:
    """What the table says of the runs of one network: means over seeds."""
    groups = [row["groups"] for row in rows]
    least = [sum(g["kept"] <= g["step"] for g in found) for found in groups]
    share = [sum(g["kept"] for g in found) / sum(g["size"] for g in found) for found in groups]
    found = {
        "at minimum": f"{statistics.mean(least):.3g} of {len(groups[0])}",
        "channels": f"{statistics.mean(share):.0%}",
        "MACs": f"{statistics.mean(r['macs'] for r in rows):.1%}",
    }
    if "accuracy" in rows[0]:
        lost = [100 * (r["dense"] - r["accuracy"]) for r in rows]
        found["points lost"] = ", ".join(f"{x:.1f}" for x in lost)
    return found


def table(results: dict[str, Any]) -> str:
    columns = ["at minimum", "channels", "MACs", "points lost"]
    lines = [
        "# What the adaptive schedule leaves of each group",
        "",
        (__doc__ or "").split("\n\n")[-1].strip().replace("\n", " "),
        "",
        f"| network | MACs asked | | {' | '.join(columns)} | graphcomb |",
        "| --- " * (len(columns) + 4) + "|",
    ]
    for name, target in TARGETS.items():
        for key in sorted(k for k in results if k.startswith(f"{name}/")):
            found = summary(results[key]["rows"])
            cells = [name, f"{target:.0%}", key.split("/", 1)[1], *(found.get(c, "") for c in columns)]
            lines.append(f"| {' | '.join(cells)} | {results[key]['revision']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--label", default="", help="put after the schedule's name")
    parser.add_argument("--table", action="store_true", help="only rewrite the table")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in () if arguments.table else arguments.networks:
        for schedule in arguments.schedules:
            key = f"{name}/{schedule}{arguments.label and f' ({arguments.label})'}"
            results[key] = measure(name, schedule)
            print(key, summary(results[key]["rows"]), flush=True)
            save(RESULTS, results)
    write(RESULTS.with_suffix(".md"), table(results))


if __name__ == "__main__":
    main()
