"""The report's sections on measurements of devices: latencies, times of layers, and errors of predictions."""

from collections.abc import Iterable, Mapping
from typing import Any

from ....graph.errors import GraphcombError
from ....graph.workload.layer import run_seconds
from ...device_results import BundledLayer, Device, DeviceModel, DeviceParity
from ...prediction.layers import from_dict
from ...prediction.measured import kernels
from ...prediction.roofline import Roofline, calibration_text
from ...summary import Summary
from ..reading import SIDES, pairs
from ..text import against, change, counted, exact, milliseconds, number, off

SLOWEST = 20  # number of kernels of each model that the report lists
MODES = {"graph": "CUDA graph", "stream": "one by one"}
Kernel = tuple[set[int], list[str], float]  # indices of the layers it computes, its names, milliseconds


def device_name(results: Device, default: str) -> str:
    """Return the name of the model of the measured device."""
    return str(results.device.get("model") or default)


def median(model: DeviceModel) -> float | None:
    """Return the median milliseconds of a run on a device, as a CUDA graph if it was measured so; None if unknown."""
    run = model.latency.get("graph") or model.latency.get("stream")
    return (run.gpu_ms or run.host_ms).get("median") if run else None


# ----------------------------------------------------------------------------------------- compared with predictions
def compared(summary: Summary) -> list[tuple[str, list[float], str]]:
    """Return (place, measured milliseconds before and after, text with the prediction's error) for each place where the
    target was measured: this machine and devices."""
    prediction = summary.prediction
    if prediction is None:
        return []
    measured_here = prediction.measured_ms or {}
    places = [("this machine", [measured_here.get(side) for side in SIDES])]
    for results, names in _same_target(summary):
        places.append((device_name(results, "the device"), [median(results.models[name]) for name in names]))
    rows = []
    for where, measured in places:
        known = [(prediction.ms[s], ms) for s, ms in zip(SIDES, measured, strict=True) if s in prediction.ms and ms]
        if known:
            texts = [f"{milliseconds(b)} measured, {milliseconds(a)} predicted ({off(a, b)})" for a, b in known]
            rows.append((where, [b for _, b in known], " → ".join(texts)))
    return rows


def profiled_layers(summary: Summary) -> dict[str, str]:
    """Return by layer, in words, what a device's profiler measured for its kernel.

    A kernel that computes several layers is assigned to the one with the most multiply-accumulates.
    """
    texts: dict[str, str] = {}
    for results, names in _same_target(summary):
        by_layer: dict[str, list[tuple[float, int]]] = {}
        for name in names:
            layers = _layers(results, name)
            for which, _, ms in _kernels(results, name):
                if which:
                    main = max(which, key=lambda i: layers[i].macs)
                    by_layer.setdefault(layers[main].name, []).append((ms, len(which) - 1))
        for layer, measured in by_layer.items():
            others = max(n for _, n in measured)
            beside = f" with {counted(others, 'other')}" if others else ""
            texts[layer] = f"measured {change(milliseconds(ms) for ms, _ in measured)}{beside}"
    return texts


def _same_target(summary: Summary) -> list[tuple[Device, tuple[str, str]]]:
    """Return the results of devices with the prediction's target and precision, with the names of their dense and their
    compressed model."""
    prediction, same = summary.prediction, []
    for results in summary.devices:
        names, bundle = list(results.models), results.bundle
        if prediction and names and (bundle.target, bundle.precision) == (prediction.target, prediction.precision):
            same.append((results, (names[0], names[-1])))
    return same


# ---------------------------------------------------------------------------------------------- a section per device
def device_section(results: Device) -> dict[str, Any]:
    """Return the section on one device for the template: a row for each model and mode, and the slowest kernels."""
    roofline, precisions = _roofline(results), _precisions(results)
    wrong = {name for name, model in results.models.items() if _wrong(model.parity)}
    rows, slowest = [], []
    for name, precision in precisions.items():
        fitting = roofline if roofline is not None and precision == roofline.dtype else None
        # A ratio means nothing if the outputs of one of its two models are wrong.
        rows += _rows(results, name, fitting, bool(wrong & {next(iter(results.models)), name}))
        slowest += _slowest(results, name, fitting)
    return {
        "title": str(results.device.get("model") or results.device.get("machine") or "a device"),
        "facts": _facts(results, roofline, precisions),
        "rows": rows,
        "layers": slowest,
        "notes": results.notes,
    }


def _precisions(results: Device) -> dict[str, str]:
    """Return the precision of each model, by default the one that the bundle was asked for."""
    bundle = results.bundle
    precisions = {name: model.precision for name, model in bundle.models.items()}
    return {name: precisions.get(name) or bundle.precision or "" for name in results.models}


