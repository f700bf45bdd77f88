"""Kernels that the fusion rules predict, against those of engines that were built.

    python benchmarks/kernels.py                 # resumes; results in benchmarks/results/kernels.json and kernels.md
    python benchmarks/kernels.py --only 'timm/*'

Every network (random weights, one image) is captured, folded, exported in fp16 and built with TensorRT-RTX for one target,
which needs no GPU. The build log lists the kernels; `graph.fusion` predicts how many there are. The rules were developed on
one half of the networks; of the other half only the count was looked at.
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

    import graphcomb.passes
    import graphcomb.runtime
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
            print(
                f"[{i + 1}/{len(names)}] {name}: {row['status']} {row.get('built', row.get('why'))} {time.monotonic() - start:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
