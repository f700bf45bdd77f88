"""Compare the number of kernels that the fusion rules predict with that of built engines.

    python benchmarks/kernels.py                 # resumes; results in benchmarks/results/kernels.json and kernels.md
    python benchmarks/kernels.py --only 'timm/*'

Every network (random weights, one image) is captured, folded, exported in fp16 and built with TensorRT-RTX for one target,
which needs no GPU. The build log lists the kernels; `graph.workload.fusion` predicts their number. The rules were
developed on one half of the networks; for the other half only the numbers were compared.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

from common import revision, save, write
from kernel_networks import DEVELOPED, HELD_OUT, NETWORKS, make
from zoo import environment, run_child

RESULTS = Path(__file__).parent / "results"
TARGET = "rtx-sm86"
WANTED = 0.1  # relative error of a count that is good enough


def build(name: str, kept: Path) -> dict:
    """Capture, fold, export and build a network; the program and its kernels are kept in the folder."""
    import torch

    import graphcomb
    from graphcomb.passes import Fuse, RemoveChannels
    from graphcomb.runtime import build_engine, export_onnx

    torch.set_num_threads(1)
    side, surgery = NETWORKS[name]
    stage = "capture"
    try:
        program = graphcomb.capture(make(name), (torch.randn(1, 3, side, side),))
        if surgery:
            stage = "prune"
            program = RemoveChannels(**surgery)(program).program
        stage = "fold"
        program = Fuse()(program).program
        program.save(kept / f"{file_name(name)}.pt2")
        stage = "export"
        with tempfile.TemporaryDirectory() as folder:
            exported = export_onnx(program, Path(folder) / "net.onnx", "fp16")
            stage = "build"
            built = build_engine(exported.path, TARGET, Path(folder) / "net.rtx")
    except Exception as error:  # whatever fails is a row of the table
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return {"status": "failed", "stage": stage, "why": text.replace(tempfile.gettempdir(), "")[:300]}
    kernels = [
        {
            "name": kernel.name, "kind": kernel.kind, "padding": kernel.padding, "inputs": kernel.inputs,
            "outputs": kernel.outputs, "onnx": kernel.nodes,
            "nodes": [built.origins[n].node for n in kernel.nodes if n in built.origins],
        }
        for kernel in built.kernels
    ]  # fmt: skip
    save(kept / f"{file_name(name)}.json", kernels)
    return {
        "status": "ok", "built": len(kernels), "padding": len(built.padding), "unread": len(built.unread),
        "macs": program.macs, "nodes": sum(exported.nodes.values()), "commit": revision(),
    }  # fmt: skip


def file_name(name: str) -> str:
    return name.replace("/", "-").replace(" ", "-")


def predict(name: str, kept: Path) -> dict:
    """How many kernels the rules predict for a kept program."""
    import graphcomb
    from graphcomb.graph.workload.fusion import kernels
    from graphcomb.graph.workload.libraries import TENSORRT

    found = kernels(graphcomb.load(kept / f"{file_name(name)}.pt2").graph, TENSORRT)
    launches = [kernel.launches(TENSORRT.grain) for kernel in found]
    return {"predicted": sum(launches), "laid_out": sum(launches) - len(found)}


def table(data: dict) -> str:
    """The results as Markdown."""
    lines = [
        f"# Kernels\n\n{(__doc__ or '').split(chr(10) * 2)[2].strip()}\n\n{data['environment']}, {TARGET}, fp16.\n"
    ]
    halves = {"The rules were developed on these": DEVELOPED, "Held out": HELD_OUT}
    for title, names in halves.items():
        found = {n: row for n in names if (row := data["rows"].get(n)) and row["status"] == "ok" and "predicted" in row}
        if not found:
            continue
        errors = {n: row["predicted"] / row["built"] - 1 for n, row in found.items()}
        good = sum(abs(error) <= WANTED for error in errors.values())
        lines.append(
            f"\n## {title}: {good} of {len(found)} within {WANTED:.0%}, median error "
            f"{statistics.median(map(abs, errors.values())):.1%}\n"
        )
        lines.append("| network | pixels | kernels built | predicted | error |\n| --- | --- | --- | --- | --- |")
        for n, row in found.items():
            mark = "" if abs(errors[n]) <= WANTED else " (missed)"
            lines.append(f"| {n} | {names[n][0]} | {row['built']} | {row['predicted']} | {errors[n]:+.1%}{mark} |")
        failed = {n: row for n in names if (row := data["rows"].get(n)) and row["status"] != "ok"}
        lines += [f"\n{n}: failed at {row.get('stage', '')}: {row.get('why', '')}" for n, row in failed.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern over network names")
    parser.add_argument("--again", action="store_true", help="build anew what has a result")
    parser.add_argument("--failed", action="store_true", help="build anew what failed")
    parser.add_argument("--seconds", type=float, default=600, help="time limit for one network")
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--kept", type=Path, default=None, help="programs and kernels; default in the cache folder")
    parser.add_argument("--results", type=Path, default=RESULTS / "kernels.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import timm  # noqa: F401
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    from graphcomb.data import cache_folder

    kept = options.kept or cache_folder() / "kernels"
    kept.mkdir(parents=True, exist_ok=True)
    data = json.loads(options.results.read_text()) if options.results.exists() else {"rows": {}}
    data["environment"] = environment()
    names = [name for name in NETWORKS if fnmatch.fnmatch(name, options.only)]
    for i, name in enumerate(names):
        old = data["rows"].get(name)
        start = time.monotonic()
        if not old or options.again or (options.failed and old["status"] != "ok"):
            data["rows"][name] = run_child(functools.partial(build, name, kept), options.seconds, options.gigabytes)
            save(options.results, data)
            row = data["rows"][name]
            seconds = time.monotonic() - start
            print(f"[{i + 1}/{len(names)}] {name}: {row.get('built', row.get('why'))}, {seconds:.0f} s", flush=True)
    for name in names:
        if data["rows"][name]["status"] == "ok" and (kept / f"{file_name(name)}.pt2").exists():
            data["rows"][name] |= predict(name, kept)
    save(options.results, data)
    write(options.results.with_suffix(".md"), table(data))


if __name__ == "__main__":
    main()
