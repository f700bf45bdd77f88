"""Which kernels an inference library makes of the nodes of a program.

A library computes a convolution or matrix product together with the pointwise operators after it in one kernel; it joins
pointwise operators, movements of data and reductions into kernels that it generates, computes an attention as one kernel,
and does nothing for operators that only rename indices. `Rules` (in `libraries`) say what one library joins, `kernels`
applies them to a graph.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from ..facts import JOINS, PARTS
from ..nodes import arguments, op_name, shape
from .libraries import CLIPS, Rules, Shape, classify, single


@dataclass(frozen=True)
class Copy:
    """A kernel that only copies a tensor into another layout, or pads it. odd: (node, dim): the copy is needed only if that
    size is no multiple of the grain; None: always."""

    tensor: fx.Node
    odd: tuple[fx.Node, int] | None = None


@dataclass(eq=False)
class Kernel:
    """One kernel. kind: "product", "attention", "generated" or "other". nodes: those that it computes. copies: further
    kernels that prepare its operands or its results."""

    kind: str
    nodes: list[fx.Node] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)

    def launches(self, grain: int) -> int:
        """Number of kernels that are launched at the example's sizes, copies included."""
        return 1 + len(self.copied(grain))

    def copied(self, grain: int, shape: Shape = shape) -> list[fx.Node]:
        """The tensors that are copied at these sizes."""
        return [c.tensor for c in self.copies if c.odd is None or shape(c.odd[0])[c.odd[1]] % grain]


def kernels(graph: fx.Graph, rules: Rules, shape: Shape = shape) -> list[Kernel]:
    """The kernels of a program, in the order of their first nodes. Nodes that depend on no input are in none. shape: gives
    the sizes of a node's tensor, by default those of the example inputs."""
    return _Fusion(graph, rules, shape).run()


def count(graph: fx.Graph, rules: Rules) -> int:
    """Number of kernels that a run launches, at the example's sizes."""
    return sum(kernel.launches(rules.grain) for kernel in kernels(graph, rules))


