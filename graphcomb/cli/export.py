"""`graphcomb export`: write an ONNX file for a target and compare it with the program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .shared.arguments import Arguments, Inputs, Quiet, read_sizes, read_values
from .shared.output import console, save

if TYPE_CHECKING:
    from ..runtime.export.to_onnx import OnnxReport


def export(
    model: Annotated[str, typer.Argument(help="A .pt2 file, or package.module:callable.")],
    out: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The file to write.")],
    target: Annotated[str | None, typer.Option("--target", help="The device that must parse the opset.")] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="fp32, fp16 or bf16; a quantised program is INT8 in fp32.")
    ] = ("fp32"),
    opset: Annotated[
        int | None, typer.Option("--opset", help="17 or higher; by default chosen for the program and the target.")
    ] = None,
    keep_fp32: Annotated[
        list[str] | None,
        typer.Option("--keep-fp32", metavar="PATTERN", help="Nodes or modules of an fp16 file that stay in fp32."),
    ] = None,
    keep_io_types: Annotated[
        bool, typer.Option("--keep-io-types", help="Inputs and outputs of an fp16 file stay in fp32.")
    ] = False,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", help="Largest error of an output, relative to its largest value.")
    ] = None,
    arg: Arguments = None,
    input_: Inputs = None,
    json_: Annotated[Path | None, typer.Option("--json", metavar="REPORT.json", help="Write the report.")] = None,
    quiet: Quiet = False,
) -> None:
    """Write a model as an ONNX file for a target. The file is compared with the model in ONNX Runtime before it is kept."""
    from ..graph.errors import BadInput
    from ..runtime import export_onnx
    from .shared.shapes import captured

    if out.suffix != ".onnx":
        raise BadInput(f"{out}: the file to write ends in .onnx")
    program = captured(model, read_values(arg or ()), [read_sizes(s) for s in input_ or ()])
    report = export_onnx(
        program, out, precision, opset, target, tolerance, progress=not quiet, keep_fp32=keep_fp32 or (),
        keep_io_types=keep_io_types,
    )  # fmt: skip
    save(json_, report.to_dict())
    show_export(report)


def show_export(report: OnnxReport) -> None:
    """Print the size and opset of an exported file, its error against the program, and which nodes stay in fp32."""
    file = f"{report.path}: {report.bytes:,} bytes, {report.precision}, opset {report.opset}"
    console.print(f"{file}, {sum(report.nodes.values())} nodes", soft_wrap=True)
    if report.parity is None:
        console.print("not compared with the model")
    else:
        console.print(f"worst error of an output {report.parity:.1e}, allowed {report.tolerance:.1e}")
    for node, why in report.float32.items():
        console.print(f"{node} stays in fp32: {why}", soft_wrap=True)
    for name, what in report.clamped.items():
        console.print(f"{name}: {what}", soft_wrap=True)
    for text in report.warnings:
        console.print(f"warning: {text}", soft_wrap=True)
