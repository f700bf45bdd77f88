"""Write formats.md and summary.schema.json beside this file from the pydantic models of the runtime: `make docs-formats`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from graphcomb.runtime import device_results as results
from graphcomb.runtime import engine_summary as engine
from graphcomb.runtime import summary

FORMATS = (
    summary.Summary, summary.Record, summary.Cost, summary.Change, summary.Scores, summary.Verified, summary.RecordedLayer,
    summary.KernelCount, summary.Epoch, summary.Refused, summary.Planned, summary.PlannedChange, summary.Bench,
    summary.Timing, engine.Engine, engine.Kernel, engine.Origin, engine.Pad, engine.Unfused, summary.Onnx,
    summary.Prediction, summary.PredictedLayer, summary.Predicted, summary.Uncertainty, summary.Calibration, results.Device,
    results.Bundle, results.BundledModel, results.BundledLayer, results.DeviceModel, results.DeviceEngine,
    results.DeviceParity, results.Latency, results.Power, results.ProfiledLayer,
)  # fmt: skip


def pages() -> dict[str, str]:
    """Return the text of each page by the name of its file."""
    schema = summary.Summary.model_json_schema()
    return {"formats.md": markdown(), "summary.schema.json": json.dumps(schema, indent=1) + "\n"}


def markdown() -> str:
    """Return a page with a table of fields for every model."""
    lines = [
        "# JSON formats",
        "",
        "The JSON files that graphcomb writes. Fields may be added; existing fields keep their meaning. summary.schema.json",
        "is the JSON schema of summary.json.",
    ]
    for model in FORMATS:
        lines += ["", f"## {model.__name__}", "", " ".join((model.__doc__ or "").split()), ""]
        lines += ["| field | type | meaning |", "| --- | --- | --- |"]
        for name, field in model.model_fields.items():
            hint = field.annotation
            kind = (
                hint.__name__
                if isinstance(hint, type)
                else re.sub(r"\b(typing|graphcomb\.runtime\.\w+)\.", "", str(hint))
            )
            for python, plain in ((" | ", " or "), ("tuple[str, ...]", "list[str]"), ("None", "null"), ("~T", "any")):
                kind = kind.replace(python, plain)
            optional = "" if field.is_required() else " (optional)"
            lines.append(f"| {field.alias or name} | {kind} | {field.description}{optional} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name, text in pages().items():
        Path(__file__).with_name(name).write_text(text)
