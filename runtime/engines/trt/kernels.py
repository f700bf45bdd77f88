"""The kernels of an engine, from its build log: kernels that only pad, padded axes, and quantisation that saves nothing.

How padding is told apart from the model's own concatenations, pads and slices (ours): a tensor between two kernels is
*padded* if its shape is that of no ONNX tensor between their nodes (also after merging adjacent axes), but one of these
ONNX tensors has a shape that is equal along some axes and slightly smaller along the others.

A grouped convolution is padded inside each of its groups: the width of a group counts, and only multiples of the number of
groups are possible widths. A width that would double the axis in order to save some padding is not advised.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ...engine_summary import Kernel, Pad, Unfused

Shape = tuple[int, ...]

DTYPES = {
    "Half": "fp16", "Float": "fp32", "BFloat16": "bf16", "FP8": "fp8", "FP4": "fp4",
    "Int4": "int4", "Int8": "int8", "Int32": "int32", "Int64": "int64",
}  # fmt: skip
# The names of generated kernels list their steps (`__myl_ReluConc_myl0_3`). These steps make an axis longer or shorter. A
# kernel of only such steps and reshapes only pads; so does one that also has MOVES steps, if the order in memory is kept.
GROW, SHRINK = {"Conc", "Pad"}, {"Slic"}
PADDING_ONLY = GROW | SHRINK | {"Repl", "Resh"}
MOVES = {"Move", "Tran"}
MOVERS = ("kgen", "runtime_function")
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
QDQ = ("QuantizeLinear", "DequantizeLinear")
QUANTIZED = ("int8", "fp8", "int4", "fp4")


@dataclass(frozen=True)
class Tensor:
    """An operand of a kernel.

    shape: -1 stands for a dynamic axis. format: the library's short name of the layout, such as "NHWC" or "Linear". order:
    axes from the slowest to the fastest in memory; empty if unknown.
    """

    name: str
    shape: Shape
    dtype: str = ""
    format: str = ""
    order: Shape = ()

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}] {self.format}".strip()


@dataclass(frozen=True)
class LoggedKernel:
    """One kernel as the log describes it. kind: the library's name of its type. nodes: names of the ONNX nodes that it
    computes."""

    name: str
    kind: str = ""
    nodes: tuple[str, ...] = ()
    inputs: tuple[Tensor, ...] = ()
    constants: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()

    @property
    def steps(self) -> list[str]:
        """The steps in the name of a generated kernel; empty for a kernel of the library."""
        name = re.match(r"__myl_([A-Za-z]+)", self.name)
        return re.findall(r"[A-Z][a-z]*", name[1]) if name else []


@dataclass(frozen=True)
class Node:
    """An ONNX node as the parser printed it. inputs, outputs: (name, shape) of its operands."""

    name: str
    op: str
    inputs: tuple[tuple[str, Shape], ...] = ()
    outputs: tuple[tuple[str, Shape], ...] = ()


@dataclass
class BuildLog:
    """A parsed build log.

    layers: kernels in execution order. nodes: ONNX nodes by name. memory: bytes by purpose. unread: lines that look like
    the description of a kernel but could not be parsed.
    """

    layers: list[LoggedKernel] = field(default_factory=list)
    nodes: dict[str, Node] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    def kernels(self) -> list[Kernel]:
        """Return the kernels in execution order; `padding` is true for those that only pad."""
        padding = {pad.kernel for pad in self.pads() if pad.how == "kernel"}
        kernels = []
        for layer in self.layers:
            tensors = {"inputs": tuple(map(str, layer.inputs)), "outputs": tuple(map(str, layer.outputs))}
            only_pads = layer.name in padding
            kernels.append(Kernel(name=layer.name, kind=layer.kind, nodes=layer.nodes, padding=only_pads, **tensors))
        return kernels

    def pads(self, alignment: Callable[[str], int] | None = None) -> list[Pad]:
        """Return every padded axis with the advice how to avoid the padding.

        alignment: returns the target's alignment for a dtype ("fp16" -> 8), 0 if it is unknown; see `advice`.
        """
        readers: dict[str, list[LoggedKernel]] = defaultdict(list)
        writers: dict[str, list[LoggedKernel]] = defaultdict(list)
        for layer in self.layers:
            for tensor in layer.inputs:
                readers[tensor.name].append(layer)
            for tensor in layer.outputs:
                writers[tensor.name].append(layer)
        pads: list[Pad] = []
        widened: set[tuple[str, int, int]] = set()
        for layer in self.layers:
            steps = set(layer.steps)
            for tensor in layer.outputs if steps & GROW else ():
                known = self._crossing(readers[tensor.name], "inputs") or self._crossing([layer], "outputs")
                if small := _unpadded(tensor.shape, known):
                    padded = self._differences(layer, _how(layer, tensor, layer.inputs), small, tensor, alignment)
                    pads += padded
                    widened |= {(r.name, p.before, p.after) for p in padded for r in readers[tensor.name]}
            for tensor in layer.inputs if steps & SHRINK else ():
                known = self._crossing(writers[tensor.name], "outputs") or self._crossing([layer], "inputs")
                small = _unpadded(tensor.shape, known)
                if small and any(output.shape == small for output in layer.outputs):
                    pads += self._differences(layer, _how(layer, tensor, layer.outputs), small, tensor, alignment)
            if layer.kind not in MOVERS:
                weights = self._weight_pads(layer, alignment)
                pads += [pad for pad in weights if (layer.name, pad.before, pad.after) not in widened]
        return pads

    def unfused(self) -> list[Unfused]:
        """Return the quantisation that was not fused into operators, so that it saves no time (`summary.UNFUSED`).

        Not listed: quantising the network's inputs and dequantising its outputs, which cannot be avoided, and weights,
        which are quantised when the engine is built.
        """
        made = {tensor.name for layer in self.layers for tensor in layer.outputs}
        read = {tensor.name for layer in self.layers for tensor in layer.inputs}
        sources = {tensor: node for node in self.nodes.values() for tensor, _ in node.outputs}
        narrow = {n for layer in self.layers if any(t.dtype in QUANTIZED for t in layer.inputs) for n in layer.nodes}
        rows: list[Unfused] = []
        for layer in self.layers:
            nodes = self._nodes(layer)
            few = any(tensor.dtype in QUANTIZED for tensor in layer.outputs)
            inner = any(t.name in made for t in layer.inputs) and any(t.name in read for t in layer.outputs)
            if nodes and all(node.op in QDQ for node in nodes):
                rows += [Unfused(kernel=layer.name, how="kernel", nodes=layer.nodes)] if inner else []
                continue
            for node in nodes:
                feeds = [sources[tensor] for tensor, _ in node.inputs if tensor in sources]
                if node.op in PRODUCTS and len(feeds) > 1 and all(feed.op == QDQ[1] for feed in feeds[:2]):
                    # Several kernels may compute one product and its bias: it is enough if one of them reads few bits.
                    if node.name not in narrow:
                        rows.append(Unfused(kernel=layer.name, how="float", nodes=(node.name,)))
                    elif self._writes_wide(layer, node):
                        rows.append(Unfused(kernel=layer.name, how="wide", nodes=(node.name,)))
                elif node.op == QDQ[1] and feeds and feeds[0].op == QDQ[0] and feeds[0] in nodes and not few:
                    source = feeds[0].inputs[0][0] if feeds[0].inputs else ""
                    if source in sources or source in read:  # else it is a weight
                        rows.append(Unfused(kernel=layer.name, how="idle", nodes=(feeds[0].name, node.name)))
        return rows

    def _writes_wide(self, layer: LoggedKernel, node: Node) -> bool:
        """Return whether a kernel multiplies in few bits and another kernel of the same node scales the result."""
        if layer.kind in MOVERS or not any(t.dtype in QUANTIZED for t in layer.inputs):
            return False
        wide = {t.name for t in layer.outputs if t.dtype in ("fp32", "fp16", "bf16")}
        return any(
            other is not layer and node.name in other.nodes and any(t.name in wide for t in other.inputs)
            for other in self.layers
        )

    def _weight_pads(self, layer: LoggedKernel, alignment: Callable[[str], int] | None) -> list[Pad]:
        """Return the axes along which the weight of a convolution or matrix product is padded with zeros.

        The library may have made a 1x1 convolution a matrix product, so axes of size 1 are ignored.
        """
        pads = []
        for node in self._nodes(layer):
            if node.op not in PRODUCTS or len(node.inputs) < 2:
                continue
            axes = [axis for axis, extent in enumerate(node.inputs[1][1]) if extent != 1]
            weight = tuple(node.inputs[1][1][axis] for axis in axes)
            turns = {weight: axes} | ({weight[::-1]: axes[::-1]} if len(weight) == 2 else {})
            squeezed = [replace(c, shape=tuple(n for n in c.shape if n != 1)) for c in layer.constants]
            wide = [c for c in squeezed if len(c.shape) == len(weight) > 1]
            fits = [(c, small) for c in wide if (small := _unpadded(c.shape, turns, everywhere=True))]
            if len(fits) == 1 and not any(c.shape in turns for c in wide):
                constant, small = fits[0]
                pads += self._differences(layer, "weights", small, constant, alignment, node, turns[small])
        return pads

    def _differences(
        self,
        layer: LoggedKernel,
        how: str,
        small: Shape,
        tensor: Tensor,
        alignment: Callable[[str], int] | None,
        node: Node | None = None,
        axes: Sequence[int] | None = None,
    ) -> list[Pad]:
        """Return the axes along which a tensor is larger than its shape `small` in the model.

        node, axes: for a weight, its node and the axis of the weight for each axis of `small`.
        """
        pads = []
        nodes = layer.nodes if node is None else (node.name,)
        aligned = alignment(tensor.dtype) if alignment and tensor.dtype in DTYPES.values() else 0
        for place, (before, after) in enumerate(zip(small, tensor.shape, strict=True)):
            if before != after:
                axis = place if axes is None else axes[place]
                groups = max(self._groups(name, None if node else before) for name in nodes) if nodes else 1
                inner = node is not None and axis == 1
                multiple, note = advice(before, after, aligned, groups, inner)
                extents: dict[str, Any] = {
                    "axis": axis,
                    "before": before,
                    "after": after,
                    "alignment": multiple,
                    "note": note,
                }
                pads.append(Pad(kernel=layer.name, how=how, nodes=nodes, **extents))
        return pads

    def _groups(self, name: str, channels: int | None) -> int:
        """Return the number of groups that restricts the widths of a convolution; 1 for other nodes.

        channels: the channels in question; 1 is returned for a convolution that neither reads nor writes that many (None:
        any number). A depthwise convolution with one output per channel has as many groups as channels, whatever their
        number, so its groups restrict nothing.
        """
        node = self.nodes.get(name)
        shapes = [] if node is None else [shape for _, shape in (*node.inputs[:2], *node.outputs[:1])]
        if node is None or not node.op.startswith("Conv") or len(shapes) != 3 or min(map(len, shapes)) < 3:
            return 1
        (_, read, *_), weight, (_, written, *_) = shapes
        groups = (read if node.op == "Conv" else written) // max(weight[1], 1)
        bound = groups != read or groups != written
        return groups if bound and channels in (None, read, written) else 1

    def _crossing(self, layers: Iterable[LoggedKernel], side: Literal["inputs", "outputs"]) -> list[Shape]:
        """Return the shapes of the ONNX tensors that enter ("inputs") or leave ("outputs") each kernel's set of nodes."""
        shapes = []
        for layer in layers:
            nodes = self._nodes(layer)
            inner = {name for node in nodes for name, _ in (node.outputs if side == "inputs" else node.inputs)}
            shapes += [shape for node in nodes for name, shape in getattr(node, side) if name not in inner]
        return shapes

    def _nodes(self, layer: LoggedKernel) -> list[Node]:
        """Return the ONNX nodes of a kernel that the parser printed."""
        return [self.nodes[name] for name in layer.nodes if name in self.nodes]


