"""The results of a bench bundle: the JSON file that bench_device.py writes on a device, or that a run of it brings back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...graph.errors import BadInput
from ...graph.files import read_json
from ..kit.contents import FORMAT


def are_results(path: str | Path) -> bool:
    """Whether a file looks like the results of a bench bundle."""
    try:
        return _are_results(read_json(Path(path)))
    except BadInput:
        return False


def _are_results(values: Any) -> bool:
    return isinstance(values, dict) and str(values.get("format", "")).startswith("graphcomb-bench")


def read_results(path: str | Path) -> dict[str, Any]:
    """What bench_device.py wrote. Raises BadInput for another file or another version's, or one without models."""
    path = Path(path)
    results = read_json(path)
    if not _are_results(results) or "models" not in results:
        raise BadInput(f"{path}: not the results of a bench bundle")
    if results["format"] != FORMAT:
        raise BadInput(f"{path}: of format {results['format']}, this version reads {FORMAT}; bundle and measure again")
    models = results["models"]
    if not isinstance(models, dict) or not models or not all(isinstance(row, dict) for row in models.values()):
        raise BadInput(f"{path}: models: expected what was measured, by name of the model; measure again")
    return results


def precision_of(bundle: Mapping[str, Any], name: str) -> str:
    """The precision of a bundle's model, which need not be the one that the bundle was asked for."""
    return str(bundle["models"][name].get("precision", bundle["precision"]))


def median_latency(model: Mapping[str, Any]) -> tuple[str, float]:
    """How a measured model was run, in a CUDA graph where it could be, and its median seconds, on the device where that
    is known."""
    mode = "graph" if "graph" in model["latency"] else "stream"
    times = model["latency"][mode]
    return mode, (times.get("gpu_ms") or times["host_ms"])["median"] / 1e3
