"""Layers: what the nodes of a program compute, as far as their latency depends on it, at any sizes of the groups.

The unit of latency tables and estimates: passes ask what a layer costs, the runtime measures it, and neither needs to know
the other. What an inference engine merges into the convolution before it (batch norm, an activation, a residual addition)
and what only renames indices (views) is no layer of its own. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from . import axes as ax
from .axes import Axis, Factor
from .comb import Comb, Sizer
from .cost import macs, unknown
from .errors import Refused
from .ops import arguments, op_name, shape, source
from .rules.contraction import spelled_out

FREE = frozenset(
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze expand getitem dropout detach alias contiguous clone "
    "unbind select to sym_size".split()
)
MERGED = frozenset("batch_norm relu relu6 hardtanh clamp clamp_min leaky_relu".split())
ACTIVATIONS = frozenset("gelu silu sigmoid tanh softmax _softmax hardswish hardsigmoid exp erf mish softplus".split())
MATMULS = frozenset("linear matmul linalg_matmul bmm mm addmm baddbmm".split())
PAIRS = {"mv": ("self", "vec"), "addmv": ("mat", "vec"), "dot": ("self", "tensor"), "vdot": ("self", "other")}
NORMS = frozenset("layer_norm group_norm instance_norm rms_norm".split())


@dataclass(frozen=True)
class Layer:
    """One operation at concrete sizes.

    op: "conv" (also transposed: options say), "matmul", "attention", "norm", "activation" or "copy" (anything whose time
    is moving its tensors). sizes: by name, those that pruning may change. options: by name, those that it does not.

        conv       sizes: inputs, outputs, groups; options: batch, image (height, width, ... of the input), kernel, stride,
                   padding, dilation, transposed
        matmul     sizes: batch, inputs (K), outputs (N); options: rows (M), shared (1: one right-hand side for all)
        attention  sizes: heads, width, value (head widths of queries and keys, and of values); options: batch, queries, keys
        norm       sizes: channels; options: rows
        activation, copy   sizes: entries (of the result; for a copy the mean of what is read and written if that is more)
    """

    op: str
    sizes: tuple[tuple[str, int], ...]
    options: tuple[tuple[str, int | tuple[int, ...]], ...] = ()

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
        return 0

    def entries(self) -> int:
        """Numbers that are read and written, weights included, each once."""
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
        if self.op == "norm":
            return 2 * self["rows"] * self["channels"]
        return 2 * self["entries"]

    def result_image(self) -> tuple[int, ...]:
        """Height, width, ... of a convolution's result (output padding of a transposed one left out)."""
        parts = zip(*(self[k] for k in ("image", "kernel", "stride", "padding", "dilation")), strict=True)
        if self["transposed"]:
            return tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in parts)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in parts)

    def resized(self, sizes: Iterable[int]) -> Layer:
        """The layer with other sizes, in the order of `sizes`."""
        return Layer(self.op, tuple((k, n) for (k, _), n in zip(self.sizes, sizes, strict=True)), self.options)

    def __str__(self) -> str:
        def one(name: str, value: int | tuple[int, ...]) -> str:
            return f"{name}={'x'.join(map(str, value)) if isinstance(value, tuple) else value}"

        return " ".join([self.op, *(one(k, v) for k, v in (*self.options, *self.sizes))])


class Latency(Protocol):
    """Something that knows, or predicts, how long layers take."""

    @property
    def per_run(self) -> float:
        """Seconds of a whole run that belong to no layer."""
        ...

    def prepare(self, layers: Iterable[Layer], progress: bool = False) -> None:
        """Get ready to answer for these layers; a table measures what it does not know."""

    def seconds(self, layer: Layer) -> float:
        """How long one run of the layer takes."""
        ...


def run_seconds(latency: Latency, layers: Iterable[Layer], progress: bool = False) -> float:
    """What a run of these layers takes; a table first measures, all at once, what it does not know."""
    layers = list(layers)
    latency.prepare(dict.fromkeys(layers), progress)
    return latency.per_run + sum(map(latency.seconds, layers))


