"""The weights of merged layers: a convolution, linear layer, normalisation or scale is an affine map with a kernel, and two
such maps become one. (`merge_in_graph` puts it into the graph.)

Two maps compose (`then`) or add up (`plus`) to one; where no single map computes the same, these raise `Inexact`. A
`Geometry` is enough to tell what a merged map costs; a `Kernel` has the weights too. Composition is UPDP's (arXiv
2401.06426) reparameterisation, sums of branches are RepVGG's (arXiv 2101.03697); the rules for strides, dilation,
groups and borders are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ...graph.facts import CONVS, TRANSPOSED_CONVS

Sides = tuple[int, int]  # padding of one spatial dimension: zeros before the first entry and after the last


class Inexact(Exception):
    """Raised where two maps cannot be written as one; the message is the reason."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of an affine map, without its weights.

    extent: number of taps in each spatial dimension; empty for a linear layer, all 1 for a normalisation or scale,
    which is a depthwise map (`groups == inputs == outputs`). stride, padding, dilation: as of a convolution, padding in
    zeros before and after. biased: whether the map adds a bias. transposed: whether it is a transposed convolution,
    which only a scale may follow; output_padding: its argument of that name.
    """

    outputs: int
    inputs: int
    extent: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[Sides, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    biased: bool = False
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @classmethod
    def scaling(cls, channels: int, dims: int, biased: bool) -> Geometry:
        """The map that multiplies each channel by a number, and adds one if `biased`."""
        return cls(channels, channels, (1,) * dims, (1,) * dims, ((0, 0),) * dims, (1,) * dims, channels, biased)

    @property
    def span(self) -> tuple[int, ...]:
        """Number of input entries from the first tap to the last, in each spatial dimension."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.extent, self.dilation, strict=True))

    @property
    def taps(self) -> int:
        """Multiply-accumulates for one output value."""
        return self.inputs // self.groups * math.prod(self.extent)

    @property
    def padded(self) -> bool:
        """Whether the input is padded with zeros."""
        return any(a or b for a, b in self.padding)

    @property
    def diagonal(self) -> bool:
        """Whether the map only scales and shifts each channel, at every position alike."""
        plain = all(k == 1 for k in (*self.extent, *self.stride)) and not self.padded and not self.transposed
        return plain and self.groups == self.outputs == self.inputs

    def steps(self, stride: tuple[int, ...] | None = None) -> list[int]:
        """Distance between neighbouring taps in each dimension, in input entries; 0 for a single tap.

        stride: of a map that runs before this one; the distances are then those in the input of that map.
        """
        strides = stride or (1,) * len(self.extent)
        return [s * d if k > 1 else 0 for k, d, s in zip(self.extent, self.dilation, strides, strict=True)]

    def then(self, second: Geometry) -> Geometry:
        """The geometry of `Kernel.then`, which raises Inexact for the same reasons."""
        if second.transposed:
            raise Inexact("before a transposed convolution, whose border outputs see only part of the kernel")
        biased = self.biased or second.biased
        if second.diagonal:
            return replace(self, biased=biased)
        if self.transposed:
            raise Inexact("after a transposed convolution, which only a scale can follow")
        if second.padded and (self.biased or any(k > 1 for k in self.extent)):
            raise Inexact("before a zero-padded convolution, so that the fold would be wrong at the border")
        if self.diagonal:
            return replace(second, biased=biased)
        dilation = [math.gcd(a, b) or 1 for a, b in zip(self.steps(), second.steps(self.stride), strict=True)]
        spans = zip(self.span, second.span, self.stride, dilation, strict=True)
        padding = zip(self.padding, second.padding, self.stride, strict=True)
        # One step of the second map is `s` steps in the input of the first, so there its taps lie s * dilation apart and
        # each of its padding zeros is s zeros. The taps of both lie on the grid of their greatest common distance.
        extent = tuple((a - 1 + s * (b - 1)) // d + 1 for a, b, s, d in spans)
        stride = tuple(a * b for a, b in zip(self.stride, second.stride, strict=True))
        zeros = tuple((p[0] + s * q[0], p[1] + s * q[1]) for p, q, s in padding)
        groups = math.gcd(self.groups, second.groups)
        return Geometry(second.outputs, self.inputs, extent, stride, zeros, tuple(dilation), groups, biased)

    def plus(self, other: Geometry) -> Geometry:
        """The geometry of `Kernel.plus`, which raises Inexact for the same reasons."""
        pair = (self, other)
        if self.transposed or other.transposed:
            raise Inexact("a sum with a transposed convolution")
        if self.stride != other.stride:
            raise Inexact(f"a sum of maps of strides {self.stride} and {other.stride}")
        # Two maps of one stride have equally many outputs if their padding less the span of their kernel is equal.
        ends = [[p[0] + p[1] - s for p, s in zip(m.padding, m.span, strict=True)] for m in pair]
        if ends[0] != ends[1]:
            raise Inexact("a sum of maps that are padded differently")
        left = [max(p[0], q[0]) for p, q in zip(self.padding, other.padding, strict=True)]
        offsets = [m.offsets(left) for m in pair]
        dilation = [math.gcd(*v) or 1 for v in zip(self.steps(), other.steps(), *offsets, strict=True)]
        ranges = zip(*offsets, self.span, other.span, strict=True)
        span = [max(a + s, b + t) for a, b, s, t in ranges]
        extent = tuple((s - 1) // d + 1 for s, d in zip(span, dilation, strict=True))
        padding = tuple((a, end + s - a) for a, end, s in zip(left, ends[0], span, strict=True))
        groups, biased = math.gcd(self.groups, other.groups), self.biased or other.biased
        return Geometry(self.outputs, self.inputs, extent, self.stride, padding, tuple(dilation), groups, biased)

    def scaled(self, factor: float) -> Geometry:
        """The geometry of this map times a number, which is the same."""
        return self

    def offsets(self, left: list[int]) -> list[int]:
        """Distance, in input entries of each dimension, of the first tap from the start of a common kernel padded by
        `left`.
        """
        return [a - p[0] for a, p in zip(left, self.padding, strict=True)]

    def convolution_padding(self) -> list[int] | str:
        """The padding as the argument of a convolution: one number for each dimension, or "same".

        Raises Inexact where the two sides of a dimension differ in a way that no convolution pads.
        """
        if all(a == b for a, b in self.padding):
            return [a for a, _ in self.padding]
        same = all((s - 1) // 2 == a and s - 1 - a == b for (a, b), s in zip(self.padding, self.span, strict=True))
        if same and all(s == 1 for s in self.stride):
            return "same"
        raise Inexact(f"the merged kernel is padded by {self.padding}, unevenly, which no convolution does")


@dataclass(frozen=True)
class Kernel:
    """An affine map with its weights: `y[o] = bias[o] + sum over inputs i and taps t of weight[o, i, t] * x[i, stride *
    position - left + dilation * t]`, where `x` is zero outside of its bounds.

    weight: `(outputs, inputs / groups, *extent)`, also of a transposed convolution. bias: `(outputs,)` or None.
    """

    geometry: Geometry
    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def scaled(self, factor: float) -> Kernel:
        """This map times a number."""
        return replace(self, weight=self.weight * factor, bias=None if self.bias is None else self.bias * factor)

    def regrouped(self, groups: int) -> torch.Tensor:
        """The weight `(outputs, inputs / groups, *extent)` of the same map with fewer groups, which must divide the
        present number: the blocks of the present groups lie on a diagonal, with zeros elsewhere.
        """
        count = self.geometry.groups // groups
        if count == 1:
            return self.weight
        blocks = self.weight.unflatten(0, (groups, count, -1))  # [groups, count, outputs, inputs, *extent]
        wide = blocks.new_zeros(*blocks.shape[:3], count, *blocks.shape[3:])
        wide.diagonal(dim1=1, dim2=3).copy_(blocks.movedim(1, -1))
        return wide.flatten(3, 4).flatten(0, 2)

    def then(self, second: Kernel) -> Kernel:
        """The map that applies this map and then `second`.

        With extents `k1`, `k2`, strides `s1`, `s2`, paddings `p1`, `p2`, weights `W1`, `W2` and biases `b1`, `b2`, both
        of dilation 1: the taps of the second are `s1` apart in the input of the first, so the extent is `k1 + (k2 - 1)
        s1`, the stride `s1 s2`, the padding `p1 + s1 p2`, the bias `b2 + W2 b1` with `W2` summed over its taps. The
        dilation is the greatest distance on whose grid the taps of both lie, the number of groups the greatest common
        divisor.

        Raises Inexact where (1) the second map is a transposed convolution; (2) the first is one and the second is more
        than a scale and shift of each channel; (3) the second map pads and the first has a bias or more than one tap,
        since the first would not give zeros where the second pads with them.
        """
        one, two = self.geometry, second.geometry
        result = one.then(two)
        if two.diagonal:
            scale = second.weight.flatten()
            bias = None if self.bias is None else self.bias * scale
            return Kernel(result, self.weight * _expand(scale, self.weight), _added(bias, second.bias))
        bias = None if self.bias is None else second._total(self.bias)
        if one.diagonal:
            grouped = second.weight.unflatten(0, (two.groups, -1))  # [groups, outputs, inputs, *extent]
            weight = (grouped * _expand(self.weight.reshape(two.groups, 1, -1), grouped)).flatten(0, 1)
        else:
            taps = zip(one.steps(), two.steps(one.stride), result.dilation, strict=True)
            apart = [(a // d, b // d) for a, b, d in taps]
            first = _spread(self.regrouped(result.groups), [a for a, _ in apart])
            weight = _convolved(first, _spread(second.regrouped(result.groups), [b for _, b in apart]), result.groups)
        return Kernel(result, weight, _added(bias, second.bias))

    def _total(self, vector: torch.Tensor) -> torch.Tensor:
        """The output `(outputs,)`, without the bias, for an input that has the values `vector` `(inputs,)` at every
        position.
        """
        grouped = self.weight.flatten(2).sum(2) if self.geometry.extent else self.weight
        groups = self.geometry.groups
        return (grouped.unflatten(0, (groups, -1)) @ vector.reshape(groups, -1, 1)).flatten()

    def plus(self, other: Kernel) -> Kernel:
        """The sum of this map and another of the same input: both kernels are padded to a common extent around their
        origin.

        Raises Inexact for a transposed convolution, for different strides, and where the paddings give different
        numbers of outputs.
        """
        result = self.geometry.plus(other.geometry)
        left = [a for a, _ in result.padding]
        total = self.weight.new_zeros(result.outputs, result.inputs // result.groups, *result.extent)
        for kernel in (self, other):
            g = kernel.geometry
            taps = []  # for each dimension, where this kernel's taps lie in the common kernel
            dims = zip(g.offsets(left), g.steps(), g.extent, result.dilation, strict=True)
            for offset, step, count, dilation in dims:
                first, apart = offset // dilation, max(step // dilation, 1)
                taps.append(slice(first, first + (count - 1) * apart + 1, apart))
            total[(slice(None), slice(None), *taps)] += kernel.regrouped(result.groups)
        return Kernel(result, total, _added(self.bias, other.bias))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The value of the map for an input with a batch dimension, computed by the ATen operator that the map becomes."""
        g = self.geometry
        names = TRANSPOSED_CONVS if g.transposed else CONVS
        target, args = operator(names[len(g.extent) - 1] if g.extent else "linear", g)
        return target(x, self.stored_weight(), self.bias, *args)

    def stored_weight(self) -> torch.Tensor:
        """The weight in the layout of ATen's operator; for a transposed convolution `(inputs, outputs / groups,
        *extent)`.
        """
        return swapped(self.weight, self.geometry.groups) if self.geometry.transposed else self.weight


def operator(name: str, g: Geometry) -> tuple[Any, tuple[Any, ...]]:
    """The ATen overload of an operator of `MAPS` that computes a map, and its arguments after input, weight and bias.

    Raises Inexact where no convolution pads like the map.
    """
    target = getattr(torch.ops.aten, name)
    if name == "linear":
        return target.default, ()
    stride, dilation = list(g.stride), list(g.dilation)
    if g.transposed:
        overload = target.default if name == "conv_transpose1d" else target.input
        return overload, (stride, [a for a, _ in g.padding], list(g.output_padding), g.groups, dilation)
    padding = g.convolution_padding()
    return (target.padding if padding == "same" else target.default), (stride, padding, dilation, g.groups)


def swapped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """The weight of a transposed convolution with inputs and outputs exchanged: from ATen's layout `(inputs, outputs /
    groups, *extent)` to that of `Kernel.weight`, and back.
    """
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _added(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b


def _expand(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor with trailing dimensions of size 1 appended until it has the rank of `like`."""
    return vector.reshape(*vector.shape, *[1] * (like.dim() - vector.dim()))


def _spread(weight: torch.Tensor, steps: list[int]) -> torch.Tensor:
    """The weight with its taps `steps` apart and zeros between them."""
    if all(step <= 1 for step in steps):
        return weight
    steps = [max(step, 1) for step in steps]
    wide = weight.new_zeros(*weight.shape[:2], *((k - 1) * s + 1 for k, s in zip(weight.shape[2:], steps, strict=True)))
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in steps))] = weight
    return wide


def _convolved(first: torch.Tensor, second: torch.Tensor, groups: int) -> torch.Tensor:
    """The weight `(outputs, inputs / groups, *extent)` of two kernels in a row: their full convolution, summed over the
    channels between them.
    """
    flat = first.dim() == 2
    if flat:
        first, second = first.unsqueeze(-1), second.unsqueeze(-1)
    dims = tuple(range(2, second.dim()))
    a = first.unflatten(0, (groups, -1)).movedim(2, 0).flatten(1, 2)  # [inputs, groups * middle, *extent]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(dims) - 1]
    full = convolve(a, second.flip(dims), padding=[k - 1 for k in second.shape[2:]], groups=groups)
    result = full.transpose(0, 1)
    return result.squeeze(-1) if flat else result
