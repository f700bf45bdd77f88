"""Pydantic models and a reader of results.json, which kit.pyz writes on a device."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..graph.errors import BadInput
from ..graph.files import read_json
from .formats import Format, says
from .kit.contents import FORMAT


class Latency(Format):
    """The latency of one model in one mode (stream or CUDA graph)."""

    runs: int = says("number of runs that counted")
    host_ms: dict[str, float] = says(
        "milliseconds that the caller waits: p5, median, p95, p99, and low and high, the 95 % confidence interval of the "
        "median from the medians of blocks of runs"
    )
    gpu_ms: dict[str, float] | None = says("milliseconds between two CUDA events, in the same form", default=None)


class DeviceParity(Format):
    """The outputs of one model on a device, compared with the reference outputs."""

    finite: bool = says("whether the outputs have no NaN and no infinity")
    error: float | None = says("largest error relative to the largest reference value; null if it cannot be computed")
    tolerance: float | None = says("largest error that the model's precision explains", default=None)
    note: str = says("what is wrong with the outputs; empty if nothing is", default="")


class Power(Format):
    """Power and temperatures while one model runs.

    Further keys: power_mw (by rail), clocks_mhz, load_percent, samples.
    """

    total_mw: float | None = says("total power in milliwatts", default=None)
    energy_mj: float | None = says("energy of one run in millijoules", default=None)
    temperatures_c: dict[str, float | None] = says("degrees Celsius by thermal zone", default={})


class ProfiledLayer(Format):
    """One kernel in the library's profile."""

    name: str = says("name of the kernel in the library")
    ms: float = says("milliseconds of one run spent in the kernel")


class DeviceEngine(Format):
    """An engine that was built on a device.

    Further keys: build_seconds (null for a reused engine of an earlier run), bytes, scratch_bytes, file (name of the
    engine file beside results.json), flags (of TensorRT's builder), no_graph (why it cannot run as a CUDA graph),
    contended (number of runs that counted although another process had the processor), cold_ms (milliseconds of load and
    first_run), device_bytes (device memory of the engine, its context and buffers), dla (number of layers, and the name and
    type of each that runs on the GPU), calibration (file, SHA-256 and number of tensors of the calibration cache, if the
    bundled model's implicit form was built), timing_cache (its file and SHA-256), and trtexec (the command line that builds
    and measures the same with NVIDIA's tool).
    """

    inspector: list[Any] = says("layers as TensorRT's engine inspector reports them", default=[])


class DeviceModel(Format):
    """The results of one model on a device."""

    file: str = says("path of the model in the bundle")
    engine: DeviceEngine = says("engine that was built from the model")
    parity: DeviceParity = says("comparison of its outputs with the reference")
    latency: dict[str, Latency] = says("latency by mode: stream, graph (a CUDA graph)")
    power: Power = says("power while it runs alone")
    throughput: dict[str, float] = says(
        "streams (their number) and images_per_second of all of them at once", default={}
    )
    accuracy: dict[str, Any] = says("metric, value and number of images; empty without --data", default={})
    layers: list[ProfiledLayer] = says("kernels in the library's profile, which is taken in separate runs")


class BundledLayer(Format):
    """One layer of a bundled model. Further keys: those of Predicted before macs."""

    name: str = says("name of the layer's weight, or of its node if it has no weight")
    macs: int = says("number of multiply-accumulates; 0 if it is unknown", default=0)
    onnx: list[str] = says("names of the ONNX nodes that compute the layer, and of their outputs", default=[])


class BundledModel(Format):
    """One model of a bundle.

    Further keys: its files and their SHA-256, names of its outputs, sparse (whether it has 2:4 sparse weights), note (how
    the bundled model differs from the one asked for), and, for a quantised model and a target with a DLA, implicit: the
    form without Q/DQ nodes that a DLA needs up to TensorRT 10 (file, scales by tensor, int8: names of the layers that
    compute in INT8, and notes: what a build may compute otherwise).
    """

    precision: str | None = says("precision of the model; int8 if it has Q/DQ nodes", default=None)
    layers: list[BundledLayer] = says("layers in execution order", default=[])


class Bundle(Format):
    """The content of bundle.json. Further keys: graphcomb (its version) and engine (the target's library)."""

    target: str | None = says("name of the target", default=None)
    precision: str | None = says("precision that was asked for", default=None)
    models: dict[str, BundledModel] = says("models by name; the reference is the first")


class Device(Format):
    """results.json of a bench bundle."""

    format: str = says("graphcomb-bench/1")
    bundle: Bundle = says("content of bundle.json")
    engine: str = says("library that ran the models")
    version: str = says("version of the library")
    date: str = says("time of the measurement, ISO 8601")
    device: dict[str, Any] = says("the device: model, system, l4t, power_mode, clocks, cpus, python")
    models: dict[str, DeviceModel] = says("results by name of the model; the reference is the first")
    ratios: dict[str, dict[str, dict[str, float]]] = says(
        "by model and mode: how many times faster than the reference it is, as percentiles; low and high are the 95 % "
        "confidence interval of the median. Where no ratio could be stated the entry is missing, and notes has the reason"
    )
    idle: dict[str, Any] = says("power and temperatures at rest, before anything is built")
    failed: dict[str, str] = says("by name of a model that could not be built or run, the reason", default={})
    interrupted: bool = says("whether Ctrl-C ended the measurement; the file then has what was measured", default=False)
    host_peak_bytes: int | None = says("largest memory of the process and of a build, in bytes", default=None)
    monitor: str | None = says("tool that reported power: tegrastats, nvidia-smi or null")
    notes: list[str] = says("remarks on the results")


def are_results(path: str | Path) -> bool:
    """Return whether a file looks like the results of a bench bundle; False for one that cannot be read."""
    try:
        return _are_results(read_json(Path(path)))
    except BadInput:
        return False


def _are_results(values: Any) -> bool:
    return isinstance(values, dict) and str(values.get("format", "")).startswith("graphcomb-bench")


def read_results(path: str | Path) -> dict[str, Any]:
    """Return the parsed content of results.json, which kit.pyz wrote (docs/formats.md, Device).

    Raises BadInput for a file that cannot be read, is no results.json, has another format version, or has no models.
    """
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
    """Return the precision of one model of a bundle, by default the one that the bundle was asked for."""
    return str(bundle["models"][name].get("precision", bundle["precision"]))


def median_latency(model: Mapping[str, Any]) -> tuple[str, float]:
    """Return the mode in which a measured model was run and its median latency in seconds.

    The mode is "graph" (a CUDA graph) if it was measured, else "stream"; the time is the GPU's if it was measured, else the
    host's.
    """
    mode = "graph" if "graph" in model["latency"] else "stream"
    times = model["latency"][mode]
    return mode, (times.get("gpu_ms") or times["host_ms"])["median"] / 1e3
