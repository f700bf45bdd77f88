"""Measure dense and compressed networks on this machine's GPU, in fp16, with every engine that is installed.

    make bench-gpu                               # or: python benchmarks/gpu.py [--only resnet50] [--batches 1 8]

Networks have random weights, since only time is measured. Channels of each network are pruned to half and a quarter of its
MACs, its depth is pruned, and it is made 2:4 sparse. Engines run in turns, with inputs on the device, and as a CUDA graph if
the engine supports it. An engine whose outputs differ from the network's is not measured. Results go to
benchmarks/results/gpu.json and gpu.md, and an interrupted run resumes. Without a GPU nothing is measured; `--engines
onnxruntime` tests the script on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from common import revision, save, write
from zoo import environment

RESULTS = Path(__file__).parent / "results"
NETWORKS = ("resnet50", "convnext_tiny", "vit_b_16", "swin_t", "segformer_b0")
ENGINES = ("tensorrt", "tensorrt_rtx", "torch_tensorrt", "inductor")
BATCHES = (1, 8, 32)
ALLOWED = 0.05  # error of an fp16 engine's outputs, relative to the largest output in fp32


def network(name: str):
    """The network in eval mode, and the shape of one image."""
    import torch

    torch.manual_seed(0)
    if name == "segformer_b0":
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        class Logits(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=19))

            def forward(self, images):
                return self.model(images).logits

        return Logits().eval(), (3, 512, 512)
    from torchvision import models

    return models.get_model(name, weights=None).eval(), (3, 224, 224)


def variants() -> dict[str, Any]:
    """Passes by name. What is kept is chosen in the cheapest way: the time does not depend on it."""
    from graphcomb.passes import Distill, RemoveChannels, Sparsify
    from graphcomb.passes.depth.prune_depth import ablated

    return {
        "dense": None,
        "channels 2x": RemoveChannels(macs=0.5),
        "channels 4x": RemoveChannels(macs=0.25),
        "depth": ablated(search=False, fading=False)(macs=0.7, supernet_steps=0, train=Distill(epochs=1, lr=1e-6)),
        "2:4": Sparsify(pattern="2:4", method="magnitude"),
    }


def half(program):
    """The program in fp16, for the engines that run programs."""
    import torch
    from torch.utils import _pytree as pytree

    import graphcomb

    module = program.copy().module().eval().half()
    cast = functools.partial(pytree.tree_map_only, torch.Tensor, lambda t: t.half() if t.is_floating_point() else t)
    return graphcomb.capture(module, cast(program.args), cast(program.kwargs), program.dynamic_shapes)


def present(wanted: list[str] | None) -> dict[str, str]:
    """The engines to measure, and why the others are not, by name ("" for those that are)."""
    import torch

    from graphcomb.graph.errors import GraphcombError
    from graphcomb.runtime.devices.here import local_target
    from graphcomb.runtime.devices.table import NAMES
    from graphcomb.runtime.engines.backends import BACKENDS, backend_module

    found = {}
    for name in wanted or ENGINES:
        try:
            if importlib.util.find_spec(BACKENDS[name].package) is None:
                found[name] = "not installed"
                continue
            module = backend_module(name)
            if not wanted and not torch.cuda.is_available():
                found[name] = "no GPU"
            elif name in NAMES:
                module.library(name)
                local_target(name)
            found.setdefault(name, "")
        except GraphcombError as error:
            found[name] = str(error)
    return found


def engines(
    backend: str, programs: dict[str, Any], batches: list[int], folder: Path
) -> tuple[dict[str, Any], dict[str, float], dict[str, str]]:
    """Engines by variant, their errors, and why some could not be built or compute something else."""
    from graphcomb.graph.errors import GraphcombError

    built, errors, failed = {}, {}, {}
    for name, program in programs.items():
        try:
            engine = opened(name, backend, program, batches, folder)
            try:
                errors[name] = checked(program, engine, min(batches))
            except Exception:
                engine.close()
                raise
            built[name] = engine
        except GraphcombError as error:
            failed[name] = str(error)[:300]
    return built, errors, failed


def opened(name: str, backend: str, program: Any, batches: list[int], folder: Path) -> Any:
    """A variant's engine, ready to run."""
    from graphcomb.runtime import build_engine, export_onnx, load_engine
    from graphcomb.runtime.devices.here import local_target
    from graphcomb.runtime.devices.table import NAMES
    from graphcomb.runtime.engines.backends import BACKENDS
    from graphcomb.runtime.engines.build import open_engine

    if BACKENDS[backend].source == ".pt2":
        return open_engine(half(program), backend)
    path = folder / f"{name.replace(' ', '-').replace(':', '-')}.onnx"
    export_onnx(program, path, "fp16")
    if backend not in NAMES:
        return open_engine(path, backend)
    sizes = (min(batches), min(batches), max(batches))
    file = path.with_suffix(BACKENDS[backend].suffixes[0])
    report = build_engine(path, local_target(backend), file, backend, batch=sizes, sparse=name == "2:4")
    return load_engine(report.path, backend, graphs=True)


