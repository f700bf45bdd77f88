"""Convert an ONNX graph to half precision: all floating-point tensors, also inputs and outputs, become fp16 or bf16.

These stay in fp32 and are reported: arithmetic on shapes (fp16 has all whole numbers only up to 2048); operands for which
ONNX does not allow fp16 (the scales of Resize, the boxes of NonMaxSuppression), between Casts; and the nodes that the
caller names (islands.py chooses those whose values fp16 cannot represent). LayerNormalization computes its statistics in
fp32 by definition (`stash_type`). Source: ours.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ....graph.errors import Refused

FLOAT = int(onnx.TensorProto.FLOAT)


@dataclass(frozen=True)
class Half:
    """A floating-point type of 16 bits.

    - name: "fp16" or "bf16". full: the name in ONNX's schemas. dtype, onnx: the types of numpy and ONNX.
    - largest, smallest: of its positive numbers. whole: it has every whole number up to this one.
    """

    name: str
    full: str
    dtype: np.dtype
    onnx: int
    whole: float

    @property
    def _info(self) -> Any:
        return ml_dtypes.finfo(self.dtype)

    @property
    def largest(self) -> float:
        return float(self._info.max)

    @property
    def smallest(self) -> float:
        return float(self._info.smallest_subnormal)

    @property
    def normal(self) -> float:
        """The smallest positive number with all digits."""
        return float(self._info.smallest_normal)


FP16 = Half("fp16", "float16", np.dtype(np.float16), int(onnx.TensorProto.FLOAT16), 2048.0)
BF16 = Half("bf16", "bfloat16", np.dtype(ml_dtypes.bfloat16), int(onnx.TensorProto.BFLOAT16), 256.0)
HALVES = {half.name: half for half in (FP16, BF16)}
# The number of inputs that an operator takes values from; its other inputs are shapes, indices or axes. An operator that is
# not listed takes values from all inputs.
VALUE_INPUTS = {"ConstantOfShape": 0} | dict.fromkeys(
    "Expand Reshape Tile Slice Pad Resize Split Squeeze Unsqueeze Gather TopK".split(), 1
)
TYPE_ATTRIBUTES = ("to", "dtype")
QUANTISATION = ("QuantizeLinear", "DequantizeLinear")


def to_half(
    graph: gs.Graph, keep: Mapping[str, str] | None = None, io: Collection[str] = (), half: Half = FP16
) -> tuple[dict[str, str], dict[str, str]]:
    """Convert a graph with typed tensors and folded constants to fp16 or bf16 in place.

    - keep: by name of a node that stays in fp32, the reason. Casts are inserted at its inputs and outputs.
    - io: names of inputs and outputs of the graph that stay in fp32; all others are converted.
    - half: the type to convert to.

    Returns two mappings: by node that stays in fp32, the reason; and by constant that the type cannot represent, what it was
    changed to. Raises Refused for a graph with control flow.
    """
    for node in graph.nodes:
        if any(isinstance(a, gs.Graph) for a in node.attrs.values()):
            raise Refused(f"{node.name} ({node.op}): no {half.name} for graphs with control flow; export fp32")
    conversion = _Conversion(graph, keep or {}, io, half)
    conversion.run()
    return conversion.float32, conversion.clamped


def inexact(graph: gs.Graph) -> str:
    """Return in words why fp16 would change the quantised values of a graph with Q/DQ nodes; empty if it would not."""
    for node in (n for n in graph.nodes if n.op in QUANTISATION):
        if not isinstance(node.inputs[1], gs.Constant):
            return f"the scale of a {node.op} is computed"
        for i, tensor in enumerate(node.inputs):
            if not isinstance(tensor, gs.Constant) or not _is_float(tensor):
                continue
            if not _takes_half(node, i, False, graph.opset):
                return f"opset {graph.opset} has no fp16 for {node.op}"
            with np.errstate(over="ignore"):
                half = tensor.values.astype(np.float16)
            if (half != tensor.values).any():
                return f"fp16 cannot hold {tensor.name} of {node.op} exactly"
    return ""


class _Conversion:
    def __init__(self, graph: gs.Graph, keep: Mapping[str, str], io: Collection[str], half: Half):
        self.graph, self.keep, self.io, self.half = graph, keep, io, half
        sizes = _shape_arithmetic(graph)
        kept = {id(t) for n in graph.nodes if n.name in keep for t in n.outputs if _is_float(t)}
        # The id() of every tensor that stays in fp32.
        self.exact = sizes | kept | {id(t) for t in graph.inputs if t.name in io and _is_float(t)}
        self.halves: dict[int, gs.Constant] = {}
        self.casts: dict[tuple[int, int], gs.Variable] = {}
        self.float32: dict[str, str] = {}
        self.clamped: dict[str, str] = {}

    def run(self) -> None:
        nodes = list(self.graph.nodes)
        data = [t for t in self.graph.tensors().values() if _is_float(t) and id(t) not in self.exact]
        constants = [t for t in data if isinstance(t, gs.Constant)]
        for tensor in data:
            if isinstance(tensor, gs.Variable):
                tensor.dtype = self.half.dtype
        for node in nodes:
            floats = [t for t in (*node.inputs, *node.outputs) if isinstance(t, gs.Variable) and self._is_any_float(t)]
            if node.name in self.keep:
                self._keep(node)
            elif floats and all(id(t) in self.exact for t in floats):
                self.float32[node.name] = f"{node.op}: arithmetic on shapes"
            else:
                self._convert(node)
        for constant in constants:  # a constant that is used in both types needs two names
            if constant.outputs and id(constant) in self.halves:
                constant.name += "_fp32"
        for i, tensor in enumerate(self.graph.outputs):
            wanted = np.dtype(np.float32) if tensor.name in self.io else self.half.dtype
            if self._is_any_float(tensor) and tensor.dtype != wanted:
                self._cast_output(i, wanted)
        self._drop_idle_casts()
        self.graph.cleanup().toposort()

    def _keep(self, node: gs.Node) -> None:
        for i, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Variable) and tensor.dtype == self.half.dtype:
                node.inputs[i] = self._cast(tensor, FLOAT)
        self.float32[node.name] = f"{node.op}: {self.keep[node.name]}"

    def _cast_output(self, index: int, dtype: np.dtype) -> None:
        """Cast an output of the graph to a type that differs from the one its node computes."""
        inner = self.graph.outputs[index]
        outer = gs.Variable(inner.name, dtype, inner.shape)
        inner.name += "_inner"
        self.graph.outputs[index] = outer
        self._append_cast(inner, outer, FLOAT if dtype == np.float32 else self.half.onnx)

    def _convert(self, node: gs.Node) -> None:
        takes = [_takes_half(node, i, False, self.graph.opset, self.half) for i in range(len(node.inputs))]
        for name in TYPE_ATTRIBUTES:
            if node.attrs.get(name) == FLOAT:
                node.attrs[name] = self.half.onnx
        if isinstance(node.attrs.get("value"), gs.Constant) and _is_float(node.attrs["value"]):
            node.attrs["value"] = self._half(node.attrs["value"])
        for i, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant):
                if _is_float(tensor) and takes[i]:
                    node.inputs[i] = self._half(tensor, node.op in QUANTISATION and i == 1)
            elif self._is_any_float(tensor):
                wanted = self.half.onnx if takes[i] else FLOAT
                if wanted != (FLOAT if id(tensor) in self.exact else self.half.onnx):
                    node.inputs[i] = self._cast(tensor, wanted)
        for i, tensor in enumerate(node.outputs):
            if tensor.dtype == self.half.dtype and not _takes_half(node, i, True, self.graph.opset, self.half):
                node.outputs[i] = gs.Variable(f"{tensor.name}_fp32", np.dtype(np.float32), tensor.shape)
                self._append_cast(node.outputs[i], tensor, self.half.onnx)
        if not all(takes[i] for i, t in enumerate(node.inputs) if self._is_any_float(t)):
            self.float32[node.name] = f"{node.op}: ONNX has no {self.half.name} for some of its operands"

    def _cast(self, tensor: gs.Variable, to: int) -> gs.Variable:
        if (id(tensor), to) not in self.casts:
            suffix, dtype = (
                (self.half.name, self.half.dtype) if to == self.half.onnx else ("fp32", np.dtype(np.float32))
            )
            out = gs.Variable(f"{tensor.name}_as_{suffix}", dtype, tensor.shape)
            self._append_cast(tensor, out, to)
            self.casts[id(tensor), to] = out
        return self.casts[id(tensor), to]

    def _append_cast(self, tensor: gs.Variable, out: gs.Variable, to: int) -> None:
        self.graph.nodes.append(gs.Node("Cast", f"{out.name}/Cast", {"to": to}, [tensor], [out]))

    def _half(self, constant: gs.Constant, scale: bool = False) -> gs.Constant:
        """Return the converted constant. Finite values stay finite; a scalar (an epsilon, a divisor) does not become 0, nor
        does a scale of quantised values, by which they are divided."""
        if id(constant) not in self.halves:
            values = constant.values
            kept = np.where(np.isfinite(values), np.clip(values, -self.half.largest, self.half.largest), values)
            if values.size == 1 or scale:
                kept = np.where(
                    (kept != 0) & (np.abs(kept) < self.half.smallest), np.copysign(self.half.smallest, kept), kept
                )
            changed = kept != values
            changed &= ~np.isnan(values)
            if changed.any():
                first, became = values[changed].flat[0], kept[changed].flat[0]
                self.clamped[constant.name] = (
                    f"{changed.sum()} of {values.size} values, such as {first:g} to {became:g}"
                )
            self.halves[id(constant)] = gs.Constant(constant.name, kept.astype(self.half.dtype))
        return self.halves[id(constant)]

    def _is_any_float(self, tensor: gs.Tensor) -> bool:
        return tensor.dtype in (np.float32, self.half.dtype)

    def _drop_idle_casts(self) -> None:
        outputs = {id(t) for t in self.graph.outputs}
        for node in [n for n in self.graph.nodes if n.op == "Cast" and n.inputs[0].dtype == n.outputs[0].dtype]:
            if id(node.outputs[0]) in outputs:
                continue
            for user in list(node.outputs[0].outputs):
                user.inputs = [node.inputs[0] if t is node.outputs[0] else t for t in user.inputs]
            node.outputs.clear()


def _shape_arithmetic(graph: gs.Graph) -> set[int]:
    """Return the id() of every float tensor whose values are computed from sizes of the inputs and not from their data."""
    graph.toposort()
    data = {id(t) for t in graph.inputs}
    sizes: set[int] = set()
    for node in graph.nodes:
        values = node.inputs[: VALUE_INPUTS.get(node.op)]
        if node.op in ("Shape", "Size") or (
            any(id(t) in sizes for t in values) and not any(id(t) in data for t in node.inputs)
        ):
            sizes.update(id(t) for t in node.outputs)
        elif any(id(t) in data for t in node.inputs):
            data.update(id(t) for t in node.outputs)
    return {id(t) for t in graph.tensors().values() if id(t) in sizes and _is_float(t)}


def _takes_half(node: gs.Node, index: int, output: bool, opset: int, half: Half = FP16) -> bool:
    """Return whether ONNX allows a type for an input or output of a node; False for a custom operator without a schema."""
    try:
        schema = onnx.defs.get_schema(node.op, opset, node.domain or "")
    except onnx.defs.SchemaError:
        return False
    places = schema.outputs if output else schema.inputs
    return f"tensor({half.full})" in places[min(index, len(places) - 1)].types


def _is_float(tensor: gs.Tensor) -> bool:
    return tensor.dtype == np.float32
