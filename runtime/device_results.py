"""results.json, which bench_device.py writes on a device or a run of it brings back: as a model, and reading it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..graph.errors import BadInput
from ..graph.files import read_json
from .formats import Format, says
from .kit.contents import FORMAT


class Latency(Format):
    """Of one model, run in one way."""

    runs: int = says("runs that counted")
    host_ms: dict[str, float] = says("as the caller sees it: p5, median, p95, p99")
    gpu_ms: dict[str, float] | None = says("between two CUDA events", default=None)


class DeviceParity(Format):
    """Outputs of one model on a device against the reference."""

    finite: bool = says("no NaN or infinity")
    error: float | None = says("relative; null without a reference or with NaN")
    tolerance: float | None = says("the largest error that the model's precision explains", default=None)
    note: str = says("what is wrong with the outputs, where something is", default="")


class Power(Format):
    """Power and temperatures while one model runs; further keys: power_mw by rail, clocks_mhz, load_percent, samples."""

    total_mw: float | None = says("milliwatts", default=None)
    energy_mj: float | None = says("millijoules of one run", default=None)
    temperatures_c: dict[str, float | None] = says("by thermal zone, in degrees Celsius", default={})


class ProfiledLayer(Format):
    """One kernel in the library's profile."""

    name: str = says("the library's")
    ms: float = says("milliseconds")


class DeviceEngine(Format):
    """An engine that was built on a device; further keys: build_seconds (null for the engine of an earlier run, which is
    reused), bytes, scratch_bytes, file: beside the results, flags: of TensorRT's builder, no_graph: why it cannot run as a
    CUDA graph, and contended: runs that counted although something else had the processor."""

    inspector: list[Any] = says("layers as the library has them", default=[])


class DeviceModel(Format):
    """One model on a device."""

    file: str = says("in the bundle")
    engine: DeviceEngine = says("that was built")
    parity: DeviceParity = says("whether its outputs are those of the reference")
    latency: dict[str, Latency] = says("by way to run it: stream, graph (a CUDA graph)")
    power: Power = says("while it runs alone")
    layers: list[ProfiledLayer] = says("from the library's profiler, in runs of its own")


class BundledLayer(Format):
    """One layer of a bundled model; further keys as in Predicted, without what is predicted."""

    name: str = says("of the weight, or of the node where there is none")
    macs: int = says("multiply-accumulates, where they are known", default=0)
    onnx: list[str] = says("names of the ONNX nodes that compute it, and of their results", default=[])


class BundledModel(Format):
    """One model of a bundle; further keys: its files and their sha256, names of its outputs, sparse: it has 2:4 weights,
    and note: what became of it."""

    precision: str | None = says("int8: with Q/DQ nodes", default=None)
    layers: list[BundledLayer] = says("in order", default=[])


class Bundle(Format):
    """What a bundle measures; further keys: graphcomb's version and the target's library."""

    target: str | None = says("device", default=None)
    precision: str | None = says("that was asked for", default=None)
    models: dict[str, BundledModel] = says("by name, the reference first")


class Device(Format):
    """results.json of a bench bundle."""

    format: str = says("graphcomb-bench/1")
    bundle: Bundle = says("bundle.json")
    engine: str = says("library")
    version: str = says("of the library")
    date: str = says("ISO 8601")
    device: dict[str, Any] = says("model, system, l4t, power_mode, clocks, cpus, python")
    models: dict[str, DeviceModel] = says("by name, the reference first")
    ratios: dict[str, dict[str, dict[str, float]]] = says(
        "by model and way to run it: how many times faster, percentiles, and low and high: between which the median lies "
        "with 95 %; only of models and ways where that can be said, notes has the reason for the others"
    )
    idle: dict[str, Any] = says("power and temperatures at rest, before anything is built")
    failed: dict[str, str] = says("by name of a model that could not be built or run: the reason", default={})
    interrupted: bool = says("by Ctrl-C: the rest is what was measured until then", default=False)
    monitor: str | None = says("tegrastats, nvidia-smi or null")
    notes: list[str] = says("what a reader should know")


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
