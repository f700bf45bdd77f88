"""Kernels of a branch that is to be merged into one layer: where their zero padding can go, and which taps can stay.

A convolution that pads its input cannot be merged with layers before it that do not map zeros to zeros: at the border it
reads zeros, and not those layers' values for zeros. For an exact merge, the zeros have to come first in the branch (UPDP,
arXiv 2401.06426, trains its supernet that way; moving them in a trained network is ours).
"""

from collections.abc import Callable, Sequence

import torch
from torch import fx

from ...graph.facts import CONVS, PADS, TRANSPOSED_CONVS
from ...graph.nodes import arguments, conv_padding, op_name, per_dim, permutation, shape
from ..fuse.regions import Regions
from .blocks import ACTIVATIONS, channel_axis, norm_axis

Sides = list[tuple[int, int]]  # for each axis, zeros before the first entry and after the last


def spatial(path: Sequence[fx.Node]) -> list[fx.Node]:
    """The convolutions whose kernels have more than one tap."""
    return [n for n in path if op_name(n) in CONVS and max(shape(arguments(n)["weight"])[2:]) > 1]


def is_centred(conv: fx.Node) -> bool:
    """Whether the middle tap of a kernel lies at the output's own position."""
    a = arguments(conv)
    extent = shape(a["weight"])[2:]
    if not all(k % 2 for k in extent):
        return False
    sides = zip(extent, conv_padding(conv), per_dim(a["dilation"], len(extent)), strict=True)
    return all(before == after == d * (k // 2) for k, (before, after), d in sides)


def centre(weight: torch.Tensor) -> torch.Tensor:
    """The middle tap of a kernel `(out, in, *extent)`, as a kernel of extent 1."""
    return weight[(slice(None), slice(None), *(slice(k // 2, k // 2 + 1) for k in weight.shape[2:]))]


def zeros_before(conv: fx.Node) -> Sides | None:
    """The padding of a convolution, or None if it pads nothing."""
    sides = conv_padding(conv)
    return [(0, 0), (0, 0), *sides] if any(a or b for a, b in sides) else None


def sides_of(padding: fx.Node) -> Sides:
    """The padding of a padding node."""
    pad = arguments(padding)["pad"]
    pairs = list(zip(pad[::2], pad[1::2], strict=True))[::-1]  # ATen has the last dimension first
    return [(0, 0)] * (len(shape(padding)) - len(pairs)) + pairs


def pad_argument(sides: Sides) -> list[int]:
    """The padding as the argument of a padding node."""
    return [p for pair in reversed(sides[2:]) for p in pair]


def unpad(conv: fx.Node) -> None:
    """Make a convolution pad nothing, whether its padding is given as sizes or as a word."""
    a = arguments(conv)
    conv.target = getattr(torch.ops.aten, op_name(conv)).default
    dims = len(shape(a["weight"])) - 2
    conv.args = (a["input"], a["weight"], a["bias"], a["stride"], [0] * dims, a["dilation"], a["groups"])
    conv.kwargs = {}


def earliest(
    before: Sequence[fx.Node], sides: Sides, regions: Regions, shifts: Callable[[fx.Node], bool]
) -> tuple[int, Sides] | None:
    """Where the zeros in front of a convolution have to go: the index in `before` of the node that they then precede, and
    how many they are there. None where they can stay.

    before: the nodes from the branch's head to the convolution. shifts: whether a node does not map zeros to zeros.

    Zeros can pass a node that does the same at every position: padding its input by zeros gives its output the same border,
    of the node's values for zeros. Passing a stride of `s` (of a kernel with one tap) turns each zero into `s` zeros.
    Passing a permutation permutes the axes, and the zeros stop only where the axes are in order again.
    """
    index, moved = len(before), sides
    axes = list(range(len(sides)))  # for each axis of the convolution's input, its place before the node
    for i in reversed(range(len(before))):
        node = before[i]
        if order := permutation(node):
            axes = [order[a] for a in axes]
        elif not _is_pointwise(node, axes, regions):
            break
        elif op_name(node) in CONVS:
            strides = [1, 1, *per_dim(arguments(node)["stride"], len(sides) - 2)]
            sides = [(a * s, b * s) for (a, b), s in zip(sides, strides, strict=True)]
        if axes == sorted(axes):
            index, moved = i, sides
    return (index, moved) if any(shifts(n) for n in before[index:]) else None


def _is_pointwise(node: fx.Node, axes: Sequence[int], regions: Regions) -> bool:
    """Whether a node does the same at every position. axes: the batch, the channels and the positions of a convolution."""
    name = op_name(node)
    if name in ACTIVATIONS:
        return channel_axis(node.graph, node) not in axes[2:]
    if name in ("layer_norm", "rms_norm"):
        return norm_axis(node) not in axes[2:]
    if name in (*TRANSPOSED_CONVS, *PADS) or (name in CONVS and (zeros_before(node) or list(axes) != sorted(axes))):
        return False
    step = regions.step(node)
    return step is not None and step.axis not in axes[2:]
