"""What devices measured, as the report shows it: a section for each device, times of layers, errors of predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...graph.errors import GraphcombError
from ...graph.workload.layers import run_seconds
from ..predict.layers import from_dict
from ..predict.measured import kernels
from ..predict.roofline import Roofline, calibration_text
from .reading import SIDES, items, mapping, pairs
from .text import against, change, counted, exact, milliseconds, number, off

SLOWEST = 20  # kernels of each model that are listed
MODES = {"graph": "CUDA graph", "stream": "one by one"}
Kernel = tuple[set[int], list[str], float]  # indices of the layers it computes, its names, milliseconds


def device_name(results: Mapping[str, Any], default: str) -> str:
    """The model of the device that measured."""
    return str(mapping(results.get("device")).get("model") or default)


def median(model: Mapping[str, Any]) -> float | None:
    """Median milliseconds of a run on a device, in a CUDA graph where it could be."""
    latency = mapping(model.get("latency"))
    mode = mapping(latency.get("graph") or latency.get("stream"))
    return number(mapping(mode.get("gpu_ms") or mode.get("host_ms")).get("median"))


def _model(results: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return mapping(mapping(results.get("models")).get(name))


# ------------------------------------------------------------------------------------ against what the run predicted
def compared(summary: Mapping[str, Any]) -> list[tuple[str, list[float], str]]:
    """Where the target was measured, the milliseconds before and after, and in words how far the prediction is off."""
    prediction = mapping(summary.get("prediction"))
    predicted = [number(mapping(prediction.get("ms")).get(side)) for side in SIDES]
    places = [("this machine", [number(mapping(prediction.get("measured_ms")).get(side)) for side in SIDES])]
    for results, names in _same_target(summary):
        places.append((device_name(results, "the device"), [median(_model(results, name)) for name in names]))
    found = []
    for where, measured in places:
        known = [(a, b) for a, b in zip(predicted, measured, strict=True) if a is not None and b]
        if known:
            texts = [f"{milliseconds(b)} measured, {milliseconds(a)} predicted ({off(a, b)})" for a, b in known]
            found.append((where, [b for _, b in known], " → ".join(texts)))
    return found


def profiled_layers(summary: Mapping[str, Any]) -> dict[str, str]:
    """What a device's profiler measured for the kernel of each layer, in words. A kernel that computes several layers is
    shown with the one that has the most multiply-accumulates."""
    found: dict[str, str] = {}
    for results, names in _same_target(summary):
        by_layer: dict[str, list[tuple[float, int]]] = {}
        for name in names:
            rows, profile = _kernels(results, name)
            for which, _, ms in profile:
                if which:
                    main = max(which, key=lambda i: number(rows[i].get("macs")) or 0.0)
                    by_layer.setdefault(str(rows[main].get("name")), []).append((ms, len(which) - 1))
        for layer, measured in by_layer.items():
            others = max(n for _, n in measured)
            beside = f" with {counted(others, 'other')}" if others else ""
            found[layer] = f"measured {change(milliseconds(ms) for ms, _ in measured)}{beside}"
    return found


def _same_target(summary: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], tuple[str, str]]]:
    """Devices' results of what the prediction is for, with the names of the dense and the compressed model."""
    prediction = mapping(summary.get("prediction"))
    wanted = [prediction.get(key) for key in ("target", "precision")]
    found = []
    for results in items(summary.get("devices")):
        names = list(mapping(results.get("models")))
        if names and [mapping(results.get("bundle")).get(key) for key in ("target", "precision")] == wanted:
            found.append((results, (names[0], names[-1])))
    return found


# ---------------------------------------------------------------------------------------------- a section per device
def device_section(results: Mapping[str, Any]) -> dict[str, Any]:
    """What one device measured: a row for each model and way to run it, and the slowest kernels."""
    device, models = mapping(results.get("device")), mapping(results.get("models"))
    roofline, precisions = _roofline(results), _precisions(results)
    wrong = {str(name) for name, model in models.items() if _wrong(mapping(mapping(model).get("parity")))}
    rows, slowest = [], []
    for name, precision in precisions.items():
        fitting = roofline if roofline is not None and precision == roofline.dtype else None
        # A ratio says nothing where the outputs of either model are wrong.
        rows += _rows(results, name, fitting, bool(wrong & {next(iter(models)), name}))
        slowest += _slowest(results, name, fitting)
    return {
        "title": str(device.get("model") or device.get("machine") or "a device"),
        "facts": _facts(results, roofline, precisions),
        "rows": rows,
        "layers": slowest,
        "notes": [str(note) for note in results.get("notes") or ()],
    }


def _precisions(results: Mapping[str, Any]) -> dict[str, str]:
    """The precision of each model, which need not be the one that the bundle was asked for."""
    bundle = mapping(results.get("bundle"))
    described = mapping(bundle.get("models"))
    return {
        name: str(mapping(described.get(name)).get("precision") or bundle.get("precision") or "")
        for name in mapping(results.get("models"))
    }


