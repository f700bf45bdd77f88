"""Bundles of groups that keep the same share of their indices, and are sized as one. Source: ours.

Groups of sizes s_1, s_2, ... with the greatest common divisor k have k steps: with n steps left, group i keeps n * s_i / k
indices, its most important ones. So every linear equation between the sizes that has no constant term still holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ....graph.comb.axes import Factor
from ....graph.comb.groups import Group
from ....graph.errors import BadInput
from ..importance.members import Scores


@dataclass(frozen=True)
class Bundle:
    """Groups that keep the same share. whole: a group that stands for them where sizes are chosen; its indices are the
    steps. why: the reason for the tie."""

    whole: Group
    groups: tuple[Group, ...]
    why: str

    def unit(self, group: Group) -> int:
        """Number of indices of a group in one step of the bundle."""
        return group.size // self.whole.size


def bundle(groups: Iterable[Group], minimum: int, why: str) -> Bundle:
    """Tie groups together. minimum: how many indices each group keeps at least. why: the reason."""
    groups = tuple(groups)
    steps = math.gcd(*(g.size for g in groups))
    least = max(math.ceil(max(g.least, min(minimum, g.size)) * steps / g.size) for g in groups)
    members = [member for g in groups for member in g.members]
    name = groups[0].name if len(groups) == 1 else f"{groups[0].name} (and {len(groups) - 1} tied to it)"
    whole = replace(groups[0], name=name, size=steps, members=members, atom=Factor(steps), least=least)
    return Bundle(whole, groups, why)


@dataclass(frozen=True)
class Ties:
    """Which groups are sized as one. groups: all groups that may shrink. bundles: disjoint sets of these groups."""

    groups: list[Group]
    bundles: list[Bundle] = field(default_factory=list)

    @cached_property
    def _tied(self) -> dict[Factor, Bundle]:
        return {g.atom: b for b in self.bundles for g in b.groups}

    @property
    def chosen(self) -> list[Group]:
        """The groups that sizes are chosen for: those without ties, and the whole of each bundle."""
        return self.alike(self.groups)

    @cached_property
    def units(self) -> dict[Factor, tuple[Factor, int]]:
        """By tied atom, the atom of its bundle's whole, and how many indices the tied atom loses in a step."""
        return {g.atom: (b.whole.atom, b.unit(g)) for b in self.bundles for g in b.groups}

    def whole(self, group: Group) -> Group:
        """The whole of a tied group's bundle; another group itself."""
        return self._tied[group.atom].whole if group.atom in self._tied else group

    def alike(self, groups: Iterable[Group]) -> list[Group]:
        """The wholes of the groups, each once."""
        return list({w.atom: w for w in map(self.whole, groups)}.values())

    def joined(self, sizes: Mapping[Factor, int]) -> dict[Factor, int]:
        """From sizes of groups, the sizes of their wholes."""
        counts: dict[Factor, int] = {}
        for atom, size in sizes.items():
            key, unit = self.units.get(atom, (atom, 1))
            counts[key] = size // unit
        return counts

    def spread(self, sizes: Mapping[Factor, int]) -> dict[Factor, int]:
        """From sizes of wholes, the sizes of their groups."""
        wholes = {b.whole.atom: b for b in self.bundles}
        separate: dict[Factor, int] = {}
        for atom, size in sizes.items():
            if atom in wholes:
                separate |= {g.atom: size * wholes[atom].unit(g) for g in wholes[atom].groups}
            else:
                separate[atom] = size
        return separate

    def steps(self, steps: Mapping[Factor, int]) -> dict[Factor, int]:
        """From the numbers of indices by which groups may shrink at a time, the same for their wholes."""
        joint = {atom: step for atom, step in steps.items() if atom not in self.units}
        for b in self.bundles:
            wholes = (steps.get(g.atom, 1) // math.gcd(steps.get(g.atom, 1), b.unit(g)) for g in b.groups)
            joint[b.whole.atom] = math.lcm(*wholes)
        return joint

    def scores(self, scores: Scores) -> Scores:
        """From scores of groups, those of their wholes: the least important step has the least important indices of every
        group."""
        joint = {atom: values for atom, values in scores.items() if atom not in self.units}
        for b in self.bundles:
            ranked = [np.sort(scores[g.atom]).reshape(b.whole.size, -1).sum(1) for g in b.groups if g.atom in scores]
            if ranked:
                joint[b.whole.atom] = np.sum(ranked, axis=0)
        return joint

    def kept(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """From sizes of groups, both by name, the sizes of their wholes. Raises BadInput for sizes that break a tie."""
        tied = {g.name: g for b in self.bundles for g in b.groups if g.name in sizes}
        joint = {name: (size, name) for name, size in sizes.items() if name not in tied}
        for g in tied.values():
            keep, unit, whole = sizes[g.name], self.units[g.atom][1], self.whole(g)
            other = joint.get(whole.name)
            if keep % unit or (other is not None and other[0] != keep // unit):
                with_ = [o.name for o in self._tied[g.atom].groups if o is not g]
                raise BadInput(
                    f"RemoveChannels.for_class: {g.name} may not keep {keep} of {g.size}: it has to keep the same share as "
                    f"{other[1] if other else with_[0]}, in multiples of {unit} ({self._tied[g.atom].why})"
                )
            joint[whole.name] = keep // unit, g.name
        return {name: size for name, (size, _) in joint.items()}

    def record(self) -> list[dict[str, object]]:
        """The rows of `tied` in the pass's record."""
        return [{"groups": [g.name for g in b.groups], "steps": b.whole.size, "why": b.why} for b in self.bundles]
