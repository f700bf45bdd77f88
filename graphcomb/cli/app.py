"""The command line. Mistakes are one line on stderr and exit code 2; Ctrl-C is one line and exit code 130."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unicodedata import category

import typer
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from ..graph.errors import BadInput, GraphcombError
from ..notices import show_warnings

if TYPE_CHECKING:
    from ..passes.depth.blocks import Block
    from ..runtime.engines.dla import Placement

BAD_INPUT, UNEXPECTED, WORSE, NO_FIGURE, INTERRUPTED = 2, 1, 1, 1, 130
console = Console(markup=False, emoji=False)  # names and lines of source code may look like markup


class _Interrupted(Exception):
    """Ctrl-C, under a name that the command-line library does not handle itself."""


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Interrupted from None


app = typer.Typer(
    cls=_Group, add_completion=False, no_args_is_help=True, rich_markup_mode=None,
    help="Compress vision models: capture, comb, prune, distill, lower to ONNX and TensorRT, measure.",
)  # fmt: skip

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override a field, as in passes.0.ratio=0.3.")
]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="NAME=1x3x480x640", help="Shape of an input with more than a dynamic batch."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")] = False) -> None:
    """Compress vision models: capture, comb, prune, distill, lower to ONNX and TensorRT, measure."""
    if not debug:
        show_warnings()
        logging.getLogger("torch").setLevel(logging.ERROR)


@app.command()
def run(
    recipe: RecipeFile,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results; default out/NAME.")] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="A plan file, edited by hand.")] = None,
    set_: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not continue from finished passes.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: compress, verify, export, build engines, measure, report. Continues where it was interrupted."""
    from .. import plan as plans
    from .. import runner
    from ..pipeline import is_main
    from ..recipe import read_recipe

    parsed = read_recipe(recipe, set_ or ())
    edited = plans.read_plan(plan) if plan else None
    folder = out or Path("out") / recipe.stem
    summary = runner.run(parsed, folder, edited, progress=not quiet, fresh=fresh)
    if is_main():
        show_summary(summary)


@app.command()
def plan(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option("--out", help="The plan file to write.")] = Path("plan.yaml"),
    set_: Overrides = None,
) -> None:
    """Print what a recipe would remove, group by group, and write it as an editable plan for `run --plan`.

    For a recipe with PruneDepth also the blocks of the network: what each costs, what pruning it saves, or why it cannot.
    """
    from .. import plan as plans
    from ..recipe import read_recipe
    from ..runner import prepare

    job = prepare(read_recipe(recipe, set_ or ()))
    rows, blocks = plans.make_plan(job), plans.make_blocks(job)
    plans.write_plan(rows, out, blocks)
    if rows:
        show_groups([r | {"frozen": r.get("frozen")} for r in rows])
    if blocks:
        show_blocks(blocks)
    console.print(f"plan written to {out}; edit it, then: graphcomb run {recipe} --plan {out}", soft_wrap=True)


