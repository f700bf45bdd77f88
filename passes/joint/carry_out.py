"""From a decision to passes: depth first, then widths, then a repair of both against the dense network. Source: ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ...graph.errors import BadInput
from ..base import Pass
from ..channels.remove_channels import RemoveChannels
from ..depth.prune_depth import PruneDepth
from ..repair.repair import Repair
from .problem import Choice, Problem
from .space import Space


@dataclass(frozen=True)
class Decision:
    """The names of the blocks that go, and how many indices each group keeps, by the names of the groups that lose some."""

    blocks: tuple[str, ...] = ()
    widths: Mapping[str, int] = field(default_factory=dict)


def decision(problem: Problem, choice: Choice) -> Decision:
    """The decision of a choice, by names."""
    blocks = tuple(b.name for b, gone in zip(problem.blocks, choice.gone, strict=True) if gone)
    widths = {
        axis.name: axis.sizes[k]
        for axis, k in zip(problem.axes, choice.sizes, strict=True)
        if 0 <= k < len(axis.sizes) - 1
    }
    return Decision(blocks, widths)


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
    return [*steps, Repair(samples=samples)] if steps else []


def kept(space: Space, decided: Decision) -> dict[str, float]:
    """The option `keep` of `RemoveChannels` for the program without the blocks. Raises BadInput as `passes` does."""
    gone = indices(space, decided.blocks)
    form = space.form(gone)
    here = form.here([g for g in space.groups if g.name in decided.widths])
    left = {g.name for g, _ in here}
    for name, index in space.inner.items():
        if name in decided.widths and index in gone:
            raise BadInput(
                f"plan: {name} keeps {decided.widths[name]} and goes with the block {space.blocks[index].name}"
            )
    # A group between two blocks that are merged into one layer is gone, whatever its size.
    return {
        own.name: float(n) if (n := decided.widths[g.name]) > 1 else n / own.size for g, own in here if g.name in left
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
