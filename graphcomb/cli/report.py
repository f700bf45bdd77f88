"""`graphcomb report`: write the HTML report on a run, or on measurements of devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..graph.errors import BadInput
from .shared.output import console

if TYPE_CHECKING:
    from ..runtime.summary import Summary


def report(
    summary: Annotated[
        Path, typer.Argument(metavar="SUMMARY.json", help="summary.json of a run, or results.json of a bench bundle.")
    ],
    device: Annotated[
        list[Path] | None, typer.Option("--device", metavar="RESULTS.json", help="Results of a bench bundle to add.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The HTML file; by default report.html in the same folder.")
    ] = None,
) -> None:
    """Write the HTML report on a finished run again, or on measurements of devices."""
    from .. import runtime
    from ..runtime.device_results import Device, read_results
    from ..runtime.formats import read
    from ..runtime.summary import read_summary

    if "passes" in _read(summary):
        run = read_run(summary)
    else:  # results of a device without a run
        device = [summary, *(device or ())]
        run = read_summary({"model": "Measured on the device"}, str(summary))
    for path in device or ():
        run.devices.append(read(Device, read_results(path), str(path)))
    path = out or summary.with_name("report.html")
    runtime.write_report(run, path)
    console.print(str(path), soft_wrap=True)


def read_run(path: Path) -> Summary:
    """Read summary.json of a run. Raises BadInput, which names the first wrong field, for another file."""
    from ..runtime.summary import read_summary

    return read_summary(_read(path), str(path))


def _read(path: Path) -> dict[str, Any]:
    """Read summary.json of a run or results.json of a bench bundle. Raises BadInput for another file."""
    from ..graph.files import read_json

    values = read_json(path)
    if not isinstance(values, dict) or not {"passes", "format"} & values.keys():
        raise BadInput(f"{path}: not a summary.json of graphcomb run")
    return values
