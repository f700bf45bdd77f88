"""Sizes that a user fixes: the rows of a plan, and the option `keep`, which maps patterns over group names to sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ....graph.comb.groups import Group
from ....graph.comb.solve import Comb
from ....graph.errors import BadInput
from .selection import Selection


@dataclass(frozen=True)
class Planned:
    """The size that a plan gives a group. fixed: whether it is the user's decision, which stands even if other groups must
    then give more; else it is a proposal."""

    keep: int
    fixed: bool


def read_plan(comb: Comb, plan: Any) -> dict[str, Planned]:
    """The size of each group that a plan names, by group name. Raises BadInput for rows that do not fit the program.

    A row is {"name", "keep"} with an optional `prune`, which may be false to keep the group whole, and an optional
    `proposed`: a row whose `keep` is still the proposed one is no decision.
    """
    rows = plan.get("groups", []) if isinstance(plan, dict) else plan or []
    known = {g.name: g for g in comb.groups}
    result = {}
    for row in rows:
        name, keep = row.get("name"), row.get("keep")
        group = known.get(name)
        if group is None:
            raise BadInput(f"plan: no group {name!r} in this program; graphcomb plan lists them")
        whole = row.get("prune") is False or keep is None
        if whole:
            keep = group.size
        if not isinstance(keep, int) or isinstance(keep, bool) or not group.least <= keep <= group.size:
            raise BadInput(
                f"plan: {name}: keep must be a whole number from {group.least} to {group.size}, not {keep!r}"
            )
        if group.frozen and keep != group.size:
            raise BadInput(f"plan: {name} is frozen ({group.frozen})")
        if not group.frozen:
            result[name] = Planned(keep, whole or row.get("proposed") != keep)
    return result


def kept_by_pattern(
    keep: Mapping[str, float], comb: Comb, groups: list[Group], selection: Selection
) -> dict[str, Planned]:
    """The size of each group that a pattern of `keep` matches, by group name; the last pattern that matches counts.

    groups: those that may shrink. Raises BadInput for a pattern that matches none of them, or a size that does not fit.
    """
    rows: dict[str, Planned] = {}

    def named(pattern: str, among: list[Group]) -> list[Group]:
        return [g for g in among if fnmatchcase(g.name, pattern) or fnmatchcase(g.name.partition(":")[0], pattern)]

    for pattern, size in keep.items():
        matches = named(pattern, groups)
        if not matches:
            whole = named(pattern, comb.groups)
            others = [f"{g.name} {f'is frozen ({g.frozen})' if g.frozen else 'is left out'}" for g in whole]
            why = some(others, 2) or f"they are called {some([g.name for g in groups])}"
            raise BadInput(f"RemoveChannels.keep: {pattern!r} matches no group that may shrink; {why}")
        for group in matches:
            least = max(group.least, selection.minimum)
            if size > 1 and not least <= size <= group.size:
                raise BadInput(
                    f"RemoveChannels.keep: {group.name} may keep {least} to {group.size} indices, not {size:g}"
                )
            rows[group.name] = Planned(int(size) if size > 1 else selection.share(group, size), True)
    return rows


def some(names: Sequence[str], count: int = 4) -> str:
    """The first `count` names, and a note if there are more."""
    return f"{', '.join(names[:count])}{' and more' if len(names) > count else ''}"
