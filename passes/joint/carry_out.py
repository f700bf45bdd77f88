"""From a decision to passes: depth first, then widths, then a repair of both against the dense network, then 2:4 sparsity,
then precisions. Source: ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ...graph.errors import BadInput
from ..base import Pass
from ..channels.remove_channels import RemoveChannels
from ..depth.prune_depth import PruneDepth
from ..repair.repair import Repair
from .solver.problem import Choice, Problem
from .space import Space, weight_of
from .variants import quantise, sparsify


@dataclass(frozen=True)
class Decision:
    """The names of the blocks that go; how many indices each group keeps, by the names of the groups that lose some; the
    precisions of layers and the layers that become 2:4 sparse, by the names of their weights."""

    blocks: tuple[str, ...] = ()
    widths: Mapping[str, int] = field(default_factory=dict)
    precisions: Mapping[str, str] = field(default_factory=dict)
    sparse: tuple[str, ...] = ()


def decision(problem: Problem, choice: Choice) -> Decision:
    """The decision of a choice, by names."""
    blocks = tuple(b.name for b, gone in zip(problem.blocks, choice.gone, strict=True) if gone)
    widths = {
        axis.name: axis.sizes[k]
        for axis, k in zip(problem.axes, choice.sizes, strict=True)
        if axis.kind == "widths" and 0 <= k < len(axis.sizes) - 1
    }
    changed = [axis for axis, k in zip(problem.axes, choice.sizes, strict=True) if axis.kind != "widths" and k == 0]
    precisions = {name: axis.option for axis in changed if axis.kind == "precision" for name in axis.members}
    sparse = tuple(name for axis in changed if axis.kind == "sparsity" for name in axis.members)
    return Decision(blocks, widths, precisions, sparse)


def passes(space: Space, decided: Decision, importance: str, samples: int) -> list[Pass]:
    """The passes that carry out a decision on the space's program, in their order.

    importance, samples: the options of `RemoveChannels` and `Repair`. Raises BadInput for a group that keeps a size
    although its block goes, and for a block that cannot go.
    """
    steps: list[Pass] = []
    if decided.blocks:
        steps.append(PruneDepth(names=decided.blocks, repair=True))
    if decided.widths:
        keep = kept(space, decided)
        steps.append(RemoveChannels(keep=keep, importance=importance, round_to=1, samples=samples, scope="local"))
    steps += [Repair(samples=samples)] if steps else []
    left = remaining(space, decided.blocks)
    if sparse := [name for name in decided.sparse if name in left]:
        steps.append(sparsify(sparse, samples))
    if precisions := {name: p for name, p in decided.precisions.items() if name in left}:
        steps += quantise(precisions, samples)
    return steps


def remaining(space: Space, blocks: Collection[str]) -> set[str]:
    """The weights of the layers that are in no block of these names."""
    gone = {name for index in indices(space, blocks) for name in space.blocks[index].nodes}
    nodes = space.comb.module.graph.nodes
    return {weight for node in nodes if node.name not in gone and (weight := weight_of(node)) is not None}


def kept(space: Space, decided: Decision) -> dict[str, float]:
    """The option `keep` of `RemoveChannels` for the program without the blocks. Raises BadInput as `passes` does."""
    gone = indices(space, decided.blocks)
    _, here = space.built(gone, [g for g in space.groups if g.name in decided.widths])
    left = {g.name for g, _ in here}
    for name, index in space.inner.items():
        if name in decided.widths and index in gone:
            raise BadInput(
                f"plan: {name} keeps {decided.widths[name]} and goes with the block {space.blocks[index].name}"
            )
    # A group between two blocks that are merged into one layer is gone, whatever its size.
    return {
        now.name: float(n) if (n := decided.widths[g.name]) > 1 else n / now.size for g, now in here if g.name in left
    }


def indices(space: Space, names: Collection[str]) -> list[int]:
    """The indices of blocks, ascending, by their names. Raises BadInput for a block that is not there or cannot go."""
    places = {block.name: i for i, block in enumerate(space.blocks)}
    for name in names:
        if name not in places:
            why = space.refused.get(name)
            raise BadInput(
                f"plan: block {name} cannot go: {why}" if why else f"plan: no block {name!r} in this program"
            )
    return sorted(places[name] for name in names)
