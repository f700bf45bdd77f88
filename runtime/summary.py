"""Pydantic models of summary.json and of the JSON files that are parts of it.

`graphcomb run` writes the file, the report and the command line read it. docs/formats.md and docs/summary.schema.json are
generated from these models, engine_summary.py and device_results.py (`make docs-formats`). Fields may be added; the existing
ones keep their meaning.
"""

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from ..graph.errors import BadInput
from .device_results import Device
from .engine_summary import Engine
from .formats import Format, read, says

T = TypeVar("T")


class Cost(Format):
    """The cost of one run of a program on its example inputs."""

    macs: int = says("number of multiply-accumulates")
    params: int = says("number of parameters")
    unknown: list[str] = says("operators whose multiply-accumulates are unknown; macs leaves them out", default=[])


class Change(Format, Generic[T]):
    """A value before and after a pass or a run."""

    before: T = says("value for the input program")
    after: T = says("value for the resulting program")


class Scores(Change[float | None]):
    """The mean of the metric over the samples, before and after a pass."""

    metric: str = says("name of the metric", default="accuracy")
    interval: list[float | None] | None = says(
        "95 % interval of after over the choice of samples: low and high; null where it is not known", default=None
    )


class Verified(Format):
    """How a result was checked."""

    oracle: str = says(
        '"absence oracle" for a pass that removes channels, "input program" or "input program, node by node" for a pass '
        "that keeps the function",
        default="",
    )
    error: float = says("largest relative error, computed in float64")
    tolerance: float | None = says("largest error that is allowed", default=None)


class RecordedLayer(Format):
    """A convolution or linear layer in the record of a pass that removes channels."""

    name: str = says("name of the layer's weight, or of its node if it has no weight")
    kind: str = says("conv, depthwise or linear")
    channels: Change[list[int]] = says("input channels and output channels")
    macs: Change[int] = says("number of multiply-accumulates")


class KernelCount(Change[int]):
    """How many kernels one run starts, predicted from how the target's library fuses nodes."""

    more: list[str] = says("first nodes of the additional kernels; empty unless after exceeds before", default=[])
    dead: dict[str, list[str]] = says(
        "softmaxes with a single entry left, whose result is always 1; for each, the nodes that only it reads",
        default={},
    )


class Refused(Format):
    """Something that a pass left unchanged."""

    what: str = says("name of a group, parameter or node")
    why: str = says("reason, with the node that causes it")


class Epoch(Format):
    """One epoch of a pass that trains."""

    loss: float | None = says("mean loss over the batches of the epoch", default=None)
    val: float | None = says("metric on the validation data at the end of the epoch", default=None)


class Record(Format):
    """The record of one pass: an entry of record.json, and of `passes` in summary.json (there without `removed`)."""

    pass_: str = says("name of the pass", alias="pass")
    options: dict[str, Any] = says("options as in the recipe, including the defaults")
    changed: list[Any] = says("what the pass changed; the keys of an entry depend on the pass", default=[])
    refused: list[Refused] = says("what the pass left unchanged, and why", default=[])
    cost: Change[Cost] = says("cost of the program")
    seconds: float = says("wall time of the pass")
    accuracy: Scores | None = says("metric before and after the pass; null without labels", default=None)
    verified: Verified | None = says("how the result was checked; null for a pass that cannot be checked", default=None)
    layers: list[RecordedLayer] = says("convolutions and linear layers, if the pass removes channels", default=[])
    epochs: list[Epoch] = says("epochs of the training, if the pass trains", default=[])
    kernels: KernelCount | None = says("predicted number of kernels, if the pass removes channels", default=None)
    removed: dict[str, dict[str, list[int]]] | None = says(
        "by parameter or buffer, then by dimension: the removed indices, counted in the input program", default=None
    )


class Timing(Format):
    """The measured latency of one model."""

    name: str = says("name of the model")
    runs: int = says("number of samples that counted")
    rejected: int = says("number of samples that did not count, because another process had the processor")
    repeats: int = says("number of calls in one sample")
    ms: dict[str, float] = says(
        "latency of one call in milliseconds: p5, p25, median, p75, p95, p99 and iqr, and low and high, the 95 % confidence "
        "interval of the median; empty if too few samples counted"
    )


