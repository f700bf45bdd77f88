"""`graphcomb bench` and `graphcomb bundle`: measure latency here or on a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..graph.errors import BadInput
from .report import read_run
from .shared.arguments import Quiet, Shapes, read_values
from .shared.output import NO_FIGURE, Interrupted, between, complain, console, pass_gate

if TYPE_CHECKING:
    from ..runtime.report.gate import Ratios
    from ..runtime.summary import Bench


def bench(
    a: Annotated[Path, typer.Argument(metavar="A", help="The reference: an ONNX or engine file; or a bench bundle.")],
    b: Annotated[Path | None, typer.Argument(metavar="B", help="The file that is compared with the reference.")] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="The library that runs ONNX files; by default ONNX Runtime.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", help="Number of threads of engines on the CPU.")] = 1,
    batch: Annotated[int, typer.Option("--batch", help="Size of a dynamic batch.")] = 1,
    shape: Shapes = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Time limit.")] = 10.0,
    host: Annotated[
        str | None, typer.Option("--host", metavar="USER@DEVICE", help="Measure a bundle on a device, by ssh and scp.")
    ] = None,
    python: Annotated[
        str | None, typer.Option("--python", help="Python interpreter for a bundle; by default python3 on a host.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Option for a bundle, such as dla=0.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="JSON file for the result; of a bundle by default its results.json.")
    ] = None,
    gate: Annotated[
        Path | None,
        typer.Option("--gate", metavar="BASELINE.json", help="An earlier result; exit code 1 where it was faster."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure the latency of two models in turns, guarded against a busy machine, or a bench bundle on a device.

    Exit code 1 without a figure, when some models of a bundle failed, and when a model is slower than in --gate.
    """
    from .. import runtime
    from ..graph.files import write_json
    from ..runtime.report.gate import read_ratios
    from ..runtime.summary import Bench
    from .shared.shapes import read_shapes

    baseline = read_ratios(gate) if gate else {}

    if a.is_dir():
        if b is not None:
            raise BadInput(f"bench: {a} is a bundle and holds the models to compare; leave {b} out")
        if batch != 1:
            raise BadInput("--batch: a bundle has the batch that it was written with; give it to `graphcomb bundle`")
        if shape:
            raise BadInput("--shape: a bundle has the shapes that it was written with; give them to `graphcomb bundle`")
        options = {"seconds": seconds, "threads": threads, **({"engine": engine} if engine else {})}
        measure_bundle(
            a, out or a / "results.json", host, options | read_values(option or (), "--option"), quiet, python, baseline
        )
        return
    for name, value in (("--host", host), ("--python", python), ("--option", option)):
        if value:
            raise BadInput(f"{name}: {a} is no bench bundle; `graphcomb bundle` writes one")
    if b is None:
        raise BadInput(f"bench: {a} against what? give a second file")
    result = runtime.bench(
        [a, b], threads=threads, batch=batch, seconds=seconds, progress=not quiet, engine=engine,
        shapes=read_shapes(shape or ()),
    )  # fmt: skip
    if out is not None:
        write_json(out, result.to_dict(), indent=2)
    show_bench(Bench.model_validate(result.to_dict()))
    check_gate(result.to_dict(), baseline)
    if result.ratio is None:
        raise typer.Exit(NO_FIGURE)


def measure_bundle(
    folder: Path,
    out: Path,
    host: str | None,
    options: dict[str, Any],
    quiet: bool,
    python: str | None,
    baseline: Ratios,
) -> None:
    """Run a bench bundle and print its results.

    Exits with an exit code if a model failed, no ratio could be stated, or a model is slower than in the baseline; raises
    Interrupted after Ctrl-C.
    """
    from ..runtime.bundle.run import run_bundle, script_arguments

    arguments = script_arguments(options) + ["--quiet"] * quiet
    results = run_bundle(folder, out, host, arguments, python)
    show_device(results)
    console.print(f"written: {out}", soft_wrap=True)
    if results.get("interrupted"):
        raise Interrupted
    for name, reason in results.get("failed", {}).items():
        complain("failed", f"{name}: {reason}")
    check_gate(results, baseline)
    if results.get("failed") or (len(results["models"]) > 1 and not any(results["ratios"].values())):
        raise typer.Exit(NO_FIGURE)


def check_gate(results: dict[str, Any], baseline: Ratios) -> None:
    """Print one line for each model that is slower than in the baseline, and exit with an exit code if there is one."""
    from ..runtime.report.gate import compare_ratios, ratios

    pass_gate(compare_ratios(ratios(results), baseline))


