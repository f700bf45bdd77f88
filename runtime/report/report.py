"""The report: one self-contained HTML file about a run, made from its summary.

Keys of the summary, all optional; what is missing is left out of the report, unknown keys are ignored.

| key | value |
| --- | --- |
| model, target, precision | text |
| accuracy_before, accuracy_after | number; shares of one are shown in percent |
| metric | what these are, where it is not the accuracy; the figures of another metric are shown as they are |
| macs_before, macs_after, macs_ratio | multiply-accumulates for the example input; how many times fewer |
| params_before, params_after, params_ratio | parameters |
| cost | `{"before": {"macs", "params"}, "after": {...}}`, instead of the four numbers above |
| latency, or bench | `BenchResult.to_dict()`, the dense program first |
| latency_ratio, latency_predicted | how many times faster, as measured and as a latency table or roofline predicted |
| prediction | what `prediction.predict` says of the program before and after, with measured_ms where that is known |
| surgery_error | worst relative error of the surgery against the oracle, float64 |
| onnx_parity, onnx_parity_fp16 | relative error of the ONNX files against the program: a number each, or one by precision |
| onnx | `OnnxReport.to_dict()` by precision; agreement and what stayed in fp32 are shown of the one that engines are built from |
| engine | path of the engine file |
| devices | list of what bench bundles measured on devices (`measured.read_results`) |
| engine_report, or engines | `EngineReport.to_dict()`, or a list of them |
| records, or passes | list of pass records: pass, options, changed, refused (what, why), layers (name, kind, channels and MACs before and after), cost, seconds, accuracy (before, after), verified (error) |
| training | `{"epochs": [{"loss", "accuracy" or "val"}]}`; by default the epochs in the records |
| environment | anything: versions, CPU, date, seed |
| files | paths of what the run wrote, by kind |
"""  # noqa: E501  (a table's rows)

from __future__ import annotations

import datetime
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from ...graph.errors import BadInput, GraphcombError
from ...graph.workload.layers import Layer as Work
from ...graph.workload.layers import run_seconds
from ..devices.table import TARGETS
from ..engines.base import replacing
from ..engines.trt.log import UNFUSED
from ..measure.places import latency_place
from ..predict.measured import from_dict, kernels
from ..predict.roofline import Roofline, calibration_text
from . import charts

# Longer tables are folded; of the layers the most expensive ones stay in sight.
LONG, IN_SIGHT = 40, 20
SIDES = ("before", "after")
MODES = {"graph": "CUDA graph", "stream": "one by one"}
PAD_TEXTS = {
    "kernel": "an extra kernel",
    "fused": "inside a kernel that is there anyway",
    "weights": "zeros in the weights",
}


