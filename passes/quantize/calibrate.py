"""The scales of the inputs of layers, from calibration data.

Every input is quantised with one scale, so what counts is the value from which on it saturates: the largest one
("minmax"), one that few entries exceed ("percentile"), or the one with the least squared error of the entries
("histogram"). "error" takes the one of the three with the least squared error of the outputs of the layers that read the
input, their weights quantised. Source: Wu et al., arXiv 2004.09602, sections 3.3 and 5.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ...graph.compat import pytree
from ...graph.errors import BadInput
from ...graph.nodes import arguments
from ...graph.trainable import TrainableModule
from ..common.feed import Batch
from ..common.observe import Observer
from ..common.weights import WeightedLayer

Range = tuple[int, int]
RANGE: Range = (-128, 127)  # the one signed range that ONNX's QuantizeLinear has
UNSIGNED: Range = (0, 255)  # of values that are never negative, twice as fine
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

    def least_error(self, steps_up: int = RANGE[1]) -> float:
        """The saturation with the least squared error, where the entries of a bin lie at its middle. steps_up: the largest
        integer."""
        counts = self.counts.numpy()
        middles = (np.arange(BINS) + 0.5) * self.width / BINS
        steps = (self.largest * CLIPS / steps_up)[:, None]
        errors = np.square(middles - steps * np.minimum(np.round(middles / steps), steps_up)) @ counts
        return float(self.largest * CLIPS[int(errors.argmin())])


def saturations(
    histogram: Histogram, calibration: str, percentile: float, steps_up: int = RANGE[1]
) -> tuple[float, ...]:
    """The saturations that a calibration chooses from, without repetition; 0 for an input that was zero throughout."""
    if not histogram.largest:
        return (0.0,)
    found = {"minmax": histogram.largest}
    if calibration in ("percentile", "error"):
        found["percentile"] = histogram.percentile(percentile)
    if calibration in ("histogram", "error"):
        found["histogram"] = histogram.least_error(steps_up)
    return tuple(dict.fromkeys(found.values())) if calibration == "error" else (found[calibration],)


def input_scales(
    module: TrainableModule,
    chosen: Sequence[WeightedLayer],
    batches: Sequence[tuple[Batch, int]],
    calibration: str,
    percentile: float,
    others: Sequence[fx.Node] = (),
    unsigned: Collection[fx.Node] = (),
) -> dict[fx.Node, float]:
    """The scale, which is the size of one step, of every input of the chosen layers and of other values; 0 for a value that
    was zero throughout.

    - batches: with the number of samples of each that count.
    - others: values that no layer need read. For one that none reads, "error" takes the histogram's saturation.
    - unsigned: the values whose range is UNSIGNED.

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
    options = {}
    for node, histogram in known.items():
        method = "histogram" if calibration == "error" and node not in readers else calibration
        options[node] = saturations(histogram, method, percentile, _range(node, unsigned)[1])
    errors = {node: np.zeros(len(ends)) for node, ends in options.items()}
    if any(len(ends) > 1 for ends in options.values()):
        _add_errors(module, chosen, batches, options, unsigned, errors)
    return {node: ends[int(errors[node].argmin())] / _range(node, unsigned)[1] for node, ends in options.items()}


def _range(node: fx.Node, unsigned: Collection[fx.Node]) -> Range:
    return UNSIGNED if node in unsigned else RANGE


def _where(node: fx.Node, readers: Mapping[Any, str]) -> str:
    return f"the inputs of {readers[node]} are" if node in readers else f"the value of {node.name} is"


def _add_errors(
    module: TrainableModule,
    chosen: Sequence[WeightedLayer],
    batches: Sequence[tuple[Batch, int]],
    options: Mapping[fx.Node, Sequence[float]],
    unsigned: Collection[fx.Node],
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
        rounded = on_grid(weight, weight_scales(weight))
        scale = float(value.double().square().sum()) or 1.0
        ends = _range(source, unsigned)
        for i, end in enumerate(options[source]):
            step = end / ends[1]
            given = {id(x): torch.fake_quantize_per_tensor_affine(x, step, 0, *ends), id(weight): rounded}
            new, keywords = pytree.tree_map(lambda v, g=given: g.get(id(v), v), (args, kwargs))
            off = node.target(*new, **keywords) - value  # type: ignore[operator]
            errors[source][i] += float(off.double().square().sum()) / scale

    observer, judged = Observer(module, layer_of, see), 0
    for batch, count in batches:
        if judged >= JUDGES:
            break
        observer(batch)
        judged += count


def weight_scales(weight: Tensor) -> Tensor:
    """The scales `(out,)` of a weight `(out, ...)`, in float32: the largest entry of a channel becomes 127."""
    largest = weight.detach().abs().flatten(1).amax(1).float()
    return torch.where(largest > 0, largest, torch.ones_like(largest)) / RANGE[1]


def on_grid(weight: Tensor, scales: Tensor) -> Tensor:
    """The weight with every entry on the grid of its output channel."""
    zero = torch.zeros_like(scales, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight.detach(), scales, zero, 0, *RANGE)
