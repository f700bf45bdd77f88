"""The top of the report: the sentence below the title, and a tile for each headline figure."""

from dataclasses import dataclass
from pathlib import Path

from ...devices.table import TARGETS
from ...engine_summary import Engine
from ...summary import Summary
from ..reading import costs, latency_place, timings
from ..text import (
    NOT_FINITE,
    against,
    change,
    counted,
    exact,
    milliseconds,
    number,
    percent,
    score_format,
    si,
    size,
    times,
)
from .devices import compared


@dataclass
class Tile:
    """One headline figure: label, value, and a line of detail. state: "watch" highlights the tile."""

    label: str
    value: str
    detail: str = ""
    state: str = ""


def lead(summary: Summary) -> str:
    """Return one sentence on how much smaller and faster the program became."""
    parts = []
    for key, noun in (("macs", "multiply-accumulates"), ("params", "parameters")):
        if (ratio := costs(summary, key)[2]) is not None:
            parts.append(f"{against(ratio, 'fewer', 'more')} {noun}")
    if (ratio := number(summary.latency_ratio)) is not None:
        parts.append(f"{against(ratio, 'faster', 'slower')} in {latency_place(summary)}")
    return ", ".join(parts)


def tiles(summary: Summary) -> list[Tile]:
    """Return a tile for each headline figure that the summary has."""
    made = [
        *_quality(summary),
        *_latency(summary),
        *_costs(summary),
        *_prediction(summary),
        *_surgery(summary),
        *_parity(summary),
        *map(_engine, summary.engines),
    ]
    if not summary.engines and summary.engine:
        made.append(Tile("engine", Path(summary.engine).name))
    return made


def _quality(summary: Summary) -> list[Tile]:
    before, after = number(summary.accuracy_before), number(summary.accuracy_after)
    if summary.accuracy_after is None and before is None:
        return []
    score = score_format(before, after, metric=summary.metric)
    if after is None:  # the outputs of the compressed program may be NaN, which summary.json has as null
        return [Tile(summary.metric, NOT_FINITE, f"from {score(before)}", "watch")]
    details = []
    if before is not None:
        factor, unit = (100, " points") if score is percent else (1, "")
        difference = f"{(after - before) * factor:+.2f}".replace("-", "−")
        details.append(f"from {score(before)}, {difference}{unit}")
    ends = [end for end in summary.accuracy_interval or () if number(end) is not None]
    if len(ends) == 2:
        details.append(f"95\u00a0% interval {score(ends[0])} to {score(ends[1])}")
    return [Tile(summary.metric, score(after), "; ".join(details))]


def _costs(summary: Summary) -> list[Tile]:
    tiles = []
    for key, label in (("macs", "multiply-accumulates"), ("params", "parameters")):
        before, after, ratio = costs(summary, key)
        if ratio is not None or after is not None:
            value = si(after) if ratio is None else against(ratio, "fewer", "more")
            tiles.append(Tile(label, value, f"{si(before)} → {si(after)}" if before and after else ""))
    return tiles


def _latency(summary: Summary) -> list[Tile]:
    bench, ratio, predicted = summary.bench, number(summary.latency_ratio), number(summary.latency_predicted)
    note = bench.note if bench else ""
    if ratio is None and predicted is not None:
        detail = f"predicted; not measured: {note}" if note else "predicted, not measured"
        return [Tile("latency", against(predicted, "faster", "slower"), detail, "watch")]
    if ratio is None:
        return [Tile("latency", "no figure", note, "watch")] if note else []
    medians = [row["median"] for row in timings(summary).values()]
    details = [" → ".join(map(milliseconds, medians))] if len(medians) == 2 else []
    spread = next(filter(None, bench.ratios.values()), {}) if bench else {}
    if {"low", "high"} <= spread.keys():
        details.append(f"95\u00a0% interval of the median {times(spread['low'])} to {times(spread['high'])}")
    if {"p5", "p95"} <= spread.keys():
        details.append(f"90\u00a0% of pairs {times(spread['p5'])} to {times(spread['p95'])}")
    target = TARGETS.get(summary.target)
    if target is None or target.processor:
        if predicted is not None:
            details.append(f"predicted {times(predicted)}, {100 * abs(predicted / ratio - 1):.0f}\u00a0% off")
    else:  # the target is another device than the measured processor
        if predicted is not None:
            details.append(f"predicted {times(predicted)} on {target.name}")
        details.append(f"another device than {target.name}, where padding and kernel launches weigh otherwise")
    return [Tile("latency on this processor", against(ratio, "faster", "slower"), ", ".join(details))]


def _prediction(summary: Summary) -> list[Tile]:
    prediction = summary.prediction
    if prediction is None or not prediction.ms:
        return []
    predicted = list(prediction.ms.values())
    measured = [f"measured on {where}: {change(map(milliseconds, ms))}" for where, ms, _ in compared(summary)]
    details = []
    if len(predicted) == 2 and all(predicted):
        faster = against(predicted[0] / predicted[1], "faster", "slower")
        facts = [faster, prediction.precision, f"batch {prediction.batch}", *([] if measured else ["not measured"])]
        details.append(", ".join(facts))
    name = f"predicted on {prediction.target}"
    return [Tile(name, change(map(milliseconds, predicted)), "; ".join(details + measured))]


def _surgery(summary: Summary) -> list[Tile]:
    error = number(summary.surgery_error)
    return [] if error is None else [Tile("surgery error", exact(error), "worst, relative, float64")]


def _parity(summary: Summary) -> list[Tile]:
    """Return a tile with the error of the ONNX file that the engines were built from."""
    files = {"fp32": number(summary.onnx_parity), "fp16": number(summary.onnx_parity_fp16)}
    errors = {name: error for name, error in files.items() if error is not None}
    if not errors:
        return []
    wanted = summary.precision or next((engine.precision for engine in summary.engines), "")
    # An INT8 engine is built from a file in fp16 or fp32. If the summary does not say which, take the less exact one.
    precision = wanted if wanted in errors else max(errors, key=lambda name: errors[name])
    export = summary.onnx.get(precision)
    details = [
        f"the {precision} file, relative to the fp32 program" if precision != "fp32" else "relative to the program"
    ]
    if export and export.agreement is not None:
        details.append(f"{100 * export.agreement:.4g}\u00a0% of decisions on real samples the same")
    if export:
        details.append(f"limit {export.tolerance:g}")
    if export and export.float32:
        details.append(f"{counted(len(export.float32), 'node')} kept in fp32")
    return [Tile(f"ONNX parity, {precision}", exact(errors[precision]), ", ".join(details))]


def _engine(engine: Engine) -> Tile:
    padding = len(engine.padding)
    padded = counted(padding, "padding kernel") if padding else "no padding kernels"
    detail = f"{len(engine.kernels)} kernels, {size(engine.bytes)}, {padded}"
    return Tile("engine", f"{engine.target} {engine.precision}".strip(), detail, "watch" if padding else "")