class Layers:
    """The layers of a combed program as functions of the sizes of its groups.

    batch: size of the dynamic batch to count with, where the program has one. Refused for a program in which something
    multiplies that is none of these layers.
    """

    def __init__(self, comb: Comb, batch: int = 1):
        self.comb = comb
        free = ax.atoms(a for n in comb.module.graph.nodes if n.op == "placeholder" for a in comb.axes[n] or ())
        self._batch: dict[Factor, int] = {a: batch for a in free if a.symbolic}
        for node in comb.module.graph.nodes:
            if (why := unknown(node)) or (macs(node) and not _is_layer(node)):
                raise Refused(f"latency: {source(node)}: {why or f'how long {op_name(node)} takes is not known'}")
        self.nodes = [n for n in comb.module.graph.nodes if self._counts(n)]

    def at(self, sizes: Mapping[Factor, int]) -> Iterator[tuple[fx.Node, Layer]]:
        """Every layer when the atoms have the given sizes."""
        size = self.sizer(sizes)
        for node in self.nodes:
            yield node, self.layer(node, size)

    def sizer(self, sizes: Mapping[Factor, int]) -> Sizer:
        return Sizer({**sizes, **self._batch})

    def atoms(self, node: fx.Node) -> dict[Factor, None]:
        """The prunable atoms that a node's layer may depend on."""
        found = ax.atoms(a for n in (node, *node.all_input_nodes) for a in self._flat(n))
        return {a: None for a in found if a.frozen is None}

    def _flat(self, node: fx.Node) -> list[Axis]:
        axes = self.comb.axes[node] or []
        if isinstance(node.meta.get("val"), (list, tuple)):
            return [axis for result in axes for axis in result or ()]
        return axes

    def _counts(self, node: fx.Node) -> bool:
        """Whether the node costs time of its own."""
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            return False
        name = op_name(node)
        if name in FREE or self.comb.is_parameter(node):
            return False
        return not ((name in MERGED or name == "add") and self._follows_conv(node))

    def _follows_conv(self, node: fx.Node) -> bool:
        """Whether an operand is a convolution nobody else reads, with what has been merged into it."""
        for operand in node.all_input_nodes:
            name = op_name(operand)
            if operand.op != "call_function" or len(operand.users) > 1:
                continue
            if name.startswith("conv"):
                return True
            if (name in MERGED or name == "add") and self._follows_conv(operand):
                return name == "batch_norm" or op_name(node) != "batch_norm"
        return False

    def layer(self, node: fx.Node, size: Sizer) -> Layer:
        """The node's layer."""
        name, axes = op_name(node), self.comb.axes

        def sizes(n: fx.Node) -> list[int]:
            return [size(a) for a in axes[n]]

        if name.startswith("conv") and name[4:5] in "123_":
            return self._conv(node, sizes)
        if name in MATMULS:
            return self._matmul(node, sizes)
        if (name in PAIRS or name in ("einsum", "inner", "tensordot")) and macs(node):
            return self._contraction(*_letters(node), sizes)
        if name == "scaled_dot_product_attention":
            a = arguments(node)
            *batch, heads, queries, width = sizes(a["query"])
            keys, value = sizes(a["value"])[-2:]
            return Layer(
                "attention", (("heads", heads), ("width", width), ("value", value)),
                (("batch", math.prod(batch)), ("queries", queries), ("keys", keys)),
            )  # fmt: skip
        result = sizes(node)
        if name in NORMS:
            channels = result[-1] if name in ("layer_norm", "rms_norm") else math.prod(result[1:])
            return Layer("norm", (("channels", channels),), (("rows", math.prod(result) // max(channels, 1)),))
        entries = math.prod(result)
        if name in ACTIVATIONS:
            return Layer("activation", (("entries", entries),))
        read = sum(math.prod(sizes(n)) for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor))
        return Layer("copy", (("entries", max(entries, (entries + read) // 2)),))

    def _conv(self, node: fx.Node, sizes: Any) -> Layer:
        a = arguments(node)
        source, weight, result = sizes(a["input"]), sizes(a["weight"]), sizes(node)
        transposed = "transpose" in op_name(node)
        groups = source[1] // weight[1] if not transposed else result[1] // weight[1]
        spatial = len(weight) - 2

        def spread(value: Any) -> tuple[int, ...]:
            values = [value] if isinstance(value, int) else list(value)
            return tuple(values * spatial if len(values) == 1 else values)

        options: list[tuple[str, Any]] = [
            ("batch", source[0]),
            ("image", tuple(source[2:])),
            ("kernel", tuple(weight[2:])),
        ]
        padding = a["padding"]
        if isinstance(padding, str):
            around = [
                0 if padding == "valid" else d * (k - 1) for k, d in zip(weight[2:], spread(a["dilation"]), strict=True)
            ]
            padding = [n // 2 for n in around]  # an odd one is added before, on one side of the image
            options[1] = ("image", tuple(n + total % 2 for n, total in zip(source[2:], around, strict=True)))
        for key, value in (("stride", a["stride"]), ("padding", padding), ("dilation", a["dilation"])):
            options.append((key, spread(value)))
        options.append(("transposed", int(transposed)))
        return Layer("conv", (("inputs", source[1]), ("outputs", result[1]), ("groups", groups)), tuple(options))

    def _contraction(self, left: fx.Node, right: fx.Node, terms: tuple[str, str], result: str, sizes: Any) -> Layer:
        """A matrix product from letters for the dimensions of two operands and of their result, as in einsum."""
        if self.comb.is_parameter(left):
            left, right, terms = right, left, terms[::-1]
        size: dict[str, int] = {}
        for node, term in ((left, terms[0]), (right, terms[1])):
            for letter, n in zip(term, sizes(node), strict=True):
                size[letter] = max(size.get(letter, 1), n)
        one, other = (
            {k for k, n in zip(t, sizes(m), strict=True) if n > 1} for m, t in ((left, terms[0]), (right, terms[1]))
        )

        def product(letters: set[str]) -> int:
            return math.prod(size[k] for k in letters)

        wanted = set(result)
        batch, inner = product(one & other & wanted), product((one & other) - wanted)
        return Layer(
            "matmul", (("batch", batch), ("inputs", inner), ("outputs", product((other - one) & wanted))),
            (("rows", product((one - other) & wanted)), ("shared", int(batch == 1))),
        )  # fmt: skip

    def _matmul(self, node: fx.Node, sizes: Any) -> Layer:
        a = arguments(node)
        result = sizes(node) or [1]
        if op_name(node) == "linear":
            left, shared = sizes(a["input"]), True
        else:
            names = [n for n in ("batch1", "mat1", "self") if n in a]
            left = sizes(a[names[0]])
            right = next(a[n] for n in ("batch2", "mat2", "other") if n in a)
            shared = self.comb.is_parameter(right) or right.op == "get_attr" or len(shape(right)) == 2
        batch, rows = (1, math.prod(result[:-1])) if shared else (math.prod(result[:-2]), result[-2])
        return Layer(
            "matmul", (("batch", batch), ("inputs", left[-1]), ("outputs", result[-1])),
            (("rows", rows), ("shared", int(shared))),
        )  # fmt: skip


def _is_layer(node: fx.Node) -> bool:
    """Whether a node that multiplies is one of the layers there are."""
    name = op_name(node)
    if name == "einsum":
        return len(arguments(node)["tensors"]) == 2  # more are several products, one after the other
    known = name in MATMULS or name in PAIRS or name in ("inner", "tensordot", "scaled_dot_product_attention")
    return known or (name.startswith("conv") and name[4:5] in "123_")


def _letters(node: fx.Node) -> tuple[fx.Node, fx.Node, tuple[str, str], str]:
    """The two operands of a contraction, letters for their dimensions, and those of the result."""
    a, name = arguments(node), op_name(node)
    if name == "einsum":
        left, right = a["tensors"]
        (one, other), result = spelled_out(a["equation"], [len(shape(left)), len(shape(right))])
        return left, right, (one, other), result
    first, second = PAIRS.get(name, ("self", "other"))
    left, right = a[first], a[second]
    ranks = len(shape(left)), len(shape(right))
    names = [chr(ord("a") + i) for i in range(sum(ranks))]
    one, two = names[: ranks[0]], names[ranks[0] :]
    over = zip(a["dims_self"], a["dims_other"], strict=True) if name == "tensordot" else [(-1, -1)]
    for i, j in over:
        two[j] = one[i]
    return left, right, ("".join(one), "".join(two)), "".join(set(one) ^ set(two))
