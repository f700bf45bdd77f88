"""Seconds of comb, selection and surgery, compared with torch-pruning's dependency graph, pruner and step.

    python benchmarks/comb_speed.py                    # results in benchmarks/results/comb_speed.json and .md
    python benchmarks/comb_speed.py --models resnet50

Each model runs in its own process with one thread, and runs of both libraries alternate. Runs during which other processes
had the processor (CPU time below 93 % of wall time) do not count. The ratio is the median of the ratios of neighbouring
runs. The time of capture is shown but not part of the ratio.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

from common import save, write

RESULTS = Path(__file__).parent / "results"
MODELS = ("resnet50", "vit_b_16", "convnext_tiny", "swin_t", "efficientnet_b0", "densenet121", "chain1000")
GUARD = 0.93


def build(name: str):
    import torch
    from torchvision import models

    torch.manual_seed(0)
    if name == "chain1000":
        layers: list = [torch.nn.Conv2d(3, 16, 3, padding=1)]
        for _ in range(333):
            layers += [torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3, padding=1)]
        return torch.nn.Sequential(*layers).eval(), torch.randn(1, 3, 16, 16)
    return models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)


def measure(name: str, runs: int, seconds: float, rival: bool) -> dict:
    import torch
    import torch_pruning as tp

    from graphcomb import capture
    from graphcomb.graph.comb.solve import Comb
    from graphcomb.passes import RemoveChannels

    torch.set_num_threads(1)
    model, x = build(name)
    start = time.perf_counter()
    program = capture(model, x)
    row: dict = {"capture_s": time.perf_counter() - start, "nodes": len(program.graph.nodes)}

    def theirs(work) -> None:
        tp.pruner.MagnitudePruner(
            work, x, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.5,
            ignored_layers=[m for m in work.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1000],
        ).step()  # fmt: skip

    jobs = {
        "comb": lambda: Comb(program),
        "their_graph": lambda: tp.DependencyGraph().build_dependency(copy_of(), example_inputs=x),
        "all": lambda: RemoveChannels(ratio=0.5)(program),
        "their_all": lambda: theirs(copy_of()),
    }
    if not rival:
        row |= {"their_graph_fails": "left out", "their_all_fails": "left out"}
    spare: list = []

    def copy_of():
        return spare.pop()

    times: dict[str, list[float]] = {k: [] for k in jobs}
    rejected, end = 0, time.monotonic() + seconds
    while time.monotonic() < end and min(map(len, times.values())) < runs:
        found = {}
        for job, function in jobs.items():
            if f"{job}_fails" in row:
                continue
            if job.startswith("their"):
                spare.append(copy.deepcopy(model))
            try:
                wall, cpu = time.perf_counter(), time.process_time()
                function()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            except Exception as error:
                row[f"{job}_fails"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
                found[job] = None
                continue
            found[job] = wall if cpu / wall >= GUARD else None
            rejected += found[job] is None
        for ours, other in (("comb", "their_graph"), ("all", "their_all")):
            if f"{other}_fails" in row:
                if found[ours] is not None:
                    times[ours].append(found[ours])
                times[other].append(float("nan"))
            elif found[ours] is not None and found[other] is not None:
                times[ours].append(found[ours])
                times[other].append(found[other])
    row["rejected"] = rejected
    for ours, other in (("comb", "their_graph"), ("all", "their_all")):
        row[f"{ours}_s"] = statistics.median(times[ours]) if times[ours] else None
        if f"{other}_fails" not in row and times[ours]:
            row[f"{other}_s"] = statistics.median(times[other])
            ratios = sorted(b / a for a, b in zip(times[ours], times[other], strict=True))
            row[f"{ours}_ratio"] = statistics.median(ratios)
            row[f"{ours}_ratio_spread"] = [ratios[0], ratios[-1]]
            row[f"{ours}_runs"] = len(ratios)
    return row


def table(data: dict) -> str:
    lines = [
        "# Seconds for comb, selection and surgery\n",
        f"{data['environment']}. Ratios: torch-pruning over graphcomb, median (lowest to highest) of paired runs.\n",
        "| model | nodes | capture | comb | their dependency graph | ratio | with surgery | their pruner + step | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, r in data["rows"].items():
        cells = [name, str(r["nodes"]), f"{r['capture_s']:.2f} s"]
        for ours, other in (("comb", "their_graph"), ("all", "their_all")):
            cells.append(f"{1e3 * r[f'{ours}_s']:.1f} ms" if r[f"{ours}_s"] else "too contended")
            if f"{other}_fails" in r:
                cells += ["did not end" if r[f"{other}_fails"] == "left out" else "fails", "-"]
            elif r.get(f"{ours}_ratio"):
                low, high = r[f"{ours}_ratio_spread"]
                cells += [f"{1e3 * r[f'{other}_s']:.0f} ms", f"{r[f'{ours}_ratio']:.1f} ({low:.1f} to {high:.1f})"]
            else:
                cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=90, help="limit per model")
    parser.add_argument("--results", type=Path, default=RESULTS / "comb_speed.json")
    parser.add_argument("--no-rival", action="store_true", help="leave torch-pruning out, where it does not end")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.one:
        print(json.dumps(measure(options.one, options.runs, options.seconds, not options.no_rival)))
        return
    import torch
    import torch_pruning

    path: Path = options.results
    path.parent.mkdir(exist_ok=True)
    data = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    data["environment"] = (
        f"One thread of {platform.processor() or platform.machine()}, torch {torch.__version__}, "
        f"torch-pruning {torch_pruning.__version__}, Python {platform.python_version()}"
    )
    for name in options.models:
        command = [
            sys.executable,
            __file__,
            "--one",
            name,
            "--runs",
            str(options.runs),
            "--seconds",
            str(options.seconds),
        ]
        if options.no_rival:
            command.append("--no-rival")
        try:
            out = subprocess.run(command, capture_output=True, text=True, timeout=4 * options.seconds)
        except subprocess.TimeoutExpired:
            print(f"{name}: no end after {4 * options.seconds:.0f} s; try --no-rival")
            continue
        if out.returncode:
            print(f"{name}: {(out.stderr.strip().splitlines() or [f'ended with {out.returncode}'])[-1]}")
            continue
        data["rows"][name] = json.loads(out.stdout.strip().splitlines()[-1])
        save(path, data, sort_keys=False)
        print(name, {k: round(v, 4) if isinstance(v, float) else v for k, v in data["rows"][name].items()}, flush=True)
    write(path.with_suffix(".md"), table(data))


if __name__ == "__main__":
    main()
