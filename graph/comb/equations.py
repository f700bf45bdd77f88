"""The equations of a graph: the axes of every tensor so far, and the vocabulary in which a rule describes its operator."""

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
GATES = "gates, layers and directions of a recurrence"


class Sizes(Protocol):
    """The interface of a rewrite after indices were removed: it reads sizes of axes, and writes them into the new graph."""

    def full(self, axis: Axis) -> bool:
        """Whether the axis lost nothing."""

    def size(self, axis: Axis) -> int:
        """Number of indices of the axis that are left."""

    def assign(self, node: fx.Node, argument: str, value: Any) -> None:
        """Set an argument of a node of the new graph."""

    def resize(self, old: fx.Node, new: fx.Node, argument: str, axes: list[Axis]) -> None:
        """Regenerate an argument that lists the sizes of the axes."""


Rewrite = Callable[[Any, fx.Node], None]  # called with a `Sizes` and the node in the new graph


class Equations:
    """What is known about the axes of a program, and the vocabulary in which rules add to it.

    axes: for every node the axes of its tensor, a list of such lists for several results, None without a tensor.
    parameters: axes of every parameter and buffer by name. roles: (axis, role, the weight that it belongs to or None), see
    `role`. rewrites: (node, function that regenerates its constants). minima: (node, axes, number of indices that the axes
    together must keep). structural: reasons that freeze axes which make no group, such as kernel
    positions.
    """

    def __init__(self, program: Program):
        self.program = program
        self.module = program.graph_module
        self.axes: dict[fx.Node, Any] = {}
        self.parameters: dict[str, list[Axis]] = {}
        self.rewrites: list[tuple[fx.Node, Rewrite]] = []
        self.minima: list[tuple[fx.Node, list[Axis], int]] = []
        self.roles: list[tuple[Axis, str, fx.Node | None]] = []
        self.structural: set[Reason] = set()
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
        """Whether the tensor is a parameter, or computed from nothing but parameters."""
        return node in self._made_of_parameters

    # -------------------------------------------------------------------------------------------------------- new axes
    def fresh(self, node: fx.Node, d: int) -> Axis:
        """A new, free axis for dimension d of the node's result."""
        size = node.meta["val"].shape[d]
        return ax.fresh(hint(size), None, not isinstance(size, int))

    def frozen(self, node: fx.Node, d: int, text: str, index: int | None = None) -> Axis:
        """A new frozen axis for dimension d of the node's result, or of the result with that index if there are several."""
        value = node.meta["val"]
        size = (value if index is None else value[index]).shape[d]
        return ax.fresh(hint(size), Reason(node, text), not isinstance(size, int))

    def all_frozen(self, value: Any, reason: Reason) -> Any:
        """New frozen axes for a tensor, or for each of several; None for a value that is no tensor."""
        if isinstance(value, torch.Tensor):
            return [ax.fresh(hint(n), reason, not isinstance(n, int)) for n in value.shape]
        if isinstance(value, (list, tuple)):
            return [self.all_frozen(v, reason) if isinstance(v, torch.Tensor) else None for v in value]
        return None

    # ------------------------------------------------------------------------------------------------------- equations
    @staticmethod
    def unify(a: Axis, b: Axis) -> None:
        """State that two axes are the same index space."""
        if a is not b:
            unify(a, b)

    def unify_all(self, axes: list[Axis], others: list[Axis]) -> None:
        """State, pair by pair, that axes are the same index spaces."""
        for a, b in zip(axes, others, strict=True):
            self.unify(a, b)

    @staticmethod
    def freeze(axis: Axis, node: fx.Node, text: str) -> None:
        """State that nothing may be removed along the axis, with the node's reason."""
        ax.freeze(axis, Reason(node, text))

    def window(self, node: fx.Node, x: fx.Node, first: int, index: int | None = None) -> list[Axis]:
        """State that the node slides a window over the dimensions of x from `first` on: freeze them, and return frozen axes
        for the same dimensions of the result."""
        for axis in self.axes[x][first:]:
            self.freeze(axis, node, WINDOW)
        return [self.frozen(node, d, WINDOW, index) for d in range(first, len(shape(x)))]

    def kernel(self, axis: Axis, node: fx.Node, text: str = KERNEL) -> None:
        """State that an axis holds the kernel positions of a convolution, or the gates of a recurrence (`GATES`): it is
        frozen, and makes no group."""
        reason = Reason(node, text)
        self.structural.add(reason)
        ax.freeze(axis, reason)

    # ----------------------------------------------------------------------------------------------- uses of an axis
    def role(self, axis: Axis, role: str, weight: fx.Node | None = None) -> None:
        """State what an axis is used as: "out", "in", "linear" (output of a linear layer), "group", "multiplier", "head",
        "width" or "constant"."""
        self.roles.append((axis, role, weight))

    def copies(self, node: fx.Node, axes: list[Axis], role: str) -> None:
        """State that along these axes of its result the node repeats a constant ("constant") or its operand
        ("multiplier")."""
        self._copies.setdefault(node, []).extend(axes)
        for axis in axes:
            self.role(axis, role)

    def sums(self, node: fx.Node, axes: list[Axis]) -> None:
        """State that the node adds up, compares or normalises the entries along these axes of its operands.

        A user's rule that does not call this counts as doing so along all axes; a rule of an operator that treats each
        entry by itself passes `[]`.
        """
        self._sums.setdefault(node, []).extend(axes)

    def joins(self, node: fx.Node) -> None:
        """State that the node puts its operands side by side, so that their entries do not meet."""
        self._joins.add(node)

    def at_least(self, node: fx.Node, axes: list[Axis], count: int) -> None:
        """State that the node is defined only if the axes together keep this many indices."""
        self.minima.append((node, axes, count))

    # -------------------------------------------------------------------------------------------------------- rewrites
    def rewrite(self, node: fx.Node, function: Rewrite) -> None:
        """After removal, call `function(sizes, new_node)` to regenerate the node's constants from its axes."""
        self.rewrites.append((node, function))

    def resize(self, node: fx.Node, argument: str, axes: list[Axis]) -> None:
        """State that `argument` lists the sizes of `axes`, to be regenerated after removal."""
        self.rewrite(node, lambda sizes, new: sizes.resize(node, new, argument, axes))