class Bench(Format):
    """A paired measurement: `graphcomb bench --out`, and `bench` in summary.json. In each round every model runs once."""

    timings: list[Timing] = says("one entry per model; the reference is the first")
    ratios: dict[str, dict[str, float] | None] = says(
        "by model: how many times faster than the reference it is, as percentiles over the rounds that counted; low and "
        "high are the 95 % confidence interval of the median; null if too few rounds counted"
    )
    ratio: float | None = says("median ratio of the second model; null if it is unknown")
    rounds: int = says("number of rounds in which the runs of all models counted")
    contended: bool = says("whether there is no ratio because the machine was busy, or its clocks changed")
    estimator: str = says("how the medians and their intervals are estimated", default="")
    note: str = says("why there is no ratio; empty if there is one")
    environment: dict[str, Any] = says(
        "processor, versions of libraries, threads, load and date; stolen_seconds (that the hypervisor took), cpu_mhz "
        "(lowest and highest clock) and gpu_others_percent (percentage of the time for which other processes had the GPU), "
        "null if unknown"
    )


class Onnx(Format):
    """An exported ONNX file: a value of `onnx` in summary.json."""

    path: str = says("path of the file")
    precision: str = says("fp32 or fp16")
    opset: int = says("opset of the written file")
    bytes: int = says("size in bytes, including external weights")
    parity: float | None = says(
        "worst error against the fp32 program: the largest of max |a - b| / max |b| of an output a, the program's being b, "
        "and a tenth of rms(a - b) / rms(b) of one channel"
    )
    tolerance: float = says("largest parity that was allowed")
    agreement: float | None = says(
        "share of positions of real samples at which the largest score is the program's; null without samples or scores"
    )
    cosine: float | None = says("lowest cosine similarity of an output with the program's output")
    float32: dict[str, str] = says("by node of an fp16 file that stays in fp32, the reason")
    nodes: dict[str, int] = says("by operator, the number of nodes")


class Predicted(Format):
    """One layer of one program: before and after in `layers` of a Prediction.

    A layer in bundle.json lacks the fields from macs on and has `onnx`, the names of the ONNX nodes that compute it.
    """

    node: str = says("name of the node in the program's graph")
    call: str = says("operator of the node")
    op: str = says("kind of layer: conv, matmul, attention, recurrent, norm, activation or copy")
    sizes: dict[str, int] = says("by name, the sizes that pruning may change: inputs, outputs, groups, ...")
    options: dict[str, Any] = says("by name, the values that pruning does not change: batch, image, kernel, rows, ...")
    macs: int = says("number of multiply-accumulates")
    padded_macs: int = says("number of multiply-accumulates with channels padded to the target's alignment")
    bytes: float = says("bytes of all inputs, outputs and weights, each counted once")
    ms: float = says("predicted time in milliseconds")
    bound: str = says("largest part of the time by the roofline: compute, memory or launch")
    half: float = says("time with every prunable group at half its size, divided by the time now")
    verdict: str = says(
        "why fewer channels would save no time, or less than the share of MACs that they save; empty if neither is so"
    )


class PredictedLayer(Format):
    """One layer of a Prediction in both programs."""

    name: str = says("name of the layer's weight, or of its node if it has no weight")
    op: str = says("kind of layer, as in Predicted")
    before: Predicted | None = says(
        "layer in the dense program, or in the only one; null if it has no such layer", default=None
    )
    after: Predicted | None = says("layer in the compressed program; null if it has no such layer", default=None)


class Calibration(Format):
    """How a roofline was fitted to the measurements of bench bundles."""

    target: str = says("name of the target")
    precision: str = says("precision of the models")
    device: str | None = says("name that the measured device reports")
    engine: str = says("library and version")
    modes: list[str] = says("how the models were run: graph (a CUDA graph), stream")
    models: int = says("number of measured models")
    kernels: int = says("number of kernels in their profiles whose layers are known")
    fitted: list[str] = says("what was fitted: common factor, or the names of the next four fields")
    compute_share: float = says("attained share of the peak arithmetic")
    memory_share: float = says("attained share of the bandwidth")
    launch_us: float = says("microseconds to start a kernel")
    run_us: float = says("microseconds of a run that belong to no kernel")
    error: dict[str, float] = says("relative error of the fit over the models: median, worst")
    left_out: dict[str, float] | None = says(
        "relative error with each model predicted from the others alone: median, worst; null below three models"
    )


class Uncertainty(Format):
    """How accurate predictions of this kind are known to be."""

    factor: float = says("the true time is mostly between ms / factor and ms * factor")
    source: str = says("measurements that the factor is taken from")

    def __str__(self) -> str:
        return f"off by up to {self.factor:.2g} times: {self.source}"


class Prediction(Format):
    """`prediction` in summary.json, and `graphcomb predict --json`."""

    by: str = says("source of the prediction: a latency table or a roofline")
    target: str = says("name of the target")
    precision: str = says("precision of the engine")
    batch: int = says("batch size assumed for a dynamic batch")
    ms: dict[str, float] = says("by program (before, after), the predicted milliseconds of one run")
    uncertainty: Uncertainty | None = says("uncertainty of ms; null if it is unknown", default=None)
    run_ms: float = says("milliseconds of a run that belong to no layer")
    calibration: Calibration | None = says("fit of the roofline; null for a data sheet or a latency table")
    layers: list[PredictedLayer] = says("layers in execution order")
    measured_ms: dict[str, float] | None = says(
        "by program, the measured milliseconds of one run; null if the target was not measured", default=None
    )
    error: dict[str, float] | None = says("by program, ms / measured_ms - 1", default=None)


