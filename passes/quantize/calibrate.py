"""The scales of the inputs of layers, from calibration data.

Every input is quantised with one scale, so what counts is the value from which on it saturates: the largest one
("minmax"), one that few entries exceed ("percentile"), or the one with the least squared error of the entries
("histogram"). "error" takes the one of the three with the least squared error of the outputs of the layers that read the
input, their weights quantised. Source: Wu et al., arXiv 2004.09602, sections 3.3 and 5.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from ...graph import fp8
from ...graph.compat import OpOverload, pytree
from ...graph.errors import BadInput
from ...graph.nodes import arguments
from ...graph.trainable import TrainableModule
from ..common.feed import Batch
from ..common.observe import Observer
from ..common.weights import WeightedLayer


class Format(NamedTuple):
    """The numbers that values are rounded to, in units of their scale: the whole ones from `lowest` to `highest`, or those
    of E4M3."""

    lowest: int
    highest: int
    e4m3: bool = False

    @property
    def least_scale(self) -> float:
        """The smallest scale. fp16 files would round much smaller ones to 0; E4M3 loses nothing by it, for its steps are
        relative and its numbers begin at 2^-9."""
        return 2.0**-20 if self.e4m3 else 0.0

    def of_tensor(self, value: Any, scale: float, zero: int = 0) -> tuple[OpOverload, tuple[Any, ...]]:
        """The operator that rounds a value with one scale, and its arguments."""
        if self.e4m3:
            return fp8.PER_TENSOR, (value, scale)
        target = torch.ops.aten.fake_quantize_per_tensor_affine.default
        return target, (value, scale, zero, self.lowest, self.highest)

    def of_channels(self, value: Any, scales: Any, zeros: Any) -> tuple[OpOverload, tuple[Any, ...]]:
        """The operator that rounds a value with a scale for each index along its first axis, and its arguments."""
        if self.e4m3:
            return fp8.PER_CHANNEL, (value, scales, 0)
        target = torch.ops.aten.fake_quantize_per_channel_affine.default
        return target, (value, scales, zeros, 0, self.lowest, self.highest)

    def rounded(self, steps: np.ndarray) -> np.ndarray:
        """Numbers of at least 0 in units of the scale, rounded and saturated."""
        if self.e4m3:
            return fp8.e4m3(torch.from_numpy(steps)).numpy()
        return np.minimum(np.round(steps), self.highest)


INT8 = Format(-128, 127)  # the one signed range that ONNX's QuantizeLinear has
UINT8 = Format(0, 255)  # of values that are never negative, twice as fine
FP8 = Format(-int(fp8.LARGEST), int(fp8.LARGEST), True)
BINS = 2048
CLIPS = np.linspace(0.05, 1.0, 96)  # shares of the largest value that are tried as saturation
JUDGES = 32  # samples on which "error" compares outputs


class Histogram:
    """Counts of the magnitudes of a tensor's entries, in equal bins from 0 to `width`, which doubles when needed."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.width = self.largest = 0.0

    def add(self, values: Tensor) -> None:
        """Count the entries of a finite tensor."""
        magnitudes = values.detach().abs().flatten().float()
        most = float(magnitudes.max()) if magnitudes.numel() else 0.0
        self.largest = max(self.largest, most)
        if not self.width:
            if not most:
                self.counts[0] += magnitudes.numel()
                return
            self.width = most
        while most > self.width:  # two bins become one
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), torch.zeros(BINS // 2, dtype=torch.float64)])
            self.width *= 2
        self.counts += torch.histc(magnitudes, BINS, 0, self.width).double().cpu()

    def percentile(self, share: float) -> float:
        """The magnitude that this percentage of the entries does not exceed; at most the largest one."""
        reached = self.counts.cumsum(0) >= share / 100 * self.counts.sum()
        return min((int(reached.int().argmax()) + 1) * self.width / BINS, self.largest)

    def least_error(self, form: Format = INT8) -> float:
        """The saturation with the least squared error, where the entries of a bin lie at its middle."""
        counts = self.counts.numpy()
        middles = (np.arange(BINS) + 0.5) * self.width / BINS
        steps = (self.largest * CLIPS / form.highest)[:, None]
        errors = np.square(middles - steps * form.rounded(middles / steps)) @ counts
        return float(self.largest * CLIPS[int(errors.argmin())])


def saturations(histogram: Histogram, calibration: str, percentile: float, form: Format = INT8) -> tuple[float, ...]:
    """The saturations that a calibration chooses from, without repetition; 0 for an input that was zero throughout."""
    if not histogram.largest:
        return (0.0,)
    limits = {"minmax": histogram.largest}
    if calibration in ("percentile", "error"):
        limits["percentile"] = histogram.percentile(percentile)
    if calibration in ("histogram", "error"):
        limits["histogram"] = histogram.least_error(form)
    return tuple(dict.fromkeys(limits.values())) if calibration == "error" else (limits[calibration],)


def input_scales(
    module: TrainableModule,
    chosen: Sequence[WeightedLayer],
    batches: Sequence[tuple[Batch, int]],
    calibration: str,
    percentile: float,
    others: Sequence[fx.Node] = (),
    unsigned: Collection[fx.Node] = (),
    form: Format = INT8,
) -> dict[fx.Node, float]:
    """The scale, which is the size of one step, of every input of the chosen layers and of other values; 0 for a value that
    was zero throughout.

    - batches: with the number of samples of each that count.
    - others: values that no layer need read. For one that none reads, "error" takes the histogram's saturation.
    - unsigned: the values whose format is UINT8. form: the format of weights and all other values.

    Raises BadInput, which names the layer or the value, for one that is not finite.
    """
    readers = {node.args[0]: layer.name for layer in reversed(chosen) for node in layer.nodes}
    values_of = dict.fromkeys([*readers, *others])
    known: dict[fx.Node, Histogram] = {node: Histogram() for node in values_of}  # type: ignore[misc]

    def see(node: fx.Node, value: Tensor, values: Mapping[fx.Node, Any]) -> None:
        if not bool(value.isfinite().all()):
            raise BadInput(f"Quantize: {_where(node, readers)} not finite; check the data")
        known[node].add(value)

    observer = Observer(module, known, see)
    for batch, _ in batches:
        observer(batch)
    formats = {node: UINT8 if node in unsigned else form for node in known}
    options = {}
    for node, histogram in known.items():
        method = "histogram" if calibration == "error" and node not in readers else calibration
        options[node] = saturations(histogram, method, percentile, formats[node])
    errors = {node: np.zeros(len(ends)) for node, ends in options.items()}
    if any(len(ends) > 1 for ends in options.values()):
        _add_errors(module, chosen, batches, options, formats, form, errors)
    ends_of = {node: ends[int(errors[node].argmin())] for node, ends in options.items()}
    return {n: end and max(end / formats[n].highest, formats[n].least_scale) for n, end in ends_of.items()}


def _where(node: fx.Node, readers: Mapping[Any, str]) -> str:
    return f"the inputs of {readers[node]} are" if node in readers else f"the value of {node.name} is"


def _add_errors(
    module: TrainableModule,
    chosen: Sequence[WeightedLayer],
    batches: Sequence[tuple[Batch, int]],
    options: Mapping[fx.Node, Sequence[float]],
    formats: Mapping[fx.Node, Format],
    form: Format,
    errors: Mapping[fx.Node, np.ndarray],
) -> None:
    """Add the squared errors of the outputs of all readers of an input, each in units of the reader's squared outputs."""
    layer_of = {node: layer for layer in chosen for node in layer.nodes}

    def see(node: fx.Node, value: Tensor, values: Mapping[fx.Node, Any]) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if len(options[source]) < 2:
            return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        call = arguments(node)
        weight, x = (values[call[key]] for key in ("weight", next(iter(call))))
        assert isinstance(weight, Tensor)
        assert isinstance(x, Tensor)
        rounded = on_grid(weight, weight_scales(weight, form), form)
        scale = float(value.double().square().sum()) or 1.0
        for i, end in enumerate(options[source]):
            target, numbers = formats[source].of_tensor(x, end / formats[source].highest)
            given = {id(x): target(*numbers), id(weight): rounded}
            new, keywords = pytree.tree_map(lambda v, g=given: g.get(id(v), v), (args, kwargs))
            off = node.target(*new, **keywords) - value  # type: ignore[operator]
            errors[source][i] += float(off.double().square().sum()) / scale

    observer, judged = Observer(module, layer_of, see), 0
    for batch, count in batches:
        if judged >= JUDGES:
            break
        observer(batch)
        judged += count


def weight_scales(weight: Tensor, form: Format = INT8) -> Tensor:
    """The scales `(out,)` of a weight `(out, ...)`, in float32: the largest entry of a channel becomes the largest number
    of the format."""
    largest = weight.detach().abs().flatten(1).amax(1).float()
    scales = torch.where(largest > 0, largest, torch.ones_like(largest)) / form.highest
    return scales.clamp_min(form.least_scale)


def on_grid(weight: Tensor, scales: Tensor, form: Format = INT8) -> Tensor:
    """The weight with every entry on the grid of its output channel."""
    zero = torch.zeros_like(scales, dtype=torch.int32)
    target, numbers = form.of_channels(weight.detach(), scales, zero)
    rounded: Tensor = target(*numbers)
    return rounded
