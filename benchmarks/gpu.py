"""Measure dense and compressed networks on this machine's GPU with every engine that is installed.

    make bench-gpu                               # or: python benchmarks/gpu.py [--only resnet50] [--batches 1 8]

First of all what Torch-Pruning publishes for ViT-B/16 on an A5000, in eager PyTorch: its row, its pruned network here (if it
is installed), and networks of as few MACs by graphcomb, with channels or whole blocks removed. Then every network, with
its channels pruned to half and a quarter of its MACs, its depth pruned, and 2:4 sparse, in fp16 and bf16, at batch 1, 8 and
32. Networks have random weights, since only time is measured; nothing here says how accurate they are.

A step is one compressed network in one engine, which takes turns with the dense one. Inputs are on the device, and engines
run as CUDA graphs if they support it. An engine whose outputs differ from the network's is not measured, and a step that
takes more than a minute is given up. Results go to benchmarks/results/gpu.json and gpu.md after every step. No step begins
after nine minutes (--minutes); the next run does the others. Without a GPU nothing is measured; `--engines eager
onnxruntime` tests the script on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import revision, save, write

RESULTS = Path(__file__).parent / "results"
NETWORKS = ("resnet50", "convnext_tiny", "vit_b_16", "swin_t", "segformer_b0")
EAGER = "eager"  # PyTorch as it is, without a compiler
ENGINES = ("tensorrt", "tensorrt_rtx", "torch_tensorrt", "inductor")
TENSORRT = ("tensorrt", "tensorrt_rtx")  # both need a local GPU and take a range of batch sizes
PRECISIONS = ("fp16", "bf16")
BATCHES = (1, 8, 32)
ALLOWED = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.2}  # error of an engine's outputs, relative to the largest one in fp32
STEP_SECONDS = 60
TRIES = 2  # how often a step is begun whose process ends within it
# Source: Torch-Pruning, examples/transformers/readme.md, "Group Taylor (Uniform)": MACs, and milliseconds in eager PyTorch.
PUBLISHED = {
    "network": "timm vit_base_patch16_224", "engine": EAGER, "precision": "fp32", "batch": 1, "device": "A5000",
    "macs": [17.59e9, 4.61e9], "ms": [5.21, 3.99],
}  # fmt: skip
FIRST = str(PUBLISHED["network"])
RIVAL = "torch-pruning"


@dataclass(frozen=True)
class Step:
    """One variant of a network in one engine."""

    network: str
    engine: str
    precision: str
    variant: str

    @property
    def key(self) -> str:
        return " | ".join((self.network, self.engine, self.precision, self.variant))


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
    if name.startswith("timm "):
        import timm

        return timm.create_model(name.removeprefix("timm ")).eval(), (3, 224, 224)
    from torchvision import models

    return models.get_model(name, weights=None).eval(), (3, 224, 224)


def variants(name: str) -> dict[str, Any]:
    """Passes by name, None for what Torch-Pruning does. What is kept is chosen in the cheapest way: the time does not depend
    on it."""
    from graphcomb.passes import Distill, RemoveChannels, Sparsify
    from graphcomb.passes.depth.prune_depth import ablated

    depth = functools.partial(ablated(search=False, fading=False), supernet_steps=0, train=Distill(epochs=1, lr=1e-6))
    if name == FIRST:
        share = PUBLISHED["macs"][1] / PUBLISHED["macs"][0]
        return {RIVAL: None, "channels": RemoveChannels(macs=share), "depth": depth(macs=share)}
    return {
        "channels 2x": RemoveChannels(macs=0.5),
        "channels 4x": RemoveChannels(macs=0.25),
        "depth": depth(macs=0.7),
        "2:4": Sparsify(pattern="2:4", method="magnitude"),
    }


def steps(names: list[str], usable: list[str], precisions: list[str], eager: bool) -> list[Step]:
    """The steps in the order in which they are worth most. eager: whether PyTorch itself is measured, too."""
    first = [Step(FIRST, EAGER, "fp32", variant) for variant in variants(FIRST)] if eager and FIRST in names else []
    return first + [
        Step(name, engine, precision, variant)
        for precision in precisions
        for engine in usable
        for name in names
        for variant in variants(name)
    ]


# ------------------------------------------------------------------------------------------------- compressed networks
class Programs:
    """The programs of one network, made when they are asked for."""

    def __init__(self, name: str):
        import torch

        import graphcomb

        self.name = name
        self._model, shape = network(name)
        self._images = torch.randn(2, *shape)
        self._capture: Callable[[Any], Any] = lambda m: graphcomb.capture(m, (self._images,), dynamic_shapes="batch")
        self._made: dict[str, Any] = {"dense": self._capture(self._model)}

    def __getitem__(self, variant: str) -> Any:
        if variant not in self._made:
            self._made[variant] = self._make(variant)
        return self._made[variant]

    def macs(self, variant: str) -> float:
        """Multiply-accumulates of one image."""
        return self[variant].macs / len(self._images)

    def _make(self, variant: str) -> Any:
        from graphcomb.passes import Fuse
        from graphcomb.passes.base import Context
        from graphcomb.runtime import get_target

        step = variants(self.name)[variant]
        if step is None:
            return self._capture(rival(self._model, self._images[:1]))
        context = Context(data=[self._images], target=get_target("h100"), dtype="fp16")
        smaller = step(self["dense"], context).program
        return smaller if variant == "2:4" else Fuse()(smaller, context).program


def rival(model, image):
    """A vision transformer of timm with half of its width, head width and hidden units, by Torch-Pruning alone, as its
    example prunes uniformly. Raises Refused if it is not installed."""
    from graphcomb.graph.errors import Refused

    if importlib.util.find_spec("torch_pruning") is None:
        raise Refused("torch-pruning is not installed")
    import torch_pruning as tp

    model = copy.deepcopy(model)
    attentions = [m for m in model.modules() if hasattr(m, "qkv")]
    pruner = tp.pruner.BasePruner(
        model, image, importance=tp.importance.GroupMagnitudeImportance(p=1), global_pruning=False, pruning_ratio=0.5,
        ignored_layers=[model.head], num_heads={m.qkv: m.num_heads for m in attentions}, prune_head_dims=True, round_to=2,
    )  # fmt: skip
    pruner.step()
    for m in attentions:
        m.num_heads = pruner.num_heads[m.qkv]
        m.attn_dim = m.qkv.out_features // 3
        m.head_dim = m.attn_dim // m.num_heads
    return model


def cast(program, precision: str):
    """The program in fp16 or bf16, for the engines that run programs."""
    import torch
    from torch.utils import _pytree as pytree

    import graphcomb

    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    module = program.copy().module().eval().to(kind)
    changed = functools.partial(
        pytree.tree_map_only, torch.Tensor, lambda t: t.to(kind) if t.is_floating_point() else t
    )
    return graphcomb.capture(module, changed(program.args), changed(program.kwargs), program.dynamic_shapes)


# ------------------------------------------------------------------------------------------------------------- engines
def present(wanted: list[str] | None) -> dict[str, str]:
    """The engines to measure, and why the others are not, by name ("" for those that are)."""
    import torch

    from graphcomb.graph.errors import GraphcombError
    from graphcomb.runtime.devices.here import local_target
    from graphcomb.runtime.engines.backends import BACKENDS, backend_module

    found = {}
    for name in wanted or (EAGER, *ENGINES):
        try:
            if not wanted and not torch.cuda.is_available():
                found[name] = "no GPU"
                continue
            if name != EAGER and importlib.util.find_spec(BACKENDS[name].package) is None:
                found[name] = "not installed"
                continue
            if name in TENSORRT:
                backend_module(name).library(name)
                local_target(name)
            found[name] = ""
        except GraphcombError as error:
            found[name] = str(error)
    return found


def opened(step: Step, program: Any, batches: list[int], folder: Path) -> Any:
    """The engine of a program, ready to run."""
    import torch

    from graphcomb.runtime import build_engine, export_onnx, load_engine
    from graphcomb.runtime.devices.here import local_target
    from graphcomb.runtime.engines.backends import BACKENDS
    from graphcomb.runtime.engines.build import open_engine
    from graphcomb.runtime.engines.torch.base import TorchEngine, on_leaves, specs

    if step.engine == EAGER:
        program = cast(program, step.precision)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return TorchEngine(on_leaves(program, program.module().eval().to(device)), *specs(program), device)
    if BACKENDS[step.engine].source == ".pt2":
        return open_engine(cast(program, step.precision), step.engine)
    path = folder / f"{step.variant.replace(' ', '-').replace(':', '-')}.onnx"
    export_onnx(program, path, step.precision)
    if step.engine not in TENSORRT:
        return open_engine(path, step.engine)
    sizes = (min(batches), min(batches), max(batches))
    file = path.with_suffix(BACKENDS[step.engine].suffixes[0])
    target = local_target(step.engine)
    report = build_engine(path, target, file, step.engine, batch=sizes, sparse=step.variant == "2:4")
    return load_engine(report.path, step.engine, graphs=True)


def checked(program: Any, engine: Any, batch: int, allowed: float) -> float:
    """The largest error of an engine's outputs, relative to those of the program in fp32, on random images. A time counts
    for nothing where that is not what the network computes: raises Refused for an error above `allowed`."""
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
    if not error <= allowed:
        finite = all(np.isfinite(a.astype(np.float64)).all() for a in found)
        raise Refused(f"wrong outputs: error {error:.2g}" if finite else "wrong outputs: not finite")
    return error


# ----------------------------------------------------------------------------------------------------------- measuring
@dataclass
class Bench:
    """What one step leaves for the next: the programs of a network, and its dense engine."""

    batches: list[int]
    seconds: float
    folder: Path
    programs: Any = None
    dense: Any = None
    of: tuple[str, ...] = ()
    errors: dict[str, float] = field(default_factory=dict)

    def measure(self, step: Step) -> dict[str, Any]:
        """Return the row of one step: MACs and errors of both networks, and by batch their median milliseconds and how many
        times faster the smaller one is; or why there is none."""
        from graphcomb.graph.errors import GraphcombError
        from graphcomb.runtime import bench

        engine = None
        try:
            if self.programs is None or self.programs.name != step.network:
                self.close()
                self.programs = Programs(step.network)
            program = self.programs[step.variant]
            if self.of != (step.network, step.engine, step.precision):
                self.close()
                dense = Step(step.network, step.engine, step.precision, "dense")
                self.dense, self.errors["dense"] = self._checked(dense, self.programs["dense"])
                self.of = (step.network, step.engine, step.precision)
            engine, error = self._checked(step, program)
            row: dict[str, Any] = {
                "macs": [self.programs.macs("dense"), self.programs.macs(step.variant)],
                "errors": [self.errors["dense"], error],
                "batches": {},
            }
            shape = program.args[0].shape[1:]
            for batch in self.batches:
                images = [np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)]
                found = bench([self.dense, engine], images, names=["dense", step.variant], seconds=self.seconds)
                ms = [timing.ms.get("median") for timing in found.timings]
                row["batches"][str(batch)] = {"ms": ms, "ratio": found.ratios[step.variant], "note": found.note}
            return row
        except GraphcombError as error:
            return {"why": str(error)[:300]}
        except RuntimeError as error:  # the GPU's memory, or a library's own
            return {"why": f"{type(error).__name__}: {str(error)[:300]}"}
        finally:
            if engine is not None:
                engine.close()

    def _checked(self, step: Step, program: Any) -> tuple[Any, float]:
        engine = opened(step, program, self.batches, self.folder)
        try:
            return engine, checked(program, engine, min(self.batches), ALLOWED[step.precision])
        except BaseException:
            engine.close()
            raise

    def close(self) -> None:
        if self.dense is not None:
            self.dense.close()
        self.dense, self.of = None, ()
        gc.collect()


class TooLong(BaseException):
    """A step has taken more than its time. No library catches it as an error of its own."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TooLong if the block takes longer."""

    within = True

    def end(*_: Any) -> None:
        if within:
            raise TooLong(f"it took more than {seconds:g} s")

    signal.signal(signal.SIGALRM, end)  # never the default again: an alarm that is late would end the process
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        within = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def run(todo: list[Step], bench: Bench, data: dict, results: Path, minutes: float, limit: float) -> int:
    """Take the steps that have no row yet, and return how many are left when the time is over.

    A step is noted before it begins: one whose process ends within it `TRIES` times is not begun again.
    """
    start = time.monotonic()
    missing = [step for step in todo if step.key not in data["rows"]]
    for index, step in enumerate(missing):
        if time.monotonic() - start > 60 * minutes:
            return len(missing) - index
        begun = data["begun"].get(step.key, 0)
        if begun >= TRIES:
            row: dict[str, Any] = {"why": f"the process ended {begun} times in this step"}
        else:
            data["begun"][step.key] = begun + 1
            save(results, data, sort_keys=False)
            at = time.monotonic()
            try:
                with limited(limit):
                    row = bench.measure(step)
            except TooLong as error:
                bench.close()
                row = {"why": str(error)}
            row["seconds"] = round(time.monotonic() - at, 1)
        data["begun"].pop(step.key, None)
        data["rows"][step.key] = {**vars(step), "commit": revision(), **row}
        save(results, data, sort_keys=False)
        write(results.with_suffix(".md"), table(data, todo))
        print(f"{step.key}: {row.get('why') or 'measured'}", flush=True)
    return 0


