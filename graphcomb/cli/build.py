"""`graphcomb build`: build an engine from an ONNX file and report on its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .shared.arguments import SHAPE, read_sizes, read_values
from .shared.output import console, pass_gate, save

if TYPE_CHECKING:
    from ..runtime.devices.dla import Placement
    from ..runtime.summary import Engine


def build(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An ONNX file.")],
    target: Annotated[str, typer.Option("--target", help="The device, such as rtx-sm86.")],
    out: Annotated[Path | None, typer.Option("--out", help="The engine file; by default beside the model.")] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="The library that builds it; by default the target's.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="N | MIN,BEST,MAX", help="Sizes of a dynamic batch.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option("--shape", metavar="NAME=1x3x480x640", help=f"{SHAPE}, or NAME=MIN,BEST,MAX.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Option of the build, as in sparse=true.")
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
    from ..runtime.devices.dla import dla_report
    from ..runtime.engines.base import UnparsedOp
    from ..runtime.onnx_file import check_model
    from ..runtime.report.gate import Build, choose, compare, read_baseline
    from ..runtime.summary import Engine
    from .shared.shapes import read_ranges

    options = read_values(option or (), "--option")
    if shape:
        options["shapes"] = read_ranges(shape)
    if batch is not None:
        options["batch"] = read_sizes(batch, "--batch") if "," in batch else read_sizes(batch, "--batch")[0]
    baselines = read_baseline(gate, target) if gate else None
    if (core := options.get("dla")) is not None:  # by the rules alone, since the library may not be here
        show_dla(dla_report(check_model(model), runtime.get_target(target), core, options.get("batch")))
    try:
        built = runtime.build_engine(model, target, out, engine, **options)
    except UnparsedOp as error:
        if gate is None:
            raise
        pass_gate([error])
    report = built.to_dict()
    baseline = choose(baselines, built.precision) if baselines else None
    save(json_, report)
    show_engine(Engine.model_validate(report))
    if baseline is not None:
        pass_gate(compare(Build.model_validate(report), baseline))


def show_engine(engine: Engine) -> None:
    """Print the kernels, padding, quantisation and memory of an engine, and the modules and passes they come from."""
    from ..runtime.engine_summary import UNFUSED

    head = f"{engine.path}: {engine.bytes:,} bytes, {engine.precision}, {engine.backend} {engine.version}"
    console.print(head, soft_wrap=True)
    fused = [kernel for kernel in engine.kernels if len(kernel.nodes) > 1]
    nodes = sum(len(kernel.nodes) for kernel in fused)
    console.print(f"{len(engine.kernels)} kernels, {len(fused)} of them fuse {nodes} ONNX nodes")
    console.print(f"{len(engine.padding)} kernels only pad or re-format")

    def where(names: Sequence[str]) -> str:
        origins = [origin for name in names if (origin := engine.origins.get(name))]
        places = [f"{origin.node} of {origin.module or 'the model'}" for origin in origins]
        passes = dict.fromkeys(name for origin in origins for name in origin.passes)
        return ", ".join([*places[:2], *(f"changed by {name}" for name in passes)])

    if engine.pads:
        table = Table("padded node", "axis", "model", "engine", "how", "multiples of", "from")
        for pad in engine.pads:
            names = pad.nodes or [pad.kernel]
            advice = f"{pad.alignment or 'none'}{f' ({pad.note})' if pad.note else ''}"
            cells = (pad.axis, pad.before, pad.after, pad.how, advice)
            table.add_row(", ".join(names[:3]), *map(str, cells), where(names))
        console.print(table)
    for row in engine.unfused:
        place = where(row.nodes)
        console.print(f"{', '.join(row.nodes[:4])}: {UNFUSED[row.how]}{f' ({place})' if place else ''}")
    for name, size in engine.memory.items():
        console.print(f"{name}: {size:,} bytes")
    for line in engine.unread:
        console.print(f"not understood: {line[:200]}", markup=False)
    for text in engine.warnings:
        console.print(f"warning: {text}", markup=False)


def show_dla(report: Sequence[Placement]) -> None:
    """Print how many layers the DLA's rules allow, and why the GPU runs the others."""
    left = [p for p in report if p.why]
    console.print(f"by its rules the DLA can run {len(report) - len(left)} of {len(report)} layers")
    for p in left:
        console.print(f"{p.node} ({p.op}) is left to the GPU: {p.why}", soft_wrap=True, markup=False)
