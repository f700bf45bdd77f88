"""Pydantic models of a built engine, its kernels and its padding: parts of summary.json, and `graphcomb build --json`."""

from typing import Annotated

from pydantic import BeforeValidator

from .formats import Format, says

Names = Annotated[tuple[str, ...], BeforeValidator(lambda names: tuple(names) if isinstance(names, list) else names)]


class Kernel(Format):
    """One kernel of an engine."""

    name: str = says("name of the kernel in the library")
    kind: str = says("type of the kernel, in the library's words")
    nodes: Names = says("names of the ONNX nodes that it computes", default=())
    inputs: Names = says("tensors that it reads, as type, shape and layout: fp16[1,64,56,56] NHWC8", default=())
    outputs: Names = says("tensors that it writes, in the same form", default=())
    padding: bool = says("whether it only pads tensors or changes their layout", default=False)


class Origin(Format):
    """The place in the program that an ONNX node was exported from."""

    node: str = says("name of the node in the program's graph")
    module: str = says("path of its module in the model; empty for the model itself")
    passes: Names = says("passes that changed the node or a parameter of its module, in order", default=())

    def __str__(self) -> str:
        where = f"{self.module}/{self.node}" if self.module else self.node
        return where + (f" (changed by {', '.join(self.passes)})" if self.passes else "")


class Pad(Format):
    """An axis of a tensor that an engine computes with a larger size than the model."""

    kernel: str = says("name of the kernel that pads or that computes the larger size")
    how: str = says(
        "kernel: a kernel of its own pads or removes the padding; fused: another kernel pads as part of its work; weights: "
        "the weights contain zeros for the additional entries"
    )
    nodes: Names = says("names of the ONNX nodes that the padding is for")
    axis: int = says("axis of the nodes' output")
    before: int = says("size of the axis in the model")
    after: int = says("size of the axis in the engine")
    alignment: int | None = says("a size that is a multiple of this is not padded; null if every size would be")
    note: str = says("what else the advice depends on, or why there is no advice", default="")

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
    """Quantisation that makes nothing faster."""

    kernel: str = says("name of the kernel that computes the nodes", default="")
    how: str = says("; ".join(f"{how}: {what}" for how, what in UNFUSED.items()))
    nodes: Names = says("names of the ONNX nodes concerned")

    def __str__(self) -> str:
        return f"{', '.join(self.nodes[:4])}: {UNFUSED[self.how]}"


class Engine(Format):
    """A built engine: `graphcomb build --json`, and an entry of `engines` in summary.json."""

    backend: str = says("onnxruntime, openvino, tensorrt, tensorrt_rtx, inductor or torch_tensorrt")
    version: str = says("version of the library")
    target: str = says("name of the target")
    path: str = says("path of the engine file")
    bytes: int = says("size of the engine file in bytes")
    seconds: float = says("build time")
    precision: str = says("fp32, fp16, bf16, int8 or fp8")
    kernels: list[Kernel] = says("kernels in execution order")
    padding: list[str] = says("names of the kernels that only pad tensors or change their layout")
    memory: dict[str, int] = says("memory in bytes by purpose: weights, activations, scratch")
    warnings: list[str] = says("warnings of the library and of graphcomb")
    origins: dict[str, Origin] = says("by name of the ONNX node, where it was exported from", default={})
    pads: list[Pad] = says("TensorRT: axes that the engine computes with a larger size than the model", default=[])
    unfused: list[Unfused] = says("TensorRT: quantisation that makes nothing faster", default=[])
    unread: list[str] = says(
        "TensorRT: lines of the build log about kernels that graphcomb could not parse", default=[]
    )
    timing_cache: str | None = says("TensorRT: SHA-256 of the timing cache after the build", default=None)