def bundle(
    models: Annotated[
        list[str],
        typer.Argument(metavar="RUN | NAME=MODEL...", help="A run's folder; or models (.onnx, .pt2), dense first."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("bundle"),
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32, fp16, int8 or fp8; by default the run's, else fp16.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="The device, against which opset and precision are checked.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Size of a dynamic batch.")] = 1,
    shape: Shapes = None,
    opset: Annotated[
        int | None, typer.Option("--opset", help="Opset of programs (.pt2); 17 for TensorRT 8 (JetPack 5 and 6.0).")
    ] = None,
    plugin: Annotated[
        list[Path] | None, typer.Option("--plugin", help="A library with TensorRT plugins, built for the device.")
    ] = None,
) -> None:
    """Write a folder that measures models on a device with only the device's own TensorRT and numpy."""
    from ..graph.files import read_json
    from ..graph.program import load
    from ..runtime.bundle.write import write_bundle
    from .shared.shapes import read_shapes

    record = None
    layers: dict[str, Any] = {}  # the layers of ONNX files, which the files themselves do not describe
    if len(models) == 1 and Path(models[0]).is_dir():
        folder = Path(models[0])
        summary = read_run(folder / "summary.json")
        files = {"dense": folder / "dense.onnx", "compressed": folder / "model.onnx"}
        for path in files.values():
            if not path.is_file():
                raise BadInput(f"bundle: {path} is missing; run the recipe with outputs.onnx and outputs.bench")
        precision, target = precision or summary.precision, target or summary.target
        record = folder / "record.json" if (folder / "record.json").is_file() else None
        if summary.prediction and summary.prediction.batch == batch:
            rows = summary.prediction.layers
            layers["dense"] = [row.before.to_dict() | {"name": row.name} for row in rows if row.before]
            layers["compressed"] = [row.after.to_dict() | {"name": row.name} for row in rows if row.after]
    else:
        files = {}
        for text in models:
            name, equals, file = text.partition("=")
            name, file = (name, file) if equals else (Path(text).stem, text)
            if name in files:
                raise BadInput(f"bundle: two models named {name}; name them, as in dense={file}")
            files[name] = Path(file)
    contents = {name: load(path) if path.suffix == ".pt2" else path for name, path in files.items()}
    folder = write_bundle(
        out, contents, precision or "fp16", target, batch, record, layers, read_shapes(shape or ()), opset, plugin or ()
    )
    for name, about in read_json(folder / "bundle.json")["models"].items():
        if about["note"]:
            console.print(f"{name}: {about['note']}", soft_wrap=True)
    console.print(f"{folder}: on the device, python3 kit.pyz; or graphcomb bench {folder} --host USER@DEVICE")


def show_bench(result: Bench) -> None:
    """Print latencies and their ratio, or why there is no ratio."""
    table = Table("model", "median ms", "p95 ms", "runs", "times faster (95 %)")
    for timing in result.timings:
        ratio = result.ratios.get(timing.name)
        ms = [f"{timing.ms[key]:.3f}" if timing.ms else "" for key in ("median", "p95")]
        table.add_row(timing.name, *ms, str(timing.runs), between(ratio) if ratio else "")
    console.print(table)
    if result.note:
        console.print(result.note)


def show_device(results: dict[str, Any]) -> None:
    """Print the results of a bench bundle."""
    console.print(f"{results['device']['model'] or 'this machine'}, {results['engine']} {results['version']}")
    table = Table("model", "run as", "median ms", "p99 ms", "times faster", "power W", "energy mJ", "error")
    wrong = {name for name, row in results["models"].items() if row["parity"].get("note")}
    for name, row in results["models"].items():
        power, error = row["power"], row["parity"]["error"]
        mark = " (wrong outputs)" if wrong & {next(iter(results["models"])), name} else ""
        for mode, run in row["latency"].items():
            ms = run.get("gpu_ms", run["host_ms"])
            ratio = results["ratios"].get(name, {}).get(mode)
            cells = (power.get("total_mw"), power.get("energy_mj"))
            table.add_row(
                name, mode, f"{ms['median']:.3f}", f"{ms['p99']:.3f}", f"{ratio['median']:.2f}{mark}" if ratio else "",
                f"{cells[0] / 1e3:.2f}" if cells[0] is not None else "",
                f"{cells[1]:.1f}" if cells[1] is not None else "", f"{error:.1e}" if error is not None else "none",
            )  # fmt: skip
    console.print(table)
    for name, modes in results["ratios"].items():
        for mode, ratio in modes.items():
            if "low" in ratio:  # the table has no room for the interval
                console.print(f"{name} ({mode}): {between(ratio)} times faster, with 95 %", soft_wrap=True)
    for note in results["notes"]:
        console.print(note, soft_wrap=True, markup=False)