def _rows(results: Mapping[str, Any], name: str, roofline: Roofline | None, wrong: bool) -> list[dict[str, Any]]:
    """A row for each way in which a model was run."""
    model, rows = _model(results, name), []
    power, parity = mapping(model.get("power")), mapping(model.get("parity"))
    watts, energy = number(power.get("total_mw")), number(power.get("energy_mj"))
    for mode, run in mapping(model.get("latency")).items():
        ms = mapping(mapping(run).get("gpu_ms", mapping(run).get("host_ms")))
        middle, p99 = number(ms.get("median")), number(ms.get("p99"))
        ratio = number(mapping(mapping(mapping(results.get("ratios")).get(name)).get(mode)).get("median"))
        faster = against(ratio, "faster", "slower") if ratio is not None else ""
        rows.append(
            {
                "name": str(name),
                "mode": MODES.get(str(mode), str(mode)),
                "median": milliseconds(middle) if middle is not None else "–",
                "p99": milliseconds(p99) if p99 is not None else "–",
                "ratio": f"{faster}, with wrong outputs" if faster and wrong else faster,
                "power": f"{watts / 1000:.3g} W" if watts is not None else "",
                "energy": f"{energy:.3g} mJ" if energy is not None else "",
                "error": exact(parity.get("error")) or str(parity.get("note") or "no figure"),
                "bad": _wrong(parity),
                "predicted": _predicted(roofline, results, name) if middle == median(model) else "",
            }
        )
    return rows


def _wrong(parity: Mapping[str, Any]) -> bool:
    """Whether a model's outputs are not those of the reference."""
    error, tolerance = number(parity.get("error")), number(parity.get("tolerance"))
    return error is None or (tolerance is not None and error > tolerance)


def _predicted(roofline: Roofline | None, results: Mapping[str, Any], name: str) -> str:
    """A run's predicted time, with how far it is off, in words."""
    rows, measured = _kernels(results, name)[0], median(_model(results, name))
    if roofline is None or not rows or not measured:
        return ""
    ms = 1e3 * run_seconds(roofline, map(from_dict, rows))
    return f"{milliseconds(ms)} ({off(ms, measured)})"


def _facts(
    results: Mapping[str, Any], roofline: Roofline | None, precisions: Mapping[str, str]
) -> list[tuple[str, str]]:
    device, kinds = mapping(results.get("device")), list(precisions.values())
    temperatures = []
    for name in precisions:
        zones = mapping(mapping(_model(results, name).get("power")).get("temperatures_c"))
        if texts := [f"{zone} {x:.0f} °C" for zone, value in zones.items() if (x := number(value)) is not None]:
            temperatures.append(f"{name}: {', '.join(texts)}")
    facts = {key: device.get(key) for key in ("model", "power_mode", "l4t", "system", "python")}
    facts |= {
        "library": " ".join(str(results[k]) for k in ("engine", "version") if results.get(k)),
        "precision": kinds[0] if len({*kinds}) == 1 else ", ".join(map(": ".join, precisions.items())),
        "date": results.get("date"),
        "prediction": f"{roofline}; {calibration_note(mapping(roofline.calibration))}" if roofline else "",
        "temperatures": "; ".join(temperatures),
    }
    return pairs(facts)


def _slowest(results: Mapping[str, Any], name: str, roofline: Roofline | None) -> list[tuple[Any, ...]]:
    """The kernels that took longest: model, names, milliseconds, share of the run, predicted time and its bound."""
    rows, profile = _kernels(results, name)
    whole = sum(ms for _, _, ms in profile) or 1.0
    return [
        (str(name), ", ".join(names), ms, ms / whole, *_estimate(roofline, rows, which, len(names)))
        for which, names, ms in sorted(profile, key=lambda kernel: -kernel[2])[:SLOWEST]
    ]


def _estimate(roofline: Roofline | None, rows: list[Any], which: Iterable[int], launches: int) -> tuple[str, str]:
    """Predicted time of a kernel and what bounds it, in words; empty where its layers are not known."""
    if roofline is None or not which:
        return "", ""
    estimates = [roofline.estimate(from_dict(rows[i])) for i in sorted(which)]
    ms = 1e3 * (launches * roofline.start + sum(e.seconds - e.launch for e in estimates))
    return milliseconds(ms), max(estimates, key=lambda e: e.seconds).bound


def _kernels(results: Mapping[str, Any], name: str) -> tuple[list[Any], list[Kernel]]:
    """The layers of a bundle's model, and the kernels of its profile with the layers that each computes."""
    model = _model(results, name)
    rows = items(mapping(mapping(mapping(results.get("bundle")).get("models")).get(name)).get("layers"))
    named = [{"onnx": [str(text) for text in row.get("onnx") or ()]} for row in rows]
    profile = [
        {"name": str(row.get("name", "")), "ms": row["ms"]}
        for row in items(model.get("layers"))
        if number(row.get("ms")) is not None
    ]
    inspector = items(mapping(model.get("engine")).get("inspector"))
    return rows, kernels({"layers": profile, "engine": {"inspector": inspector}}, named)


def _roofline(results: Mapping[str, Any]) -> Roofline | None:
    """A roofline calibrated with the results themselves, where they allow it."""
    try:
        return Roofline.calibrated(results)
    except GraphcombError:
        return None


def calibration_note(record: Mapping[str, Any]) -> str:
    """What a roofline was calibrated with, in words; empty where the record does not say."""
    try:
        return calibration_text(record)
    except (KeyError, TypeError, ValueError):
        return ""
