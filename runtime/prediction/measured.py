"""Read the results of bench bundles, and assign the kernels of their profiles to the layers of the models. Source: ours."""

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

# Suffixes that ONNX Runtime's optimiser appends to the names of nodes.
REWRITTEN = re.compile(r"(_nchwc|_token_\d+|/\w+Fusion)+$")


@dataclass
class Measured:
    """One measured model of a bundle.

    - layers: its layers in execution order.
    - seconds: median seconds of a run.
    - kernels: one entry per kernel of the profile whose layers are known: (indices of its layers, number of launches,
      seconds within the run). Kernels that compute a common layer are one entry.
    """

    name: str
    layers: list[Layer]
    seconds: float
    kernels: list[tuple[tuple[int, ...], int, float]] = field(default_factory=list)


def kernel_names(row: Mapping[str, Any], inspector: Mapping[str, str]) -> list[str]:
    """Return the names of the ONNX nodes (or of their outputs) that a kernel of a profile computes.

    row: the kernel (`ProfiledLayer`). inspector: TensorRT's metadata by name of the kernel, which names the nodes; without
    it they are read from the name of the kernel.
    """
    name = str(row["name"])
    sources = SOURCE.findall(inspector.get(name, ""))
    return sources or [REWRITTEN.sub("", part) for part in name.split(" + ")]


def kernels(model: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[tuple[set[int], list[str], float]]:
    """Return the kernels of a measured model's profile as (indices of layers, names, profiled milliseconds).

    model: a `DeviceModel`. rows: its layers with the names of their ONNX nodes (`name_nodes`). The indices are those of the
    rows that the kernel computes, none if they are unknown. Kernels that compute a common layer are joined to one entry.
    """
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
    """Read the results of bench bundles. Return their models whose layers are known, and about: target, precision, device,
    engine and modes (how the models were run).

    - results: paths of results.json, or their contents.
    - target: the target that the results must be of; by default that of the first ones.
    - dtype: the precision of the models to return; by default the one that the bundle was asked for.

    Raises BadInput for a file that is no results.json; for results of another target or precision than asked for, of
    another engine than the target's, or of another target, precision, device or engine than the first ones; for the same
    measurement twice; for a measurement on a busy machine; and if no model has known layers.
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
    """Return `about` of `read_measured` with the target, precision, device and engine of these results.

    about: those of the results before. Raises BadInput if they differ, or are not those asked for.
    """
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
    scale = min(1.0, seconds / whole) if whole else 0.0  # the profiler slows the run down; this corrects for it
    known = [(tuple(sorted(w)), len(names), scale * ms / 1e3) for w, names, ms in profile if w and ms > 0]
    return Measured(name, layers, seconds, known)
