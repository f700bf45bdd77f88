"""The equations of a graph: the axes of every tensor so far, and what a rule may say about those of its operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx

from ..nodes import hint, shape
from ..program import Program
from . import axes as ax
from .axes import Axis, Reason, unify

WINDOW = "a window slides along the axis, so positions on it stay; channels are what can go"
KERNEL = "kernel positions"


class Sizes(Protocol):
    """What a rewrite sees after indices were removed: sizes of axes, and how to write them into the new graph."""

    def full(self, axis: Axis) -> bool:
        """Whether the axis lost nothing."""

    def size(self, axis: Axis) -> int:
        """How many indices of the axis are left."""

    def assign(self, node: fx.Node, argument: str, value: Any) -> None:
        """Set an argument of a node of the new graph."""

    def resize(self, old: fx.Node, new: fx.Node, argument: str, axes: list[Axis]) -> None:
        """Regenerate the list of sizes in an argument, which describes the axes."""


Rewrite = Callable[[Any, fx.Node], None]  # of a `Sizes` and the node in the new graph


class Equations:
    """What is known about the axes of a program, and the vocabulary in which rules add to it.

    axes: axes of every tensor node (a list of lists for operators with several results, None where there is no tensor).
    parameters: axes of every parameter and buffer by name. roles: (axis, what it is used as, the weight it belongs to).
    rewrites: (node, function that regenerates its constants). minima: (node, axes, how many indices these must keep
    together). kernels: axes of kernel positions.
    """

    def __init__(self, program: Program):
        self.program = program
        self.module = program.graph_module
        self.axes: dict[fx.Node, Any] = {}
        self.parameters: dict[str, list[Axis]] = {}
        self.rewrites: list[tuple[fx.Node, Rewrite]] = []
        self.minima: list[tuple[fx.Node, list[Axis], int]] = []
        self.roles: list[tuple[Axis, str, fx.Node | None]] = []
        self.kernels: list[Axis] = []
        self._copies: dict[fx.Node, list[Axis]] = {}
        self._sums: dict[fx.Node, list[Axis]] = {}
        self._joins: set[fx.Node] = set()
        self._made_of_parameters: set[fx.Node] = set()

    # --------------------------------------------------------------------------------------------------- reading axes
    def first(self, node: fx.Node) -> fx.Node:
        """The node's first tensor operand."""
        return next(
            a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node) and self.axes[a] is not None
        )

    def flat(self, node: fx.Node) -> list[Axis]:
        """The axes of all results of a node."""
        axes = self.axes[node] or []
        several = isinstance(node.meta.get("val"), (list, tuple))
        return [axis for result in axes for axis in result or ()] if several else axes

    def is_parameter(self, node: fx.Node) -> bool:
        """Whether the tensor is a parameter, or computed from parameters alone."""
        return node in self._made_of_parameters

    # -------------------------------------------------------------------------------------------------------- new axes
    def fresh(self, node: fx.Node, d: int) -> Axis:
        """A new, free axis for dimension d of the node's result."""
        size = node.meta["val"].shape[d]
        return ax.fresh(hint(size), None, not isinstance(size, int))

    def frozen(self, node: fx.Node, d: int, text: str, index: int | None = None) -> Axis:
        """A new frozen axis for dimension d of the node's result (of the result with that index, where there are
        several)."""
        value = node.meta["val"]
        size = (value if index is None else value[index]).shape[d]
        return ax.fresh(hint(size), Reason(node, text), not isinstance(size, int))

    def all_frozen(self, value: Any, reason: Reason) -> Any:
        """New frozen axes for a tensor, or for each of several; None for what is no tensor."""
        if isinstance(value, torch.Tensor):
            return [ax.fresh(hint(n), reason, not isinstance(n, int)) for n in value.shape]
        if isinstance(value, (list, tuple)):
            return [self.all_frozen(v, reason) if isinstance(v, torch.Tensor) else None for v in value]
        return None

    # ------------------------------------------------------------------------------------------------------- equations
    @staticmethod
    def unify(a: Axis, b: Axis) -> None:
        """The two axes are the same index space."""
        if a is not b:
            unify(a, b)

    @staticmethod
    def freeze(axis: Axis, node: fx.Node, text: str) -> None:
        """Nothing may be removed along the axis, for a reason that the node gives."""
        ax.freeze(axis, Reason(node, text))

    def window(self, node: fx.Node, x: fx.Node, first: int, index: int | None = None) -> list[Axis]:
        """The node slides a window over the dimensions of x from `first` on: freeze them, and the result's."""
        for axis in self.axes[x][first:]:
            self.freeze(axis, node, WINDOW)
        return [self.frozen(node, d, WINDOW, index) for d in range(first, len(shape(x)))]

    def kernel(self, axis: Axis, node: fx.Node) -> None:
        """Kernel positions of a convolution: frozen, and not worth a group of their own."""
        self.freeze(axis, node, KERNEL)
        self.kernels.append(axis)

    # ----------------------------------------------------------------------------------------------- uses of an axis
    def role(self, axis: Axis, role: str, weight: fx.Node | None = None) -> None:
        """Note what an axis is used as: "out", "in", "linear" (out of a linear), "group", "multiplier", "head", "width" or
        "constant"."""
        self.roles.append((axis, role, weight))

    def copies(self, node: fx.Node, axes: list[Axis], role: str) -> None:
        """Along these axes of its result the node repeats a constant or its operand; role: "constant" or "multiplier"."""
        self._copies.setdefault(node, []).extend(axes)
        for axis in axes:
            self.role(axis, role)

    def sums(self, node: fx.Node, axes: list[Axis]) -> None:
        """The node adds up, compares or normalises the entries along these axes of its operands. A user's rule that does
        not call this is taken to do so along all of them; one of an operator that takes every entry by itself says `[]`."""
        self._sums.setdefault(node, []).extend(axes)

    def joins(self, node: fx.Node) -> None:
        """The node's operands come to lie side by side and do not meet entry by entry."""
        self._joins.add(node)

    def at_least(self, node: fx.Node, axes: list[Axis], count: int) -> None:
        """The node is defined only where the axes together keep this many indices."""
        self.minima.append((node, axes, count))

    # -------------------------------------------------------------------------------------------------------- rewrites
    def rewrite(self, node: fx.Node, function: Rewrite) -> None:
        """After slicing, call `function(sizes, new_node)` to regenerate the node's constants from its axes."""
        self.rewrites.append((node, function))

    def resize(self, node: fx.Node, argument: str, axes: list[Axis]) -> None:
        """The list of sizes in `argument` describes `axes`: regenerate what changes."""
        self.rewrite(node, lambda sizes, new: sizes.resize(node, new, argument, axes))