def _how(layer: LoggedKernel, padded: Tensor, others: tuple[Tensor, ...]) -> str:
    """Return "kernel" if a kernel that writes or reads the padded tensor does nothing but pad, else "fused".

    others: the tensors on the kernel's other side.
    """
    steps = set(layer.steps)
    if steps <= PADDING_ONLY:
        return "kernel"
    unmoved = bool(padded.order) and any(other.order == padded.order for other in others)
    return "kernel" if steps <= PADDING_ONLY | MOVES and unmoved else "fused"


def _unpadded(shape: Shape, known: Iterable[Shape], everywhere: bool = False) -> Shape | None:
    """Return the largest known shape that is slightly smaller than `shape` along some axes and equal along the others.

    Known shapes are compared after merging adjacent axes to the same rank. everywhere: whether the shape may be smaller
    along all axes. A dynamic extent (-1) equals only itself. Returns None if `shape` itself is known or none fits.
    """
    views = {view for other in known for view in _views(other, len(shape))}
    if shape in views:
        return None
    fits = [
        small
        for small in views
        if all(0 < a <= b < 2 * a + 8 or a == b for a, b in zip(small, shape, strict=True))
        and (everywhere or any(a == b for a, b in zip(small, shape, strict=True)))
    ]
    return max(fits, key=math.prod, default=None)


