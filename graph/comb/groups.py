"""Groups: the indices of parameters that can only be removed together, with their names and kinds."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from torch import fx

from ..nodes import source
from . import axes as ax
from .axes import Factor, atoms
from .equations import Equations

KINDS = ("channel", "head", "head width", "hidden", "group", "token", "multiplier", "constant")
DEFAULT_KINDS = ("channel", "head", "head width", "hidden", "group")
FOLDED = "_folded_"  # prefix of the names that capture gives to constants which the model computes


@dataclass(frozen=True)
class Group:
    """Indices that can only be removed together.

    name: "parameter:dim" of the first member, with the kind appended if one dimension holds several groups. size: number of
    indices. kind: one of KINDS. members: every (parameter or buffer, dim) that the group takes part in. frozen: None, or
    why nothing may be removed. atom: the group's factor in the solved axes. least: number of indices that must stay for
    every operator to be defined.
    """

    name: str
    size: int
    kind: str
    members: list[tuple[str, int]]
    frozen: str | None
    atom: Factor
    least: int = 1


def find_groups(solved: Equations) -> list[Group]:
    """All groups that have a parameter or buffer as a member, frozen ones included, in graph order."""
    members, kinds, least = members_of(solved), kinds_of(solved), _least(solved)
    named: dict[str, list[tuple[Factor, str]]] = defaultdict(list)
    for atom in members:
        if atom.frozen in solved.structural:
            continue
        name, dim = next((m for m in members[atom] if not m[0].startswith(FOLDED)), members[atom][0])
        named[f"{name}:{dim}"].append((atom, kinds[atom]))
    result = []
    for base, together in named.items():
        for atom, kind in together:
            name = base
            if len(together) > 1:
                same = [a for a, k in together if k == kind]
                name = f"{base}/{kind}" + (f".{same.index(atom)}" if len(same) > 1 else "")
            frozen = str(atom.frozen) if atom.frozen is not None else None
            if frozen is not None and name.startswith(FOLDED):
                maker = next(
                    n for n in solved.module.graph.nodes if n.op == "get_attr" and n.target == name.split(":")[0]
                )
                frozen = f"a constant that {source(maker)} computes; {frozen}"
            result.append(Group(name, atom.size, kind, members[atom], frozen, atom, least.get(atom, 1)))
    return result


def members_of(solved: Equations) -> dict[Factor, list[tuple[str, int]]]:
    """For each atom, the (parameter or buffer, dim) pairs in which it occurs."""
    members: dict[Factor, list[tuple[str, int]]] = defaultdict(list)
    for name, axes in solved.parameters.items():
        for d, axis in enumerate(axes):
            for atom in atoms([axis]):
                members[atom].append((name, d))
    return members


def kinds_of(solved: Equations) -> dict[Factor, str]:
    """The kind of every atom that occurs in a parameter or buffer, from the roles of its axes."""
    roles: dict[Factor, set[str]] = defaultdict(set)
    producers: dict[Factor, set[fx.Node]] = defaultdict(set)
    consumers: dict[Factor, set[fx.Node]] = defaultdict(set)
    for axis, role, weight in solved.roles:
        for atom in atoms([axis]):
            roles[atom].add(role)
            if weight is not None:
                (consumers if role == "in" else producers)[atom].add(weight)
    partners, owned = _partners(solved)
    result = {}
    for atom in members_of(solved):
        mine = roles[atom]
        near = {r for p in partners[atom] for r in roles[p]}
        linear = mine <= {"linear", "in"} and len(consumers[atom]) == 1 and bool(producers[atom])
        if atom not in owned or ("constant" in mine and not producers[atom]):
            kind = "constant"
        elif "multiplier" in mine and not mine & {"head", "group"}:
            kind = "multiplier"
        elif "head" in mine:
            kind = "head"
        elif "width" in mine or "head" in near:
            kind = "head width"
        elif "group" in mine:
            kind = "group"
        elif not mine & {"out", "in", "linear"}:
            kind = "token"
        else:
            kind = "hidden" if linear else "channel"
        result[atom] = kind
    return result


def _partners(solved: Equations) -> tuple[dict[Factor, set[Factor]], set[Factor]]:
    """For each atom, the atoms that it is multiplied with in a parameter's dimension; and the atoms of trainable
    parameters."""
    trainable = {n for n, _ in solved.module.named_parameters(remove_duplicate=False)}
    partners: dict[Factor, set[Factor]] = defaultdict(set)
    owned: set[Factor] = set()
    for name, axes in solved.parameters.items():
        for monomial in (m for axis in axes for m in ax.monomials(axis)):
            if name in trainable:
                owned.update(monomial)
            for atom in monomial:
                partners[atom].update(m for m in monomial if m is not atom)
    return partners, owned


def _least(solved: Equations) -> dict[Factor, int]:
    """For each atom, the number of indices that it must keep so that every minimum holds, whatever else is removed."""
    least: dict[Factor, int] = {}
    for _, axes, count in solved.minima:
        free = [a for a in atoms(axes) if a.frozen is None]
        if math.prod(ax.kept_size(axis, dict.fromkeys(free, 1)) for axis in axes) < count:
            least.update((a, max(least.get(a, 1), min(count, a.size))) for a in free)
    return least
