"""The report: one self-contained HTML file about a run, made from its summary.

Keys of the summary, all optional; what is missing is left out of the report, unknown keys are ignored.

| key | value |
| --- | --- |
| model, target, precision | text |
| accuracy_before, accuracy_after | number; shares of one are shown in percent |
| metric | what these are, where it is not the accuracy; the figures of another metric are shown as they are |
| cost | `{"before": {"macs", "params"}, "after": {...}}` for the example input |
| macs_ratio, params_ratio | how many times fewer; null where not all MACs are known |
| bench | `BenchResult.to_dict()`, the dense program first |
| latency_ratio, latency_predicted | how many times faster, as measured and as a latency table or roofline predicted |
| prediction | what `predict` says of the program before and after, with measured_ms where that is known |
| prediction_note | why there is no prediction |
| surgery_error | worst relative error of the surgery against the oracle, float64 |
| onnx_parity, onnx_parity_fp16 | relative error of the ONNX file of a precision against the program |
| onnx | `OnnxReport.to_dict()` by precision; agreement and what stayed in fp32 are shown of the one that engines are built from |
| engine | path of the engine file |
| devices | list of what bench bundles measured on devices (`read_results`) |
| engines | list of `EngineReport.to_dict()` |
| passes | list of pass records: pass, options, changed, refused (what, why), layers (name, kind, channels and MACs before and after), cost, seconds, accuracy (before, after), verified (error), epochs (loss, val) |
| environment | anything: versions, CPU, date, seed |
| files | paths of what the run wrote, by kind |
"""  # noqa: E501  (a table's rows)

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

from ...graph.errors import BadInput
from ...graph.files import replacing
from .devices import device_section, profiled_layers
from .engines import PAD_TEXTS, engine_section
from .headline import Tile, lead, tiles
from .layers import LayerRow, layer_rows, prediction_facts, slowest
from .passes import PassRow, Refusal, kernel_facts, pass_row, refusals
from .plots import plots
from .reading import items, mapping, metric_name, pairs
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


def write_report(summary: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the HTML report of a run's summary to `path`; returns the path.

    Raises BadInput when the summary is not a mapping or the file cannot be written.
    """
    if not isinstance(summary, Mapping):
        raise BadInput(f"report: the summary is a mapping of names to values, not a {type(summary).__name__}")
    path = Path(path)
    page = render(summary)
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def render(summary: Mapping[str, Any]) -> str:
    """The report as HTML text."""
    source = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= FILTERS
    return environment.from_string(source).render(report=view(summary), pad_texts=PAD_TEXTS)


def view(summary: Mapping[str, Any]) -> Report:
    """What the page shows of a summary."""
    records, engines = items(summary.get("passes")), items(summary.get("engines"))
    layers = layer_rows(records, items(mapping(summary.get("prediction")).get("layers")), profiled_layers(summary))
    return Report(
        title=str(summary.get("model") or "graphcomb run"),
        lead=lead(summary),
        tiles=tiles(summary, engines),
        plots=plots(summary, records, layers),
        layers=layers,
        largest=slowest(layers) if len(layers) > 1 else [],
        prediction=prediction_facts(summary) + kernel_facts(records),
        refusals=refusals(records),
        passes=[pass_row(record) for record in records],
        engines=[engine_section(engine) for engine in engines],
        devices=[device_section(results) for results in items(summary.get("devices"))],
        environment=pairs(summary, ("target", "precision")) + pairs(mapping(summary.get("environment"))),
        files=pairs(mapping(summary.get("files"))),
        metric=metric_name(summary),
        written=datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
    )
