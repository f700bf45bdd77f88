"""The top of the report: the sentence under the title, and a tile for each headline figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..devices.table import TARGETS
from ..measure.places import latency_place
from .devices import compared
from .reading import SIDES, costs, items, mapping, metric_name, timings
from .text import against, change, counted, exact, milliseconds, number, percent, score_format, si, size, times


@dataclass
class Tile:
    """One headline figure: label, value, and a line below it. state "watch" draws attention."""

    label: str
    value: str
    detail: str = ""
    state: str = ""


def lead(summary: Mapping[str, Any]) -> str:
    """How much smaller and faster the program became, in one sentence."""
    parts = []
    for key, noun in (("macs", "multiply-accumulates"), ("params", "parameters")):
        if (ratio := costs(summary, key)[2]) is not None:
            parts.append(f"{against(ratio, 'fewer', 'more')} {noun}")
    if (ratio := number(summary.get("latency_ratio"))) is not None:
        parts.append(f"{against(ratio, 'faster', 'slower')} in {latency_place(summary)}")
    return ", ".join(parts)


def tiles(summary: Mapping[str, Any], engines: list[Mapping[str, Any]]) -> list[Tile]:
    """The headline figures that the summary has."""
    found = [
        *_quality(summary),
        *_costs(summary),
        *_latency(summary),
        *_prediction(summary),
        *_surgery(summary),
        *_parity(summary, engines),
        *map(_engine, engines),
    ]
    if not engines and summary.get("engine"):
        found.append(Tile("engine", Path(str(summary["engine"])).name))
    return found


def _quality(summary: Mapping[str, Any]) -> list[Tile]:
    before, after = number(summary.get("accuracy_before")), number(summary.get("accuracy_after"))
    if after is None and before is None:
        return []
    metric = metric_name(summary)
    score = score_format(before, after, metric=metric)
    detail = ""
    if before is not None and after is not None:
        factor, unit = (100, " points") if score is percent else (1, "")
        difference = f"{(after - before) * factor:+.2f}".replace("-", "−")
        detail = f"from {score(before)}, {difference}{unit}"
    return [Tile(metric, score(before if after is None else after), detail)]


def _costs(summary: Mapping[str, Any]) -> list[Tile]:
    found = []
    for key, label in (("macs", "multiply-accumulates"), ("params", "parameters")):
        before, after, ratio = costs(summary, key)
        if ratio is not None or after is not None:
            value = si(after) if ratio is None else against(ratio, "fewer", "more")
            found.append(Tile(label, value, f"{si(before)} → {si(after)}" if before and after else ""))
    return found


def _latency(summary: Mapping[str, Any]) -> list[Tile]:
    bench = mapping(summary.get("bench"))
    ratio, note = number(summary.get("latency_ratio")), str(bench.get("note") or "")
    predicted = number(summary.get("latency_predicted"))
    if ratio is None and predicted is not None:
        detail = f"predicted; not measured: {note}" if note else "predicted, not measured"
        return [Tile("latency", against(predicted, "faster", "slower"), detail, "watch")]
    if ratio is None:
        return [Tile("latency", "no figure", note, "watch")] if note else []
    medians = [row["median"] for row in timings(summary).values()]
    details = [" → ".join(map(milliseconds, medians))] if len(medians) == 2 else []
    spread = next((row for row in mapping(bench.get("ratios")).values() if row), None)
    low, high = (number(mapping(spread).get(key)) for key in ("p5", "p95"))
    if low is not None and high is not None:
        details.append(f"90\u00a0% of pairs {times(low)} to {times(high)}")
    details.append(f"measured in {latency_place(summary)}")
    target = TARGETS.get(str(summary.get("target")))
    if target is None or target.backend == "onnxruntime":
        if predicted is not None:
            details.append(f"predicted {times(predicted)}, {100 * abs(predicted / ratio - 1):.0f}\u00a0% off")
    else:  # measured on another device than it is predicted for
        if predicted is not None:
            details.append(f"predicted {times(predicted)} on {target.name}")
        details.append(f"says nothing of {target.name}, where padding, start-up of kernels and memory weigh otherwise")
    return [Tile("latency on this processor", against(ratio, "faster", "slower"), ", ".join(details))]


def _prediction(summary: Mapping[str, Any]) -> list[Tile]:
    prediction = mapping(summary.get("prediction"))
    predicted = [ms for side in SIDES if (ms := number(mapping(prediction.get("ms")).get(side))) is not None]
    if not predicted:
        return []
    measured = [f"measured on {where}: {change(map(milliseconds, ms))}" for where, ms, _ in compared(summary)]
    details = []
    if len(predicted) == 2 and all(predicted):
        facts = [against(predicted[0] / predicted[1], "faster", "slower")]
        if prediction.get("precision"):
            facts.append(str(prediction["precision"]))
        if (batch := number(prediction.get("batch"))) is not None:
            facts.append(f"batch {batch:.0f}")
        if not measured:
            facts.append("not measured")
        details.append(", ".join(facts))
    name = f"predicted on {prediction.get('target', '')}"
    return [Tile(name, change(map(milliseconds, predicted)), "; ".join(details + measured))]


def _surgery(summary: Mapping[str, Any]) -> list[Tile]:
    error = number(summary.get("surgery_error"))
    return [] if error is None else [Tile("surgery error", exact(error), "worst, relative, float64")]


def _parity(summary: Mapping[str, Any], engines: list[Mapping[str, Any]]) -> list[Tile]:
    """How far the file is off that the engines were built from."""
    keys = {"fp32": "onnx_parity", "fp16": "onnx_parity_fp16"}
    errors = {name: error for name, key in keys.items() if (error := number(summary.get(key))) is not None}
    if not errors:
        return []
    wanted = str(summary.get("precision") or next((e.get("precision") for e in engines), ""))
    # An INT8 engine is built from a file in fp16 or fp32; without a word about it, from the least exact one.
    precision = wanted if wanted in errors else max(errors, key=lambda name: errors[name])
    export = mapping(mapping(summary.get("onnx")).get(precision))
    details = [
        f"the {precision} file, relative to the fp32 program" if precision != "fp32" else "relative to the program"
    ]
    if (agreement := number(export.get("agreement"))) is not None:
        details.append(f"{100 * agreement:.4g}\u00a0% of decisions on real samples the same")
    if (limit := number(export.get("tolerance"))) is not None:
        details.append(f"limit {limit:g}")
    if kept := len(mapping(export.get("float32"))):
        details.append(f"{counted(kept, 'node')} kept in fp32")
    return [Tile(f"ONNX parity, {precision}", exact(errors[precision]), ", ".join(details))]


def _engine(engine: Mapping[str, Any]) -> Tile:
    padding = len(items(engine.get("padding"), (str, Mapping)))
    padded = counted(padding, "padding kernel") if padding else "no padding kernels"
    name = " ".join(str(engine[k]) for k in ("target", "precision") if engine.get(k))
    detail = f"{len(items(engine.get('kernels')))} kernels, {size(engine.get('bytes'))}, {padded}"
    return Tile("engine", name, detail, "watch" if padding else "")
