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
from .graph.compat import pytree
from .graph.errors import BadInput, CaptureError, GraphcombError
from .graph.program import Program, capture
from .passes.base import Context
from .passes.batch import adapted, split_batch
from .passes.common.feed import Feed
from .passes.quantize import Quantize
from .pipeline import Pipeline, PipelineResult, is_main, write_json
from .recipe import Input, Recipe
from .runtime.devices.table import Target, get_target
from .runtime.engines.base import backend_module, check_options, known_options
from .runtime.engines.dla import dla_core
from .runtime.export.opset import LOWEST, choose_opset
from .runtime.export.parity import SAMPLES
from .runtime.predict.measured import are_results
from .runtime.predict.roofline import Roofline
from .runtime.predict.table import LatencyTable
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
    _check_outputs(recipe)
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


def _check_outputs(recipe: Recipe) -> None:
    """Raise what building the engines would, as far as it can be told before anything is trained."""
    quantised = any(isinstance(pass_, Quantize) for pass_ in recipe.passes)
    for i, engine in enumerate(recipe.outputs.engines):
        try:
            device = get_target(engine.target)
            check_options(backend_module(device.backend).build, engine.options(), device.backend)
            if engine.dla is not None:
                dla_core(device, engine.dla, "int8" if quantised else recipe.precision, quantised)
        except GraphcombError as error:
            raise type(error)(f"outputs.engines.{i}: {error}") from error
    lowest = min(_targets(recipe), key=lambda target: target.opset)
    if recipe.outputs.opset is not None and not LOWEST <= recipe.outputs.opset <= lowest.opset:
        limits = f"{LOWEST} is the lowest, and target {lowest.name} parses up to {lowest.opset}"
        raise BadInput(f"outputs.opset: {recipe.outputs.opset}: {limits}")
    if recipe.outputs.keep_fp32 and recipe.precision == "fp32":
        raise BadInput("outputs.keep_fp32: is for precision fp16")


def _targets(recipe: Recipe) -> list[Target]:
    """All that the run's ONNX files are for, the run's own target first."""
    return [get_target(name) for name in (recipe.target, *(engine.target for engine in recipe.outputs.engines))]


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
        summary |= _bench(job, out, progress)
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
        if not asked:
            return None
        kind = "" if recipe.precision == "fp32" else f"-{recipe.precision}"
        file = name or cache_folder() / f"latency-{target.name}{kind}.json"
        return LatencyTable(file, target, precision=recipe.precision)
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
    splits = [
        resolve(name, f"data.{key}") if name else None
        for key, name in (("inputs", recipe.data.inputs), ("labels", recipe.data.labels))
    ]
    train, val = (adapted(loader, *splits) for loader in load_data(recipe.data.source, arguments))
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
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t[:2], (args, kwargs))
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
        "metric": result.metric,
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
    say, wanted = Console(quiet=not progress, markup=False, emoji=False).print, job.recipe.outputs
    opset, data = _opset(job.recipe, program), _samples(job, program)
    paths, reports = {}, {}
    for precision in dict.fromkeys(("fp32", job.recipe.precision)):
        say(f"ONNX {precision} ...")
        paths[precision] = out / ("model.onnx" if precision == "fp32" else f"model.{precision}.onnx")
        half = precision == "fp16"
        reports[precision] = runtime.export_onnx(
            program, paths[precision], precision, opset, job.target,
            tolerance=wanted.tolerance if precision == job.recipe.precision else None,
            keep_fp32=wanted.keep_fp32 if half else (), keep_io_types=half and wanted.keep_io_types,
            progress=progress, data=data,
        )  # fmt: skip
    engines = []
    pattern = any(weight.pattern == "2:4" for weight in reports[job.recipe.precision].sparse)
    for engine in wanted.engines:
        say(f"engine for {engine.target} ...")
        device, options = get_target(engine.target), engine.options()
        if pattern and "sparse" in known_options(backend_module(device.backend).build):
            options = {"sparse": True} | options
        engines.append(runtime.build_engine(paths[job.recipe.precision], device, **options))
    return {
        "onnx": {p: r.to_dict() for p, r in reports.items()},
        **{"onnx_parity" if p == "fp32" else f"onnx_parity_{p}": r.parity for p, r in reports.items()},
        "engines": [e.to_dict() for e in engines],
        "engine": str(engines[0].path) if engines else None,
    }


def _opset(recipe: Recipe, program: Program) -> int:
    """The opset of the run's ONNX files: what is asked for, or the best that all of its targets parse."""
    return min(choose_opset(program, target, recipe.outputs.opset) for target in _targets(recipe))


def _samples(job: Job, program: Program) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Some real inputs, those that nothing was trained on where there are any."""
    data = job.val if job.val is not None else job.train
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    count = 0
    for batch in Feed(program).batches(data) if data is not None else ():
        found.append((batch.args, batch.kwargs))
        count += batch.size
        if count >= SAMPLES:
            break
    return found


def _bench(job: Job, out: Path, progress: bool) -> dict[str, Any]:
    """Dense against compressed in ONNX Runtime, fp32, paired. The dense file is for the target too, so that a bundle can
    take it there."""
    dense = job.program
    runtime.export_onnx(dense, out / "dense.onnx", "fp32", _opset(job.recipe, dense), job.target)
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