def _views(shape: Shape, rank: int) -> Iterator[Shape]:
    """Yield all shapes of `rank` axes that merging adjacent axes of `shape` gives."""
    for cuts in itertools.combinations(range(1, len(shape)), rank - 1) if 0 < rank <= len(shape) else ():
        runs = [shape[i:j] for i, j in itertools.pairwise((0, *cuts, len(shape)))]
        yield tuple(-1 if -1 in run else math.prod(run) for run in runs)


def advice(before: int, after: int, aligned: int, groups: int = 1, inner: bool = False) -> tuple[int | None, str]:
    """Return the `alignment` and the `note` of a padded axis (`summary.Pad`).

    - before, after: size of the axis in the model and in the engine.
    - aligned: the target's alignment, 0 if it is unknown. If it does not explain the padding, the largest power of two that
      divides the padded size takes its place.
    - groups: number of groups of the convolution that the channels belong to.
    - inner: whether the axis has the channels of one group only.
    """
    inside = groups > 1 and before % groups == after % groups == 0 and not inner
    width, wide = (before // groups, after // groups) if inside else (before, after)
    step = aligned if aligned and _rounded(width, aligned) == wide else wide & -wide
    if groups > 1 and (inside or inner):
        if _rounded(width, step) >= 2 * width:
            return None, f"each of its {groups} groups has {width}, which the engine pads to {wide}"
        return (step, f"in each of its {groups} groups") if inner else (step * groups, f"its groups are {groups}")
    if groups > 1:  # a wider axis has more groups or wider ones: the smaller of the two results is advised
        step = min(math.lcm(step, max(before // groups, 1)), math.lcm(step, groups), key=lambda s: _rounded(before, s))
    if _rounded(before, step) > 2 * before:
        return None, f"the next width without it is {_rounded(before, step)}"
    return step, ""


def _rounded(n: int, step: int) -> int:
    return -(-n // step) * step