@app.command()
def comb(
    model: Annotated[str, typer.Argument(help="package.module:callable or a .pt2 file.")],
    arg: Annotated[
        list[str] | None, typer.Option("--arg", metavar="NAME=VALUE", help="Argument of the callable.")
    ] = None,
    shape: Annotated[list[str] | None, typer.Option("--input", metavar="1,3,224,224", help="Input shape.")] = None,
    why: Annotated[str | None, typer.Option("--why", metavar="PARAMETER", help="Explain one parameter.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which indices of a model can only be removed together, what is frozen, and why."""
    from ..graph.comb.solve import Comb
    from ..recipe import parse_recipe
    from ..runner import prepare

    tree: dict[str, Any] = {"model": {"source": model, "arguments": _arguments(arg or ())}, "passes": []}
    if shape:
        tree["inputs"] = [{"shape": _shape(s)} for s in shape]
    solved = Comb(prepare(parse_recipe(tree)).program)
    if why:
        print(solved.why(why))
        return
    rows = [
        {"name": g.name, "kind": g.kind, "size": g.size, "frozen": g.frozen, "members": [list(m) for m in g.members]}
        for g in solved.groups
    ]
    if as_json:
        print(json.dumps({"model": model, "prunable_share": solved.coverage(), "groups": rows}))
        return
    show_groups(rows)
    free = sum(r["frozen"] is None for r in rows)
    console.print(f"{free} of {len(rows)} groups can shrink; they reach {solved.coverage():.1%} of the parameters")


@app.command()
def build(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An ONNX file.")],
    target: Annotated[str, typer.Option("--target", help="A device, as in rtx-sm86.")],
    out: Annotated[Path | None, typer.Option("--out", help="The engine file.")] = None,
    engine: Annotated[str | None, typer.Option("--engine", help="The library; by default the target's own.")] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="N | MIN,BEST,MAX", help="Batch sizes, where dynamic.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="NAME=1x3x480x640",
            help="Shape of an input with more than a dynamic batch, or NAME=MIN,BEST,MAX.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Option of the library, as sparse=true.")
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", metavar="REPORT.json", help="Write the report.")] = None,
    gate: Annotated[
        Path | None,
        typer.Option(
            "--gate", metavar="BASELINE.json", help="An earlier report or summary.json; exit code 1 if worse."
        ),
    ] = None,
) -> None:
    """Build an engine from an ONNX file for a target, and say what came out: what fuses, where kernels pad, memory."""
    from .. import runtime
    from ..pipeline import write_json
    from ..runtime.engines.base import UnparsedOp, check_model
    from ..runtime.engines.dla import dla_report
    from ..runtime.report.gate import choose, compare, read_baseline
    from ..shapes import read_ranges

    options = _arguments(option or (), "--option")
    if shape:
        options["shapes"] = read_ranges(shape)
    if batch is not None:
        options["batch"] = _shape(batch, "--batch") if "," in batch else _shape(batch, "--batch")[0]
    baselines = read_baseline(gate, target) if gate else None
    if (core := options.get("dla")) is not None:  # by the rules alone, since the library may not be here
        show_dla(dla_report(check_model(model), runtime.get_target(target), core, options.get("batch")))
    try:
        found = runtime.build_engine(model, target, out, engine, **options)
    except UnparsedOp as error:
        if gate is None:
            raise
        print(f"gate: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(WORSE) from error
    rows = found.to_dict()
    baseline = choose(baselines, found.precision) if baselines else None
    if json_:
        write_json(json_, rows, indent=2)
    show_engine(rows)
    if baseline is not None and (worse := compare(rows, baseline)):
        for text in worse:
            print(f"gate: {text}", file=sys.stderr)
        raise typer.Exit(WORSE)


@app.command()
def bench(
    a: Annotated[Path, typer.Argument(metavar="A", help="The reference: an ONNX or engine file; or a bench bundle.")],
    b: Annotated[Path | None, typer.Argument(metavar="B", help="What is compared with it.")] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="The library that runs ONNX files; ONNX Runtime by default.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", help="Threads of engines on the CPU.")] = 1,
    batch: Annotated[int, typer.Option("--batch", help="Batch size where it is dynamic.")] = 1,
    shape: Shapes = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Time limit.")] = 10.0,
    host: Annotated[
        str | None, typer.Option("--host", metavar="USER@DEVICE", help="Measure a bundle there, by ssh and scp.")
    ] = None,
    python: Annotated[
        str | None, typer.Option("--python", help="Interpreter that measures a bundle; on a host python3.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Option of a bundle, as dla=0.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the result as JSON; default in the bundle.")] = None,
    quiet: Quiet = False,
) -> None:
    """Latency of two models, measured in turns and guarded against a busy machine; or a bench bundle on a device.

    Exit code 1 without a figure, and when some models of a bundle failed.
    """
    from .. import runtime
    from ..pipeline import write_json
    from ..runtime.bundle.bundle import run_bundle, script_arguments
    from ..shapes import read_shapes

    if a.is_dir():
        if b is not None:
            raise BadInput(f"bench: {a} is a bundle and holds the models to compare; leave {b} out")
        if batch != 1:
            raise BadInput("--batch: a bundle has the batch that it was written with; give it to `graphcomb bundle`")
        if shape:
            raise BadInput("--shape: a bundle has the shapes that it was written with; give them to `graphcomb bundle`")
        options = {"seconds": seconds, "threads": threads, **({"engine": engine} if engine else {})}
        arguments = script_arguments(options | _arguments(option or (), "--option"))
        path = out or a / "results.json"
        results = run_bundle(a, path, host, [*arguments, *(["--quiet"] if quiet else [])], python)
        show_device(results)
        console.print(f"written: {path}", soft_wrap=True)
        if results.get("interrupted"):
            raise _Interrupted
        for name, reason in results.get("failed", {}).items():
            print(f"failed: {name}: {' '.join(str(reason).split())}", file=sys.stderr)
        if results.get("failed") or (len(results["models"]) > 1 and not any(results["ratios"].values())):
            raise typer.Exit(NO_FIGURE)
        return
    for name, given in (("--host", host), ("--python", python), ("--option", option)):
        if given:
            raise BadInput(f"{name}: {a} is no bench bundle; `graphcomb bundle` writes one")
    if b is None:
        raise BadInput(f"bench: {a} against what? give a second file")
    found = runtime.bench(
        [a, b], threads=threads, batch=batch, seconds=seconds, progress=not quiet, engine=engine,
        shapes=read_shapes(shape or ()),
    )  # fmt: skip
    if out is not None:
        write_json(out, found.to_dict(), indent=2)
    show_bench(found.to_dict())
    if found.ratio is None:
        raise typer.Exit(NO_FIGURE)


@app.command()
def predict(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL [SMALLER]", help="package.module:callable or a .pt2 file.")
    ],
    target: Annotated[str, typer.Option("--target", help="A device, as in rtx-sm86.")] = "cpu",
    precision: Annotated[
        str | None, typer.Option("--precision", help="As in fp16; default the results' own, else fp32.")
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option("--calibrate", metavar="RESULTS.json", help="Results of bench bundles on the device."),
    ] = None,
    arg: Annotated[
        list[str] | None, typer.Option("--arg", metavar="NAME=VALUE", help="Argument of the callable.")
    ] = None,
    input_: Annotated[list[str] | None, typer.Option("--input", metavar="1,3,224,224", help="Input shape.")] = None,
    shape: Shapes = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Batch size; 1, where a program does not have another.")
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", metavar="OUT.json", help="Write what is predicted.")] = None,
) -> None:
    """Predict how long a model and its layers take on a device, and which layers will not profit from fewer channels.

    By the device's data sheet, or calibrated with what bench bundles measured on it.
    """
    from .. import runtime
    from ..pipeline import write_json
    from ..recipe import parse_recipe
    from ..runner import prepare
    from ..shapes import at_shapes, check_names, example_batch, read_shapes, with_batch

    if len(models) > 2:
        raise BadInput(f"predict: one model, or one and what became of it, not {len(models)}")
    device = runtime.get_target(target)
    roofline = runtime.Roofline.calibrated(calibrate, device, precision) if calibrate else None
    dtype = precision or (roofline.dtype if roofline else "fp32")
    if batch is not None and batch < 1:
        raise BadInput(f"batch: 1 or more, not {batch}")
    given, sizes = read_shapes(shape or ()), [_shape(s) for s in input_ or ()]
    if given and sizes:
        raise BadInput("--shape, --input: give one of the two")
    programs, fixed = {}, None
    for which, model in zip(("before", "after"), models, strict=False):
        tree: dict[str, Any] = {"model": {"source": model, "arguments": _arguments(arg or ())}, "passes": []}
        saved = model.endswith(".pt2")
        if not saved and (given or sizes or batch is not None):
            tree["inputs"] = [{"shape": s} for s in with_batch(sizes or list(given.values()), batch)]
        program = prepare(parse_recipe(tree)).program
        check_names(program, given)
        programs[which] = program = at_shapes(program, given, batch) if saved and given else program
        fixed = fixed or example_batch(program)
        if fixed and batch not in (None, fixed):
            raise BadInput(f"--batch {batch}: {model} has a fixed batch of {fixed}; capture it with a dynamic one")
    found = runtime.predict(programs, device, dtype, roofline, batch or fixed or 1)
    if json_:
        write_json(json_, found, indent=2)
    show_prediction(found)


