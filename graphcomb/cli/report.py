"""`graphcomb report`: the HTML report of a run, or of measurements on devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..graph.errors import BadInput
from .output import console


def report(
    summary: Annotated[Path, typer.Argument(metavar="SUMMARY.json", help="What `run` or a bench bundle wrote.")],
    device: Annotated[
        list[Path] | None, typer.Option("--device", metavar="RESULTS.json", help="Results of a bench bundle to add.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The HTML file; default report.html beside it.")] = None,
) -> None:
    """Write the HTML report of a finished run again, or of measurements on devices."""
    from .. import runtime
    from ..runtime.measure.results import read_results

    found = read_summary(summary)
    measured = [read_results(path) for path in device or ()]
    if "passes" not in found:  # no run: what a device measured stands for itself
        measured.insert(0, read_results(summary))
        found = {"model": "Measured on the device", "passes": []}
    path = out or summary.with_name("report.html")
    runtime.write_report(found | ({"devices": measured} if measured else {}), path)
    console.print(str(path), soft_wrap=True)


def read_summary(path: Path) -> dict[str, Any]:
    """What `run` wrote, or the results of a bench bundle."""
    from ..graph.files import read_json

    found = read_json(path)
    if not isinstance(found, dict) or not {"passes", "format"} & found.keys():
        raise BadInput(f"{path}: not a summary.json of graphcomb run")
    return found
