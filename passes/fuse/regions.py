"""Affine regions of a graph: operators read as affine steps, chains of these, and sums of branches."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from ...graph.facts import DROPOUTS, MAPS, TRANSPOSED_CONVS
from ...graph.nodes import arguments, conv_padding, fetch, is_operator, op_name, per_dim, permutation, shape
from ...graph.trainable import TrainableModule
from ...graph.verify.evaluate import evaluated, invoke, to_double
from .merge_weights import Geometry, swapped
from .parts import Branch, Part, Step, Sum, Values

VIEWS = ("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as")
STATISTICS = ("weight", "bias", "running_mean", "running_var")
OTHER_AXIS = "it runs over another axis than the layer's features"


class Regions:
    """Reads the graph of a module as affine regions, each with one entry and one exit.

    constants: the nodes of stored tensors, and those computed from nothing but stored tensors.
    """

    def __init__(self, module: TrainableModule):
        self.module = module
        self.constants = _constants(module.graph)
        self.names: dict[int, set[str]] = {}  # by the id of a stored tensor, all names that it goes by
        for n in module.graph.nodes:
            if n.op == "get_attr":
                self.names.setdefault(id(fetch(module, str(n.target))), set()).add(str(n.target))

    def find(self) -> Iterator[list[Part]]:
        """Yield chains of parts, each as long as possible and with at least one layer; the last chain of the graph
        comes first.
        """
        seen: set[fx.Node] = set()
        for node in reversed(list(self.module.graph.nodes)):
            if node not in seen:
                parts = self._chain(node)
                seen.update(*(p.members for p in parts))
                if any(p.carriers for p in parts):
                    yield parts

    def _chain(self, node: fx.Node) -> list[Part]:
        """The parts in a row that end at the node, in the order they are computed."""
        parts: list[Part] = []
        axis = None
        while part := self.step(node) or self._sum(node):
            if None not in (axis, part.axis) and axis != part.axis:
                break
            parts.insert(0, part)
            axis = part.axis if axis is None else axis
            node = part.source
            if not set(node.users) <= part.members:
                break
        return parts

    def _sum(self, node: fx.Node) -> Sum | None:
        """The node as a sum of branches that all start at one value, or None."""
        if self.addends(node) is None:
            return None
        adds: list[fx.Node] = []
        terms = list(self._terms(node, 1.0, adds))
        chains = [self._chain(end) if set(end.users) <= set(adds) else [] for _, end in terms]
        # The values on each branch, from its end towards the inputs; the first value on all branches is the source.
        places = [[end, *(p.source for p in reversed(parts))] for (_, end), parts in zip(terms, chains, strict=True)]
        source = next((n for n in places[0] if all(n in others for others in places)), None)
        if source is None:
            return None
        branches = tuple(
            Branch(factor, end, tuple(parts[len(parts) - place.index(source) :]))
            for (factor, end), parts, place in zip(terms, chains, places, strict=True)
        )
        axes = {p.axis for b in branches for p in b.parts} - {None}
        return Sum(tuple(sorted(adds)), source, next(iter(axes), None), branches) if len(axes) < 2 else None

    def _terms(self, node: fx.Node, factor: float, adds: list[fx.Node]) -> Iterator[tuple[float, fx.Node]]:
        """Yield factor and node of each term of a tree of additions; its addition nodes are appended to `adds`."""
        adds.append(node)
        for sign, term in self.addends(node) or ():
            if len(term.users) == 1 and self.addends(term):
                yield from self._terms(term, factor * sign, adds)
            else:
                yield factor * sign, term

    # -------------------------------------------------------------------------------------------------------- single steps
    def step(self, node: fx.Node) -> Step | None:
        """The affine map whose value the node is, if one precision is kept throughout; else None."""
        step = self._any_precision(node)
        # The float64 checks cannot see a change of precision, so a merge stays within one precision.
        return step if step and all(dtype(n) == dtype(step.source) for n in step.nodes) else None

    def _any_precision(self, node: fx.Node) -> Step | None:
        name = op_name(node)
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        if name in MAPS:
            return None if self.problem(node) else _layer(node)
        if name == "batch_norm":
            return None if self.problem(node) else _norm((node,), 1)
        if name in ("transpose", "permute") or name in VIEWS:
            return self._enclosed_norm(node)
        return self._elementwise(node)

    def _enclosed_norm(self, node: fx.Node) -> Step | None:
        """A normalisation between a permutation and its inverse, which normalises another axis of the permutation's
        input; or one of the last axis, as in LeViT: all dimensions but the last are folded into one before it, and
        unfolded after.
        """
        norm = node.args[0]
        if not isinstance(norm, fx.Node) or op_name(norm) != "batch_norm" or self.problem(norm):
            return None
        first = norm.args[0]
        if not isinstance(first, fx.Node) or len(norm.users) * len(first.users) != 1:
            return None
        if back := permutation(node):
            there = permutation(first)
            if there is None or [there[d] for d in back] != sorted(there):
                return None
            return _norm((first, norm, node), there[1])
        if op_name(first) not in VIEWS:
            return None
        inner, outer = shape(first), shape(first.args[0])  # type: ignore[arg-type]
        if len(inner) != 2 or len(outer) < 3 or inner[1] != outer[-1] or tuple(shape(node)) != tuple(outer):
            return None
        return replace(_norm((first, norm, node), len(outer) - 1), folds=True)

    def _elementwise(self, node: fx.Node) -> Step | None:
        """Arithmetic with a constant, zero padding, or dropout (the identity in eval mode); None for anything else."""
        name = op_name(node)
        if name in DROPOUTS:
            nothing = partial(Geometry.scaling, biased=False)
            return Step((node,), node.args[0], None, nothing, lambda values: (1, None))  # type: ignore[arg-type]
        if name in ("constant_pad_nd", "pad"):
            return _zero_padding(node)
        if name not in ("mul", "div", "add", "sub", "rsub", "neg") or not shape(node):
            return None
        a = arguments(node)
        left, right, alpha = a["self"], a.get("other", -1.0), a.get("alpha", 1)
        if name == "rsub":
            name, left, right = "sub", right, left
        if a.get("rounding_mode") is not None:
            return None
        swapped = self.is_constant(left)
        source, constant = (right, left) if swapped else (left, right)
        fits = isinstance(source, fx.Node) and not self.is_constant(source) and self.is_constant(constant)
        if not fits or shape(source) != shape(node) or (swapped and name == "div"):
            return None
        axis = _vector_axis(constant, len(shape(node)))
        if axis == -1 or not node.meta["val"].is_floating_point():
            return None

        sign = alpha if name == "add" else -alpha  # factor of the second operand
        shifted = name in ("add", "sub") and constant != 0

        def numbers(values: Values) -> tuple[Any, Any]:
            value = constant_value(constant, values) if isinstance(constant, fx.Node) else constant
            if name in ("mul", "neg"):
                return value, None
            if name == "div":
                return 1 / value, None
            scale, shift = (sign, value) if swapped else (1, sign * value)
            return scale, shift if shifted else None

        return Step((node,), source, axis, partial(Geometry.scaling, biased=shifted), numbers)

    def is_constant(self, value: Any) -> bool:
        """Whether an operand is a number, or a tensor computed from nothing but stored tensors."""
        if isinstance(value, fx.Node):
            return value in self.constants
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    def addends(self, node: fx.Node) -> list[tuple[float, fx.Node]] | None:
        """Factor and node of the two operands of a sum or difference of tensors of equal shape and precision; None for
        other nodes.
        """
        if op_name(node) not in ("add", "sub"):
            return None
        a = arguments(node)
        left, right = a["self"], a["other"]
        if any(not isinstance(n, fx.Node) or self.is_constant(n) for n in (left, right)):
            return None
        tensors = all(isinstance(n.meta["val"], torch.Tensor) for n in (left, right, node))
        if not tensors or not shape(left) == shape(right) == shape(node) or not node.meta["val"].is_floating_point():
            return None
        if not dtype(left) == dtype(right) == dtype(node):  # a sum that promotes: branches of unlike precision
            return None
        alpha = float(a.get("alpha", 1))
        return [(1.0, left), (alpha if op_name(node) == "add" else -alpha, right)]

    def problem(self, node: fx.Node) -> str | None:
        """Why a layer or normalisation cannot be merged with anything, or None."""
        a = arguments(node)
        if op_name(node) == "batch_norm":
            if a["running_mean"] is None or a["running_var"] is None or a["training"]:
                return "it normalises with the statistics of the batch"
            if any(a[key] is not None and a[key].op != "get_attr" for key in STATISTICS):
                return "its statistics or scales are computed, not stored"
            return None
        for key in ("weight", "bias"):
            stored = a[key]
            if stored is None:
                continue
            if stored.op != "get_attr":
                return f"the layer's weights are computed by {stored.name}"
            tied = self.names.get(id(fetch(self.module, str(stored.target))), set()) - {str(stored.target)}
            if tied or len(stored.users) > 1:
                return f"{stored.target} is shared with {', '.join(sorted(tied)) or 'another layer'}"
        ranks = len(shape(node)), len(shape(a["weight"]))
        if ranks[0] < 2 or (op_name(node) != "linear" and ranks[0] != ranks[1]):
            return OTHER_AXIS
        return None


def dtype(node: fx.Node) -> torch.dtype:
    """The dtype of a tensor node."""
    return node.meta["val"].dtype


def _layer(node: fx.Node) -> Step:
    a = arguments(node)
    name, rank, size = op_name(node), len(shape(node)), shape(a["weight"])

    def geometry(channels: int, dims: int) -> Geometry:
        biased = a["bias"] is not None
        if name == "linear":
            return Geometry(size[0], size[1], biased=biased)
        stride, dilation = (per_dim(a[key], dims) for key in ("stride", "dilation"))
        extent, groups, transposed = size[2:], a["groups"], name in TRANSPOSED_CONVS
        outputs = size[1] * groups if transposed else size[0]
        padding = tuple(conv_padding(node))
        more = per_dim(a["output_padding"], dims) if transposed else ()
        return Geometry(outputs, channels, extent, stride, padding, dilation, groups, biased, transposed, more)

    def numbers(values: Values) -> tuple[Any, Any]:
        stored = values(a["weight"])
        weight = swapped(stored, a["groups"]) if name in TRANSPOSED_CONVS else stored
        return weight, None if a["bias"] is None else values(a["bias"])

    source = next(iter(a.values()))
    return Step((node,), source, rank - 1 if name == "linear" else 1, geometry, numbers, node)


def _norm(nodes: tuple[fx.Node, ...], axis: int) -> Step:
    norm = next(n for n in nodes if op_name(n) == "batch_norm")
    a = arguments(norm)

    def numbers(values: Values) -> tuple[Any, Any]:
        gamma, beta, mean, var = (None if a[k] is None else values(a[k]) for k in STATISTICS)
        assert mean is not None
        assert var is not None
        scale = (var + a["eps"]).rsqrt() * (1 if gamma is None else gamma)
        return scale, (0 if beta is None else beta) - scale * mean

    return Step(nodes, nodes[0].args[0], axis, partial(Geometry.scaling, biased=True), numbers)  # type: ignore[arg-type]


def _zero_padding(node: fx.Node) -> Step | None:
    a = arguments(node)
    pad, rank = list(a["pad"]), len(shape(node))
    zeros = a.get("mode", "constant") == "constant" and not a["value"]
    if not zeros or any(not isinstance(p, int) or p < 0 for p in pad) or len(pad) > 2 * (rank - 2):
        return None

    def geometry(channels: int, dims: int) -> Geometry:
        pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]  # last dimension first
        padding = ((0, 0),) * (dims - len(pairs)) + tuple(reversed(pairs))
        return replace(Geometry.scaling(channels, dims, False), padding=padding)

    return Step((node,), node.args[0], 1, geometry, lambda values: (1, None))  # type: ignore[arg-type]


def _constants(graph: fx.Graph) -> set[Any]:
    constants: set[Any] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        pure = node.op == "call_function" and is_operator(node) and inputs and constants.issuperset(inputs)
        if (node.op == "get_attr" or pure) and isinstance(node.meta.get("val"), torch.Tensor):
            constants.add(node)
    return constants


def _vector_axis(constant: Any, rank: int) -> int | None:
    """The axis of a value of that rank along which a constant varies: None for a constant that is the same everywhere,
    -1 where it varies along no single channel axis.
    """
    if not isinstance(constant, fx.Node):
        return None
    sizes = shape(constant)
    wide = [d - len(sizes) + rank for d, s in enumerate(sizes) if s != 1]
    if not wide:
        return None
    return wide[0] if len(wide) == 1 and wide[0] in (1, rank - 1) and wide[0] > 0 else -1


def constant_value(node: fx.Node, values: Values) -> Any:
    """The value of a constant node in float64; `values` reads stored tensors."""
    if node.op == "get_attr":
        return to_double(values(node))
    return invoke(node, evaluated(node, {n: constant_value(n, values) for n in node.all_input_nodes}))
