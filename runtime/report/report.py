"""The report: one self-contained HTML file about a run, made from its summary.

It reads a `Summary` (docs/formats.md), any part of which may be empty and is then left out of the report.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ...graph.files import replacing
from ..summary import Summary, read_summary
from .devices import device_section, profiled_layers
from .engines import PAD_TEXTS, engine_section
from .headline import Tile, lead, tiles
from .layers import LayerRow, layer_rows, prediction_facts, slowest
from .passes import PassRow, Refusal, kernel_facts, pass_row, refusals
from .plots import plots
from .reading import pairs
from .text import count, exact, seconds, short_ms, si, size

FILTERS = {"si": si, "size": size, "exact": exact, "count": count, "seconds": seconds, "ms": short_ms}


@dataclass
class Report:
    """Everything the template shows, a field for each section of the page."""

    title: str
    lead: str
    tiles: list[Tile]
    plots: list[tuple[str, Markup]]
    layers: list[LayerRow]
    largest: list[LayerRow]
    prediction: list[tuple[str, str]]
    refusals: list[Refusal]
    passes: list[PassRow]
    engines: list[dict[str, Any]]
    devices: list[dict[str, Any]]
    environment: list[tuple[str, str]]
    files: list[tuple[str, str]]
    metric: str
    written: str


def write_report(summary: Summary | Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the HTML report of a run's summary to `path`; returns the path.

    summary: of a run, or what its JSON file holds, where parts may be missing. Raises BadInput, one line that names the
    field, for one that is not a summary, and for a file that cannot be written.
    """
    path = Path(path)
    page = render(summary if isinstance(summary, Summary) else read_summary(summary, "report"))
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def render(summary: Summary) -> str:
    """The report as HTML text."""
    source = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= FILTERS
    return environment.from_string(source).render(report=view(summary), pad_texts=PAD_TEXTS)


def view(summary: Summary) -> Report:
    """What the page shows of a summary."""
    predicted = summary.prediction.layers if summary.prediction else []
    layers = layer_rows(summary.passes, predicted, profiled_layers(summary))
    return Report(
        title=summary.model or "graphcomb run",
        lead=lead(summary),
        tiles=tiles(summary),
        plots=plots(summary, layers),
        layers=layers,
        largest=slowest(layers) if len(layers) > 1 else [],
        prediction=prediction_facts(summary) + kernel_facts(summary.passes),
        refusals=refusals(summary.passes),
        passes=[pass_row(record) for record in summary.passes],
        engines=[engine_section(engine) for engine in summary.engines],
        devices=[device_section(device) for device in summary.devices],
        environment=[*pairs({"target": summary.target, "precision": summary.precision}), *pairs(summary.environment)],
        files=pairs(summary.files),
        metric=summary.metric,
        written=datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
    )