class PlannedChange(Format):
    """One row of a tuned plan that changes something."""

    what: str = says("name of the group, block or layers")
    option: str = says("what the plan decides for it")
    saves_ms: float | None = says("milliseconds that this change alone saves, by the tables", default=None)
    loss: float | None = says("divergence in nats that this change alone causes, by the tables", default=None)


class Planned(Format):
    """`plan` in summary.json: the plan of `graphcomb tune` that a run carried out."""

    target: str = says("name of the target")
    precision: str = says("precision that times are of")
    by: str = says("source of the times of layers")
    method: str = says("how the choice was found")
    met: bool = says("whether the budget was met, within a tenth, when the plan was made")
    met_by: str = says('whether a "measured" or a "predicted" time tells')
    edited: bool = says("whether rows were changed by hand since, so that the figures are of another network")
    ms: dict[str, float | bool | None] = says(
        "milliseconds: dense, asked, predicted and achieved; the true times lie mostly from dense_low to dense_high, from "
        "predicted_low to predicted_high, and from low to high"
    )
    loss: dict[str, float | bool | None] = says("divergence from the dense network in nats, predicted and measured")
    changes: list[PlannedChange] = says("what the plan changes")


class Summary(Format):
    """summary.json of `graphcomb run`."""

    model: str = says("model as the recipe names it")
    target: str = says("name of the target")
    precision: str = says("precision of the engines")
    accuracy_before: float | None = says("metric of the dense program; null without labels")
    accuracy_after: float | None = says("metric of the compressed program; null without labels")
    accuracy_interval: list[float | None] | None = says(
        "95 % interval of accuracy_after over the choice of samples: low and high; null where it is not known, as for a "
        "metric that is no mean",
        default=None,
    )
    metric: str = says(
        'name of the metric, by default "accuracy"; "training" precedes it if the recipe\'s data is a single loader',
        default="accuracy",
    )
    macs_ratio: float | None = says("multiply-accumulates before divided by after; null if some are unknown")
    params_ratio: float | None = says("parameters before divided by after")
    latency_ratio: float | None = says("measured latency before divided by after; null if it could not be measured")
    latency_predicted: float | None = says("predicted latency before divided by after", default=None)
    engine: str | None = says("path of the first engine file; null without engines", default=None)
    inputs: list[list[int]] = says("shapes of the example inputs", default=[])
    surgery_error: float | None = says(
        "worst relative error against the absence oracle in float64; null if no pass removed channels"
    )
    onnx_parity: float | None = says("worst error of the fp32 ONNX file against the program")
    onnx_parity_fp16: float | None = says(
        "worst error of the fp16 ONNX file, if the engines are built from one", default=None
    )
    cost: Change[Cost] | None = says("cost of the program")
    passes: list[Record] = says("records of the passes, in order")
    files: dict[str, Any] = says("paths of the written files, by kind")
    environment: dict[str, Any] = says("versions of libraries, and the machine")
    seconds: float = says("wall time of the run", default=0.0)
    onnx: dict[str, Onnx] = says("exported files by precision", default={})
    engines: list[Engine] = says("built engines, one per target", default=[])
    bench: Bench | None = says(
        "latency of the dense and the compressed program in ONNX Runtime, fp32, one thread", default=None
    )
    prediction: Prediction | None = says(
        "predicted latency of both programs on the target, layer by layer", default=None
    )
    prediction_note: str = says("why there is no prediction", default="")
    plan: Planned | None = says("the tuned plan that the run carried out; null without one", default=None)
    devices: list[Device] = says(
        "results of bench bundles; `graphcomb report` adds them, a run does not write them", default=[]
    )


# Values of the required fields that a file which is read may lack.
NOTHING: dict[str, Any] = dict.fromkeys(name for name, field in Summary.model_fields.items() if field.is_required())
NOTHING |= {"model": "", "target": "", "precision": "", "passes": [], "files": {}, "environment": {}}


def read_summary(values: Any, where: str) -> Summary:
    """Validate the parsed JSON of a summary and return it. Missing and null values become empty ones.

    where: the file, for the message. Raises BadInput, which names the first field whose value has the wrong type.
    """
    if not isinstance(values, Mapping):
        raise BadInput(f"{where}: the summary is a mapping of names to values, not a {type(values).__name__}")
    return read(Summary, NOTHING | {name: value for name, value in values.items() if value is not None}, where)
