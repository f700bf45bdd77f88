"""Both tables of a program, and the problem that they make together with the decisions by hand. Source: ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ...graph.comb.groups import Group
from ...graph.errors import BadInput
from ..channels.sizes.knapsack import Predictor
from ..quantize.choose_layers import QUANTISED
from .carry_out import Decision, indices
from .losses import Losses
from .solver.problem import Axis, Choice, Problem, Removal
from .space import Space
from .times import Times
from .variants import CHANGED, FLOAT, KINDS, Variant


@dataclass(frozen=True)
class Fixed:
    """The decisions by hand: sizes of groups, whether blocks go, precisions of layers, and whether layers become 2:4 sparse;
    groups and blocks by name, layers by the names of their weights. A block with a decision inside it stays."""

    widths: Mapping[str, int] = field(default_factory=dict)
    blocks: Mapping[str, bool] = field(default_factory=dict)
    precisions: Mapping[str, str] = field(default_factory=dict)
    sparse: Mapping[str, bool] = field(default_factory=dict)


class Tables:
    """The time table and the loss table of one program.

    fixed: the decisions by hand; their sizes must be among those of the space. Raises BadInput if they contradict the
    program or one another.
    """

    def __init__(self, space: Space, times: Times, losses: Losses, fixed: Fixed | None = None):
        self.space, self.times, self.losses = space, times, losses
        self.fixed = fixed or Fixed()
        check_fixed(space, self.fixed)

    @property
    def problem(self) -> Problem:
        """The choice to make, with the losses known by now; blocks that were not measured yet are measured."""
        axes = (*(self._axis(g.name) for g in self.space.groups), *map(self._variant, self.times.variants.offered))
        blocks = tuple(self._removal(b.name, self.losses.block(b)) for b in self.space.blocks)
        return Problem(axes, blocks, tuple(self.times.terms), self.times.constant)

    def guessed(self, choice: Choice) -> list[tuple[Group, int]]:
        """The groups and sizes of a choice whose losses are extrapolated far beyond what was measured."""
        widths = zip(self.space.groups, choice.sizes, strict=False)  # the axes of variants follow those of the groups
        sizes = [(g, self.space.sizes[g.name][k]) for g, k in widths if k >= 0]
        return [(g, size) for g, size in sizes if self.losses.guessed(g, size)]

    def _axis(self, name: str) -> Axis:
        sizes = self.space.sizes[name]
        losses = self.losses.at(self.space.group(name), sizes)
        allowed = [k for k, loss in enumerate(losses) if math.isfinite(loss)]
        if name in self.fixed.widths:
            allowed = [sizes.index(self.fixed.widths[name])]
        finite = tuple(loss if math.isfinite(loss) else 0.0 for loss in losses)
        return Axis(name, sizes, finite, self.space.inner.get(name), tuple(allowed), name in self.fixed.widths)

    @cached_property
    def _kept(self) -> set[str]:
        """The blocks that stay since something inside them was decided by hand."""
        inside = {self.space.inner.get(name) for name in self.fixed.widths}
        inside |= {self.space.owner.get(name) for name in (*self.fixed.precisions, *self.fixed.sparse)}
        return {self.space.blocks[index].name for index in inside if index is not None}

    def _variant(self, variant: Variant) -> Axis:
        by_hand: Mapping[str, bool] = self.fixed.sparse
        if variant.option in QUANTISED:
            by_hand = {name: precision == variant.option for name, precision in self.fixed.precisions.items()}
        asked = {by_hand[name] for name in variant.weights if name in by_hand}
        if len(asked) > 1:
            raise BadInput(
                f"plan: {variant.weights[0]} and {variant.weights[-1]} exchange {variant.option.upper()} values; "
                "give both one precision"
            )
        allowed = (FLOAT,) if not math.isfinite(variant.loss) else None
        if asked:
            allowed = (CHANGED,) if asked.pop() else (FLOAT,)
        loss = variant.loss if math.isfinite(variant.loss) else 0.0
        kind = KINDS[variant.option]
        return Axis(
            variant.name, (0, 1), (loss, 0.0), variant.block, allowed, bool(by_hand.keys() & set(variant.weights)), kind,
            variant.weights, variant.option,
        )  # fmt: skip

    def _removal(self, name: str, loss: float) -> Removal:
        goes = self.fixed.blocks.get(name, False if name in self._kept or not math.isfinite(loss) else None)
        return Removal(name, loss if math.isfinite(loss) else 0.0, goes)

    def seconds(self, decided: Decision) -> float:
        """Predicted seconds of the network of a decision, layer by layer on its own structure. (The time table is off if
        neighbouring blocks go, since they merge into one layer.)"""
        narrowed = [g for g in self.space.groups if g.name in decided.widths]
        comb, here = self.space.built(indices(self.space, decided.blocks), narrowed)
        predictor = Predictor(comb, self.times.latency)
        return predictor.total({group.atom: decided.widths[g.name] for g, group in here})


def check_fixed(space: Space, fixed: Fixed) -> None:
    """Raise BadInput if the decisions by hand do not fit the program, or contradict one another."""
    groups = {g.name: g for g in space.comb.groups}
    movable = {g.name for g in space.groups}
    blocks = {b.name: i for i, b in enumerate(space.blocks)}
    gone = {name for name, goes in fixed.blocks.items() if goes}
    indices(space, gone)
    for name in fixed.blocks:
        if name not in blocks and name not in space.refused:
            raise BadInput(f"plan: no block {name!r} in this program")
    for name in (*fixed.precisions, *fixed.sparse):
        if name not in space.owner:
            raise BadInput(f"plan: no linear layer or convolution with a weight {name!r} in this program")
    for name, size in fixed.widths.items():
        group = groups.get(name)
        if group is None:
            raise BadInput(f"plan: no group {name!r} in this program; graphcomb comb lists them")
        if not group.least <= size <= group.size:
            raise BadInput(f"plan: {name}: keep must be from {group.least} to {group.size}, not {size}")
        if name not in movable and size != group.size:
            why = group.frozen or "another factor of the same axis shrinks"
            raise BadInput(f"plan: {name} keeps {size} of {group.size} and cannot shrink: {why}")
        if name in space.inner and size != group.size and space.blocks[space.inner[name]].name in gone:
            block = space.blocks[space.inner[name]].name
            raise BadInput(
                f"plan: {name} keeps {size}, and its block {block} goes; keep the block, or leave the row alone"
            )
