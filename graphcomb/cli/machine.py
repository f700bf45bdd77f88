"""`graphcomb targets` lists the devices that engines are built for, `graphcomb check` what this machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .shared.output import console, save


def targets(
    json_: Annotated[Path | None, typer.Option("--json", metavar="TARGETS.json", help="Write the table.")] = None,
) -> None:
    """List the targets with their precisions and peak rates, and how far graphcomb was tested for each."""
    from ..runtime.devices.table import EVIDENCE, TARGETS

    rows: list[dict[str, Any]] = []
    for target in TARGETS.values():
        releases = {name: ".".join(map(str, version)) for name, version in target.tensorrt.items()}
        fast = {name: target.tflops[name] for name in target.dtypes}
        rows.append(
            {
                "name": target.name, "board": target.board, "backend": target.backend, "releases": releases,
                "tflops": fast, "bandwidth": target.bandwidth, "opset": target.opset,
                "dla": target.dla.cores if target.dla else 0, "evidence": target.evidence,
            }
        )  # fmt: skip
    save(json_, rows)
    table = Table("target", "board", "fp16 TFLOPS", "at most", "GB/s", "opset", "DLA", "tried")
    for row in rows:
        precision, most = max(row["tflops"].items(), key=lambda item: item[1])
        cells = (row["tflops"]["fp16"], f"{most:g} {precision}", row["bandwidth"], row["opset"], row["dla"] or "")
        table.add_row(row["name"], row["board"], *map(str, cells), row["evidence"])
    for column in table.columns[0], table.columns[-1]:
        column.no_wrap = True
    console.print(table)
    for name, meaning in EVIDENCE.items():
        console.print(f"{name}: {meaning}", soft_wrap=True)


def check(
    json_: Annotated[Path | None, typer.Option("--json", metavar="CHECK.json", help="Write what was found.")] = None,
) -> None:
    """Report this machine's processor, GPU, clocks and libraries, and what each can be used for. Changes nothing."""
    from ..runtime.measure.machine import examine

    findings = examine()
    save(json_, [finding.to_dict() for finding in findings])
    table = Table("", "here", "what it means")
    for finding in findings:
        table.add_row(finding.what, finding.here or "none", finding.means)
    console.print(table)
