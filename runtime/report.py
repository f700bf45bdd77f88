"""The report: one self-contained HTML file about a run, made from its summary.

Keys of the summary, all optional; what is missing is left out of the report, unknown keys are ignored.

| key | value |
| --- | --- |
| model, target, precision | text |
| accuracy_before, accuracy_after | number; shares of one are shown in percent |
| macs_before, macs_after, macs_ratio | multiply-accumulates for the example input; how many times fewer |
| params_before, params_after, params_ratio | parameters |
| cost | `{"before": {"macs", "params"}, "after": {...}}`, instead of the four numbers above |
| latency, or bench | `BenchResult.to_dict()`, the dense program first |
| latency_ratio, latency_predicted | how many times faster, as measured and as a latency table or roofline predicted |
| surgery_error | worst relative error of the surgery against the oracle, float64 |
| onnx_parity | relative error of the ONNX file against the program: a number, or one by precision |
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
from markupsafe import Markup

from ..graph.errors import BadInput
from . import charts
from .build_log import UNFUSED
from .engine import replacing

# Longer tables are folded; of the layers the most expensive ones stay in sight.
LONG, IN_SIGHT = 40, 20
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
    environment.filters |= {"si": si, "size": size, "exact": exact, "count": count, "seconds": seconds}
    return environment.from_string(source).render(report=_report(summary), pad_texts=PAD_TEXTS)


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
    """A layer's output channels and MACs, dense and compressed, and the lengths of its bars in percent."""

    name: str
    kind: str
    channels: tuple[float, float]
    macs: tuple[float, float]
    channel_bars: tuple[float, float] = (0.0, 0.0)
    mac_bars: tuple[float, float] = (0.0, 0.0)


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
    layers = _layers(records)
    most = sorted(layers, key=lambda layer: layer.macs[0], reverse=True)[:IN_SIGHT]
    title = str(summary.get("model") or "graphcomb run")
    return Report(
        title=title,
        lead=_lead(summary),
        tiles=_tiles(summary, engines),
        plots=_plots(summary, records, layers),
        layers=layers,
        largest=[layer for layer in layers if layer in most] if len(layers) > LONG else [],
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
    if ratio is None and before and after:
        ratio = before / after
    return before, after, ratio


def _lead(summary: Mapping[str, Any]) -> str:
    parts = []
    if (ratio := _costs(summary, "macs")[2]) is not None:
        parts.append(f"{against(ratio, 'fewer', 'more')} multiply-accumulates")
    if (ratio := _costs(summary, "params")[2]) is not None:
        parts.append(f"{against(ratio, 'fewer', 'more')} parameters")
    if (ratio := number(summary.get("latency_ratio"))) is not None:
        parts.append(against(ratio, "faster", "slower"))
    return ", ".join(parts)


def _tiles(summary: Mapping[str, Any], engines: list[Mapping[str, Any]]) -> list[Tile]:
    tiles = []
    before, after = number(summary.get("accuracy_before")), number(summary.get("accuracy_after"))
    if after is not None or before is not None:
        score = _score(before, after)
        change = ""
        if before is not None and after is not None:
            points = score is percent
            delta = f"{(after - before) * (100 if points else 1):+.2f}".replace("-", "−")
            change = f"from {score(before)}, {delta}{' points' if points else ''}"
        tiles.append(Tile("accuracy", score(before if after is None else after), change))
    for key, label in (("macs", "multiply-accumulates"), ("params", "parameters")):
        before, after, ratio = _costs(summary, key)
        if ratio is not None or after is not None:
            value = si(after) if ratio is None else against(ratio, "fewer", "more")
            tiles.append(Tile(label, value, f"{si(before)} → {si(after)}" if before and after else ""))
    tiles += _latency_tile(summary)
    if (error := number(summary.get("surgery_error"))) is not None:
        tiles.append(Tile("surgery error", exact(error), "worst, relative, float64"))
    parity = summary.get("onnx_parity")
    named = parity.items() if isinstance(parity, Mapping) else [("", parity)]
    found = [(name, error) for name, value in named if (error := number(value)) is not None]
    if found:
        *others, (name, error) = sorted(found, key=lambda pair: pair[1])
        more = "".join(f", {name} {exact(error)}" for name, error in others)
        tiles.append(Tile("ONNX parity", exact(error), f"{name} relative to the program{more}".strip()))
    for engine in engines:
        padding = len(_list(engine.get("padding"), (str, Mapping)))
        parts = [f"{len(_list(engine.get('kernels')))} kernels", size(engine.get("bytes"))]
        extra = f"{padding} padding kernel{'s' * (padding != 1)}" if padding else "no padding kernels"
        name = " ".join(str(engine[k]) for k in ("target", "precision") if engine.get(k))
        tiles.append(Tile("engine", name, ", ".join([*parts, extra]), "watch" if padding else ""))
    if not engines and summary.get("engine"):
        tiles.append(Tile("engine", Path(str(summary["engine"])).name))
    return tiles


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
    if predicted is not None:
        details.append(f"predicted {times(predicted)}, {100 * abs(predicted / ratio - 1):.0f}\u00a0% off")
    return [Tile("latency", against(ratio, "faster", "slower"), ", ".join(details))]


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


def _layers(records: Iterable[Mapping[str, Any]]) -> list[Layer]:
    """The layers over all passes: as the first pass that names one found it, and as the last one left it."""
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
            layer.channels = layer.channels[0], new[1]
            layer.macs = layer.macs[0], work[1]
    layers = list(found.values())
    widest = max((max(layer.channels) for layer in layers), default=0) or 1
    heaviest = max((max(layer.macs) for layer in layers), default=0) or 1
    for layer in layers:
        layer.channel_bars = _bars(layer.channels, widest)
        layer.mac_bars = _bars(layer.macs, heaviest)
    return layers


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
    score = _score(*scores)
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
    kernels = _list(engine.get("kernels"))
    memory = {str(k): number(v) for k, v in _map(engine.get("memory")).items()}
    return {
        "title": " ".join(str(engine[k]) for k in ("backend", "version") if engine.get(k)),
        "target": engine.get("target", ""),
        "precision": engine.get("precision", ""),
        "path": str(engine.get("path", "")),
        "bytes": engine.get("bytes"),
        "seconds": number(engine.get("seconds")),
        "kernels": kernels,
        "padding": sum(1 for kernel in kernels if kernel.get("padding")),
        "nodes": len({str(node) for kernel in kernels for node in kernel.get("nodes") or ()}),
        "memory": [(name, value) for name, value in memory.items() if value],
        "pads": [dict(pad) | {"origin": _origin(engine, pad.get("nodes"))} for pad in _list(engine.get("pads"))],
        "unfused": [
            {"text": UNFUSED.get(str(row.get("how")), ""), "nodes": row.get("nodes") or ()}
            for row in _list(engine.get("unfused"))
        ],
        "warnings": [str(text) for text in engine.get("warnings") or ()],
    }


def _origin(engine: Mapping[str, Any], nodes: Any) -> str:
    """The passes that changed a kernel's nodes."""
    origins = _map(engine.get("origins"))
    found = [name for node in nodes or () for name in _map(origins.get(node)).get("passes", ())]
    return ", ".join(dict.fromkeys(map(str, found)))


def _device(results: Mapping[str, Any]) -> dict[str, Any]:
    """What one device measured: a row for each model and way to run it, and the slowest layers."""
    about, bundle = _map(results.get("device")), _map(results.get("bundle"))
    rows, layers = [], []
    for name, model in _map(results.get("models")).items():
        model, power = _map(model), _map(_map(model).get("power"))
        for mode, found in _map(model.get("latency")).items():
            ms = _map(_map(found).get("gpu_ms", _map(found).get("host_ms")))
            median, p99 = number(ms.get("median")), number(ms.get("p99"))
            ratio = number(_map(_map(_map(results.get("ratios")).get(name)).get(mode)).get("median"))
            watts, energy = number(power.get("total_mw")), number(power.get("energy_mj"))
            error = _map(model.get("parity")).get("error")
            rows.append(
                {
                    "name": str(name),
                    "mode": MODES.get(str(mode), str(mode)),
                    "median": milliseconds(median) if median is not None else "–",
                    "p99": milliseconds(p99) if p99 is not None else "–",
                    "ratio": against(ratio, "faster", "slower") if ratio is not None else "",
                    "power": f"{watts / 1000:.3g} W" if watts is not None else "",
                    "energy": f"{energy:.3g} mJ" if energy is not None else "",
                    "error": exact(error) if number(error) is not None else "no figure",
                    "bad": number(error) is None,
                }
            )
        timed = [row for row in _list(model.get("layers")) if number(row.get("ms")) is not None]
        whole = sum(row["ms"] for row in timed)
        slowest = sorted(timed, key=lambda row: -row["ms"])[:IN_SIGHT]
        layers += [(str(name), str(row.get("name", "")), row["ms"], row["ms"] / (whole or 1)) for row in slowest]
    temperatures = [
        f"{name}: {', '.join(f'{zone} {value:.0f} °C' for zone, value in zones.items())}"
        for name, model in _map(results.get("models")).items()
        if (zones := _map(_map(_map(model).get("power")).get("temperatures_c")))
    ]
    facts = {key: about.get(key) for key in ("model", "power_mode", "l4t", "system", "python")}
    facts |= {"library": " ".join(str(results[k]) for k in ("engine", "version") if results.get(k))}
    facts |= {
        "precision": bundle.get("precision"),
        "date": results.get("date"),
        "temperatures": "; ".join(temperatures),
    }
    return {
        "title": str(about.get("model") or about.get("machine") or "a device"),
        "facts": _pairs(facts),
        "rows": rows,
        "layers": layers,
        "notes": [str(note) for note in results.get("notes") or ()],
    }


# -------------------------------------------------------------------------------------------------------------- plots
def _plots(
    summary: Mapping[str, Any], records: list[Mapping[str, Any]], layers: list[Layer]
) -> list[tuple[str, Markup]]:
    """Caption and SVG of every plot that the summary has the numbers for."""
    plots = []
    timings = _timings(summary)
    path = _trajectory(summary, records)
    ticks = _ticks(value for _, value, _ in path)
    if len(path) > 1:
        svg = charts.trade_off("macs", path, "multiply-accumulates", si, "accuracy", ticks)
        plots.append(("Accuracy against multiply-accumulates", svg))
    if len(path) > 1 and len(timings) == 2:
        medians = [row["median"] for row in timings.values()]
        points = [(medians[0], path[0][1], "dense"), (medians[1], path[-1][1], "compressed")]
        svg = charts.trade_off("latency", points, "median latency", milliseconds, "accuracy", ticks)
        plots.append(("Accuracy against latency", svg))
    if any(layer.macs[0] for layer in layers):
        before, after = ([layer.macs[i] for layer in layers] for i in (0, 1))
        plots.append(("Multiply-accumulates of each layer", charts.profile("work", before, after, "", si)))
    if layers:
        before, after = ([layer.channels[i] for layer in layers] for i in (0, 1))
        plots.append(("Output channels of each layer", charts.profile("channels", before, after, "", count)))
    if timings:
        plots.append(("Latency of single calls", charts.ranges("calls", timings, "", milliseconds)))
    if training := _training(summary, records):
        texts = {"loss": plain_score, "accuracy": _ticks(value for _, value in training.get("accuracy", []))}
        plots.append(("Training", charts.curves("training", training, texts)))
    return [(caption, Markup(svg)) for caption, svg in plots]


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


def seconds(value: float) -> str:
    return milliseconds(1000 * value) if value < 0.1 else f"{value:.1f} s"


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def _score(*values: float | None) -> Callable[[Any], str]:
    """How to write a metric: in percent when it is a share."""
    return percent if all(0 <= value <= 1 for value in values if value is not None) else plain_score


def _ticks(values: Iterable[float]) -> Callable[[Any], str]:
    return round_percent if _score(*values) is percent else plain_score


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
