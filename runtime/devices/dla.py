"""Predict from the documented rules which nodes of an ONNX file the deep learning accelerator (DLA) of a target can run.

This needs no TensorRT. On the device TensorRT itself decides. Source: TensorRT documentation, "DLA Supported Layers and
Restrictions".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto

from ...graph.errors import BadInput
from ..onnx_file import precision
from .table import Dla, Target

# Largest values by operator. The kernel size is that of the weight, the other values are attributes of the node.
POOLING = {"window": 8, "stride": 16, "padding": 7}
LIMITS = {
    "Conv": {"kernel": 32, "stride": 8, "padding": 31},
    "ConvTranspose": {"dilation": 1, "kernel": 32},
    "MaxPool": POOLING,
    "AveragePool": POOLING,
}
ATTRIBUTES = {"stride": "strides", "padding": "pads", "dilation": "dilations", "window": "kernel_shape"}
CLIPPED = 1, 127  # range of the upper end of a clipped ReLU
NEAREST, LINEAR = 32, 4  # largest scales of a resize, by its mode
FOLDED = frozenset("Constant Shape Size".split())  # TensorRT computes their values when it builds the engine
FREE = frozenset("Identity Dropout QuantizeLinear DequantizeLinear".split())  # TensorRT makes no layers of them
PLAIN = frozenset(
    "Relu Sigmoid Tanh LeakyRelu PRelu Clip Add Sub Mul Max Min Div Pow BatchNormalization LRN ReduceMax Abs Sin Cos Atan "
    "Reshape Transpose Slice Softmax".split()
)
PRODUCT = "it has no matrix products; a 1x1 convolution computes the same"
MEAN = f"it has no mean; average pooling with a window up to {POOLING['window']} computes the same"
INSTEAD = {"Gemm": PRODUCT, "MatMul": PRODUCT, "GlobalAveragePool": MEAN, "ReduceMean": MEAN}
TYPES = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16", TensorProto.INT8: "int8"}

Shape = Sequence[int | None]


@dataclass(frozen=True)
class Placement:
    """A node of the model and where it runs.

    node, op: its name and operator. why: the reason why it runs on the GPU; empty if the DLA can run it.
    """

    node: str
    op: str
    why: str


def dla_report(
    model: onnx.ModelProto, target: Target, core: Any = 0, batch: Any = None, kind: str | None = None
) -> list[Placement]:
    """Return where each node of a model would run by the rules of the target's DLA, in the order of the graph.

    core: index of the DLA core. batch: batch size of a model with a dynamic batch. kind: the precision that the model will
    have; by default the one that it has.

    Raises BadInput for a target without a DLA or without that core, a precision that the DLA does not compute in, and
    dynamic shapes for which `batch` gives no size.
    """
    becomes, kind = kind is not None, kind or precision(model)
    rules = dla_core(target, core, kind)
    graph = onnx.shape_inference.infer_shapes(_static(model, rules, batch)).graph
    types = {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info, *graph.output)}
    shapes: dict[str, Shape] = {name: _shape(tensor) for name, tensor in types.items()}
    shapes |= {t.name: tuple(t.dims) for t in graph.initializer}
    computed = {t.name for t in graph.initializer}  # tensors that do not depend on the inputs
    # The float tensors of an INT8 model lie between Q/DQ nodes, which TensorRT fuses into the layers.
    allowed = {*rules.dtypes, *(["fp32"] if becomes or kind == "int8" else [])}
    values = {t.name: t for t in graph.initializer}
    values |= {
        n.output[0]: a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"
    }
    report = []
    for node in graph.node:
        if node.op_type in FOLDED or all(i in computed for i in node.input if i):
            computed.update(node.output)
        elif node.op_type not in FREE:
            live = [name for name in (*node.input, *node.output) if name and name not in computed]
            other = sorted({TYPES.get(types[n].elem_type, "this type") for n in live if n in types} - allowed)
            why = _lacks(node) or (f"it computes in {_either(rules)}, not {other[0]}" if other else "")
            why = why or _size(live, shapes, rules)
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            operands = [shapes.get(n, ()) for n in (*node.input, *node.output)]
            if not why and node.op_type == "Clip":
                why = _clip([values.get(name) for name in node.input[1:]], rules)
            if not why and node.op_type in RULES:
                why = RULES[node.op_type](attributes, operands, rules)
            why = why or _limits(node.op_type, attributes, operands)
            report.append(Placement(node.name, node.op_type, why))
    return report


def dla_core(target: Target, core: Any, kind: str) -> Dla:
    """Return the rules of the target's DLA, after checking that the core exists and can run a model of this precision.

    core: index of the core. kind: precision of the model.

    Raises BadInput for a target without a DLA or without that core, and a precision that the DLA does not compute in. Up to
    TensorRT 10 a DLA supports INT8 only by implicit quantisation; a build then turns Q/DQ nodes into a calibration cache.
    """
    rules = target.dla
    if rules is None:
        raise BadInput(f"option dla: {target.name} has no DLA")
    if not isinstance(core, int) or isinstance(core, bool) or not 0 <= core < rules.cores:
        raise BadInput(f"option dla: a core of {target.name}, 0 to {rules.cores - 1}, not {core!r}")
    if kind not in rules.dtypes:
        raise BadInput(f"option dla: the DLA of {target.name} computes in {_either(rules)}, not {kind}; export it so")
    return rules


def _either(rules: Dla) -> str:
    return " and ".join(rules.dtypes)


def _static(model: onnx.ModelProto, rules: Dla, batch: Any) -> onnx.ModelProto:
    """Return a copy of the model whose dynamic batch has the given size. Raises BadInput for other dynamic axes."""
    static = onnx.ModelProto()
    static.CopyFrom(model)
    weights = {t.name for t in static.graph.initializer}
    for value in static.graph.input:
        axes = value.type.tensor_type.shape.dim
        dynamic = [i for i, axis in enumerate(axes) if not axis.HasField("dim_value")]
        if value.name in weights or not dynamic or rules.dynamic_shapes:
            continue
        if dynamic != [0] or not isinstance(batch, int):
            cure = "give one batch size" if dynamic == [0] else "export it with fixed shapes"
            raise BadInput(f"option dla: input {value.name}: axes {dynamic} are dynamic, a DLA's are not; {cure}")
        axes[0].dim_value = batch
    return static


def _shape(tensor: onnx.TypeProto.Tensor) -> Shape:
    return [axis.dim_value if axis.HasField("dim_value") else None for axis in tensor.shape.dim]


# --------------------------------------------------------- rules; each returns why the DLA cannot run the node, or ""
def _lacks(node: onnx.NodeProto) -> str:
    known = node.op_type in (*PLAIN, *RULES, *LIMITS)
    return "" if known else INSTEAD.get(node.op_type, f"it has no {node.op_type}")


def _size(names: Sequence[str], shapes: dict[str, Shape], rules: Dla) -> str:
    for name in names:
        sizes = [n for n in shapes.get(name, ()) if n is not None]
        if len(sizes) != 4 or len(shapes[name]) != 4:
            return f"{name} is not a tensor of 4 known sizes (batch, channels, height, width)"
        if max(sizes[1:]) > rules.max_dim:
            return f"{name} has a size of {max(sizes[1:])}, above {rules.max_dim}"
        if sizes[0] > rules.max_batch:
            return f"{name} has a batch of {sizes[0]}, above {rules.max_batch}"
    return ""


def _above(name: str, values: Sequence[int | None], limit: int) -> str:
    largest = max((value or 0 for value in values), default=0)
    return f"{name} {largest} is above {limit}" if largest > limit else ""


def _limits(op: str, attributes: dict[str, Any], shapes: list[Shape]) -> str:
    for name, limit in LIMITS.get(op, {}).items():
        values = shapes[1][2:] if name == "kernel" else attributes.get(ATTRIBUTES[name], ())
        if above := _above(name, values, limit):
            return above
    return ""


def _deconvolution(attributes: dict[str, Any], shapes: list[Shape], rules: Dla) -> str:
    if attributes.get("group", 1) > 1 and not rules.deconvolution_groups:
        return "its deconvolutions have no groups"
    padded = any(attributes.get("pads", ())) or attributes.get("auto_pad", b"").startswith(b"SAME")
    return "its deconvolutions have no padding" if padded and not rules.deconvolution_padding else ""


def _clip(bounds: Sequence[onnx.TensorProto | None], rules: Dla) -> str:
    low, high = (None if b is None else float(onnx.numpy_helper.to_array(b).item()) for b in [*bounds, None, None][:2])
    if low != 0 or high is None or not CLIPPED[0] <= high <= CLIPPED[1]:
        return f"it clips from 0 to a value of {CLIPPED[0]} to {CLIPPED[1]} only"
    return ""


def _concat(attributes: dict[str, Any], shapes: list[Shape], rules: Dla) -> str:
    axis = attributes["axis"] % 4
    return "" if axis in rules.concat_axes else f"it joins along the channels only, not along axis {axis}"


def _resize(attributes: dict[str, Any], shapes: list[Shape], rules: Dla) -> str:
    mode = attributes.get("mode", b"nearest")
    if mode == b"cubic":
        return "it resizes to the nearest or linearly only"
    for before, after in zip(shapes[0], shapes[-1], strict=True):
        if not before or not after or after % before:
            return "it resizes by whole numbers only"
        if above := _above("scale", [after // before], LINEAR if mode == b"linear" else NEAREST):
            return above
    return ""


RULES: dict[str, Callable[[dict[str, Any], list[Shape], Dla], str]] = {
    "ConvTranspose": _deconvolution,
    "Concat": _concat,
    "Resize": _resize,
}
