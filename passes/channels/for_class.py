"""Which sizes the class of a captured model treats as equal, read off the graph. Source: ours.

A class derives sizes from attributes, from the shapes of tensors and from arithmetic with both, of which the graph shows
only results. So the equations here are those of the usual ways to write a forward:

- the pieces of a chunk or an even split are equal, as is a slice to its n-th part: `x.chunk(2, 1)`, `x[:, : c // 2]`;
- an attention layer has one number of heads: `self.num_heads`;
- the width of a head stays where attention computes its scale from it;
- where a projection to heads is as wide as its input, the number of heads times their width stays that width: `c //
  self.num_heads`; likewise for the projection back;
- a table that the forward computes, such as sines of positions, keeps its sizes, since a class makes another table for
  other sizes.

An equation too many costs freedom; one too few costs a refusal by `transplant`, which proves its result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from ...graph.comb import axes as ax
from ...graph.comb.axes import Axis, Factor
from ...graph.comb.groups import FOLDED, Group
from ...graph.comb.solve import Comb
from ...graph.facts import MAPS, MATRIX_PRODUCTS, names
from ...graph.nodes import arguments, module_path, op_name, shape, source
from .sizes.ties import Bundle, Ties, bundle

SPLITS = names("split chunk split_with_sizes tensor_split unsafe_split unsafe_chunk unsafe_split_with_sizes")
PRODUCTS = {"scaled_dot_product_attention", *MATRIX_PRODUCTS}


@dataclass(frozen=True)
class Equal:
    """Axes whose sizes a class treats as equal; `node` shows this, `text` says why."""

    axes: list[Axis]
    node: fx.Node
    text: str

    @property
    def why(self) -> str:
        return f"{source(self.node)}: {self.text}"


def class_ties(comb: Comb, groups: list[Group], minimum: int) -> tuple[Ties, dict[str, str]]:
    """The groups that may shrink without leaving what a class can express, tied as it requires; and the groups that may not
    shrink, by name with the reason. minimum: how many indices each group keeps at least."""
    equations = [*_equal(comb)]
    refused: dict[str, str] = {}
    while True:
        free = [g for g in groups if g.name not in refused]
        bundles, broken = _bundles(equations, free, minimum)
        if not broken:
            return Ties(free, bundles), refused
        refused |= broken


def _bundles(equations: list[Equal], groups: list[Group], minimum: int) -> tuple[list[Bundle], dict[str, str]]:
    """Bundles of the groups that equations connect, directly or through other groups; and, by name with the reason, the
    groups that cannot shrink at all (then there are no bundles)."""
    by_atom = {g.atom: g for g in groups}
    tied: dict[Factor, dict[Factor, None]] = {}
    why: dict[Factor, str] = {}
    broken: dict[str, str] = {}
    for equation in equations:
        atoms = {a: None for a in ax.atoms(equation.axes) if a in by_atom}
        if not atoms:
            continue
        if not _proportional(equation.axes, by_atom):
            text = f"{equation.why}, and something of it may not shrink"
            broken |= {by_atom[a].name: text for a in atoms}
            continue
        joined = {b: None for a in atoms for b in tied.get(a, {a: None})}
        for atom in joined:
            tied[atom] = joined
            why.setdefault(atom, equation.why)
    if broken:
        return [], broken
    places = {g.atom: i for i, g in enumerate(groups)}
    bundles = []
    for atoms in {id(t): t for t in tied.values() if len(t) > 1}.values():
        together = [by_atom[a] for a in sorted(atoms, key=places.__getitem__)]
        made = bundle(together, minimum, why[together[0].atom])
        if made.whole.size <= made.whole.least:
            sizes = sorted({g.size for g in together})
            text = f"{made.why}, and sizes {', '.join(map(str, sizes))} can keep no smaller common share"
            broken |= {g.name: text for g in together}
        bundles.append(made)
    return bundles, broken


def _proportional(axes: list[Axis], free: dict[Factor, Group]) -> bool:
    """Whether the axes stay equal in size when all their free atoms keep the same share: the part that does not shrink is
    equally large in each, and no product has two free atoms."""
    wholes = set()
    for axis in axes:
        whole = 0
        for monomial in ax.monomials(axis):
            shrinking = sum(atom in free for atom in monomial)
            if shrinking > 1:
                return False
            whole += 0 if shrinking else ax.size(list(monomial))
        wholes.add(whole)
    return len(wholes) == 1


# ------------------------------------------------------------------------------------------------------------- equations
def _equal(comb: Comb) -> Iterator[Equal]:
    heads = {g.atom for g in comb.groups if g.kind == "head"}
    widths = {g.atom for g in comb.groups if g.kind == "head width"}
    for node in comb.module.graph.nodes:
        name = op_name(node)
        if name in SPLITS:
            yield from _pieces(comb, node)
        elif name in ("slice", "narrow"):
            yield from _parts(comb, node)
        elif name == "scaled_dot_product_attention" and arguments(node).get("scale") is None:
            width = comb.axes[arguments(node)["query"]][-1]
            text = "a class computes its scale from the width of a head"
            yield Equal([width, ax.fresh(ax.size(width))], node, text)
        elif node.op == "get_attr" and str(node.target).startswith(FOLDED) and sum(n > 1 for n in shape(node)) > 1:
            for axis in comb.axes[node]:
                yield Equal([axis, ax.fresh(ax.size(axis))], node, "a class computes this table from its sizes")
        elif name in MAPS:
            yield from _projections(comb, node, heads | widths)
    yield from _head_counts(comb, heads)


def _pieces(comb: Comb, node: fx.Node) -> Iterator[Equal]:
    """The pieces of a split that are equally large."""
    d = arguments(node)["dim"] % len(shape(arguments(node)["self"]))
    for same in _of_one_size([axes[d] for axes in comb.axes[node]]):
        yield Equal(same, node, "a class splits into equal pieces")


def _parts(comb: Comb, node: fx.Node) -> Iterator[Equal]:
    """For a slice that is the n-th part of an axis: the axis and n times the slice."""
    a = arguments(node)
    x, d = a["self"], a["dim"] % len(shape(a["self"]))
    whole, part = shape(x)[d], shape(node)[d]
    if 0 < part < whole and whole % part == 0:
        equal = ax.fresh(whole // part) + comb.axes[node][d]
        yield Equal([comb.axes[x][d], equal], node, "a class takes an equal part of the axis")


def _projections(comb: Comb, node: fx.Node, heads: set[Factor]) -> Iterator[Equal]:
    """The two sides of a projection to or from heads, if they are equally wide."""
    channel = 1 if op_name(node).startswith("conv") else -1
    sides = comb.axes[arguments(node)["input"]][channel], comb.axes[node][channel]
    for one, other in (sides, sides[::-1]):
        for monomial in ax.monomials(one):
            if any(a in heads for a in monomial) and ax.size(list(monomial)) == ax.size(other) > 1:
                text = "a class takes heads times their width for the width it reads"
                yield Equal([list(monomial), other], node, text)


def _head_counts(comb: Comb, heads: set[Factor]) -> Iterator[Equal]:
    """The axes of heads in one module that have one size."""
    counts: dict[str, tuple[fx.Node, dict[Factor, None]]] = {}
    for node in comb.module.graph.nodes:
        if op_name(node) in PRODUCTS and (path := module_path(node)):
            atoms = [a for a in ax.atoms(comb.axes[node]) if a in heads]
            counts.setdefault(path, (node, {}))[1].update(dict.fromkeys(atoms))
    for node, counted in counts.values():
        for same in _of_one_size([[atom] for atom in counted]):
            yield Equal(same, node, "a class has one number of heads in a layer")


def _of_one_size(axes: list[Axis]) -> Iterator[list[Axis]]:
    """Yield the axes of each size that several of them have."""
    by_size: dict[int, list[Axis]] = defaultdict(list)
    for axis in axes:
        by_size[ax.size(axis)].append(axis)
    yield from (same for same in by_size.values() if len(same) > 1)
