"""The JSON files that graphcomb writes, as models: what `docs/formats.md` says, and what a reader may rely on.

Fields may be added; those below keep their meaning. `python -m graphcomb.schema` prints the page.
"""

from __future__ import annotations

from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field


class Format(BaseModel):
    """Fields that are not named here are allowed."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


def says(text: str, **options: Any) -> Any:
    return Field(description=text, **options)


class Cost(Format):
    """What a program costs for its example inputs."""

    macs: int = says("multiply-accumulates")
    params: int = says("parameters")
    unknown: list[str] = says("operators whose multiply-accumulates are not known and not counted", default=[])


class Change(Format):
    """Before and after a pass or a run."""

    before: Any = says("of the program that went in")
    after: Any = says("of the program that came out")


class Refused(Format):
    """What a pass left alone."""

    what: str = says("a group, parameter or node")
    why: str = says("the reason, with the node that it comes from")


class Record(Format):
    """One pass: an entry of record.json, and of `passes` in summary.json (there without `removed`)."""

    pass_: str = says("name of the pass", alias="pass")
    options: dict[str, Any] = says("as in the recipe, defaults included")
    changed: list[Any] = says("what it changed; each pass says it in its own way", default=[])
    refused: list[Refused] = says("what it left alone, and why", default=[])
    cost: Change = says("of the program, each a Cost")
    seconds: float = says("wall time")
    accuracy: Change | None = says("the metric, where there are labels; metric: its name", default=None)
    verified: dict[str, Any] | None = says("oracle, relative error in float64, tolerance", default=None)
    layers: list[dict[str, Any]] | None = says(
        "by layer: name, kind, channels and macs, each before and after", default=None
    )
    kernels: dict[str, Any] | None = says(
        "that a run starts, as the target's library is predicted to make them: before, after; more: nodes that begin those "
        "that are new, where there are more; dead: by softmax that has a single entry left, the nodes only it reads",
        default=None,
    )
    removed: dict[str, dict[str, list[int]]] | None = says(
        "by parameter and dimension: the indices that went, in the numbering of the program that went in", default=None
    )


class Timing(Format):
    """Latency of one model."""

    name: str = says("of the model")
    runs: int = says("samples that counted")
    rejected: int = says("samples during which something else had the processor")
    repeats: int = says("calls in one sample")
    ms: dict[str, float] = says("p5, p25, median, p75, p95, p99 and iqr in milliseconds; empty without enough samples")


class Bench(Format):
    """A paired measurement: `graphcomb bench --out`, and `bench` in summary.json."""

    timings: list[Timing] = says("by model, the reference first")
    ratios: dict[str, dict[str, float] | None] = says(
        "how many times faster than the reference: percentiles of pairs, and low and high, between which the median lies "
        "with 95 %"
    )
    ratio: float | None = says("the median of the second model's")
    rounds: int = says("pairs that counted")
    contended: bool = says("the machine was too busy for a figure")
    note: str = says("why there is no figure; empty when there is")
    environment: dict[str, Any] = says("processor, versions, threads, load, date")


class Kernel(Format):
    """One kernel of an engine."""

    name: str = says("the library's")
    kind: str = says("the library's name for what it is")
    nodes: list[str] = says("ONNX nodes that it computes")
    padding: bool = says("it only pads or re-formats")


class Engine(Format):
    """A build: `graphcomb build --json`, and an entry of `engines` in summary.json."""

    backend: str = says("onnxruntime, openvino, tensorrt, tensorrt_rtx, inductor or torch_tensorrt")
    version: str = says("of the library")
    target: str = says("device")
    path: str = says("of the engine file")
    bytes: int = says("its size")
    seconds: float = says("build time")
    precision: str = says("fp32, fp16, bf16, int8 or fp8")
    kernels: list[Kernel] = says("in execution order")
    padding: list[str] = says("names of the kernels that only pad")
    memory: dict[str, int] = says("bytes by purpose: weights, activations, scratch")
    warnings: list[str] = says("the library's and graphcomb's")
    origins: dict[str, dict[str, Any]] = says("by ONNX node: node of the graph, module, passes that changed it")
    pads: list[dict[str, Any]] = says(
        "TensorRT: axes computed wider than the model has them; how (kernel, fused, weights), nodes, axis, before, "
        "after, the alignment that would avoid it (null: no width would), and a note on it", default=[],
    )  # fmt: skip
    unfused: list[dict[str, Any]] = says(
        "TensorRT: quantisation that buys nothing; how (kernel, float, idle, wide) and nodes", default=[]
    )
    unread: list[str] = says("TensorRT: lines of the build log about kernels that could not be read", default=[])


class Onnx(Format):
    """An exported file: a value of `onnx` in summary.json."""

    path: str = says("of the file")
    precision: str = says("fp32 or fp16")
    opset: int = says("as it came out")
    bytes: int = says("with external weights")
    parity: float | None = says(
        "worst error against the fp32 program: max |a - b| / max |b| of an output, or a tenth of a channel's by its scale"
    )
    tolerance: float = says("the largest parity that was allowed")
    agreement: float | None = says("share of real samples whose scores decide as the program's; null without either")
    cosine: float | None = says("lowest of an output with the program's")
    float32: dict[str, str] = says("nodes of an fp16 file that stay in fp32, and why")
    nodes: dict[str, int] = says("count by operator")


class Predicted(Format):
    """One layer of one program: before and after in `layers` of a Prediction. In a bundle.json without what is predicted,
    and with `onnx`, the names of the ONNX nodes that compute it."""

    node: str = says("of the graph")
    call: str = says("operator")
    op: str = says("conv, matmul, attention, norm, activation or copy")
    sizes: dict[str, int] = says("that pruning may change, by name: inputs, outputs, groups, ...")
    options: dict[str, Any] = says("that it does not: batch, image, kernel, rows, ...")
    macs: int = says("multiply-accumulates")
    padded_macs: int = says("with channels padded to the target's alignment for the precision")
    bytes: float = says("read and written, weights included, each once")
    ms: float = says("predicted")
    bound: str = says("what takes longest by the roofline: compute, memory or launch")
    half: float = says("share of the time that is left when every group that can shrink has half its size")
    verdict: str = says("why it will not profit from fewer channels, or less than its MACs say; empty when it will")


class PredictedLayer(Format):
    """A layer of a Prediction; further keys as in its `ms`, each a Predicted, null where a program does not have it."""

    name: str = says("of the weight, or of the node where there is none")
    op: str = says("as in Predicted")


class Calibration(Format):
    """How a roofline was fitted to what bench bundles measured."""

    target: str = says("device")
    precision: str = says("of the models")
    device: str | None = says("as it calls itself")
    engine: str = says("library and version")
    modes: list[str] = says("how the models were run: graph, stream")
    models: int = says("that were measured")
    kernels: int = says("of their profiles whose layers are known")
    fitted: list[str] = says("common factor, or the names of the four numbers below")
    compute_share: float = says("attained, of peak arithmetic")
    memory_share: float = says("attained, of bandwidth")
    launch_us: float = says("to start a kernel")
    run_us: float = says("of a run, beside its kernels")
    error: dict[str, float] = says("that remains, relative, over the models: median, worst")
    left_out: dict[str, float] | None = says("the same, each model predicted from the others; null below three models")


class Uncertainty(Format):
    """How far off predictions are known to be."""

    factor: float = says("the true time lies, mostly, between ms / factor and ms * factor")
    source: str = says("where that is known from")


class Prediction(Format):
    """`prediction` in summary.json, and `graphcomb predict --json`."""

    by: str = says("what predicted: a latency table or a roofline")
    target: str = says("device")
    precision: str = says("of the engine")
    batch: int = says("where it is dynamic")
    ms: dict[str, float] = says("of a run: before, after")
    uncertainty: Uncertainty | None = says("of ms; null where nothing is known", default=None)
    run_ms: float = says("of a run, beside its layers")
    calibration: Calibration | None = says("of the roofline; null for a data sheet or a table")
    layers: list[PredictedLayer] = says("in order")
    measured_ms: dict[str, float] | None = says("of a run, where the target itself was measured", default=None)
    error: dict[str, float] | None = says("ms / measured_ms - 1", default=None)


class Summary(Format):
    """summary.json of `graphcomb run`."""

    model: str = says("source")
    target: str = says("device")
    precision: str = says("of the engines")
    accuracy_before: float | None = says("of the dense program; null without labels")
    accuracy_after: float | None = says("of the compressed one")
    metric: str = says(
        'what these two are: "accuracy"; "training accuracy" where the data is one loader; the name of the recipe\'s metric',
        default="accuracy",
    )
    macs_ratio: float | None = says("how many times fewer multiply-accumulates; null where not all are known")
    params_ratio: float = says("how many times fewer parameters")
    latency_ratio: float | None = says("how many times faster, measured; null where that cannot be said")
    latency_predicted: float | None = says("how many times faster, predicted", default=None)
    surgery_error: float | None = says("worst relative error against the oracle, float64; null without a surgery")
    onnx_parity: float | None = says("worst error of the fp32 ONNX file against the program")
    onnx_parity_fp16: float | None = says("of the fp16 one, which the engines are built from then", default=None)
    cost: Change = says("each a Cost")
    passes: list[Record] = says("in order")
    files: dict[str, Any] = says("paths of what was written, by kind")
    environment: dict[str, Any] = says("versions and machine")
    seconds: float = says("of the whole run", default=0.0)
    onnx: dict[str, Onnx] = says("by precision", default={})
    engines: list[Engine] = says("by target", default=[])
    bench: Bench | None = says("dense against compressed in ONNX Runtime, fp32, one thread", default=None)
    prediction: Prediction | None = says("dense and compressed on the target, layer by layer", default=None)
    prediction_note: str = says("why there is none", default="")


class Latency(Format):
    """Of one model, run in one way."""

    runs: int = says("runs that counted")
    host_ms: dict[str, float] = says("as the caller sees it: p5, median, p95, p99")
    gpu_ms: dict[str, float] | None = says("between two CUDA events", default=None)


class DeviceModel(Format):
    """One model on a device."""

    file: str = says("in the bundle")
    engine: dict[str, Any] = says(
        "build_seconds (null for the engine of an earlier run, which is reused), bytes, scratch_bytes, file: of the engine, "
        "beside the results, flags: of TensorRT's builder, inspector: layers as the library has them, no_graph: why it "
        "cannot run as a CUDA graph, and contended: runs that counted although something else had the processor"
    )
    parity: dict[str, Any] = says(
        "finite: no NaN or infinity; error: relative to the reference, null without one; tolerance: the largest error that "
        "the model's precision explains; note: what is wrong with the outputs, where something is"
    )
    latency: dict[str, Latency] = says("by way to run it: stream, graph (a CUDA graph)")
    power: dict[str, Any] = says(
        "while it runs alone: power_mw by rail, total_mw, energy_mj of one run, temperatures_c, clocks_mhz, "
        "load_percent, samples"
    )
    layers: list[dict[str, Any]] = says("name and ms of each, from the library's profiler in runs of its own")


class Device(Format):
    """results.json of a bench bundle."""

    format: str = says("graphcomb-bench/1")
    bundle: dict[str, Any] = says(
        "bundle.json: graphcomb's version, the precision asked for, target and its library, and by model its files, their "
        "sha256, its precision (int8: with Q/DQ nodes), names of its outputs, sparse: it has 2:4 weights, note: what became "
        "of it, and its layers"
    )
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


FORMATS = (
    Summary,
    Record,
    Cost,
    Change,
    Refused,
    Bench,
    Timing,
    Engine,
    Kernel,
    Onnx,
    Device,
    DeviceModel,
    Latency,
    Prediction,
    PredictedLayer,
    Predicted,
    Calibration,
)


def markdown() -> str:
    """The page: a table for every model."""
    lines = [
        "# JSON formats",
        "",
        "The JSON files that graphcomb writes. Fields may be added; these keep their meaning.",
    ]
    for model in FORMATS:
        lines += ["", f"## {model.__name__}", "", " ".join((model.__doc__ or "").split()), ""]
        lines += ["| field | type | meaning |", "| --- | --- | --- |"]
        hints = get_type_hints(model)
        for name, field in model.model_fields.items():
            kind = str(hints[name]) if not isinstance(hints[name], type) else hints[name].__name__
            kind = (
                kind.replace("typing.", "").replace(f"{__name__}.", "").replace(" | ", " or ").replace("None", "null")
            )
            optional = "" if field.is_required() else " (optional)"
            lines.append(f"| {field.alias or name} | {kind} | {field.description}{optional} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