# --------------------------------------------------------------------------------------------------------------- results
def table(data: dict, todo: list[Step]) -> str:
    """The results as Markdown, in the order of the steps; rows of other steps come last."""
    paragraphs = (__doc__ or "").split("\n\n")[2:4]
    about = data["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = ["# GPU\n", *(f"{text.strip()}\n" for text in paragraphs), f"{about['gpu'] or about['cpu']}; {versions}.\n"]
    lines.append("| network | engine | batch | compressed by | GMACs | ms | times faster (95 %) | error |")
    lines.append("| --- " * 8 + "|")
    dense, smaller = PUBLISHED["ms"]
    published = f"{RIVAL}, published for an {PUBLISHED['device']}"
    lines.append(
        _line(FIRST, f"{EAGER} fp32", PUBLISHED["batch"], published, PUBLISHED["macs"], [dense, smaller])
        + f" {dense / smaller:.2f} | |"
    )
    order = {step.key: i for i, step in enumerate(todo)}
    for key in sorted(data["rows"], key=lambda key: order.get(key, len(order))):
        row = data["rows"][key]
        engine = f"{row['engine']} {row['precision']}"
        if "why" in row:
            why = " ".join(row["why"].split()).replace("|", "/")
            lines.append(f"| {row['network']} | {engine} | | {row['variant']} | | | {why} | |")
            continue
        for batch, found in row["batches"].items():
            ratio = found["ratio"]
            text = "{median:.2f}".format(**ratio) if ratio else found["note"].replace("|", "/")
            text += " ({low:.2f} to {high:.2f})".format(**ratio) if ratio and "low" in ratio else ""
            first = _line(row["network"], engine, batch, row["variant"], row["macs"], found["ms"])
            lines.append(f"{first} {text} | {row['errors'][1]:.1e} |")
    return "\n".join(lines) + "\n"


def _line(name: str, engine: str, batch: Any, variant: str, macs: list[float], ms: list[float | None]) -> str:
    times = " to ".join("?" if value is None else f"{value:.3g}" for value in ms)
    return f"| {name} | {engine} | {batch} | {variant} | {macs[0] / 1e9:.3g} to {macs[1] / 1e9:.3g} | {times} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (FIRST, *NETWORKS)
    parser.add_argument("--only", nargs="+", default=list(names), choices=names)
    parser.add_argument(
        "--engines", nargs="+", default=None, metavar="NAME", help="default: every one that is installed"
    )
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=5, help="time limit of one comparison at one batch")
    parser.add_argument("--minutes", type=float, default=9, help="no step begins after them")
    parser.add_argument("--step-seconds", type=float, default=STEP_SECONDS, help="time limit of one step")
    parser.add_argument("--again", action="store_true", help="measure anew what has a result")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    found = present(options.engines)
    usable = [name for name, why in found.items() if not why]
    for name, why in found.items():
        print(f"{name}: {why or 'will be measured'}")
    if not usable:
        print("nothing to measure: this takes an NVIDIA GPU with CUDA, and at least one of " + ", ".join(ENGINES))
        return 0
    import torch

    from graphcomb.runtime.measure.environment import environment

    if (
        torch.cuda.is_available()
    ):  # networks are compressed on the processor; on a CPU the engines are measured with one thread
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    about = environment()
    data: dict = {"rows": {}, "begun": {}}
    if options.results.exists():
        data = json.loads(options.results.read_text())
        if data["environment"]["gpu"] != about["gpu"] or data["environment"]["cpu"] != about["cpu"]:
            raise SystemExit(
                f"{options.results}: of {data['environment']['gpu'] or data['environment']['cpu']}; give --results"
            )
    data["environment"] = about
    todo = steps(options.only, [e for e in usable if e != EAGER], options.precisions, EAGER in usable)
    if options.again:
        for step in todo:
            data["rows"].pop(step.key, None)
            data["begun"].pop(step.key, None)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.batches, options.seconds, Path(folder))
        try:
            left = run(todo, bench, data, options.results, options.minutes, options.step_seconds)
        finally:
            bench.close()
    print(
        f"{left} of {len(todo)} steps are left; run it again" if left else f"see {options.results.with_suffix('.md')}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