@app.command()
def bundle(
    models: Annotated[
        list[str],
        typer.Argument(metavar="RUN | NAME=MODEL...", help="A run's folder; or models (.onnx, .pt2), dense first."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("bundle"),
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32, fp16 or int8; default the run's, else fp16.")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", help="The device, to check opset and precision.")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Batch size where it is dynamic.")] = 1,
    shape: Shapes = None,
    opset: Annotated[
        int | None, typer.Option("--opset", help="Of programs (.pt2): 17 for TensorRT 8, as on JetPack 5 and 6.0.")
    ] = None,
) -> None:
    """Write a folder that measures models on a device with nothing but its own TensorRT and numpy."""
    from ..graph.program import load
    from ..runtime.bundle.bundle import write_bundle
    from ..runtime.predict.measured import read_json
    from ..shapes import read_shapes

    record = None
    layers: dict[str, Any] = {}  # of ONNX files, which do not tell themselves
    if len(models) == 1 and Path(models[0]).is_dir():
        folder = Path(models[0])
        summary = _read_summary(folder / "summary.json")
        found = {"dense": folder / "dense.onnx", "compressed": folder / "model.onnx"}
        for path in found.values():
            if not path.is_file():
                raise BadInput(f"bundle: {path} is missing; run the recipe with outputs.onnx and outputs.bench")
        precision, target = precision or summary.get("precision"), target or summary.get("target")
        record = folder / "record.json" if (folder / "record.json").is_file() else None
        prediction = summary.get("prediction") or {}
        if prediction.get("batch") == batch:
            for name, side in (("dense", "before"), ("compressed", "after")):
                layers[name] = [row[side] | {"name": row["name"]} for row in prediction["layers"] if row.get(side)]
    else:
        found = {}
        for text in models:
            name, equals, file = text.partition("=")
            name, file = (name, file) if equals else (Path(text).stem, text)
            if name in found:
                raise BadInput(f"bundle: two models named {name}; name them, as in dense={file}")
            found[name] = Path(file)
    given = {name: load(path) if path.suffix == ".pt2" else path for name, path in found.items()}
    folder = write_bundle(
        out, given, precision or "fp16", target, batch, record, layers, read_shapes(shape or ()), opset
    )
    for name, about in read_json(folder / "bundle.json")["models"].items():
        if about["note"]:
            console.print(printable(f"{name}: {about['note']}"), soft_wrap=True, markup=False)
    console.print(f"{folder}: on the device, python3 bench_device.py; or graphcomb bench {folder} --host USER@DEVICE")


@app.command()
def report(
    summary: Annotated[Path, typer.Argument(metavar="SUMMARY.json", help="What `run` or a bench bundle wrote.")],
    device: Annotated[
        list[Path] | None, typer.Option("--device", metavar="RESULTS.json", help="Results of a bench bundle to add.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The HTML file; default report.html beside it.")] = None,
) -> None:
    """Write the HTML report of a finished run again, or of measurements on devices."""
    from .. import runtime
    from ..runtime.predict.measured import read_results

    found = _read_summary(summary)
    measured = [read_results(path) for path in device or ()]
    if "passes" not in found:  # no run: what a device measured stands for itself
        measured.insert(0, read_results(summary))
        found = {"model": "Measured on the device", "passes": []}
    path = out or summary.with_name("report.html")
    runtime.write_report(found | ({"devices": measured} if measured else {}), path)
    console.print(str(path), soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("out/demo"), quiet: Quiet = False
) -> None:
    """Train a small network on digits (or load the cached one) and run the whole pipeline on it."""
    from ..demo.demo import run_demo

    show_summary(run_demo(out, progress=not quiet))


# ------------------------------------------------------------------------------------------------------------- output
def show_groups(rows: list[dict[str, Any]]) -> None:
    """A table of groups: what can shrink first, then what cannot and why."""
    planned = any("keep" in r for r in rows)
    table = Table("group", "kind", "size", *(["keep", "saves MACs"] if planned else []), "frozen because")
    table.columns[0].overflow = "fold"
    for r in sorted(rows, key=lambda r: r["frozen"] is not None):
        extra = [str(r.get("keep", "")), f"{r['saves_macs']:.1%}" if "saves_macs" in r else ""] if planned else []
        table.add_row(r["name"], r["kind"], str(r["size"]), *extra, r["frozen"] or "")
    console.print(table)


def show_blocks(blocks: Sequence[Block]) -> None:
    """A table of blocks, as they follow each other, and below it why some cannot be pruned."""
    table = Table("block", "kind")
    table.columns[0].overflow = "fold"
    for head in ("MACs", "params", "saves\nMACs", "saves\nkernels"):
        table.add_column(head, justify="right", no_wrap=True)
    for b in blocks:
        saves = ["", ""] if b.saves is None else [_short(b.saves), str(b.kernels)]
        table.add_row(b.name, b.kind, _short(b.macs), _short(b.params), *saves)
    console.print(table)
    for b in blocks:
        if b.why is not None:
            console.print(f"{b.name} cannot be pruned: {b.why}", soft_wrap=True, markup=False)


def _short(count: int) -> str:
    """A number in at most eight characters; exact up to a million."""
    return next(
        (f"{count / unit:.1f} {name}" for unit, name in ((1e9, "G"), (1e6, "M")) if count >= unit), f"{count:,}"
    )


def show_summary(summary: dict[str, Any]) -> None:
    """The figures of a finished run."""
    from ..pipeline import figure
    from ..runtime.measure.places import latency_place

    table = Table(show_header=False)
    hidden = {"onnx_parity"} if summary.get("onnx_parity_fp16") is not None else set()  # of the file nobody runs
    name = summary.get("metric") or "accuracy"
    for when in ("before", "after"):
        if (value := summary.get(f"accuracy_{when}")) is not None:
            table.add_row(f"{name.replace(' ', '_')}_{when}", figure(name, value))
    for key, form in SUMMARY_ROWS.items():
        if summary.get(key) is not None and key not in hidden:
            where = f" in {latency_place(summary)}" if key == "latency_ratio" else ""
            table.add_row(key, Text(form.format(summary[key]) + where))
    if (prediction := summary.get("prediction")) and len(prediction["ms"]) == 2:
        before, after = prediction["ms"].values()
        where = f"{prediction['target']}, {prediction['precision']}, batch {prediction['batch']}"
        doubt = prediction.get("uncertainty")
        bar = f" (each off by up to {doubt['factor']:.2g} times)" if doubt else ""
        ms = f"{before:.3g} -> {after:.3g} ms{bar}"
        table.add_row("predicted", Text(f"{before / after:.2f}x faster on {where}: {ms}") if after else "")
    for kind, path in summary["files"].items():
        for one in path if isinstance(path, list) else [path]:
            table.add_row(kind, one)
    console.print(table)
    if note := summary.get("bench", {}).get("note"):
        console.print(f"latency: {note}")


def show_engine(report: dict[str, Any]) -> None:
    """What a build made of the model: kernels, padding and quantisation that cost, memory, with their origin."""
    from ..runtime.engines.trt.log import UNFUSED

    report = printable(report)

    console.print(
        f"{report['path']}: {report['bytes']:,} bytes, {report['precision']}, {report['backend']} {report['version']}",
        soft_wrap=True,
    )
    fused = [k for k in report["kernels"] if len(k["nodes"]) > 1]
    nodes = sum(len(k["nodes"]) for k in fused)
    console.print(f"{len(report['kernels'])} kernels, {len(fused)} of them fuse {nodes} ONNX nodes")
    console.print(f"{len(report['padding'])} kernels only pad or re-format")
    origins = report["origins"]

    def where(names: Sequence[str]) -> str:
        known = [f"{o['node']} of {o['module'] or 'the model'}" for n in names if (o := origins.get(n))]
        passes = dict.fromkeys(p for n in names if n in origins for p in origins[n]["passes"])
        return ", ".join([*known[:2], *(f"changed by {p}" for p in passes)])

    if report.get("pads"):
        table = Table("padded node", "axis", "model", "engine", "how", "multiples of", "from")
        for p in report["pads"]:
            names = p["nodes"] or [p["kernel"]]
            advice = " ".join([str(p["alignment"] or "none"), *([f"({p['note']})"] if p.get("note") else [])])
            cells = (p["axis"], p["before"], p["after"], p["how"], advice)
            table.add_row(", ".join(names[:3]), *map(str, cells), where(names))
        console.print(table)
    for row in report.get("unfused", ()):
        place = where(row["nodes"])
        console.print(f"{', '.join(row['nodes'][:4])}: {UNFUSED[row['how']]}{f' ({place})' if place else ''}")
    for name, size in report["memory"].items():
        console.print(f"{name}: {size:,} bytes")
    for line in report.get("unread", ()):
        console.print(f"not understood: {line[:200]}", markup=False)
    for text in report["warnings"]:
        console.print(f"warning: {text}", markup=False)


def show_dla(report: Sequence[Placement]) -> None:
    """How many layers the DLA's rules allow, and why the others are left to the GPU."""
    left = [p for p in report if p.why]
    console.print(f"by its rules the DLA can run {len(report) - len(left)} of {len(report)} layers")
    for p in left:
        console.print(f"{p.node} ({p.op}) is left to the GPU: {p.why}", soft_wrap=True, markup=False)


def show_prediction(found: dict[str, Any]) -> None:
    """Predicted time by layer, what bounds it, and why fewer channels will not help."""
    from ..runtime.predict.roofline import calibration_text

    table = Table("layer", "op", "MACs", "padded", "bytes", "ms", "bound", "fewer channels")
    table.columns[0].overflow = "fold"
    for row in found["layers"]:
        sides = [row[k] for k in ("before", "after") if row.get(k)]
        last = sides[-1]

        def cell(key: str, form: str, sides: list[dict[str, Any]] = sides) -> str:
            return " -> ".join(dict.fromkeys(form.format(side[key]) for side in sides))

        numbers = [cell("macs", "{:,}"), cell("padded_macs", "{:,}"), cell("bytes", "{:,.0f}"), cell("ms", "{:.4f}")]
        table.add_row(row["name"], row["op"], *numbers, cell("bound", "{}"), last["verdict"])
    console.print(table)
    console.print(f"{found['by']}: {' -> '.join(f'{ms:.3f} ms' for ms in found['ms'].values())}", soft_wrap=True)
    if (c := found["calibration"]) is not None:
        console.print(calibration_text(c), soft_wrap=True)
    if (doubt := found.get("uncertainty")) is not None:
        console.print(f"off by up to {doubt['factor']:.2g} times: {doubt['source']}", soft_wrap=True)


def show_bench(result: dict[str, Any]) -> None:
    """Latencies and their ratio, or why there is none."""
    result = printable(result)
    table = Table("model", "median ms", "p95 ms", "runs", "times faster (95 %)")
    for timing in result["timings"]:
        ms, ratio = timing["ms"], result["ratios"].get(timing["name"])
        faster = _between(ratio) if ratio else ""
        table.add_row(
            timing["name"], *(f"{ms[k]:.3f}" if ms else "" for k in ("median", "p95")), str(timing["runs"]), faster
        )
    console.print(table)
    if result["note"]:
        console.print(result["note"])


def printable(value: Any) -> Any:
    """A value of a file or a device without the control characters that a terminal would obey, in all its texts."""
    if isinstance(value, str):
        return "".join("\ufffd" if category(c)[0] == "C" and c not in "\n\t" else c for c in value)
    if isinstance(value, dict):
        return {printable(k): printable(v) for k, v in value.items()}
    return [printable(v) for v in value] if isinstance(value, list) else value


def _between(ratio: dict[str, float]) -> str:
    """A ratio and the interval in which its median lies, as far as there is one."""
    between = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if "low" in ratio else ""
    return f"{ratio['median']:.2f}{between}"


def show_device(results: dict[str, Any]) -> None:
    """What a bench bundle measured on a device."""
    results = printable(results)
    console.print(f"{results['device']['model'] or 'this machine'}, {results['engine']} {results['version']}")
    table = Table("model", "run as", "median ms", "p99 ms", "times faster", "power W", "energy mJ", "error")
    wrong = {name for name, row in results["models"].items() if row["parity"].get("note")}
    for name, row in results["models"].items():
        power, error = row["power"], row["parity"]["error"]
        mark = " (wrong outputs)" if wrong & {next(iter(results["models"])), name} else ""
        for mode, found in row["latency"].items():
            ms = found.get("gpu_ms", found["host_ms"])
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
            if "low" in ratio:  # which the table has no room for
                console.print(f"{name} ({mode}): {_between(ratio)} times faster, with 95 %", soft_wrap=True)
    for note in results["notes"]:
        console.print(note, soft_wrap=True, markup=False)


SUMMARY_ROWS = {
    "macs_ratio": "{:.2f}x fewer",
    "params_ratio": "{:.2f}x fewer",
    "latency_ratio": "{:.2f}x faster",
    "surgery_error": "{:.1e}",
    "onnx_parity": "{:.1e}",
    "onnx_parity_fp16": "{:.1e}",
    "seconds": "{:.0f} s",
}


def _read_summary(path: Path) -> dict[str, Any]:
    """What `run` wrote, or the results of a bench bundle."""
    from ..runtime.predict.measured import read_json

    found = read_json(path)
    if not isinstance(found, dict) or not {"passes", "format"} & found.keys():
        raise BadInput(f"{path}: not a summary.json of graphcomb run")
    return found


def _arguments(pairs: Sequence[str], option: str = "--arg") -> dict[str, Any]:
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise BadInput(f"{option} {pair}: expected name=value")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise BadInput(f"{option} {pair}: the value is not valid YAML") from error
    return found


def _shape(text: str, option: str = "--input") -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(f"{option} {text}: expected sizes separated by commas, as in 1,3,224,224") from error


# -------------------------------------------------------------------------------------------------------- entry point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = arguments[:1] == ["--debug"]
    try:
        code = app(arguments, prog_name="graphcomb", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except _Interrupted:
        return _fail("interrupted; run the same command again to continue", INTERRUPTED, debug)
    except GraphcombError as error:
        return _fail(str(error), BAD_INPUT, debug)
    except Exception as error:
        if hasattr(error, "format_message"):  # usage errors of the command-line library
            return _fail(error.format_message(), BAD_INPUT, debug)
        text = (
            f"unexpected {type(error).__name__}: {error} (graphcomb --debug {' '.join(arguments)} shows the traceback)"
        )
        return _fail(text, UNEXPECTED, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code
