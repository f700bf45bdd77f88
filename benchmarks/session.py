"""Measure the cost of a session in a training step without an event: ResNet-18 at 64 x 64, compared with the same loop
alone.

    python benchmarks/session.py             # results in benchmarks/results/session.json and .md

Steps of the plain loop and of each kind of session alternate in one process and one thread. The figure is the median of
the ratios of neighbouring steps, with the quartiles. Times are CPU times. The pass computes exact Fisher scores in every
step, and its first event is after the last measured step.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch
import torchvision
from common import save, write
from torch import nn
from torch.nn import functional as F

import graphcomb
from graphcomb.passes import RemoveChannels

RESULTS = Path(__file__).parent / "results"


def step_of(model: nn.Module, session: graphcomb.Session | None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(x: torch.Tensor, y: torch.Tensor) -> float:
        start = time.process_time()
        F.cross_entropy(model(x), y).backward()
        if session is not None:
            session.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        if session is not None:
            session.after_step()
        return time.process_time() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = torch.randn(options.batch, 3, 64, 64), torch.randint(10, (options.batch,))
    steps = {"plain": step_of(model(), None)}
    for cut in ("end", "during"):
        pass_ = RemoveChannels(macs=0.5, interval=10_000, prune_share=1.0)
        session = graphcomb.attach(model(), pass_, example=(x[:2],), steps=20_000, cut=cut)
        steps[cut] = step_of(session.module, session)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(options.steps + 3):
        for name, step in steps.items():
            taken = step(x, y)
            if i >= 3:
                seconds[name].append(taken)
    rows = {}
    for cut in ("end", "during"):
        ratios = [own / plain for own, plain in zip(seconds[cut], seconds["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[cut] = {"ratio": middle, "quartiles": [low, high], "seconds": statistics.median(seconds[cut])}
    result = {
        "machine": platform.processor() or platform.machine(), "torch": torch.__version__, "batch": options.batch,
        "steps": options.steps, "plain_seconds": statistics.median(seconds["plain"]), "rows": rows,
    }  # fmt: skip
    save(RESULTS / "session.json", result)
    lines = [
        "# What a session costs a training step\n",
        f"ResNet-18, 64 x 64, batch {options.batch}, one thread, torch {torch.__version__}, {result['machine']}; "
        f"{options.steps} steps of each in turns; CPU time of a step over the plain loop's, median (quartiles).\n",
        "| session | times a plain step |",
        "| --- | ---: |",
        *(
            f'| cut="{cut}" | {row["ratio"]:.3f} ({row["quartiles"][0]:.3f} to {row["quartiles"][1]:.3f}) |'
            for cut, row in rows.items()
        ),
    ]
    write(RESULTS / "session.md", "\n".join(lines) + "\n")


def model() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10).train()


if __name__ == "__main__":
    main()