# ----------------------------------------------------------------------------------------------------------- the joining
class _Fusion:
    """The state of joining nodes to kernels.

    kinds: classes of the nodes that compute. source: for a node without cost, the node that it renames. operands, readers:
    of every node that computes, skipping nodes without cost. owner: the kernel of each node that has one so far.
    """

    def __init__(self, graph: fx.Graph, rules: Rules, shape: Shape):
        self.rules, self.shape = rules, functools.cache(shape)
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self.kinds: dict[fx.Node, str] = {}
        self.source: dict[fx.Node, fx.Node] = {}
        self.operands: dict[fx.Node, list[fx.Node]] = {}
        self.readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        self.outputs: set[fx.Node] = set()
        self.owner: dict[fx.Node, Kernel] = {}
        varies: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "placeholder":
                varies.add(node)
            read = [self.source.get(n, n) for n in node.all_input_nodes if n in varies]
            if node.op == "output":
                self.outputs.update(read)
            if (
                node.op != "call_function"
                or not read
                or not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple))
            ):
                continue
            varies.add(node)
            kind = "free" if op_name(node) in rules.free else classify(node, self.shape)
            parts = not isinstance(node.meta["val"], torch.Tensor) and kind != "recurrent"  # a split: only renames, if
            if kind == "free" or (parts and not rules.generated):  # nothing is generated
                self.source[node] = read[0]
                continue
            self.kinds[node], self.operands[node] = kind, list(dict.fromkeys(read))
            for n in self.operands[node]:
                self.readers[n].append(node)

    def run(self) -> list[Kernel]:
        if self.rules.attention:
            for node, kind in self.kinds.items():
                if kind == "attention":
                    self._attention([node])
                elif op_name(node) in ("matmul", "bmm") and node not in self.owner:
                    self._written_out_attention(node)
        shared: dict[fx.Node, Kernel] = {}
        for node, kind in self.kinds.items():
            if node in self.owner or kind not in ("product", "depthwise", "attention"):
                continue
            follow = self._epilogue(node)
            linear = self.rules.together and op_name(node) == "linear" and not follow
            if linear and self.operands[node][0] in shared:
                self._add(shared[self.operands[node][0]], [node])
                continue
            kernel = self._add(Kernel("product"), [node, *follow])
            if linear:
                shared[self.operands[node][0]] = kernel
        for node, kind in self.kinds.items():
            if node in self.owner or (kind == "move" and self._lies_there(node)):
                continue
            if kind in self.rules.generated:
                self._generate(node)
            else:
                self._add(Kernel("other"), [node])
        kernels = list(dict.fromkeys(self.owner[n] for n in self.kinds if n in self.owner))
        if self.rules.layouts:
            self._layouts(kernels)
        for kernel in kernels if self.rules.requantises else ():
            if kernel.kind == "product":
                kernel.copies.append(Copy(kernel.nodes[-1]))
        return kernels

    def _add(self, kernel: Kernel, nodes: Iterable[fx.Node]) -> Kernel:
        for node in nodes:
            kernel.nodes.append(node)
            self.owner[node] = kernel
        return kernel

    # ----------------------------------------------------------------------------------------------------- epilogues
    def _epilogue(self, product: fx.Node) -> list[fx.Node]:
        """The pointwise nodes after a product that its kernel computes, up to where a single tensor leaves them."""
        epilogue: list[fx.Node] = []
        end = product
        while end not in self.outputs:
            inner: list[fx.Node] = []
            waiting = {end}  # tensors that nodes outside of `inner` still read
            candidates = list(self.readers[end])
            while candidates and waiting != {inner[-1] if inner else None}:
                node = min(candidates, key=self.place.__getitem__)
                if len(inner) > 8 or not self._joins(node, product, {product, *epilogue, *inner}):
                    return epilogue
                inner.append(node)
                waiting = {n for n in waiting if n in self.outputs or not set(self.readers[n]) <= set(inner)} | {node}
                candidates = [n for n in (*candidates, *self.readers[node]) if n not in inner]
            if not inner or waiting != {inner[-1]}:
                return epilogue
            epilogue += inner
            end = inner[-1]
        return epilogue

    def _joins(self, node: fx.Node, product: fx.Node, inside: set[fx.Node]) -> bool:
        kind, name = self._kind(product), op_name(node)
        if self.kinds.get(node) != "pointwise" or node in self.owner or self._entries(node) != self._entries(product):
            return False
        others = [
            n
            for n in node.all_input_nodes
            if (s := self.source.get(n, n)) in self.place and self._varies(s) and s not in inside
        ]
        if any(self.place[self.source.get(n, n)] > self.place[product] for n in others):
            return False  # a tensor that is computed later may itself need this product
        if any(self._entries(n) == self._entries(node) for n in others):
            flat = kind != "linear" or len(self.shape(product)) <= 3
            return kind in self.rules.residual and flat and name in ("add", "sub", "mul")
        if others and kind == "depthwise":
            return False
        return self.rules.joins(kind, name)

    def _varies(self, node: fx.Node) -> bool:
        return node in self.kinds or node.op == "placeholder"

    def _kind(self, product: fx.Node) -> str:
        name = op_name(product)
        if name.startswith("conv"):
            return "depthwise" if self.kinds[product] == "depthwise" else "conv"
        return "linear" if name == "linear" else "matmul"

    # ----------------------------------------------------------------------------------------------------- attention
    def _attention(self, nodes: list[fx.Node]) -> None:
        """Make one kernel of an attention and of the nodes that only move or scale its queries, keys and values (each costs
        a copy anyway)."""
        kernel = self._add(Kernel("attention"), nodes)
        operands = [n for node in nodes for n in self.operands[node] if n not in nodes]
        stack = list(operands)
        while stack:
            node = stack.pop()
            if self.kinds.get(node) not in ("move", "pointwise") or node in self.owner or node in self.outputs:
                continue
            if all(self.owner.get(reader) is kernel for reader in self.readers[node]):
                self._add(kernel, [node])
                stack += self.operands[node]

    def _written_out_attention(self, first: fx.Node) -> None:
        """Make a kernel of scores, the operations on them, softmax and weighted values, for several heads of one width."""
        chain, end, weighted = [first], first, False
        while len(self.readers[end]) == 1 and end not in self.outputs and len(chain) < 12:
            node = self.readers[end][0]
            name = op_name(node)
            if name in ("matmul", "bmm"):
                several = len(self.shape(first)) > 2 and self.shape(first)[-3] > 1
                same = self.shape(first.all_input_nodes[0])[-1] == self.shape(node)[-1]
                if weighted and several and same and self.operands[node][0] is end:
                    self._attention([*chain, node])
                return
            weighted |= name in ("softmax", "_softmax")
            if self.kinds[node] != "pointwise" and name not in ("softmax", "_softmax"):
                return
            chain.append(node)
            end = node

    # --------------------------------------------------------------------------------------------- generated kernels
    def _lies_there(self, node: fx.Node) -> bool:
        """Whether a movement costs nothing: a concatenation that its producers write in place, or a transposed result of
        attention that its readers take as it is."""
        name, readers = op_name(node), self.readers[node]
        if not self.rules.generated or node in self.outputs or not readers:
            return False
        if not all(self.kinds[n] in ("product", "depthwise", "pool") for n in readers):
            return False
        if name in JOINS:
            return all(self.kinds.get(n) != "move" or op_name(n) in JOINS for n in self.operands[node])
        before = self.owner.get(self.operands[node][0])
        return name in ("transpose", "permute") and before is not None and before.kind == "attention"

    def _generate(self, node: fx.Node) -> None:
        """Join a node to generated kernels that it reads, or make a new one."""
        joined: Kernel | None = None
        for kernel in dict.fromkeys(self.owner[n] for n in self.operands[node] if n in self.owner):
            if kernel.kind != "generated" or not self._fits(kernel, node):
                continue
            beside = {o for n in self._needed(node) if (o := self.owner.get(n)) not in (None, kernel, joined)}
            if self._reaches(beside, kernel):
                continue
            if joined is None:
                joined = self._add(kernel, [node])
            elif not self._reaches(set(self._before(kernel)) - {joined}, joined) and not self._reaches(
                set(self._before(joined)) - {kernel}, kernel
            ):
                self._add(joined, kernel.nodes)
        if joined is None:
            self._add(Kernel("generated"), [node])

    def _fits(self, kernel: Kernel, node: fx.Node) -> bool:
        """Whether a generated kernel may also compute a node: it neither resizes nor rearranges reduced values."""
        if self.rules.single and any(single(n, self.shape) for n in kernel.nodes):
            return False
        sums = [n for n in kernel.nodes if self.kinds[n] == "reduce"]
        reduced = any(self._entries(n) < self._entries(n.all_input_nodes[0]) for n in sums)
        return "upsample" not in op_name(node) and not (reduced and self.kinds[node] == "move")

    def _reaches(self, start: Iterable[Kernel], goal: Kernel) -> bool:
        """Whether one of `start` is the kernel `goal`, or needs it."""
        seen: set[Kernel] = set()
        stack = list(start)
        while stack:
            kernel = stack.pop()
            if kernel is goal:
                return True
            if kernel not in seen:
                seen.add(kernel)
                stack += self._before(kernel)
        return False

    def _before(self, kernel: Kernel) -> Iterator[Kernel]:
        """The kernels whose results a kernel reads."""
        for node in kernel.nodes:
            for n in self._needed(node):
                if (owner := self.owner.get(n)) is not None and owner is not kernel:
                    yield owner

    def _needed(self, node: fx.Node) -> Iterator[fx.Node]:
        """The operands of a node, skipping concatenations that cost nothing."""
        for n in self.operands[node]:
            if n in self.kinds and n not in self.owner:
                yield from self._needed(n)
            else:
                yield n

    # ------------------------------------------------------------------------------------------------------- layouts
    def _layouts(self, made: list[Kernel]) -> None:
        """Add copies between layouts: TensorRT computes images with channels last, and other tensors in plain order."""
        padded: set[fx.Node] = set()
        for kernel in made:
            if kernel.kind == "attention":
                self._copies_of_attention(kernel)
                continue
            for node in kernel.nodes:
                name, read = op_name(node), node.all_input_nodes[0]
                if name.startswith("conv") and self.kinds[node] == "product" and read not in padded:
                    padded.add(read)
                    if (image := self.source.get(read, read)).op == "placeholder":
                        kernel.copies.append(Copy(image))
                    elif arguments(node)["groups"] == 1:
                        kernel.copies.append(Copy(read, (read, 1)))
                if self._is_channels_last(node) or self._is_plain(node):
                    kernel.copies.append(Copy(read))
                if name in ("matmul", "bmm"):
                    left, right = node.all_input_nodes[:2]
                    inner, outer = (left, len(self.shape(left)) - 1), (right, len(self.shape(right)) - 1)
                    kernel.copies += [Copy(left, inner), Copy(right, inner), Copy(node, outer)]
            if kernel.kind == "generated" and self._is_split(kernel):
                kernel.copies.append(Copy(kernel.nodes[-1]))
        for node in self.kinds:
            if node not in self.owner and op_name(node) in JOINS:
                for n in self.operands[node]:  # pools can neither write to nor read from a part of a tensor
                    if n in self.owner and any(self.kinds.get(r) == "pool" for r in (n, *self.readers[n])):
                        self.owner[n].copies.append(Copy(n))

    def _copies_of_attention(self, kernel: Kernel) -> None:
        first = kernel.nodes[0]
        inputs = [n for n in first.all_input_nodes if self._varies(self.source.get(n, n))]
        if self.kinds[first] != "attention":
            last = next(n for n in reversed(kernel.nodes) if op_name(n) in ("matmul", "bmm"))
            inputs = [*first.all_input_nodes[:2], last.all_input_nodes[1]]
        elif len(self.shape(first)) > 2 and self.shape(first)[-3] == 1:
            inputs = [*inputs[:3], first, first]  # a single head becomes two products and a softmax
        inputs = inputs[:3] if len(inputs) == 4 else inputs
        values = self.source.get(inputs[2], inputs[2]) if len(inputs) > 2 else first
        kernel.copies += [Copy(n) for n in (inputs[:1] if self._is_packed(values) else inputs)]

    def _is_packed(self, values: fx.Node) -> bool:
        """Whether queries, keys and values are parts of one tensor that was moved before it was split, and each part
        after."""
        moved = False
        while self.kinds.get(values) == "move":
            if op_name(values) in PARTS:
                return moved and self.kinds.get(self.operands[values][0]) == "move"
            moved, values = True, self.operands[values][0]
        return False

    def _is_split(self, kernel: Kernel) -> bool:
        """Whether the statistics of a normalisation are computed first, since the nodes after it use another order."""
        norms = {n for n in kernel.nodes if self.kinds[n] == "norm"}
        stack = [r for n in norms for r in self.readers[n] if self.owner.get(r) is kernel]
        if any(r in norms for r in stack):
            return True
        stack = [r for r in stack if self.kinds[r] == "move"]
        while stack:
            readers = self.readers[stack.pop()]
            if any(op_name(r) == "linear" for r in readers):
                return True
            stack += [r for r in readers if self.owner.get(r) is kernel and self.kinds[r] == "move"]
        return False

    def _is_plain(self, node: fx.Node) -> bool:
        """Whether a convolution reads an image that a reduction wrote in plain order."""
        if self.kinds[node] != "reduce" or not isinstance(node.meta["val"], torch.Tensor):
            return False
        image = len(self.shape(node)) == 4 and math.prod(self.shape(node)[2:]) > 1
        return image and any(op_name(r).startswith("conv") for r in self.readers[node])

    def _is_channels_last(self, node: fx.Node) -> bool:
        """Whether a mean over images reads the result of a convolution of the library (generated code reorders it
        itself)."""
        owner = self.owner.get(self.operands[node][0])
        if op_name(node) not in ("mean", "adaptive_avg_pool2d") or owner is None or owner.kind != "product":
            return False
        first, *rest = owner.nodes
        if len(self.shape(node.all_input_nodes[0])) != 4 or not op_name(first).startswith("conv"):
            return False
        grouped = self.kinds[first] == "product" and arguments(first)["groups"] > 1
        return not grouped and bool(rest) and all(op_name(n) in CLIPS for n in rest)

    def _entries(self, node: fx.Node) -> int:
        """Number of entries of a tensor; 0 for a list of tensors."""
        return math.prod(self.shape(node)) if isinstance(node.meta.get("val"), torch.Tensor) else 0