def write_report(summary: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the report of a run; returns the path.

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
    environment.filters |= {"si": si, "size": size, "exact": exact, "count": count, "seconds": seconds, "ms": short_ms}
    return environment.from_string(source).render(report=_report(summary), pad_texts=PAD_TEXTS, metric=_metric(summary))


# --------------------------------------------------------------------------------------------------------- view model
@dataclass
class Tile:
    """One headline figure: label, value, and a line below it. state "watch" draws attention."""

    label: str
    value: str
    detail: str = ""
    state: str = ""


@dataclass
class Layer:
    """A layer's output channels (None where it has none), MACs and predicted milliseconds (None where nothing is
    predicted), dense and compressed, and the lengths of their bars in percent. work: padded MACs and bytes, in words;
    bound: what bounds its time; verdict: why it will not profit from fewer channels; measured: of its kernel, in words."""

    name: str
    kind: str
    channels: tuple[float, float] | None
    macs: tuple[float, float]
    channel_bars: tuple[float, float] = (0.0, 0.0)
    mac_bars: tuple[float, float] = (0.0, 0.0)
    ms: tuple[float, float] | None = None
    ms_bars: tuple[float, float] = (0.0, 0.0)
    work: str = ""
    bound: str = ""
    verdict: str = ""
    measured: str = ""


@dataclass
class Step:
    """A pass as the report shows it."""

    name: str
    options: list[tuple[str, str]]
    macs: tuple[float | None, float | None]
    params: tuple[float | None, float | None]
    accuracy: str
    error: str
    changed: int
    refused: int
    seconds: float | None


@dataclass
class Refusal:
    """All that was left alone for one reason: what, and where the reason lies."""

    why: str
    items: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Report:
    """Everything the template shows."""

    title: str
    lead: str
    tiles: list[Tile]
    plots: list[tuple[str, Markup]]
    layers: list[Layer]
    largest: list[Layer]
    prediction: list[tuple[str, str]]
    refusals: list[Refusal]
    steps: list[Step]
    engines: list[dict[str, Any]]
    devices: list[dict[str, Any]]
    environment: list[tuple[str, str]]
    files: list[tuple[str, str]]
    written: str


def _report(summary: Mapping[str, Any]) -> Report:
    records = _list(summary.get("records", summary.get("passes")))
    engines = summary.get("engine_report", summary.get("engines"))
    engines = _list([engines] if isinstance(engines, Mapping) else engines)
    layers = _layers(records, _list(_map(summary.get("prediction")).get("layers")), _profiled(summary))
    most = sorted(layers, key=lambda layer: (max(layer.ms or (0.0,)), layer.macs[0]), reverse=True)[:IN_SIGHT]
    title = str(summary.get("model") or "graphcomb run")
    return Report(
        title=title,
        lead=_lead(summary),
        tiles=_tiles(summary, engines),
        plots=_plots(summary, records, layers),
        layers=layers,
        largest=most if len(layers) > 1 else [],
        prediction=_prediction(summary) + _more_kernels(records),
        refusals=_refusals(records),
        steps=[_step(record) for record in records],
        engines=[_engine(engine) for engine in engines],
        devices=[_device(results) for results in _list(summary.get("devices"))],
        environment=_pairs(summary, ("target", "precision")) + _pairs(_map(summary.get("environment"))),
        files=_pairs(_map(summary.get("files"))),
        written=datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
    )


def _costs(summary: Mapping[str, Any], key: str) -> tuple[float | None, float | None, float | None]:
    """Before, after and how many times fewer."""
    cost = _map(summary.get("cost"))
    before, after = (
        number(summary.get(f"{key}_{when}", _map(cost.get(when)).get(key))) for when in ("before", "after")
    )
    ratio = number(summary.get(f"{key}_ratio"))
    if ratio is None and before and after and f"{key}_ratio" not in summary:  # null: not all are known
        ratio = before / after
    return before, after, ratio


def _lead(summary: Mapping[str, Any]) -> str:
    parts = []
    if (ratio := _costs(summary, "macs")[2]) is not None:
        parts.append(f"{against(ratio, 'fewer', 'more')} multiply-accumulates")
    if (ratio := _costs(summary, "params")[2]) is not None:
        parts.append(f"{against(ratio, 'fewer', 'more')} parameters")
    text = ", ".join(parts)
    if (ratio := number(summary.get("latency_ratio"))) is not None:
        where = latency_place(summary)
        text += f"{', ' if text else ''}{against(ratio, 'faster', 'slower')} in {where}"
    return text


def _tiles(summary: Mapping[str, Any], engines: list[Mapping[str, Any]]) -> list[Tile]:
    tiles = []
    before, after = number(summary.get("accuracy_before")), number(summary.get("accuracy_after"))
    if after is not None or before is not None:
        score = _score(before, after, metric=_metric(summary))
        change = ""
        if before is not None and after is not None:
            points = score is percent
            delta = f"{(after - before) * (100 if points else 1):+.2f}".replace("-", "−")
            change = f"from {score(before)}, {delta}{' points' if points else ''}"
        tiles.append(Tile(_metric(summary), score(before if after is None else after), change))
    for key, label in (("macs", "multiply-accumulates"), ("params", "parameters")):
        before, after, ratio = _costs(summary, key)
        if ratio is not None or after is not None:
            value = si(after) if ratio is None else against(ratio, "fewer", "more")
            tiles.append(Tile(label, value, f"{si(before)} → {si(after)}" if before and after else ""))
    tiles += _latency_tile(summary)
    given = _map(summary.get("prediction"))
    predicted = [ms for side in SIDES if (ms := number(_map(given.get("ms")).get(side))) is not None]
    if predicted:
        details = [
            f"measured on {where}: {_both(map(milliseconds, measured))}" for where, measured, _ in _errors(summary)
        ]
        if len(predicted) == 2 and all(predicted):
            kind, batch = given.get("precision"), number(given.get("batch"))
            about = [str(kind)] * bool(kind) + [f"batch {batch:.0f}"] * (batch is not None)
            details.insert(
                0,
                ", ".join(
                    [
                        against(predicted[0] / predicted[1], "faster", "slower"),
                        *about,
                        *["not measured"] * (not details),
                    ]
                ),
            )
        name = f"predicted on {given.get('target', '')}"
        tiles.append(Tile(name, _both(map(milliseconds, predicted)), "; ".join(details)))
    if (error := number(summary.get("surgery_error"))) is not None:
        tiles.append(Tile("surgery error", exact(error), "worst, relative, float64"))
    tiles += _parity_tile(summary, engines)
    for engine in engines:
        padding = len(_list(engine.get("padding"), (str, Mapping)))
        parts = [f"{len(_list(engine.get('kernels')))} kernels", size(engine.get("bytes"))]
        extra = f"{padding} padding kernel{'s' * (padding != 1)}" if padding else "no padding kernels"
        name = " ".join(str(engine[k]) for k in ("target", "precision") if engine.get(k))
        tiles.append(Tile("engine", name, ", ".join([*parts, extra]), "watch" if padding else ""))
    if not engines and summary.get("engine"):
        tiles.append(Tile("engine", Path(str(summary["engine"])).name))
    return tiles


def _parity_tile(summary: Mapping[str, Any], engines: list[Mapping[str, Any]]) -> list[Tile]:
    """How far the file is off that the engines were built from."""
    given = summary.get("onnx_parity")
    named = dict(given) if isinstance(given, Mapping) else {"fp32": given, "fp16": summary.get("onnx_parity_fp16")}
    found = {str(name): error for name, value in named.items() if (error := number(value)) is not None}
    if not found:
        return []
    wanted = str(summary.get("precision") or next((e.get("precision") for e in engines), ""))
    # An INT8 engine is built from a file in fp16 or fp32; without a word about it, from the least exact one.
    kind = wanted if wanted in found else max(found, key=lambda name: found[name])
    about = _map(_map(summary.get("onnx")).get(kind))
    details = [f"the {kind} file, relative to the fp32 program" if kind != "fp32" else "relative to the program"]
    if (agreement := number(about.get("agreement"))) is not None:
        details.append(f"{100 * agreement:.4g}\u00a0% of decisions on real samples the same")
    if (limit := number(about.get("tolerance"))) is not None:
        details.append(f"limit {limit:g}")
    if kept := len(_map(about.get("float32"))):
        details.append(f"{kept} node{'s' * (kept != 1)} kept in fp32")
    return [Tile(f"ONNX parity, {kind}", exact(found[kind]), ", ".join(details))]


def _latency_tile(summary: Mapping[str, Any]) -> list[Tile]:
    given = _bench(summary)
    ratio, note = number(summary.get("latency_ratio")), str(given.get("note") or "")
    predicted = number(summary.get("latency_predicted"))
    if ratio is None:
        if predicted is not None:
            detail = f"predicted; not measured: {note}" if note else "predicted, not measured"
            return [Tile("latency", against(predicted, "faster", "slower"), detail, "watch")]
        return [Tile("latency", "no figure", note, "watch")] if note else []
    rows = list(_timings(summary).values())
    details = [" → ".join(milliseconds(row["median"]) for row in rows)] if len(rows) == 2 else []
    spread = next((r for r in _map(given.get("ratios")).values() if r), None)
    low, high = (number(_map(spread).get(key)) for key in ("p5", "p95"))
    if low is not None and high is not None:
        details.append(f"90\u00a0% of pairs {times(low)} to {times(high)}")
    details.append(f"measured in {latency_place(summary)}")
    target = TARGETS.get(str(summary.get("target")))
    elsewhere = target is not None and target.backend != "onnxruntime"
    if predicted is not None:
        if not elsewhere:
            details.append(f"predicted {times(predicted)}, {100 * abs(predicted / ratio - 1):.0f}\u00a0% off")
        else:  # measured on another device than it is predicted for
            details.append(f"predicted {times(predicted)} on {target.name if target else ''}")
    if elsewhere and target is not None:
        details.append(f"says nothing of {target.name}, where padding, start-up of kernels and memory weigh otherwise")
    return [Tile("latency on this processor", against(ratio, "faster", "slower"), ", ".join(details))]


def _bench(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    return _map(summary.get("latency", summary.get("bench")))


def _timings(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Percentiles of the latency in ms by item, of the items that have them all."""
    found = {}
    for timing in _list(_bench(summary).get("timings")):
        row = {k: x for k, v in _map(timing.get("ms")).items() if (x := number(v)) is not None}
        if row.keys() >= set(charts.BOX):
            found[str(timing.get("name", ""))] = row
    return found


def _layers(
    records: Iterable[Mapping[str, Any]], predicted: list[Mapping[str, Any]], profiled: Mapping[str, str]
) -> list[Layer]:
    """The layers over all passes: as the first pass that names one found it, and as the last one left it; then with what
    is predicted, in the order of the prediction. profiled: in words, by name."""
    found: dict[str, Layer] = {}
    for record in records:
        for row in _list(record.get("layers")):
            channels, macs = _map(row.get("channels")), _map(row.get("macs"))
            old, new = _sizes(channels.get("before")), _sizes(channels.get("after"))
            if old is None or new is None:
                continue
            work = number(macs.get("before")) or 0.0, number(macs.get("after")) or 0.0
            name = str(row.get("name", ""))
            layer = found.setdefault(name, Layer(name, str(row.get("kind", "")), (old[1], new[1]), work))
            layer.channels = (layer.channels or old)[0], new[1]
            layer.macs = layer.macs[0], work[1]
    layers = []
    for row in predicted:
        name, sides = str(row.get("name", "")), [_map(row.get(side)) for side in SIDES]
        widths = [number(_map(side.get("sizes")).get("outputs")) for side in sides]
        outputs = tuple(width or 0.0 for width in widths) if any(widths) else None
        work = number(sides[0].get("macs")) or 0.0, number(sides[1].get("macs")) or 0.0
        layer = found.pop(name, None) or Layer(name, str(row.get("op", "")), outputs, work)  # type: ignore[arg-type]
        layer.ms = number(sides[0].get("ms")) or 0.0, number(sides[1].get("ms")) or 0.0
        moved = _both([size(side.get("bytes")) for side in sides if side])
        layer.work = ", ".join(filter(None, [_padding(sides), moved]))
        layer.bound = _both(str(side.get("bound", "")) for side in sides if side)
        layer.verdict = str((sides[1] or sides[0]).get("verdict", ""))
        layer.measured = profiled.get(name, "")
        layers.append(layer)
    layers += found.values()
    widest = max((max(layer.channels) for layer in layers if layer.channels), default=0) or 1
    heaviest = max((max(layer.macs) for layer in layers), default=0) or 1
    slowest = max((max(layer.ms) for layer in layers if layer.ms), default=0) or 1
    for layer in layers:
        layer.channel_bars = _bars(layer.channels or (0.0, 0.0), widest)
        layer.mac_bars = _bars(layer.macs, heaviest)
        layer.ms_bars = _bars(layer.ms or (0.0, 0.0), slowest)
    return layers


def _padding(sides: Iterable[Mapping[str, Any]]) -> str:
    """How much the kernels' padding adds to the multiply-accumulates; empty where it adds nothing."""
    pairs = [(number(side.get("macs")), number(side.get("padded_macs"))) for side in sides]
    added = [padded / macs - 1 for macs, padded in pairs if macs and padded]
    return f"padding adds {_both(f'{100 * share:.0f}' for share in added)} %" if any(added) else ""


def _both(texts: Iterable[str]) -> str:
    """Before and after in words, or once where they are the same."""
    return " → ".join(dict.fromkeys(texts))


# ---------------------------------------------------------------------------------------------------------- prediction
def _prediction(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What predicts the time, how far off it is, and how much of it will not fall with the channels."""
    given = _map(summary.get("prediction"))
    if not given:
        note = summary.get("prediction_note")
        return [("predicted time", f"none: {note}")] if note else []
    facts = [("predicted by", str(given.get("by", "")))]
    if (calibration := _map(given.get("calibration"))) and (text := _calibration(calibration)):
        facts.append(("calibration", text))
    doubt = _map(given.get("uncertainty"))
    if (factor := number(doubt.get("factor"))) is not None:
        facts.append(("known error", f"off by up to {factor:.2g} times: {doubt.get('source', '')}"))
    facts += [("error", f"{where}: {text}") for where, _, text in _errors(summary)]
    found: dict[str, list[float]] = {}
    for row in _list(given.get("layers")):
        side = _map(row.get("after")) or _map(row.get("before"))
        found.setdefault(str(side.get("verdict", "")), []).append(number(side.get("ms")) or 0.0)
    whole = sum(map(sum, found.values())) or 1.0
    for verdict, ms in sorted(found.items(), key=lambda pair: -sum(pair[1])):
        if verdict:
            share = f"{len(ms)} layer{'s' * (len(ms) != 1)}, {100 * sum(ms) / whole:.0f}\u00a0% of the time"
            facts.append(("little to gain", f"{verdict}: {share}"))
    return facts


def _more_kernels(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Where a pass left more kernels than there were, and what computes for a softmax that has nothing left to choose."""
    facts = []
    for record in records:
        found, name = _map(record.get("kernels")), str(record.get("pass", ""))
        before, after = number(found.get("before")), number(found.get("after"))
        if before is not None and after is not None and after > before:
            nodes = ", ".join(map(_short, _list(found.get("more"), str)))
            facts.append(("more kernels", f"{name}: {before:.0f} → {after:.0f} predicted; new: {nodes}"))
        for node, feeding in _map(found.get("dead")).items():
            rest = ", ".join(_list(feeding, str))
            facts.append(
                ("dead branch", f"{_short(node)} has a single entry left and decides nothing; only for it: {rest}")
            )
    return facts


def _calibration(record: Mapping[str, Any]) -> str:
    try:
        return calibration_text(record)
    except (KeyError, TypeError, ValueError):
        return ""


def _errors(summary: Mapping[str, Any]) -> list[tuple[str, list[float], str]]:
    """Where the target was measured, the milliseconds before and after, and in words with how far the prediction is off."""
    given = _map(summary.get("prediction"))
    predicted = [number(_map(given.get("ms")).get(side)) for side in SIDES]
    places = [("this machine", [number(_map(given.get("measured_ms")).get(side)) for side in SIDES])]
    for results in _same_target(summary):
        names = list(_map(results.get("models")))
        measured = [_median(_map(_map(results.get("models")).get(name))) for name in (names[0], names[-1])]
        places.append((str(_map(results.get("device")).get("model") or "the device"), measured))
    found = []
    for where, measured in places:
        pairs = [(a, b) for a, b in zip(predicted, measured, strict=True) if a is not None and b]
        if pairs:
            texts = [f"{milliseconds(b)} measured, {milliseconds(a)} predicted ({a / b - 1:+.0%})" for a, b in pairs]
            found.append((where, [b for _, b in pairs], " → ".join(texts).replace("-", "−").replace("%", "\u00a0%")))
    return found


def _same_target(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Devices' results of what the prediction is for."""
    given = _map(summary.get("prediction"))
    wanted = [given.get(key) for key in ("target", "precision")]
    return [
        results
        for results in _list(summary.get("devices"))
        if [_map(results.get("bundle")).get(key) for key in ("target", "precision")] == wanted
        and _map(results.get("models"))
    ]


def _median(model: Mapping[str, Any]) -> float | None:
    """Milliseconds of a run on a device, in a CUDA graph where it could be."""
    found = _map(model.get("latency"))
    mode = _map(found.get("graph") or found.get("stream"))
    return number(_map(mode.get("gpu_ms") or mode.get("host_ms")).get("median"))


def _profiled(summary: Mapping[str, Any]) -> dict[str, str]:
    """What a device's profiler measured for the kernel of each layer, in words. A kernel that computes several layers is
    shown with the one that has the most multiply-accumulates."""
    found: dict[str, str] = {}
    for results in _same_target(summary):
        times: dict[str, list[tuple[float, int]]] = {}
        names = list(_map(results.get("models")))
        for name in (names[0], names[-1]):
            rows, profile = _kernels(results, name)
            for which, _, ms in profile:
                if which:
                    main = max(which, key=lambda i: number(rows[i].get("macs")) or 0.0)
                    times.setdefault(str(rows[main].get("name")), []).append((ms, len(which) - 1))
        for name, pairs in times.items():
            others = max(n for _, n in pairs)
            beside = f" with {others} other{'s' * (others != 1)}" if others else ""
            found[name] = f"measured {_both(milliseconds(ms) for ms, _ in pairs)}{beside}"
    return found


def _kernels(results: Mapping[str, Any], name: str) -> tuple[list[Any], list[tuple[set[int], list[str], float]]]:
    """The layers of a bundle's model, and the kernels of its profile with the layers that each computes."""
    model = _map(_map(results.get("models")).get(name))
    rows = _list(_map(_map(_map(results.get("bundle")).get("models")).get(name)).get("layers"))
    named = [{"onnx": [str(text) for text in row.get("onnx") or ()]} for row in rows]
    profile = [
        {"name": str(row.get("name", "")), "ms": row["ms"]}
        for row in _list(model.get("layers"))
        if number(row.get("ms")) is not None
    ]
    inspector = _list(_map(model.get("engine")).get("inspector"))
    return rows, kernels({"layers": profile, "engine": {"inspector": inspector}}, named)


def _roofline(results: Mapping[str, Any]) -> Roofline | None:
    """Calibrated with the results themselves, where they allow it."""
    try:
        return Roofline.calibrated(results)
    except GraphcombError:
        return None


def _work(roofline: Roofline | None, rows: list[Any], which: Iterable[int], count: int) -> tuple[str, str]:
    """Predicted time of a kernel and what bounds it, in words; empty where its layers are not known."""
    if roofline is None or not which:
        return "", ""
    layers: list[Work] = [from_dict(rows[i]) for i in sorted(which)]
    found = [roofline.estimate(layer) for layer in layers]
    ms = 1e3 * (count * roofline.start + sum(e.seconds - e.launch for e in found))
    return milliseconds(ms), max(found, key=lambda e: e.seconds).bound


def _bars(pair: tuple[float, float], whole: float) -> tuple[float, float]:
    return round(100 * pair[0] / whole, 2), round(100 * pair[1] / whole, 2)


# A reason of the comb's: the node that froze the axis, where that is in the source, and why.
REASON = re.compile(r"^(\S+)(?: \((.*)\))?: (.+)$", re.DOTALL)


def _refusals(records: Iterable[Mapping[str, Any]]) -> list[Refusal]:
    """What was left alone, by reason, the most frequent first."""
    groups: dict[str, Refusal] = {}
    for record in records:
        for row in _list(record.get("refused")):
            reason = REASON.match(str(row.get("why", "")))
            why = reason[3] if reason else str(row.get("why", "")) or "no reason given"
            place = f"{reason[1]} {_short(reason[2])}".strip() if reason else ""
            item = str(row.get("what", "")), place
            group = groups.setdefault(why, Refusal(why))
            if item not in group.items:
                group.items.append(item)
    return sorted(groups.values(), key=lambda group: -len(group.items))


def _short(place: str | None) -> str:
    """The end of a source path, with the line and its text."""
    return re.sub(r"^\S*/([^/\s]+/[^/\s]+:\d+)", r"\1", place or "")


def _step(record: Mapping[str, Any]) -> Step:
    cost = _map(record.get("cost"))
    before, after = _map(cost.get("before")), _map(cost.get("after"))
    accuracy = _map(record.get("accuracy"))
    scores = [number(accuracy.get(when)) for when in ("before", "after")]
    score = _score(*scores, metric=str(accuracy.get("metric") or "accuracy"))
    return Step(
        name=str(record.get("pass", "")),
        options=[(k, _plain(v)) for k, v in _map(record.get("options")).items() if v not in (None, [], (), {})],
        macs=(number(before.get("macs")), number(after.get("macs"))),
        params=(number(before.get("params")), number(after.get("params"))),
        accuracy=score(scores[1]) if scores[1] is not None else "",
        error=exact(_map(record.get("verified")).get("error")),
        changed=len(_list(record.get("changed"), (str, Mapping))),
        refused=len(_list(record.get("refused"))),
        seconds=number(record.get("seconds")),
    )


def _engine(engine: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's report with what the template needs made sure of."""
    kernels: list[dict[str, Any]] = [
        {
            "name": str(kernel.get("name", "")),
            "kind": str(kernel.get("kind", "")),
            "padding": bool(kernel.get("padding")),
        }
        | {key: _list(kernel.get(key), str) for key in ("nodes", "inputs", "outputs")}
        for kernel in _list(engine.get("kernels"))
    ]
    memory = {str(k): number(v) for k, v in _map(engine.get("memory")).items()}
    return {
        "title": " ".join(str(engine[k]) for k in ("backend", "version") if engine.get(k)),
        "target": engine.get("target", ""),
        "precision": engine.get("precision", ""),
        "path": str(engine.get("path", "")),
        "bytes": engine.get("bytes"),
        "seconds": number(engine.get("seconds")),
        "kernels": kernels,
        "padding": sum(kernel["padding"] for kernel in kernels),
        "nodes": len({node for kernel in kernels for node in kernel["nodes"]}),
        "memory": [(name, value) for name, value in memory.items() if value],
        "pads": [_pad(engine, pad) for pad in _list(engine.get("pads"))],
        "unfused": [
            {"text": UNFUSED.get(str(row.get("how")), ""), "nodes": _list(row.get("nodes"), str)}
            for row in _list(engine.get("unfused"))
            if row.get("how") != "wide"
        ],
        "wide": [
            n for row in _list(engine.get("unfused")) if row.get("how") == "wide" for n in _list(row.get("nodes"), str)
        ],
        "warnings": _list(engine.get("warnings"), str),
    }


def _pad(engine: Mapping[str, Any], pad: Mapping[str, Any]) -> dict[str, Any]:
    """A padded axis, with the passes that changed its nodes."""
    nodes, origins = _list(pad.get("nodes"), str), _map(engine.get("origins"))
    passes = [name for node in nodes for name in _list(_map(origins.get(node)).get("passes"), str)]
    texts = {key: str(pad.get(key, "")) for key in ("kernel", "how", "axis", "before", "after", "note")}
    texts["alignment"] = "none" if (alignment := pad.get("alignment", "")) is None else str(alignment)
    return texts | {"nodes": nodes, "origin": ", ".join(dict.fromkeys(passes))}


def _device(results: Mapping[str, Any]) -> dict[str, Any]:
    """What one device measured: a row for each model and way to run it, and the slowest layers."""
    about, bundle = _map(results.get("device")), _map(results.get("bundle"))
    rows, layers, roofline = [], [], _roofline(results)
    models = _map(results.get("models"))
    abouts = [_map(_map(bundle.get("models")).get(name)) for name in models]
    kinds = [str(about.get("precision") or bundle.get("precision") or "") for about in abouts]
    wrong = {str(name) for name, model in models.items() if _wrong(_map(_map(model).get("parity")))}
    for (name, model), kind in zip(models.items(), kinds, strict=True):
        model, power = _map(model), _map(_map(model).get("power"))
        own = roofline if roofline is not None and kind == roofline.dtype else None
        for mode, found in _map(model.get("latency")).items():
            ms = _map(_map(found).get("gpu_ms", _map(found).get("host_ms")))
            median, p99 = number(ms.get("median")), number(ms.get("p99"))
            ratio = number(_map(_map(_map(results.get("ratios")).get(name)).get(mode)).get("median"))
            watts, energy = number(power.get("total_mw")), number(power.get("energy_mj"))
            parity = _map(model.get("parity"))
            faster = against(ratio, "faster", "slower") if ratio is not None else ""
            if faster and wrong & {next(iter(models)), name}:
                faster += ", with wrong outputs"
            rows.append(
                {
                    "name": str(name),
                    "mode": MODES.get(str(mode), str(mode)),
                    "median": milliseconds(median) if median is not None else "–",
                    "p99": milliseconds(p99) if p99 is not None else "–",
                    "ratio": faster,
                    "power": f"{watts / 1000:.3g} W" if watts is not None else "",
                    "energy": f"{energy:.3g} mJ" if energy is not None else "",
                    "error": exact(parity.get("error")) or str(parity.get("note") or "no figure"),
                    "bad": str(name) in wrong,
                    "predicted": _predicted(own, results, str(name)) if median == _median(model) else "",
                }
            )
        known, profile = _kernels(results, str(name))
        whole = sum(kernel[2] for kernel in profile) or 1.0
        for which, names, spent in sorted(profile, key=lambda kernel: -kernel[2])[:IN_SIGHT]:
            work = _work(own, known, which, len(names))
            layers.append((str(name), ", ".join(names), spent, spent / whole, *work))
    temperatures = []
    for name, model in models.items():
        zones = _map(_map(_map(model).get("power")).get("temperatures_c"))
        if texts := [f"{zone} {x:.0f} °C" for zone, value in zones.items() if (x := number(value)) is not None]:
            temperatures.append(f"{name}: {', '.join(texts)}")
    calibration = _map(roofline.calibration) if roofline else {}
    facts = {key: about.get(key) for key in ("model", "power_mode", "l4t", "system", "python")}
    facts |= {"library": " ".join(str(results[k]) for k in ("engine", "version") if results.get(k))}
    facts |= {
        "precision": kinds[0] if len({*kinds}) == 1 else ", ".join(map(": ".join, zip(models, kinds, strict=True))),
        "date": results.get("date"),
        "prediction": f"{roofline}; {_calibration(calibration)}" if roofline else "",
        "temperatures": "; ".join(temperatures),
    }
    return {
        "title": str(about.get("model") or about.get("machine") or "a device"),
        "facts": _pairs(facts),
        "rows": rows,
        "layers": layers,
        "notes": [str(note) for note in results.get("notes") or ()],
    }


def _wrong(parity: Mapping[str, Any]) -> bool:
    """Whether a model's outputs are not those of the reference."""
    error, tolerance = number(parity.get("error")), number(parity.get("tolerance"))
    return error is None or (tolerance is not None and error > tolerance)


def _predicted(roofline: Roofline | None, results: Mapping[str, Any], name: str) -> str:
    """A run's predicted time, with how far it is off, in words."""
    rows, measured = _kernels(results, name)[0], _median(_map(_map(results.get("models")).get(name)))
    if roofline is None or not rows or not measured:
        return ""
    ms = 1e3 * run_seconds(roofline, map(from_dict, rows))
    return f"{milliseconds(ms)} ({ms / measured - 1:+.0%})".replace("-", "−").replace("%", "\u00a0%")


# -------------------------------------------------------------------------------------------------------------- plots
def _plots(
    summary: Mapping[str, Any], records: list[Mapping[str, Any]], layers: list[Layer]
) -> list[tuple[str, Markup]]:
    """Caption and SVG, with its numbers in words, of every plot that the summary has the numbers for."""
    plots: list[tuple[str, str, str]] = []
    timings = _timings(summary)
    path = _trajectory(summary, records)
    metric = _metric(summary)
    ticks = _ticks((value for _, value, _ in path), metric)

    def trade_off(name: str, points: list[tuple[float, float, str]], what: str, text: Callable[[float], str]) -> None:
        caption = f"{metric.capitalize()} against {'latency on ' + what if name.startswith('device') else what}"
        label = "median latency" if name != "macs" else what
        words = "; ".join(f"{stage}: {text(cost)}, {ticks(value)}" for cost, value, stage in points)
        plots.append((caption, charts.trade_off(name, points, label, text, metric, ticks), words))

    def profile(caption: str, name: str, pairs: list[tuple[float, float]], text: Callable[[float], str]) -> None:
        before, after = ([pair[i] for pair in pairs] for i in (0, 1))
        most = max(range(len(pairs)), key=lambda i: before[i])
        words = (
            f"{len(pairs)} layers in the order of the network, {text(sum(before))} before and {text(sum(after))} after; "
            f"the largest is layer {most + 1}, {text(before[most])} before and {text(after[most])} after"
        )
        plots.append((caption, charts.profile(name, before, after, "", text), words))

    if len(path) > 1:
        trade_off("macs", path, "multiply-accumulates", si)
    if len(path) > 1 and len(timings) == 2:
        medians = [row["median"] for row in timings.values()]
        points = [(medians[0], path[0][1], "dense"), (medians[1], path[-1][1], "compressed")]
        trade_off("latency", points, "latency", milliseconds)
    for i, results in enumerate(_list(summary.get("devices")) if len(path) > 1 else ()):
        medians = [_median(_map(model)) or 0.0 for model in _map(results.get("models")).values()]
        if len(medians) > 1 and medians[0] and medians[-1]:
            points = [(medians[0], path[0][1], "dense"), (medians[-1], path[-1][1], "compressed")]
            where = _map(results.get("device")).get("model") or "a device"
            trade_off(f"device-{i}", points, str(where), milliseconds)
    if any(layer.macs[0] for layer in layers):
        profile("Multiply-accumulates of each layer", "work", [layer.macs for layer in layers if any(layer.macs)], si)
    if wide := [layer.channels for layer in layers if layer.channels]:
        profile("Output channels of each layer", "channels", wide, count)
    if timed := [layer.ms for layer in layers if layer.ms]:
        profile("Predicted time of each layer", "times", timed, milliseconds)
    if timings:
        words = "; ".join(
            f"{name}: median {milliseconds(row['median'])}, nine of ten from {milliseconds(row['p5'])} to "
            f"{milliseconds(row['p95'])}"
            for name, row in timings.items()
        )
        plots.append(("Latency of single calls", charts.ranges("calls", timings, "", milliseconds), words))
    if training := _training(summary, records):
        texts = {"loss": plain_score, "accuracy": _ticks((value for _, value in training.get("accuracy", [])), metric)}
        words = "; ".join(
            f"{name}: {texts[name](points[0][1])} in epoch {points[0][0]:g}, {texts[name](points[-1][1])} in epoch "
            f"{points[-1][0]:g}"
            for name, points in training.items()
        )
        plots.append(("Training", charts.curves("training", training, texts), words))
    return [(caption, _described(svg, f"{caption}. {words}")) for caption, svg, words in plots]


def _described(svg: str, words: str) -> Markup:
    """An image for those who do not see it."""
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(words)}"', 1))


def _trajectory(summary: Mapping[str, Any], records: list[Mapping[str, Any]]) -> list[tuple[float, float, str]]:
    """MACs, accuracy and name of the dense program and of every stage whose accuracy is known. Stages that change
    neither are one point."""
    first, last, _ = _costs(summary, "macs")
    start, end = number(summary.get("accuracy_before")), number(summary.get("accuracy_after"))
    points = [(first, start, "dense")]
    for record in records:
        macs = number(_map(_map(record.get("cost")).get("after")).get("macs"))
        points.append((macs, number(_map(record.get("accuracy")).get("after")), str(record.get("pass", ""))))
    points.append((last, end, "compressed"))
    known: list[tuple[float, float, str]] = []
    for macs, value, name in points:
        if macs is not None and value is not None and (macs, value) not in [p[:2] for p in known]:
            known.append((macs, value, name))
    return known


def _training(summary: Mapping[str, Any], records: list[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Loss and accuracy over the epochs, as far as they were noted."""
    given = _map(summary.get("training")).get("epochs")
    epochs = _list(given) or [epoch for record in records for epoch in _list(record.get("epochs"))]
    series: dict[str, list[tuple[float, float]]] = {}
    for i, epoch in enumerate(epochs, 1):
        for name, keys in (("loss", ("loss",)), ("accuracy", ("accuracy", "val"))):
            value = next((v for key in keys if (v := number(epoch.get(key))) is not None), None)
            if value is not None:
                series.setdefault(name, []).append((i, value))
    return series


# ----------------------------------------------------------------------------------------------------------- the text
def si(value: Any) -> str:
    """A count in steps of a thousand: 4.09 G."""
    found = number(value)
    if found is None:
        return "–"
    for unit in ("", " k", " M", " G", " T"):
        if abs(found) < 999.5 or unit == " T":
            break
        found /= 1000
    return f"{found:.3g}{unit}"


def size(value: Any) -> str:
    """Bytes: 10.6 MB."""
    found = number(value)
    return "–" if found is None else f"{si(found)}{'' if abs(found) >= 999.5 else ' '}B"


def count(value: Any) -> str:
    """A whole number with thousands separated."""
    found = number(value)
    return "–" if found is None else f"{found:,.0f}"


def exact(value: Any) -> str:
    """A small error: 3.1e-14, and 0 for none at all."""
    found = number(value)
    return "" if found is None else f"{found:.1e}" if found else "0"


def times(value: Any) -> str:
    """A ratio: 3.94×."""
    found = number(value)
    return "–" if found is None else f"{found:.3g}×" if found < 100 else f"{found:,.0f}×"


def against(ratio: float, better: str, worse: str) -> str:
    """A ratio in words: 3.94× faster, 1.1× slower."""
    return f"{times(ratio)} {better}" if ratio >= 1 or ratio <= 0 else f"{times(1 / ratio)} {worse}"


def percent(value: Any) -> str:
    found = number(value)
    return "–" if found is None else f"{100 * found:.2f}\u00a0%"


def round_percent(value: float) -> str:
    """For an axis: no more digits than the tick has."""
    return f"{100 * value:.6g} %"


def plain_score(value: Any) -> str:
    found = number(value)
    return "–" if found is None else f"{found:.4g}"


def milliseconds(value: float) -> str:
    return f"{value:.3g} ms"


def short_ms(value: float) -> str:
    """Milliseconds without the unit."""
    return f"{value:.3g}"


def seconds(value: float) -> str:
    return milliseconds(1000 * value) if value < 0.1 else f"{value:.1f} s"


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def _metric(summary: Mapping[str, Any]) -> str:
    """What the run's figure of quality is called."""
    return str(summary.get("metric") or "accuracy")


def _score(*values: float | None, metric: str = "accuracy") -> Callable[[Any], str]:
    """How to write a metric: in percent when it is an accuracy and a share."""
    share = metric.endswith("accuracy") and all(0 <= value <= 1 for value in values if value is not None)
    return percent if share else plain_score


def _ticks(values: Iterable[float], metric: str = "accuracy") -> Callable[[Any], str]:
    return round_percent if _score(*values, metric=metric) is percent else plain_score


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return str(value)


def _pairs(values: Mapping[str, Any], keys: Iterable[str] | None = None) -> list[tuple[str, str]]:
    chosen = values.keys() if keys is None else keys
    return [(str(key), _plain(values[key])) for key in chosen if values.get(key) not in (None, "", [], {})]


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any, kinds: type | tuple[type, ...] = Mapping) -> list[Any]:
    return [item for item in value if isinstance(item, kinds)] if isinstance(value, list | tuple) else []


def _sizes(value: Any) -> tuple[float, float] | None:
    """Input and output channels."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    ins, outs = number(value[0]), number(value[1])
    return None if ins is None or outs is None else (ins, outs)
