"""Running a recipe: model and data in, compressed program, ONNX, engines, measurements and report out."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import runtime
from .data import cache_folder
from .graph.errors import BadInput, CaptureError, GraphcombError
from .graph.program import Program, capture
from .passes.base import Context
from .passes.batches import Feed, split_batch
from .pipeline import Pipeline, PipelineResult, is_main, write_json
from .recipe import Input, Recipe
from .runtime.engine import backend_module
from .runtime.latency import LatencyTable
from .runtime.measured import are_results
from .runtime.roofline import Roofline
from .runtime.targets import Target, get_target
from .sources import first_batch, load_data, load_model, resolve

DEFAULT_SHAPE = [1, 3, 224, 224]
BENCH_SECONDS = 30.0  # at most; an undisturbed machine needs far fewer


@dataclass
class Job:
    """What a recipe stands for, loaded and checked: everything a pipeline needs. val is None without labels."""

    recipe: Recipe
    program: Program
    target: Target
    train: Any = None
    val: Any = None
    loss: Any = None
    metric: Any = None
    latency: Any = None

    def context(self, progress: bool = False) -> Context:
        """The context in which a single pass of the recipe would run."""
        return Context(
            data=self.train, val=self.val, loss=self.loss, metric=self.metric, target=self.target,
            dtype=self.recipe.precision, teacher=self.program, seed=self.recipe.seed, progress=progress,
            latency=self.latency,
        )  # fmt: skip


def prepare(recipe: Recipe) -> Job:
    """Load and capture the model, load the data, and check that all of it fits together; nothing is written.

    Raises GraphcombError naming the field: a target that is not known, a library that is not installed, a model that
    cannot be imported or captured, data that the model does not take.
    """
    target = get_target(recipe.target)
    for i, name in enumerate(recipe.outputs.engines):
        try:
            backend_module(get_target(name).backend)
        except GraphcombError as error:
            raise type(error)(f"outputs.engines.{i}: {error}") from error
    torch.manual_seed(recipe.seed)
    model = load_model(recipe.model.source, recipe.model.arguments)
    train, val, batch = _data(recipe)
    if isinstance(model, Program):
        if recipe.inputs or recipe.dynamic_batch is not None:
            raise BadInput("inputs, dynamic_batch: a captured program has its own, remove the fields")
        program = model
    else:
        program = _capture(model, recipe, batch)
    if batch is not None:
        Feed(program, "data").fit(batch)
        if Feed(program, "validation data").fit(first_batch(val)).labels is None:
            val = None
    loss = resolve(recipe.loss, "loss") if recipe.loss else None
    metric = resolve(recipe.metric, "metric") if recipe.metric else None
    return Job(recipe, program, target, train, val, loss, metric, _latency(recipe, target))


def run(
    recipe: Recipe,
    out: str | Path,
    plan: list[dict[str, Any]] | None = None,
    progress: bool = False,
    fresh: bool = False,
) -> dict[str, Any]:
    """Run a recipe and write its outputs to the folder `out`; returns what summary.json holds.

    Finished passes found in `out` are taken over when nothing they depend on has changed, unless fresh is set. Under
    `accelerate launch` all processes run the passes, and the main one does the rest.
    """
    out, start = Path(out), time.perf_counter()
    check_folder(out)
    job = prepare(recipe)
    progress = progress and is_main()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be made ({error.strerror})") from error
    if is_main():
        (out / "summary.json").unlink(missing_ok=True)
    result = Pipeline(recipe.passes).run(
        job.program, job.train, job.val, job.loss, job.metric, job.target, recipe.precision,
        seed=recipe.seed, out=out, progress=progress, plan={"groups": plan} if plan else None, key=recipe.key(),
        resume=not fresh, latency=job.latency,
    )  # fmt: skip
    summary = _summary(job, result)
    if not is_main():
        return summary
    wanted, files = recipe.outputs, summary["files"]
    if wanted.pt2:
        files["pt2"] = str(result.program.save(out / "model.pt2"))
    if wanted.onnx or wanted.engines or wanted.bench:
        summary |= _lower(job, result.program, out, progress)
        files["onnx"] = [report["path"] for report in summary["onnx"].values()]
        files["engines"] = [report["path"] for report in summary["engines"]]
    if wanted.bench:
        summary |= _bench(job.program, out, progress)
    summary |= _predict(job, result.program, summary)
    summary["seconds"] = round(time.perf_counter() - start, 1)
    if wanted.report:
        files["report"] = str(out / "report.html")
        runtime.write_report(summary, out / "report.html")
    write_json(out / "summary.json", summary, indent=2)
    return summary


def _latency(recipe: Recipe, target: Target) -> LatencyTable | Roofline | None:
    """What predicts latencies; a table, which takes measurements, only when a pass asks for it."""
    asked = any(getattr(pass_, "latency", None) is not None for pass_ in recipe.passes)
    name = recipe.latency_table
    try:
        if name == "roofline":
            return Roofline(target, recipe.precision)
        if name is not None and are_results(name):
            return Roofline.calibrated(name, target, recipe.precision)
        return LatencyTable(name or cache_folder() / f"latency-{target.name}.json", target) if asked else None
    except BadInput as error:
        raise BadInput(f"latency_table: {error}") from error


def check_folder(out: Path) -> None:
    """Raise BadInput when the folder cannot be made or written; makes nothing."""
    found = out.absolute()
    while not found.exists() and found != found.parent:
        found = found.parent
    if not found.is_dir():
        raise BadInput(f"--out {out}: {found} is not a folder")
    if not os.access(found, os.W_OK | os.X_OK):
        raise BadInput(f"--out {out}: no permission to write in {found}")


def example(inputs: list[Input], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Example inputs: Gaussian noise for floats, zeros for integers and booleans."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for wanted in inputs:
        dtype = getattr(torch, wanted.dtype)
        noise = torch.randn(wanted.shape, generator=generator)
        result.append(noise.to(dtype) if dtype.is_floating_point else torch.zeros(wanted.shape, dtype=dtype))
    return tuple(result)


def _data(recipe: Recipe) -> tuple[Any, Any, Any]:
    """Training and validation loaders and the first training batch; Nones without data."""
    if recipe.data is None:
        return None, None, None
    arguments = dict(recipe.data.arguments)
    if recipe.data.source == "random" and recipe.inputs:
        arguments.setdefault("shape", recipe.inputs[0].shape[1:])
    train, val = load_data(recipe.data.source, arguments)
    return train, val, first_batch(train)


def _capture(model: torch.nn.Module, recipe: Recipe, batch: Any) -> Program:
    kwargs: dict[str, Any] = {}
    if recipe.inputs:
        args = example(recipe.inputs, recipe.seed)
    elif batch is not None:
        args, kwargs, _ = split_batch(batch)
    else:
        args = example([Input(shape=DEFAULT_SHAPE)], recipe.seed)
    dynamic = batch is not None if recipe.dynamic_batch is None else recipe.dynamic_batch
    if batch is not None and not recipe.inputs and dynamic:
        args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t[:2], (args, kwargs))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch.export prints the graph it gives up on
            return capture(model, args, kwargs, "batch" if dynamic else None)
    except CaptureError as error:
        shapes = ", ".join(str(tuple(a.shape)) for a in [*args, *kwargs.values()] if isinstance(a, torch.Tensor))
        raise CaptureError(f"model: {recipe.model.source} with inputs {shapes}: {error}") from error


def _summary(job: Job, result: PipelineResult) -> dict[str, Any]:
    """The part of the summary that needs no runtime."""
    before, after = job.program.cost(), result.program.cost()
    predicted = [r["latency"]["predicted"] for r in result.records if "latency" in r]
    return {
        "model": job.recipe.model.source,
        "target": job.target.name,
        "precision": job.recipe.precision,
        "accuracy_before": result.accuracy_before,
        "accuracy_after": result.accuracy_after,
        "macs_ratio": None if "unknown" in before | after else before["macs"] / max(after["macs"], 1),
        "params_ratio": before["params"] / max(after["params"], 1),
        "latency_ratio": None,
        "latency_predicted": predicted[0]["before"] / predicted[-1]["after"] if predicted else None,
        "surgery_error": result.surgery_error,
        "onnx_parity": None,
        "engine": None,
        "files": {},
        "cost": {"before": before, "after": after},
        "inputs": [list(a.shape) for a in job.program.args if isinstance(a, torch.Tensor)],
        "passes": [{k: v for k, v in record.items() if k != "removed"} for record in result.records],
        "environment": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "torch": torch.__version__,
            "graphcomb": version("graphcomb"),
        },
    }


def _lower(job: Job, program: Program, out: Path, progress: bool) -> dict[str, Any]:
    """model.onnx in fp32, model.fp16.onnx when asked for, and the engines, built from the recipe's precision."""
    say = Console(quiet=not progress, markup=False, emoji=False).print
    paths, reports = {}, {}
    for precision in dict.fromkeys(("fp32", job.recipe.precision)):
        say(f"ONNX {precision} ...")
        paths[precision] = out / ("model.onnx" if precision == "fp32" else f"model.{precision}.onnx")
        reports[precision] = runtime.export_onnx(
            program, paths[precision], precision, target=job.target, progress=progress
        )
    engines = []
    for name in job.recipe.outputs.engines:
        say(f"engine for {name} ...")
        engines.append(runtime.build_engine(paths[job.recipe.precision], name))
    return {
        "onnx": {p: r.to_dict() for p, r in reports.items()},
        **{"onnx_parity" if p == "fp32" else f"onnx_parity_{p}": r.parity for p, r in reports.items()},
        "engines": [e.to_dict() for e in engines],
        "engine": str(engines[0].path) if engines else None,
    }


