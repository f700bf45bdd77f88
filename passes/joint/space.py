"""The options for a program: sizes of its groups, blocks that may go, and which groups go with a block.

Depth goes first when a choice is carried out, so the names and axes of the program without some blocks have to be matched
with those of the program itself. Blocks are pruned node by node, and nodes outside keep their names, so the axes of the
tensors outside of blocks tell which index spaces are the same (ours).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from ...graph.comb import axes as ax
from ...graph.comb.axes import Factor
from ...graph.comb.groups import DEFAULT_KINDS, Group
from ...graph.comb.solve import Comb
from ...graph.edit import rebuild
from ...graph.facts import MAPS
from ...graph.nodes import arguments, op_name
from ...graph.program import Program
from ..channels.groups import movable
from ..channels.sizes.selection import Selection
from ..common.scoring import bar
from ..depth.blocks import Block
from ..depth.price import find_blocks
from ..depth.reach import Reach
from ..depth.relax import relax
from ..fuse.merge_in_graph import Merger

SIZES = 6  # default number of sizes of a group, the whole one included


@dataclass(frozen=True)
class Form:
    """The structure of the program without some blocks; its weights do not matter. twins: for each of its atoms, the
    program's atom of the same index space. Several atoms can have one twin, since a residual sum that is gone no longer
    ties the values before it to those after it."""

    comb: Comb
    twins: Mapping[Factor, Factor]

    def here(self, groups: Iterable[Group]) -> list[tuple[Group, Group]]:
        """The groups of the program that are left, each with a group of this form; there may be several pairs for one
        group."""
        known = {g.atom: g for g in groups}
        return [(known[self.twins[g.atom]], g) for g in self.comb.groups if self.twins.get(g.atom) in known]


class Space:
    """The groups of a program that may shrink, the sizes that they may have, and the blocks that may go.

    alignment: sizes are multiples of it, as far as the group's axes require that. count: number of evenly spaced sizes of a
    group, the whole one included; if it is more than 1, the least possible size is there besides. more: by group name,
    further sizes. progress: whether to show a bar. lazy: do not find out which groups go with which block, for which the
    program without each of the blocks is needed.

    Attributes: comb; groups; sizes, by group name, smallest first, the whole last; even, the evenly spaced ones of them;
    blocks; inner, by group name, the index of the block that contains the group; owner, by the name of a layer's weight,
    that of the block that contains the layer, or None; refused, by name, why a block cannot go or a group cannot shrink.
    """

    def __init__(
        self,
        program: Program,
        alignment: int = 8,
        count: int = SIZES,
        more: Mapping[str, Collection[int]] | None = None,
        seed: int = 0,
        progress: bool = False,
        lazy: bool = False,
    ):
        self.program, self.seed, self.alignment = program, seed, alignment
        self.comb = Comb(program)
        self.groups = movable(self.comb, DEFAULT_KINDS)
        blocks = find_blocks(program)
        self.blocks: list[Block] = [b for b in blocks if b.prunable]
        frozen = {g.name: g.frozen for g in self.comb.groups if g.frozen is not None}
        self.refused: dict[str, str] = frozen | {b.name: b.why for b in blocks if b.why is not None}
        self._forms: dict[frozenset[int], Form] = {}
        selection = Selection(self.comb, self.groups, alignment, 1)
        self.steps = {g.name: selection.step(g) for g in self.groups}
        wanted = more or {}
        self.even = {g.name: _even(selection, g, count) for g in self.groups}
        self.sizes = {g.name: _sizes(selection, g, self.even[g.name], wanted.get(g.name, ())) for g in self.groups}
        self.groups = [g for g in self.groups if len(self.sizes[g.name]) > 1]
        self.inner: dict[str, int] = {}
        with bar(progress, "blocks", len(self.blocks)) as update:
            for index in range(0 if lazy else len(self.blocks)):
                left = set(self.form([index]).twins.values())
                self.inner |= {g.name: index for g in self.groups if g.atom not in left and g.name not in self.inner}
                update(index + 1, self.blocks[index].name)

    def group(self, name: str) -> Group:
        """The group of that name, which must be one that may shrink."""
        return next(g for g in self.groups if g.name == name)

    def form(self, gone: Iterable[int]) -> Form:
        """The form of the program without the blocks of these indices."""
        key = frozenset(gone)
        if key not in self._forms:
            blocks = [self.blocks[i] for i in sorted(key)]
            pruned = relax(self.program, blocks, settled=True, tail=False)
            merger = Merger(pruned, self.seed, {}, checked=False)  # what `Fuse` does; its weights are not used
            merger.run()
            pruned = pruned.derive(rebuild(merger.module), stale=False)
            comb = Comb(pruned)
            module = pruned.module()
            for tensor in (*module.parameters(), *module.buffers()):  # a large network has many forms: keep no weights
                tensor.data = tensor.data.new_zeros(()).expand(tensor.shape)
            form = Form(comb, twins(self.comb, comb, {n for b in blocks for n in b.nodes}))
            if len(key) > 1:
                return form  # not kept, since there are many sets of several blocks
            self._forms[key] = form
        return self._forms[key]

    def built(self, gone: Collection[int], groups: Collection[Group]) -> tuple[Comb, list[tuple[Group, Group]]]:
        """What the passes build without the blocks of these indices, and `Form.here` of some groups. Layers are only merged
        where blocks go; where parallel ones are, their group has another name."""
        if not gone:
            return self.comb, [(group, group) for group in groups]
        form = self.form(gone)
        return form.comb, form.here(groups)

    @cached_property
    def owner(self) -> dict[str, int | None]:
        """By the name of a layer's weight, the index of the block that contains the layer, or None."""
        block_of = {name: b for b, block in enumerate(self.blocks) for name in block.nodes}
        nodes = self.comb.module.graph.nodes
        return {weight: block_of.get(node.name) for node in nodes if (weight := weight_of(node)) is not None}

    @cached_property
    def _reach(self) -> Reach:
        return Reach(self.program, self.blocks, self.seed)

    def connects(self, gone: Iterable[int]) -> bool:
        """Whether the outputs still depend on the inputs without the blocks of these indices."""
        return self._reach(gone)


