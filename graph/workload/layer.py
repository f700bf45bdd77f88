"""A layer at concrete sizes, and the interface of latency models: the unit of latency tables and estimates.

Passes ask what a layer costs, the runtime measures it, and neither needs to know the other. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from .libraries import ONNXRUNTIME, Rules


@dataclass(frozen=True)
class Layer:
    """One operation at concrete sizes.

    sizes: by name, those that pruning may change. options: by name, those that it does not change. op is one of:

    - conv (also transposed). sizes: inputs, outputs, groups. options: batch, image (height, width, ... of the input),
      kernel, stride, padding, dilation, transposed.
    - matmul. sizes: batch, inputs (K), outputs (N). options: rows (M), shared (1: one right-hand side for all).
    - attention. sizes: heads, width, value (head widths of queries and keys, and of values). options: batch, queries, keys.
    - recurrent (LSTM, GRU, RNN). sizes: inputs, hidden. options: batch, steps (of a sequence), layers, directions, gates.
    - norm. sizes: channels. options: rows.
    - activation, and copy (any operation whose time is that of moving its tensors). sizes: entries (of the result; for a
      copy the mean of what is read and written if that is more).

    beside: entries that the layer's kernel moves in addition to the operation's own, such as for a residual addition.
    joined: whether another layer's kernel computes this layer, too.
    """

    op: str
    sizes: tuple[tuple[str, int], ...]
    options: tuple[tuple[str, int | tuple[int, ...]], ...] = ()
    beside: int = 0
    joined: bool = False

    def __getitem__(self, name: str) -> Any:
        return dict((*self.sizes, *self.options))[name]

    def macs(self, alignment: int = 1) -> int:
        """Multiply-accumulates, with channels, K and N padded to multiples of the alignment."""

        def pad(n: int) -> int:
            return -(-n // alignment) * alignment

        if self.op == "conv":
            groups = max(self["groups"], 1)
            depthwise = groups == self["inputs"] == self["outputs"]
            pairs = (
                pad(groups) if depthwise else groups * pad(self["inputs"] // groups) * pad(self["outputs"] // groups)
            )
            places = math.prod(self["image"] if self["transposed"] else self.result_image())
            return self["batch"] * places * math.prod(self["kernel"]) * pairs
        if self.op == "matmul":
            return self["batch"] * self["rows"] * pad(self["inputs"]) * pad(self["outputs"])
        if self.op == "attention":
            pairs = self["batch"] * self["heads"] * self["queries"] * pad(self["keys"])
            return pairs * (pad(self["width"]) + pad(self["value"]))
        if self.op == "recurrent":
            return self["batch"] * self["steps"] * self._recurrent_weights(pad)
        return 0

    def _recurrent_weights(self, pad: Callable[[int], int] = int) -> int:
        """Number of weights of all layers and directions of a recurrent layer: each step uses each of them once."""
        width, directions = pad(self["hidden"]), self["directions"]
        read = [self["inputs"], *[directions * self["hidden"]] * (self["layers"] - 1)]
        return sum(directions * self["gates"] * width * (pad(n) + width) for n in read)

    @property
    def launches(self) -> int:
        """Number of kernels that start one after the other: a recurrent layer has one for each step of each of its layers
        (both directions run at once), since each waits for the one before."""
        if self.joined:
            return 0
        return self["steps"] * self["layers"] if self.op == "recurrent" else 1

    def entries(self) -> int:
        """Number of entries that are read and written, weights included, each once."""
        return self._own_entries() + self.beside

    def _own_entries(self) -> int:
        if self.op == "conv":
            image, result = math.prod(self["image"]), math.prod(self.result_image())
            weights = self["inputs"] * self["outputs"] // max(self["groups"], 1) * math.prod(self["kernel"])
            return self["batch"] * (image * self["inputs"] + result * self["outputs"]) + weights
        if self.op == "matmul":
            rows = self["batch"] * self["rows"]
            return rows * (self["inputs"] + self["outputs"]) + self["batch"] * self["inputs"] * self["outputs"]
        if self.op == "attention":
            tokens = (self["queries"] + self["keys"]) * (self["width"] + self["value"])
            return self["batch"] * self["heads"] * tokens
        if self.op == "recurrent":
            results = (2 * self["layers"] - 1) * self["directions"] * self["hidden"]  # read again by the layer above
            return self["batch"] * self["steps"] * (self["inputs"] + results) + self._recurrent_weights()
        if self.op == "norm":
            return 2 * self["rows"] * self["channels"]
        return 2 * self["entries"]

    def result_image(self) -> tuple[int, ...]:
        """Height, width, ... of a convolution's result (without the output padding of a transposed one)."""
        parts = zip(*(self[k] for k in ("image", "kernel", "stride", "padding", "dilation")), strict=True)
        if self["transposed"]:
            return tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in parts)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in parts)

    def resized(self, sizes: Iterable[int]) -> Layer:
        """The layer with other sizes, given in the order of its `sizes`."""
        return Layer(self.op, tuple((k, n) for (k, _), n in zip(self.sizes, sizes, strict=True)), self.options)

    def __str__(self) -> str:
        def one(name: str, value: int | tuple[int, ...]) -> str:
            return f"{name}={'x'.join(map(str, value)) if isinstance(value, tuple) else value}"

        return " ".join([self.op, *(one(k, v) for k, v in (*self.options, *self.sizes))])


class Latency(Protocol):
    """A model of how long layers take. If it has `rules`, they say which nodes are one kernel."""

    @property
    def per_run(self) -> float:
        """Seconds of a whole run that belong to no layer."""
        ...

    def prepare(self, layers: Iterable[Layer], progress: bool = False) -> None:
        """Prepare to answer for these layers; a table measures those that it does not know."""

    def seconds(self, layer: Layer) -> float:
        """Seconds of one run of the layer."""
        ...


def run_seconds(latency: Latency, layers: Iterable[Layer], progress: bool = False) -> float:
    """Seconds of a run of these layers; a table first measures, all at once, those that it does not know."""
    layers = list(layers)
    latency.prepare(dict.fromkeys(layers), progress)
    return latency.per_run + sum(map(latency.seconds, layers))


def rules_of(latency: Any) -> Rules:
    """The rules of a latency model; ONNX Runtime's if it has none."""
    return getattr(latency, "rules", ONNXRUNTIME)
