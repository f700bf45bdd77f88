"""summary.json and the files that are parts of it, as models: a run writes it, the report and the command line read it.

docs/formats.md and docs/summary.schema.json are made from these models and those of device_results.py (`make docs-formats`).
Fields may be added; those below keep their meaning.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BeforeValidator

from ..graph.errors import BadInput
from .device_results import Device
from .formats import Format, read, says

T = TypeVar("T")
Names = Annotated[tuple[str, ...], BeforeValidator(lambda names: tuple(names) if isinstance(names, list) else names)]


class Cost(Format):
    """What a program costs for its example inputs."""

    macs: int = says("multiply-accumulates")
    params: int = says("parameters")
    unknown: list[str] = says("operators whose multiply-accumulates are not known and not counted", default=[])


class Change(Format, Generic[T]):
    """Before and after a pass or a run."""

    before: T = says("of the program that went in")
    after: T = says("of the program that came out")


class Scores(Change[float | None]):
    """The metric's mean, before and after a pass."""

    metric: str = says("what it is called", default="accuracy")


class Verified(Format):
    """How a result was checked."""

    oracle: str = says("absence oracle, for a surgery; input program, for a pass that changes no function", default="")
    error: float = says("relative, in float64")
    tolerance: float | None = says("the largest that is allowed", default=None)


class RecordedLayer(Format):
    """A convolution or linear layer in the record of a pass that removes channels."""

    name: str = says("of the weight, or of the node where there is none")
    kind: str = says("conv, depthwise or linear")
    channels: Change[list[int]] = says("how many go in, and how many come out")
    macs: Change[int] = says("multiply-accumulates")


class KernelCount(Change[int]):
    """How many kernels a run starts, as the target's library is predicted to make them."""

    more: list[str] = says("nodes that begin those that are new, where there are more", default=[])
    dead: dict[str, list[str]] = says("by softmax with a single entry left, the nodes only it reads", default={})


class Refused(Format):
    """What a pass left alone."""

    what: str = says("a group, parameter or node")
    why: str = says("the reason, with the node that it comes from")


class Epoch(Format):
    """One epoch of a pass that trains."""

    loss: float | None = says("mean over its batches", default=None)
    val: float | None = says("the metric on the validation data after it", default=None)


class Record(Format):
    """One pass: an entry of record.json, and of `passes` in summary.json (there without `removed`)."""

    pass_: str = says("name of the pass", alias="pass")
    options: dict[str, Any] = says("as in the recipe, defaults included")
    changed: list[Any] = says("what it changed; each pass says it in its own way", default=[])
    refused: list[Refused] = says("what it left alone, and why", default=[])
    cost: Change[Cost] = says("of the program")
    seconds: float = says("wall time")
    accuracy: Scores | None = says("the metric, where there are labels", default=None)
    verified: Verified | None = says("how the result was checked, where it can be", default=None)
    layers: list[RecordedLayer] = says("convolutions and linear layers, by a pass that removes channels", default=[])
    epochs: list[Epoch] = says("of a pass that trains", default=[])
    kernels: KernelCount | None = says("of a pass that removes channels, where the target's are known", default=None)
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
    nodes: Names = says("ONNX nodes that it computes", default=())
    inputs: Names = says("tensors that it reads, type and shape first, as in fp16[1,64,56,56] NHWC8", default=())
    outputs: Names = says("tensors that it writes", default=())
    padding: bool = says("it only pads or re-formats, a cost without multiply-accumulates", default=False)


class Origin(Format):
    """Where an ONNX node comes from."""

    node: str = says("of the program's graph")
    module: str = says("path in the model, empty at the top")
    passes: Names = says("names of those that changed the node or a parameter of its module, in order", default=())

    def __str__(self) -> str:
        where = f"{self.module}/{self.node}" if self.module else self.node
        return where + (f" (changed by {', '.join(self.passes)})" if self.passes else "")