def checked(program: Any, engine: Any, batch: int) -> float:
    """The largest error of an engine's outputs, relative to those of the program in fp32, on random images. A time counts
    for nothing where that is not what the network computes: raises Refused for an error above `ALLOWED`."""
    import torch

    from graphcomb.graph.errors import Refused
    from graphcomb.graph.program import flatten_outputs
    from graphcomb.runtime.export.output_error import relative_error
    from graphcomb.runtime.export.parity import feeds

    images = torch.randn(batch, *program.args[0].shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = [t.double().numpy() for t in flatten_outputs(program.copy().module().eval()(images))]
    found = engine.run(feeds(engine, (images,), {}))
    error = max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))
    if not error <= ALLOWED:
        finite = all(np.isfinite(a.astype(np.float64)).all() for a in found)
        raise Refused(f"wrong outputs: error {error:.2g}" if finite else "wrong outputs: not finite")
    return error


def measure(name: str, backend: str, batches: list[int], seconds: float, programs: dict[str, Any]) -> dict:
    """Rows by batch: median milliseconds of each variant, and how many times faster it is than dense."""
    from graphcomb.runtime import bench

    with tempfile.TemporaryDirectory() as folder:
        built, errors, failed = engines(backend, programs, batches, Path(folder))
        row: dict = {
            "failed": failed,
            "errors": errors,
            "macs": {v: p.macs for v, p in programs.items()},
            "batches": {},
        }
        if "dense" not in built:
            return row
        shape = programs["dense"].args[0].shape[1:]
        for batch in batches:
            inputs = [np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)]
            found = bench(list(built.values()), inputs, names=list(built), seconds=seconds)
            row["batches"][str(batch)] = {
                timing.name: {"ms": timing.ms, "ratio": found.ratios.get(timing.name)} for timing in found.timings
            }
            row["note"] = found.note
            row["environment"] = found.environment
        for engine in built.values():
            engine.close()
    return row


def compressed(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The variants of a network, and the reasons of those that are refused."""
    import torch

    import graphcomb
    from graphcomb.graph.errors import GraphcombError
    from graphcomb.passes import Fuse
    from graphcomb.passes.base import Context
    from graphcomb.runtime import get_target

    model, shape = network(name)
    images = torch.randn(2, *shape)
    program = graphcomb.capture(model, (images,), dynamic_shapes="batch")
    context = Context(data=[images], target=get_target("h100"), dtype="fp16")
    found, refused = {}, {}
    for variant, step in variants().items():
        try:
            smaller = step(program, context).program if step else program
            found[variant] = Fuse()(smaller, context).program if variant != "2:4" else smaller
        except GraphcombError as error:
            refused[variant] = str(error)[:300]
    return found, refused


def table(data: dict) -> str:
    """The results as Markdown."""
    lines = [f"# GPU\n\n{(__doc__ or '').split(chr(10) * 2)[2].strip()}\n\n{data['environment']}.\n"]
    names = ["dense", "channels 2x", "channels 4x", "depth", "2:4"]
    lines.append("| network | engine | batch | dense, ms | " + " | ".join(names[1:]) + " |")
    lines.append("| --- " * (4 + len(names) - 1) + "|")
    for key, row in data["rows"].items():
        network, engine = key.split(" ")
        for batch, found in row["batches"].items():
            cells = []
            for name in names[1:]:
                ratio = (found.get(name) or {}).get("ratio")
                fewer = row["macs"]["dense"] / row["macs"][name] if name in row["macs"] else None
                cells.append(f"{ratio['median']:.2f}x faster, {fewer:.2f}x fewer MACs" if ratio and fewer else "")
            dense = found["dense"]["ms"].get("median")
            first = f"{dense:.3f}" if dense is not None else "no figure"
            lines.append(f"| {network} | {engine} | {batch} | {first} | " + " | ".join(cells) + " |")
        for variant, why in {**row["failed"], **row.get("refused", {})}.items():
            lines.append(f"| {network} | {engine} | | | {variant}: {why.replace('|', '/')} |" + " |" * (len(names) - 2))
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument(
        "--engines", nargs="+", default=None, metavar="NAME", help="default: every one that is installed"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=20, help="time limit of one comparison")
    parser.add_argument("--again", action="store_true", help="measure anew what has a result")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = present(options.engines)
    usable = [name for name, why in found.items() if not why]
    for name, why in found.items():
        print(f"{name}: {why or 'will be measured'}")
    if not usable:
        print("nothing to measure: this takes an NVIDIA GPU with CUDA, and at least one of " + ", ".join(ENGINES))
        return 0
    data = json.loads(options.results.read_text()) if options.results.exists() else {"rows": {}}
    data["environment"] = environment()
    for name in options.only:
        missing = [e for e in usable if options.again or f"{name} {e}" not in data["rows"]]
        if not missing:
            continue
        programs, refused = compressed(name)
        for engine in missing:
            row = measure(name, engine, options.batches, options.seconds, programs)
            data["rows"][f"{name} {engine}"] = {"commit": revision(), "refused": refused} | row
            save(options.results, data)
            print(f"{name}, {engine}: {json.dumps(row['failed']) if row['failed'] else 'measured'}", flush=True)
    write(options.results.with_suffix(".md"), table(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
