"""What a bench bundle measured, layer by layer: which of a model's layers each kernel of a profile ran. Source: ours."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...graph.errors import BadInput
from ...graph.workload.layer import Layer
from ..device_results import median_latency, precision_of, read_results
from ..devices.table import Target, get_target
from ..engines.trt.log import SOURCE
from ..kit.measuring import BUSY
from .layers import from_dict

# Endings that ONNX Runtime's rewrites give to the names of nodes.
REWRITTEN = re.compile(r"(_nchwc|_token_\d+|/\w+Fusion)+$")


@dataclass
class Measured:
    """One model of a bundle: its layers, the median seconds of a run, and the kernels of its profile, each as indices of
    layers, number of launches and seconds within the run. Kernels that share a layer are one."""

    name: str
    layers: list[Layer]
    seconds: float
    kernels: list[tuple[tuple[int, ...], int, float]] = field(default_factory=list)


def kernel_names(row: Mapping[str, Any], inspector: Mapping[str, str]) -> list[str]:
    """The ONNX nodes (or results) that a kernel of a profile says it computes. inspector: metadata by kernel."""
    name = str(row["name"])
    sources = SOURCE.findall(inspector.get(name, ""))
    return sources or [REWRITTEN.sub("", part) for part in name.split(" + ")]


def kernels(model: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[tuple[set[int], list[str], float]]:
    """The kernels of a measured model's profile: indices of the layers it computes (empty where that is not known), its
    names, and milliseconds as profiled; kernels that share a layer joined."""
    owner = {text: i for i, row in enumerate(rows) for text in row.get("onnx", ())}
    inspector = {
        str(entry.get("Name")): str(entry.get("Metadata", ""))
        for entry in model.get("engine", {}).get("inspector", ())
        if isinstance(entry, Mapping)
    }
    joined: list[tuple[set[int], list[str], float]] = []
    for row in model.get("layers", ()):
        which = {owner[text] for text in kernel_names(row, inspector) if text in owner}
        names, ms = [str(row["name"])], float(row["ms"])
        for other in [other for other in joined if other[0] & which]:
            joined.remove(other)
            which, names, ms = which | other[0], other[1] + names, ms + other[2]
        joined.append((which, names, ms))
    return joined


def read_measured(
    results: Sequence[str | Path | Mapping[str, Any]], target: Target | None = None, dtype: str | None = None
) -> tuple[list[Measured], dict[str, Any]]:
    """The models of bundles' results whose layers are known, and what they are of: target, precision, device, engine.
    Of a bundle with several precisions, the models that have the one asked for, by default the bundle's.

    Raises BadInput for results of another target, engine, precision or device than the target's and the first ones', and
    for the same measurement twice.
    """
    runs: list[Measured] = []
    about: dict[str, Any] = {}
    seen: list[tuple[str, Mapping[str, Any]]] = []
    for source in results:
        measurement = source if isinstance(source, Mapping) else read_results(source)
        where = "these results" if isinstance(source, Mapping) else str(source)
        if twin := next((other for other, earlier in seen if earlier == measurement), None):
            raise BadInput(f"{where}: the same measurement as {twin}; give it once")
        seen.append((where, measurement))
        try:
            about = _same(measurement, where, about, target, dtype)
            for name, model in measurement["models"].items():
                if precision_of(measurement["bundle"], name) != about["precision"]:
                    continue
                rows = measurement["bundle"]["models"][name].get("layers") or ()
                mode, _ = median_latency(model)
                if model["engine"].get("contended", 0) > BUSY * model["latency"][mode]["runs"]:
                    raise BadInput(f"{where}: {name} was measured on a busy machine; measure again")
                if rows:
                    runs.append(_run(name, model, rows))
                    about["modes"] = sorted({*about.get("modes", ()), mode})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BadInput(f"{where}: not the results of a bench bundle ({type(error).__name__}: {error})") from error
    if not runs:
        raise BadInput(
            "calibration: the bundle says nothing about the layers of its models; bundle programs (.pt2) or a run's folder"
        )
    return runs, about


def _same(
    measurement: Mapping[str, Any], where: str, about: Mapping[str, Any], target: Target | None, dtype: str | None
) -> dict[str, Any]:
    """What the results are of; BadInput when that is not what is wanted."""
    bundle = measurement["bundle"]
    if bundle.get("target") is None:
        raise BadInput(f"{where}: the bundle names no target; write it with --target")
    device = get_target(bundle["target"])
    if target is not None and device.name != target.name:
        raise BadInput(f"{where}: measured for target {device.name}, not {target.name}")
    if measurement["engine"] != device.backend:
        raise BadInput(f"{where}: measured with {measurement['engine']}, and {device.name} runs {device.backend}")
    measured = [precision_of(bundle, name) for name in measurement["models"]] or [bundle["precision"]]
    if dtype is not None and dtype not in measured:
        raise BadInput(f"{where}: measured in {' and '.join(dict.fromkeys(measured))}, not {dtype}")
    kind = dtype or (bundle["precision"] if bundle["precision"] in measured else measured[0])
    new = {
        "target": device.name, "precision": kind, "device": measurement["device"].get("model"),
        "engine": f"{measurement['engine']} {measurement['version']}",
    }  # fmt: skip
    different = [f"{k} {v}, not {about[k]}" for k, v in new.items() if k in about and about[k] != v]
    if different:
        raise BadInput(f"{where}: cannot be joined with the results before: {different[0]}")
    return {**about, **new}


def _run(name: str, model: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Measured:
    layers, (_, seconds) = [from_dict(row) for row in rows], median_latency(model)
    profile = kernels(model, rows)
    times = [1e3 * seconds, *(ms for _, _, ms in profile)]
    if not seconds > 0 or not all(map(math.isfinite, times)) or any(x.macs() < 0 or x.entries() < 0 for x in layers):
        raise ValueError(f"sizes or times of {name}")
    whole = sum(ms for _, _, ms in profile) / 1e3
    scale = min(1.0, seconds / whole) if whole else 0.0  # the profiler slows the run down
    known = [(tuple(sorted(w)), len(names), scale * ms / 1e3) for w, names, ms in profile if w and ms > 0]
    return Measured(name, layers, seconds, known)