def _even(selection: Selection, group: Group, count: int) -> tuple[int, ...]:
    """Up to `count` allowed sizes, evenly spaced."""
    return tuple(sorted({selection.legal(group, group.size * i / count) for i in range(1, count)} | {group.size}))


def _sizes(selection: Selection, group: Group, even: tuple[int, ...], more: Collection[int]) -> tuple[int, ...]:
    """The evenly spaced sizes, the least one if there are several, and the further ones that are possible."""
    least = {selection.legal(group, 1)} if len(even) > 1 else set()
    return tuple(sorted({*even} | least | {n for n in more if group.least <= n <= group.size}))


def weight_of(node: fx.Node) -> str | None:
    """The name of the weight of a linear layer or a convolution; None for other nodes and for computed weights."""
    if op_name(node) not in MAPS:
        return None
    weight = arguments(node)["weight"]
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def twins(comb: Comb, other: Comb, apart: Collection[str]) -> dict[Factor, Factor]:
    """For the atoms of another program, the atoms of this one that are the same index space, as told by tensors of nodes
    with the same name. apart: names of nodes to ignore. Atoms for which tensors disagree have no twin."""
    nodes = {n.name: n for n in comb.module.graph.nodes if n.op in ("call_function", "placeholder")}
    twin_of: dict[Factor, Factor] = {}
    doubtful: set[Factor] = set()
    for node in other.module.graph.nodes:
        twin = nodes.get(node.name)
        if (
            twin is None
            or node.op != twin.op
            or node.name in apart
            or not isinstance(node.meta.get("val"), torch.Tensor)
        ):
            continue
        pairs = _pairs(other.flat(node), comb.flat(twin))
        for theirs, ours in pairs:
            if twin_of.setdefault(theirs, ours) is not ours:
                doubtful.add(theirs)
    return {theirs: ours for theirs, ours in twin_of.items() if theirs not in doubtful}


def _pairs(theirs: Sequence[ax.Axis], ours: Sequence[ax.Axis]) -> list[tuple[Factor, Factor]]:
    """Pairs of the atoms of two tensors' axes, for axes whose atoms have the same sizes."""
    pairs = []
    if len(theirs) == len(ours):
        for left, right in zip(theirs, ours, strict=True):
            a, b = list(ax.atoms([left])), list(ax.atoms([right]))
            if [f.size for f in a] == [f.size for f in b]:
                pairs += list(zip(a, b, strict=True))
    return pairs