class Pad(Format):
    """An axis that an engine computes wider than the model has it."""

    kernel: str = says("that pads or is wider")
    how: str = says(
        "kernel: it only pads or unpads; fused: inside one that is there anyway; weights: zeros in the weights"
    )
    nodes: Names = says("ONNX nodes that it pads for")
    axis: int = says("of their output")
    before: int = says("its size in the model")
    after: int = says("its size in the engine")
    alignment: int | None = says("multiples of it avoid the padding; null: no width would")
    note: str = says("what else the advice depends on, or why there is none", default="")

    def __str__(self) -> str:
        where = ", ".join(self.nodes[:3]) or self.kernel
        advice = "no width avoids it" if self.alignment is None else f"multiples of {self.alignment} are not"
        note = f" ({self.note})" if self.note else ""
        return f"{where}: axis {self.axis} is padded from {self.before} to {self.after}; {advice}{note}"


UNFUSED = {
    "kernel": "a kernel of its own quantises or dequantises",
    "float": "computes in floating point although its operands are quantised",
    "idle": "quantises and dequantises within one kernel, which rounds and saves nothing",
    "wide": "computes in few bits but writes floating point, and a kernel of its own scales and quantises that",
}


class Unfused(Format):
    """Quantisation that buys nothing."""

    kernel: str = says("that computes it", default="")
    how: str = says("; ".join(f"{how}: {what}" for how, what in UNFUSED.items()))
    nodes: Names = says("ONNX nodes that it concerns")

    def __str__(self) -> str:
        return f"{', '.join(self.nodes[:4])}: {UNFUSED[self.how]}"


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
    origins: dict[str, Origin] = says("by ONNX node", default={})
    pads: list[Pad] = says("TensorRT: axes computed wider than the model has them", default=[])
    unfused: list[Unfused] = says("TensorRT: quantisation that buys nothing", default=[])
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
    """A layer of a Prediction, side by side in the programs; null where a program does not have it."""

    name: str = says("of the weight, or of the node where there is none")
    op: str = says("as in Predicted")
    before: Predicted | None = says("of the program, or of the dense one", default=None)
    after: Predicted | None = says("of what became of it", default=None)


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

    def __str__(self) -> str:
        return f"off by up to {self.factor:.2g} times: {self.source}"


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
    params_ratio: float | None = says("how many times fewer parameters")
    latency_ratio: float | None = says("how many times faster, measured; null where that cannot be said")
    latency_predicted: float | None = says("how many times faster, predicted", default=None)
    engine: str | None = says("path of the first engine's file; null without engines", default=None)
    inputs: list[list[int]] = says("shapes of the example inputs", default=[])
    surgery_error: float | None = says("worst relative error against the oracle, float64; null without a surgery")
    onnx_parity: float | None = says("worst error of the fp32 ONNX file against the program")
    onnx_parity_fp16: float | None = says("of the fp16 one, which the engines are built from then", default=None)
    cost: Change[Cost] | None = says("of the program")
    passes: list[Record] = says("in order")
    files: dict[str, Any] = says("paths of what was written, by kind")
    environment: dict[str, Any] = says("versions and machine")
    seconds: float = says("of the whole run", default=0.0)
    onnx: dict[str, Onnx] = says("by precision", default={})
    engines: list[Engine] = says("by target", default=[])
    bench: Bench | None = says("dense against compressed in ONNX Runtime, fp32, one thread", default=None)
    prediction: Prediction | None = says("dense and compressed on the target, layer by layer", default=None)
    prediction_note: str = says("why there is none", default="")
    devices: list[Device] = says(
        "what bench bundles measured, as the report was given it; no run writes it", default=[]
    )


# What a summary that is only read may lack.
NOTHING: dict[str, Any] = dict.fromkeys(name for name, field in Summary.model_fields.items() if field.is_required())
NOTHING |= {"model": "", "target": "", "precision": "", "passes": [], "files": {}, "environment": {}}


def read_summary(values: Any, where: str) -> Summary:
    """A summary from what its JSON file holds, checked here once; what is missing or null is empty.

    where: the file, which an error names. Raises BadInput, one line with the field, for what is of another kind.
    """
    if not isinstance(values, Mapping):
        raise BadInput(f"{where}: the summary is a mapping of names to values, not a {type(values).__name__}")
    return read(Summary, NOTHING | {name: value for name, value in values.items() if value is not None}, where)
