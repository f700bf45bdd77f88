"""Layers: the operations of a program as far as their latency depends on them, at any sizes of the groups.

`fusion` says which nodes an inference library computes together. Nodes that it merges into another node's kernel (batch
norm, an activation, a residual addition), and nodes that only rename indices (views), are no layers of their own. Source:
ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from ..comb import axes as ax
from ..comb.axes import Axis, Factor
from ..comb.solve import Comb, Sizer
from ..cost import macs, unknown
from ..errors import Refused
from ..facts import (
    CELLS,
    CONVS,
    FAKE_QUANTISATION,
    MATRIX_PRODUCTS,
    NORMS,
    RECURRENT,
    TRANSPOSED_CONVS,
    VECTOR_PRODUCTS,
)
from ..nodes import arguments, conv_padding, hint, op_name, per_dim, recurrence, shape, source, spelled_out
from .fusion import Copy, Kernel, kernels
from .layer import Layer
from .libraries import ONNXRUNTIME, Rules, classify

ACTIVATIONS = frozenset("gelu silu sigmoid tanh softmax _softmax hardswish hardsigmoid exp erf mish softplus".split())
ATTENTION = "scaled_dot_product_attention"
MATMULS = frozenset({"linear", *MATRIX_PRODUCTS})


class Layers:
    """The layers of a solved program (a `Comb`) as functions of the sizes of its groups.

    batch: the size to use for a dynamic batch, which is the first dynamic size that is the first dimension of an input.
    Other dynamic sizes are those of the example inputs. rules: which nodes are one kernel. nodes: for every layer, the node
    that it is named after; the layers of copies come last. Raises Refused if an operator multiplies but is none of these
    layers.
    """

    def __init__(self, comb: Comb, batch: int = 1, rules: Rules = ONNXRUNTIME):
        self.comb, self.rules = comb, rules
        self._fixed = _batched(comb, batch)  # sizes of atoms that do not depend on the groups
        for node in comb.module.graph.nodes:
            if (why := unknown(node)) or (macs(node) and not _is_layer(node)):
                raise Refused(f"latency: {source(node)}: {why or f'how long {op_name(node)} takes is not known'}")
        # Fake quantisation has axes of its own in the comb; their sizes follow those of its input.
        for node in comb.module.graph.nodes:
            if op_name(node) in FAKE_QUANTISATION and comb.axes[node] and comb.axes[node.all_input_nodes[0]]:
                for old, new in zip(comb.axes[node.all_input_nodes[0]], comb.axes[node], strict=True):
                    if len(atoms := ax.atoms([new])) == 1 and next(iter(atoms)).frozen is not None:
                        self._fixed.update(dict.fromkeys(atoms, self.sizer({})(old)))
        self._kernels: dict[fx.Node, Kernel] = {}
        self._copies: dict[int, Copy] = {}
        self.nodes: list[fx.Node] = []
        launches = kernels(comb.module.graph, rules)
        place = {node: i for i, node in enumerate(comb.module.graph.nodes)}
        named = [(node, kernel) for kernel in launches for node in _named(kernel)]
        for node, kernel in sorted(named, key=lambda pair: place[pair[0]]):
            self._kernels[node] = kernel
            self.nodes.append(node)
        for copy in (copy for kernel in launches for copy in kernel.copies):
            self._copies[len(self.nodes)] = copy
            self.nodes.append(copy.tensor)

    def at(self, sizes: Mapping[Factor, int]) -> Iterator[tuple[fx.Node, Layer]]:
        """Yield every layer, with its node, when the atoms have the given sizes."""
        size = self.sizer(sizes)
        for i, node in enumerate(self.nodes):
            if (layer := self.numbered(i, size)) is not None:
                yield node, layer

    def sizer(self, sizes: Mapping[Factor, int]) -> Sizer:
        """Computes sizes of axes when the atoms have the given sizes and the batch that of `Layers`."""
        return Sizer({**sizes, **self._fixed})

    def numbered(self, index: int, size: Sizer) -> Layer | None:
        """The layer of `nodes[index]`; None for a copy that is not needed at these sizes."""
        node = self.nodes[index]
        if (copy := self._copies.get(index)) is not None:
            if copy.odd is not None and size(self.comb.axes[copy.odd[0]][copy.odd[1]]) % self.rules.grain == 0:
                return None
            return Layer("copy", (("entries", self.entries(node, size)),))
        kernel = self._kernels[node]
        main = _named(kernel)
        if kernel.kind == "attention" and len(main) == 1 and op_name(node) != ATTENTION:
            return self._written_out(kernel, size)
        several = not isinstance(node.meta["val"], torch.Tensor)
        if len(kernel.nodes) > 1 or (several and op_name(node) not in RECURRENT):
            if kernel.kind in ("product", "attention"):
                joined = node is not main[0]
                beside = 0 if joined else self._read(kernel, size, set(main))
                return dataclasses.replace(self.layer(node, size), beside=beside, joined=joined)
            moved = self._read(kernel, size, set()) + self._written(kernel, size)
            if several or op_name(node) not in NORMS:
                return Layer("copy", (("entries", (moved + 1) // 2),))
            layer = self.layer(node, size)
            return dataclasses.replace(layer, beside=moved - layer.entries())
        return self.layer(node, size)

    def atoms(self, index: int) -> dict[Factor, None]:
        """The prunable atoms that the layer of `nodes[index]` may depend on."""
        node = self.nodes[index]
        nodes = [node] if index in self._copies else self._kernels[node].nodes
        all_atoms = ax.atoms(a for op in nodes for n in (op, *op.all_input_nodes) for a in self.comb.flat(n))
        if (copy := self._copies.get(index)) is not None and copy.odd is not None:
            all_atoms |= ax.atoms(self.comb.flat(copy.odd[0]))
        return {a: None for a in all_atoms if a.frozen is None}

    def entries(self, node: fx.Node, size: Sizer) -> int:
        """Number of entries of a tensor, or of all tensors of a list."""
        axes = self.comb.axes[node] or []
        lists = axes if isinstance(node.meta.get("val"), (list, tuple)) else [axes]
        return sum(math.prod(map(size, shape)) for shape in lists if shape is not None)

    def _read(self, kernel: Kernel, size: Sizer, internal: set[fx.Node]) -> int:
        """Number of entries, without weights, that a kernel reads for its nodes other than `internal`."""
        inside, entries = set(kernel.nodes), {}
        for node in (n for n in kernel.nodes if n not in internal):
            for n in node.all_input_nodes:
                if not self._inside(n, inside) and not self.comb.is_parameter(n) and n.op != "get_attr":
                    entries[n] = self.entries(n, size)
        return sum(entries.values())

    def _written(self, kernel: Kernel, size: Sizer) -> int:
        inside = set(kernel.nodes)
        return sum(self.entries(n, size) for n in kernel.nodes if any(r not in inside for r in n.users))

    def _inside(self, node: fx.Node, inside: set[fx.Node]) -> bool:
        while node not in inside and node.op == "call_function" and node not in self._kernels and node.all_input_nodes:
            node = node.all_input_nodes[0]  # skip nodes that only rename indices
        return node in inside

    def _written_out(self, kernel: Kernel, size: Sizer) -> Layer:
        """The layer of an attention that is written as two products around a softmax."""
        first, last = (n for n in kernel.nodes if op_name(n) in ("matmul", "bmm"))
        *batch, queries, width = (size(a) for a in self.comb.axes[first.all_input_nodes[0]])
        keys, value = (size(a) for a in self.comb.axes[last.all_input_nodes[1]][-2:])
        return _attention(batch, queries, width, keys, value)

    def layer(self, node: fx.Node, size: Sizer) -> Layer:
        """The layer of a node, without other nodes of its kernel."""
        name, axes = op_name(node), self.comb.axes

        def sizes(n: fx.Node) -> list[int]:
            return [size(a) for a in axes[n]]

        if name in (*CONVS, *TRANSPOSED_CONVS):
            return self._conv(node, sizes)
        if name in MATMULS:
            return self._matmul(node, sizes)
        if (name in VECTOR_PRODUCTS or name in ("einsum", "inner", "tensordot")) and macs(node):
            return self._contraction(*_letters(node), sizes)
        if name == ATTENTION:
            a = arguments(node)
            *batch, queries, width = sizes(a["query"])
            return _attention(batch, queries, width, *sizes(a["value"])[-2:])
        if name in RECURRENT:
            return _recurrent(node, sizes)
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
        pads, spatial = conv_padding(node), len(weight) - 2
        # Padding that is larger after the image than before counts as a larger image.
        image = tuple(n + high - low for n, (low, high) in zip(source[2:], pads, strict=True))
        return Layer(
            "conv", (("inputs", source[1]), ("outputs", result[1]), ("groups", groups)),
            (
                ("batch", source[0]), ("image", image), ("kernel", tuple(weight[2:])),
                ("stride", per_dim(a["stride"], spatial)), ("padding", tuple(low for low, _ in pads)),
                ("dilation", per_dim(a["dilation"], spatial)), ("transposed", int(transposed)),
            ),
        )  # fmt: skip

    def _contraction(self, left: fx.Node, right: fx.Node, terms: tuple[str, str], result: str, sizes: Any) -> Layer:
        """A matrix product, from letters for the dimensions of two operands and of their result, as in einsum."""
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
            first, second = MATRIX_PRODUCTS[op_name(node)]
            left, right = sizes(a[first]), a[second]
            shared = self.comb.is_parameter(right) or right.op == "get_attr" or len(shape(right)) == 2
        batch, rows = (1, math.prod(result[:-1])) if shared else (math.prod(result[:-2]), result[-2])
        return Layer(
            "matmul", (("batch", batch), ("inputs", left[-1]), ("outputs", result[-1])),
            (("rows", rows), ("shared", int(shared))),
        )  # fmt: skip


def _recurrent(node: fx.Node, sizes: Any) -> Layer:
    """The layer of an LSTM, GRU or RNN, or of a cell, which is one step of it."""
    a, made = arguments(node), recurrence(node)
    assert not isinstance(made, str)  # `Layers` has refused those
    *lead, inputs = sizes(a["input"])
    lead = [1, *lead] if op_name(node) in CELLS else lead
    steps, batch = reversed(lead) if a.get("batch_first") else lead
    return Layer("recurrent", (("inputs", inputs), ("hidden", sizes(made.parts[0][1])[1])), (
        ("batch", batch), ("steps", steps), ("layers", made.layers), ("directions", made.directions),
        ("gates", RECURRENT[op_name(node)]),
    ))  # fmt: skip


def _attention(batch: list[int], queries: int, width: int, keys: int, value: int) -> Layer:
    """An attention layer; the last dimension of its batch is that of the heads."""
    return Layer(
        "attention", (("heads", batch[-1]), ("width", width), ("value", value)),
        (("batch", math.prod(batch[:-1])), ("queries", queries), ("keys", keys)),
    )  # fmt: skip


def _batched(comb: Comb, batch: int) -> dict[Factor, int]:
    """Sizes of the atoms that grow with the batch, for this batch size; atoms of other dynamic sizes keep those of the
    example inputs."""
    sizes: list[tuple[Axis, Any]] = [
        (axis, n)
        for node, axes in comb.axes.items()
        if axes is not None and isinstance(value := node.meta.get("val"), torch.Tensor)
        for axis, n in zip(axes, value.shape, strict=True)
        if not isinstance(n, int)
    ]
    inputs: list[Any] = [n.meta.get("val") for n in comb.module.graph.nodes if n.op == "placeholder"]
    firsts = [v.shape[0] for v in inputs if isinstance(v, torch.Tensor) and v.dim() and not isinstance(v.shape[0], int)]
    if not firsts:
        return {}
    symbols = firsts[0].node.expr.free_symbols
    examples = {n.node.expr: hint(n) for _, n in sizes if n.node.expr.is_symbol} | dict.fromkeys(symbols, batch)
    dynamic: dict[Factor, int] = {}
    for axis, n in sizes:
        expr = n.node.expr
        new = [a for a in ax.atoms([axis]) if a.symbolic and a not in dynamic]
        if not new or not expr.free_symbols & symbols or not expr.free_symbols <= examples.keys():
            continue
        one, two = (ax.kept_size(axis, {**dynamic, new[0]: k}) for k in (1, 2))  # linear in every atom
        dynamic[new[0]] = max(1, 1 + (int(expr.subs(examples)) - one) // max(two - one, 1))
    return dynamic


def _is_layer(node: fx.Node) -> bool:
    """Whether a node that multiplies is one of the known layers."""
    name = op_name(node)
    if name == "einsum":
        return len(arguments(node)["tensors"]) == 2  # with more operands it is several products in a row
    if name in RECURRENT:
        return not isinstance(recurrence(node), str)
    return name in {*MATMULS, *VECTOR_PRODUCTS, *CONVS, *TRANSPOSED_CONVS, "inner", "tensordot", ATTENTION}


def _letters(node: fx.Node) -> tuple[fx.Node, fx.Node, tuple[str, str], str]:
    """The two operands of a contraction, letters for their dimensions, and letters for the result's."""
    a, name = arguments(node), op_name(node)
    if name == "einsum":
        left, right = a["tensors"]
        (one, other), result = spelled_out(a["equation"], [len(shape(left)), len(shape(right))])
        return left, right, (one, other), result
    first, second = VECTOR_PRODUCTS.get(name, ("self", "other"))
    left, right = a[first], a[second]
    ranks = len(shape(left)), len(shape(right))
    names = [chr(ord("a") + i) for i in range(sum(ranks))]
    first_names, second_names = names[: ranks[0]], names[ranks[0] :]
    over = zip(a["dims_self"], a["dims_other"], strict=True) if name == "tensordot" else [(-1, -1)]
    for i, j in over:
        second_names[j] = first_names[i]
    kept = sorted(set(first_names) ^ set(second_names))
    return left, right, ("".join(first_names), "".join(second_names)), "".join(kept)


def _named(kernel: Kernel) -> list[fx.Node]:
    """The nodes that a kernel's layers are named after: its products, or else the node that takes longest."""
    products = [n for n in kernel.nodes if classify(n) in ("product", "depthwise", "attention")]
    if kernel.kind == "attention" and len(products) > 1:
        return products[:1]  # written out
    if products:
        return products
    norms = [n for n in kernel.nodes if op_name(n) in NORMS]
    return (norms or kernel.nodes)[:1]