def _rows(results: Device, name: str, roofline: Roofline | None, wrong: bool) -> list[dict[str, Any]]:
    """Return a row of texts for each mode in which a model was run. wrong: whether its ratio is of wrong outputs."""
    model, rows = results.models[name], []
    watts, energy = model.power.total_mw, model.power.energy_mj
    for mode, run in model.latency.items():
        ms = run.gpu_ms or run.host_ms
        middle, p99 = ms.get("median"), ms.get("p99")
        ratio = results.ratios.get(name, {}).get(mode, {}).get("median")
        faster = against(ratio, "faster", "slower") if ratio is not None else ""
        rows.append(
            {
                "name": name,
                "mode": MODES.get(mode, mode),
                "median": milliseconds(middle) if middle is not None else "–",
                "p99": milliseconds(p99) if p99 is not None else "–",
                "ratio": f"{faster}, with wrong outputs" if faster and wrong else faster,
                "power": f"{watts / 1000:.3g} W" if watts is not None else "",
                "energy": f"{energy:.3g} mJ" if energy is not None else "",
                "error": exact(model.parity.error) or model.parity.note or "no figure",
                "bad": _wrong(model.parity),
                "predicted": _predicted(roofline, results, name) if middle == median(model) else "",
            }
        )
    return rows


def _wrong(parity: DeviceParity) -> bool:
    """Return whether a model's outputs differ from the reference by more than the tolerance, or are not known to agree."""
    error = number(parity.error)
    return error is None or (parity.tolerance is not None and error > parity.tolerance)


def _predicted(roofline: Roofline | None, results: Device, name: str) -> str:
    """Return the predicted time of a run and its error in words; empty if there is no prediction."""
    layers, measured = _layers(results, name), median(results.models[name])
    if roofline is None or not layers or not measured:
        return ""
    ms = 1e3 * run_seconds(roofline, (from_dict(layer.to_dict()) for layer in layers))
    return f"{milliseconds(ms)} ({off(ms, measured)})"


def _facts(results: Device, roofline: Roofline | None, precisions: Mapping[str, str]) -> list[tuple[str, str]]:
    kinds, temperatures = list(precisions.values()), []
    for name, model in results.models.items():
        zones = [f"{z} {value:.0f} °C" for z, value in model.power.temperatures_c.items() if value is not None]
        if zones:
            temperatures.append(f"{name}: {', '.join(zones)}")
    facts = {key: results.device.get(key) for key in ("model", "power_mode", "l4t", "system", "python")}
    facts |= {
        "library": f"{results.engine} {results.version}".strip(),
        "precision": kinds[0] if len({*kinds}) == 1 else ", ".join(map(": ".join, precisions.items())),
        "date": results.date,
        "prediction": f"{roofline}; {calibration_text(roofline.calibration or {})}" if roofline else "",
        "temperatures": "; ".join(temperatures),
    }
    return pairs(facts)


def _slowest(results: Device, name: str, roofline: Roofline | None) -> list[tuple[Any, ...]]:
    """Return (model, names, milliseconds, share of the run, predicted time, bound) of the slowest kernels."""
    profile = _kernels(results, name)
    whole = sum(ms for _, _, ms in profile) or 1.0
    return [
        (name, ", ".join(names), ms, ms / whole, *_estimate(roofline, _layers(results, name), which, len(names)))
        for which, names, ms in sorted(profile, key=lambda kernel: -kernel[2])[:SLOWEST]
    ]


def _estimate(
    roofline: Roofline | None, layers: list[BundledLayer], which: Iterable[int], launches: int
) -> tuple[str, str]:
    """Return the predicted time of a kernel and its bound in words; empty texts if its layers are unknown."""
    if roofline is None or not which:
        return "", ""
    estimates = [roofline.estimate(from_dict(layers[i].to_dict())) for i in sorted(which)]
    ms = 1e3 * (launches * roofline.start + sum(e.seconds - e.launch for e in estimates))
    return milliseconds(ms), max(estimates, key=lambda e: e.seconds).bound


def _layers(results: Device, name: str) -> list[BundledLayer]:
    """Return the layers of a bundle's model."""
    return results.bundle.models[name].layers if name in results.bundle.models else []


def _kernels(results: Device, name: str) -> list[Kernel]:
    """Return the kernels of a model's profile with the layers that each computes."""
    return kernels(results.models[name].to_dict(), [layer.to_dict() for layer in _layers(results, name)])


def _roofline(results: Device) -> Roofline | None:
    """Return a roofline that is calibrated with these results; None if that is not possible."""
    try:
        return Roofline.calibrated(results.to_dict())
    except GraphcombError:
        return None
