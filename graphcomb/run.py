"""Run a recipe and write its results: the compressed program, ONNX files, engines, measurements, report and summary."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import runtime
from .graph.errors import BadInput, GraphcombError
from .graph.files import finite, write_json
from .graph.program import Program
from .job import Job, prepare, targets_of
from .passes.common.feed import Feed
from .pipeline import Pipeline, PipelineResult
from .recipe import Recipe
from .runtime.devices.table import get_target
from .runtime.engines.backends import takes
from .runtime.export.opset import choose_opset
from .runtime.export.parity import SAMPLES
from .runtime.formats import read
from .runtime.summary import Summary
from .store import is_main

BENCH_SECONDS = 30.0  # time limit of the measurement; an undisturbed machine needs much less


def run(
    recipe: Recipe,
    out: str | Path,
    plan: list[dict[str, Any]] | Callable[[Job], Recipe] | None = None,
    progress: bool = False,
    fresh: bool = False,
    planned: dict[str, Any] | None = None,
) -> Summary:
    """Run a recipe and write its outputs to the folder `out`; returns what summary.json holds.

    plan: sizes of groups for the recipe's RemoveChannels; or what gives a recipe with other passes, once the model is
    there. planned: the figures of a tuned plan (`Plan.figures`), for the summary.

    Finished passes found in `out` are taken over when nothing they depend on has changed, unless fresh is set. Under
    `accelerate launch` all processes run the passes, and the main one does the rest.
    """
    out, start = Path(out), time.perf_counter()
    check_folder(out)
    job = prepare(recipe)
    rows = None if callable(plan) else plan
    if callable(plan):
        recipe = job.recipe = plan(job)
    progress = progress and is_main()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be made ({error.strerror})") from error
    if is_main():
        (out / "summary.json").unlink(missing_ok=True)
    result = Pipeline(recipe.passes).run(
        job.program, job.context(progress), out=out, plan={"groups": rows} if rows else None, key=recipe.key(),
        resume=not fresh,
    )  # fmt: skip
    values = _summary(job, result) | {"plan": planned}
    if not is_main():
        return read(Summary, values, "summary.json")
    wanted, files = recipe.outputs, values["files"]
    if wanted.pt2:
        files["pt2"] = str(result.program.save(out / "model.pt2"))
    if wanted.onnx or wanted.engines or wanted.bench:
        values |= _lower(job, result.program, out, progress)
        files["onnx"] = [report["path"] for report in values["onnx"].values()]
        files["engines"] = [report["path"] for report in values["engines"]]
    if wanted.bench:
        values |= _bench(job, out, progress)
    values |= _predict(job, result.program, values.get("bench"))
    values["seconds"] = round(time.perf_counter() - start, 1)
    if wanted.report:
        files["report"] = str(out / "report.html")
    summary = read(Summary, values, "summary.json")
    if wanted.report:
        runtime.write_report(summary, out / "report.html")
    write_json(out / "summary.json", finite(summary.to_dict()), indent=2)
    return summary


def check_folder(out: Path) -> None:
    """Raise BadInput if the folder cannot be created or written. Nothing is created."""
    folder = out.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise BadInput(f"--out {out}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(f"--out {out}: no permission to write in {folder}")


def _summary(job: Job, result: PipelineResult) -> dict[str, Any]:
    """Return the fields of the summary that need no export and no measurement."""
    before, after = job.program.cost(), result.program.cost()
    predicted = [r["latency"]["predicted"] for r in result.records if "latency" in r]
    return {
        "model": job.recipe.model.source,
        "target": job.target.name,
        "precision": job.recipe.precision,
        "accuracy_before": result.accuracy_before,
        "accuracy_after": result.accuracy_after,
        "accuracy_interval": result.accuracy_interval and list(result.accuracy_interval),
        "metric": result.metric,
        "macs_ratio": None if "unknown" in before | after else before["macs"] / max(after["macs"], 1),
        "params_ratio": before["params"] / max(after["params"], 1),
        "latency_ratio": None,
        "latency_predicted": predicted[0]["before"] / predicted[-1]["after"] if predicted else None,
        "surgery_error": result.surgery_error,
        "onnx_parity": None,
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
    """Write model.onnx in fp32 and, if the recipe's precision is fp16, model.fp16.onnx; build the engines from the file in
    the recipe's precision. Returns fields of the summary."""
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
        device, options = get_target(engine.target), engine.options.given()
        if pattern and "sparse" in takes(device.backend):
            options = {"sparse": True} | options
        engines.append(runtime.build_engine(paths[job.recipe.precision], device, **options))
    return {
        "onnx": {p: r.to_dict() for p, r in reports.items()},
        **{"onnx_parity" if p == "fp32" else f"onnx_parity_{p}": r.parity for p, r in reports.items()},
        "engines": [e.to_dict() for e in engines],
        "engine": str(engines[0].path) if engines else None,
    }


def _opset(recipe: Recipe, program: Program) -> int:
    """Return the opset of a program's ONNX files: the recipe's, else the lowest of those chosen for its targets."""
    return min(choose_opset(program, target, recipe.outputs.opset) for target in targets_of(recipe))


def _samples(job: Job, program: Program) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return at least `SAMPLES` real inputs, if there are so many, from the validation data or else the training data."""
    data = job.val if job.val is not None else job.train
    samples: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    count = 0
    for batch in Feed(program).batches(data) if data is not None else ():
        samples.append((batch.args, batch.kwargs))
        count += batch.size
        if count >= SAMPLES:
            break
    return samples


def _bench(job: Job, out: Path, progress: bool) -> dict[str, Any]:
    """Measure the dense and the compressed program in turns on this processor, in fp32, with the library of the target if it
    is a processor, else in ONNX Runtime. Returns fields of the summary.

    dense.onnx has an opset that the target parses, so that a bundle can contain the file.
    """
    dense = job.program
    runtime.export_onnx(dense, out / "dense.onnx", "fp32", _opset(job.recipe, dense), job.target)
    files = [out / "dense.onnx", out / "model.onnx"]
    result = runtime.bench(
        files, names=["dense", "compressed"], seconds=BENCH_SECONDS, progress=progress,
        engine=job.target.backend if job.target.processor else None,
    )  # fmt: skip
    return {"bench": result.to_dict(), "latency_ratio": result.ratio}


def _predict(job: Job, compressed: Program, bench: dict[str, Any] | None) -> dict[str, Any]:
    """Predict the latency of the dense and the compressed program, layer by layer. Returns fields of the summary.

    If the measured processor is the target, in fp32, the measured times and the error are added.
    """
    try:
        programs = {"before": job.program, "after": compressed}
        prediction = runtime.predict(programs, job.target, job.recipe.precision, job.latency)
    except GraphcombError as error:
        return {"prediction": None, "prediction_note": str(error)}
    if bench and not bench["note"] and job.target.processor and job.recipe.precision == "fp32":
        times = [timing["ms"]["median"] for timing in bench["timings"]]
        prediction["measured_ms"] = dict(zip(programs, times, strict=True))
        prediction["error"] = {k: prediction["ms"][k] / ms - 1 for k, ms in prediction["measured_ms"].items()}
    return {"prediction": prediction}