def _bench(dense: Program, out: Path, progress: bool) -> dict[str, Any]:
    """Dense against compressed in ONNX Runtime, fp32, paired."""
    runtime.export_onnx(dense, out / "dense.onnx", "fp32")
    files = [out / "dense.onnx", out / "model.onnx"]
    found = runtime.bench(files, names=["dense", "compressed"], seconds=BENCH_SECONDS, progress=progress)
    return {"bench": found.to_dict(), "latency_ratio": found.ratio}


def _predict(job: Job, compressed: Program, summary: dict[str, Any]) -> dict[str, Any]:
    """Predicted time of the dense and the compressed program, layer by layer, and how far off it is where the target itself
    was measured: with ONNX Runtime, in fp32."""
    try:
        programs = {"before": job.program, "after": compressed}
        found = runtime.predict(programs, job.target, job.recipe.precision, job.latency)
    except GraphcombError as error:
        return {"prediction": None, "prediction_note": str(error)}
    bench = summary.get("bench")
    if bench and not bench["note"] and job.target.backend == "onnxruntime" and job.recipe.precision == "fp32":
        times = [timing["ms"]["median"] for timing in bench["timings"]]
        found["measured_ms"] = dict(zip(programs, times, strict=True))
        found["error"] = {k: found["ms"][k] / ms - 1 for k, ms in found["measured_ms"].items()}
    return {"prediction": found}
