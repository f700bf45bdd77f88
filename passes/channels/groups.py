"""Which groups may shrink, and by how many indices at a time, so that widths stay multiples that hardware likes. Source:
ours.

Convolutions and matrix products pad their channels to multiples of an alignment (see the table of targets). An axis may be
a product or a sum of atoms, so the step of an atom is the smallest number of indices that keeps every product that it takes
part in, and every part of a concatenation, aligned. Sizes that are not aligned to begin with may stay.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import fx

from ...graph.comb import axes as ax
from ...graph.comb.axes import Factor
from ...graph.comb.groups import Group
from ...graph.comb.solve import Comb
from ...graph.errors import BadInput, Refused
from ...graph.facts import MAPS
from ...graph.nodes import arguments, is_operator, op_name, shape
from ...graph.program import Program
from ...graph.sparse import sparse_weights
from ..common.weights import selected

PRIORITY = {  # by kind; of the factors of a product the lowest shrinks
    "head": 0, "group": 1, "channel": 2, "hidden": 2, "head width": 3, "token": 4, "multiplier": 5, "constant": 6,
}  # fmt: skip


def movable(comb: Comb, kinds: Iterable[str], include: Iterable[str] = (), exclude: Iterable[str] = ()) -> list[Group]:
    """The groups that a pass may shrink: not frozen, of the given kinds, matched by `include` (if any) and not by `exclude`
    (patterns over names of groups and parameters). Of the factors of a product only one shrinks, heads before widths, so
    that ratios do not compound. Raises BadInput for a pattern that matches no parameter and no group."""
    include, exclude, kinds = tuple(include), tuple(exclude), tuple(kinds)
    known = [*comb.parameters, *(g.name for g in comb.groups)]
    for field, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(n, pattern) for n in known):
                raise BadInput(f"RemoveChannels.{field}: {pattern!r} matches no parameter; {_nearest(pattern, known)}")

    def wanted(group: Group) -> bool:
        names = [group.name, *(name for name, _ in group.members)]
        return selected(names, include, exclude)

    candidates = [g for g in comb.groups if g.frozen is None and g.size > g.least and g.kind in kinds and wanted(g)]
    partners = products(comb)
    chosen: dict[Factor, Group] = {}
    for group in sorted(candidates, key=lambda g: PRIORITY[g.kind]):
        if not any(p in chosen for p in partners[group.atom]):
            chosen[group.atom] = group
    return [g for g in candidates if g.atom in chosen]


def not_trained(comb: Comb, groups: Iterable[Group]) -> dict[str, str]:
    """The groups whose parameters are all frozen, by name with the reason: training would score them 0, so that they would
    be the first to go."""
    trained = {name for name, p in comb.module.named_parameters(remove_duplicate=False) if p.requires_grad}
    why = (
        "its parameters have requires_grad=False, so that training gives it no score; let them train "
        "(requires_grad_(True) before capture), or take importance: magnitude"
    )
    return {g.name: why for g in groups if not any(name in trained for name, _ in g.members)}


def require_no_pattern(program: Program, groups: Iterable[Group]) -> None:
    """Raise Refused if removing indices of these groups would break a pattern such as 2:4."""
    sparse, shrinking = sparse_weights(program), {member for g in groups for member in g.members}
    for name, pattern in sparse.items():
        if pattern and (name, 1) in shrinking:
            raise Refused(
                f"RemoveChannels: removing input channels one by one would break the pattern of {name}, which Sparsify "
                f"made {pattern}; run RemoveChannels before Sparsify"
            )


def alike(comb: Comb, groups: Iterable[Group]) -> list[list[Group]]:
    """The groups by kind. Groups are of one kind if they take part in the same operators, as the same arguments and equally
    often, with the same kernel sizes (Isomorphic Pruning, arXiv 2407.04616)."""
    reads: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for node in comb.module.graph.nodes:
        if is_operator(node):
            for place, value in arguments(node).items():
                if isinstance(value, fx.Node) and value.op == "get_attr":
                    kernel = shape(value)[2:] if op_name(node) in MAPS else ()
                    reads[str(value.target)].append((op_name(node), place, kernel))
    classes: dict[Any, list[Group]] = {}
    for group in groups:
        roles = Counter((dim, *role) for name, dim in group.members for role in reads[name])
        classes.setdefault((group.kind, frozenset(roles.items())), []).append(group)
    return list(classes.values())


def _nearest(pattern: str, known: list[str]) -> str:
    """The end of an error message: the most similar name, or pattern for a part of the network."""
    parts = [name.split(".") for name in known]
    patterns = [".".join(p[:n]) + ".*" for p in parts for n in range(1, len(p))]
    close = difflib.get_close_matches(pattern, dict.fromkeys([*known, *patterns]), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"parameters are called {', '.join(map(repr, known[:3]))}, ..."


def products(comb: Comb) -> dict[Factor, set[Factor]]:
    """For every atom, the atoms that it is multiplied with in an axis of a parameter."""
    partners: dict[Factor, set[Factor]] = defaultdict(set)
    for monomial in _monomials(comb):
        for atom in monomial:
            partners[atom].update(m for m in monomial if m is not atom)
    return partners


def _monomials(comb: Comb) -> Iterator[tuple[Factor, ...]]:
    """Yield the products of atoms in the axes of parameters; an axis that several parameters have is looked at once."""
    axes = [ax.normal(axis) for axes in comb.parameters.values() for axis in axes]
    for axis in {tuple(map(id, axis)): axis for axis in axes if axis}.values():
        yield from ax.monomials(axis)


def steps(comb: Comb, groups: list[Group], alignment: int) -> dict[Factor, int]:
    """The number of indices by which each group may shrink at a time, so that every channel axis stays a multiple of
    `alignment`."""
    result = {g.atom: 1 for g in groups}
    if alignment == 1:
        return result
    for monomial in _monomials(comb):
        for atom in monomial:
            if atom in result:
                rest = math.prod(m.size for m in monomial if m is not atom)
                result[atom] = math.lcm(result[atom], alignment // math.gcd(alignment, rest))
    return result
