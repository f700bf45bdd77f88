"""Write the report on a run, one self-contained HTML file, from its `Summary` (docs/formats.md).

Parts of the summary that are empty are left out of the report.
"""

import datetime
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...graph.files import replacing
from ..engine_summary import UNFUSED, Engine, Pad
from ..summary import Summary, read_summary
from .reading import pairs
from .sections.devices import device_section, profiled_layers
from .sections.headline import lead, tiles
from .sections.layers import largest_savings, layer_rows, longest_bars, prediction_facts, slowest
from .sections.passes import kernel_facts, pass_row, refusals
from .sections.planned import plan_section
from .sections.plots import plots
from .template import fill
from .text import count, exact, seconds, short_ms, si, size, sort_key

FILTERS = {"si": si, "size": size, "exact": exact, "count": count, "seconds": seconds, "ms": short_ms, "key": sort_key}


PAD_TEXTS = {
    "kernel": "an extra kernel",
    "fused": "inside a kernel that is there anyway",
    "weights": "zeros in the weights",
}


def write_report(summary: Summary | Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the HTML report on a run to `path` and return the path.

    summary: a run's summary, or the parsed JSON of summary.json, in which fields may be missing. Raises BadInput for a value
    that is no summary, naming the first wrong field, and for a file that cannot be written.
    """
    path = Path(path)
    page = render(summary if isinstance(summary, Summary) else read_summary(summary, "report"))
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def render(summary: Summary) -> str:
    """Return the report as HTML text."""
    return fill("report.html.jinja", FILTERS, report=sections(summary), pad_texts=PAD_TEXTS)


def sections(summary: Summary) -> dict[str, Any]:
    """Return the sections of the report for the template, by name."""
    predicted = summary.prediction.layers if summary.prediction else []
    layers = layer_rows(summary.passes, predicted, profiled_layers(summary))
    return {
        "title": summary.model or "graphcomb run",
        "lead": lead(summary),
        "tiles": tiles(summary),
        "plots": plots(summary, layers),
        "plan": plan_section(summary),
        "layers": layers,
        "longest": longest_bars(layers),
        "largest": slowest(layers) if len(layers) > 1 else [],
        "prediction": prediction_facts(summary) + kernel_facts(summary.passes),
        "savings": largest_savings(layers),
        "refusals": refusals(summary.passes),
        "passes": [pass_row(record) for record in summary.passes],
        "engines": [_engine(engine) for engine in summary.engines],
        "devices": [device_section(device) for device in summary.devices],
        "environment": pairs({"target": summary.target, "precision": summary.precision} | summary.environment),
        "files": pairs(summary.files),
        "metric": summary.metric,
        "written": datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
    }


def _engine(engine: Engine) -> dict[str, Any]:
    """Return the section on an engine for the template: library, kernels, padded axes, quantisation that saves nothing."""
    return dict(engine) | {
        "title": f"{engine.backend} {engine.version}".strip(),
        "padding": sum(kernel.padding for kernel in engine.kernels),
        "nodes": len({node for kernel in engine.kernels for node in kernel.nodes}),
        "memory": [(name, size) for name, size in engine.memory.items() if size],
        "pads": [_pad(engine, pad) for pad in engine.pads],
        "unfused": [{"text": UNFUSED.get(r.how, ""), "nodes": r.nodes} for r in engine.unfused if r.how != "wide"],
        "wide": [node for row in engine.unfused if row.how == "wide" for node in row.nodes],
    }


def _pad(engine: Engine, pad: Pad) -> dict[str, Any]:
    """Return a padded axis for the template, with the passes that changed its nodes."""
    passes = [name for node in pad.nodes if node in engine.origins for name in engine.origins[node].passes]
    alignment = "none" if pad.alignment is None else str(pad.alignment)
    return dict(pad) | {"alignment": alignment, "origin": ", ".join(dict.fromkeys(passes))}
