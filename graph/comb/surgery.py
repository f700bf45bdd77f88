"""Removal: the smaller program, built from the solved axes and the indices that stay. Source: ours.

Weights are index-selected along every axis that lost something, and every shape constant is regenerated from the axes;
nothing is patched in place, and the input program stays as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx

from ..edit import copy_tensor, like, rebuild
from ..errors import Refused
from ..nodes import arguments, fetch, op_name, set_argument, source
from ..program import Program
from ..trainable import TrainableModule
from . import axes as ax
from .axes import Axis, Factor, Masks
from .solve import Comb

Removed = dict[str, dict[int, list[int]]]


class Slicer:
    """The sizes after removal, and the means to write them into the new graph; rewrites get it as their `Sizes`."""

    def __init__(self, comb: Comb, masks: Masks):
        self.comb, self.masks = comb, masks
        self.sizes = {atom: int(mask.sum()) for atom, mask in masks.items()}
        self.env: dict[fx.Node, fx.Node] = {}

    def full(self, axis: Axis) -> bool:
        """Whether the axis lost nothing."""
        return not ax.touches(axis, self.sizes)

    def size(self, axis: Axis) -> int:
        """Number of indices of the axis that are left."""
        return ax.kept_size(axis, self.sizes)

    @staticmethod
    def assign(node: fx.Node, argument: str, value: Any) -> None:
        """Set an argument of a node of the new graph by schema name."""
        set_argument(node, argument, value)

    def resize(self, old: fx.Node, new: fx.Node, argument: str, axes: list[Axis]) -> None:
        """Regenerate those entries of a list of sizes whose axis lost indices, or that were computed from such sizes."""
        entries = arguments(old)[argument]
        values = list(arguments(new)[argument])
        changed = False
        for i, (entry, axis) in enumerate(zip(entries, axes, strict=True)):
            stale = isinstance(entry, fx.Node) and entry in self.tainted
            if (self.full(axis) and not stale) or (isinstance(entry, int) and entry == -1):
                continue
            values[i] = self._expression(old, new, axis)
            changed = True
        if changed:
            set_argument(new, argument, values)

    @cached_property
    def tainted(self) -> set[fx.Node]:
        """The nodes of sizes that depend on a dimension which lost indices."""
        tainted: set[fx.Node] = set()
        for node in self.comb.module.graph.nodes:
            if op_name(node).startswith("sym_size"):
                if not self.full(self.comb.axes[node.args[0]][node.args[1]]):
                    tainted.add(node)
            elif self.comb.axes.get(node, 0) is None and any(i in tainted for i in node.all_input_nodes):
                tainted.add(node)
        return tainted

    def _expression(self, old: fx.Node, new: fx.Node, axis: Axis) -> Any:
        """The size of an axis after removal: its static part times its symbolic sizes, which are read from tensors that
        have them. Raises Refused if no tensor does."""
        symbolic = [f for f in ax.normal(axis) if any(a.symbolic for a in ax.atoms([[f]]))]
        static = self.size([f for f in ax.normal(axis) if f not in symbolic])
        if not symbolic:
            return static
        whole = self._source(old, symbolic)
        sources = [s for s in ([whole] if whole else [self._source(old, [f]) for f in symbolic]) if s is not None]
        if (not whole and len(sources) < len(symbolic)) or not self.full(symbolic):
            raise Refused(f"{source(old)}: the dynamic size {ax.show(axis)} cannot be regenerated")
        graph = new.graph
        result: fx.Node | None = None
        with graph.inserting_before(new):
            for node, dim in sources:
                size = graph.call_function(torch.ops.aten.sym_size.int, (self.env[node], dim))
                size.meta["val"] = node.meta["val"].shape[dim]
                result = size if result is None else _product(graph, result, size)
            assert result is not None  # since `sources` is not empty
            return result if static == 1 else _product(graph, result, static)

    def _source(self, user: fx.Node, factors: Axis) -> tuple[fx.Node, int] | None:
        """A dimension of a tensor before `user` that is exactly this product, or None."""
        source = self._sources.get(_key(factors))
        return source if source is not None and self._places[source[0]] < self._places[user] else None

    @cached_property
    def _places(self) -> dict[fx.Node, int]:
        return {node: i for i, node in enumerate(self.comb.axes)}

    @cached_property
    def _sources(self) -> dict[tuple[int, ...], tuple[fx.Node, int]]:
        """For every product of dynamic size, the first tensor dimension that is this product."""
        sources: dict[tuple[int, ...], tuple[fx.Node, int]] = {}
        for node, axes in self.comb.axes.items():
            value: Any = node.meta.get("val")
            for d, n in enumerate(value.shape if axes is not None and isinstance(value, torch.Tensor) else ()):
                if not isinstance(n, int):
                    sources.setdefault(_key(axes[d]), (node, d))
        return sources


def _key(axis: Axis) -> tuple[int, ...]:
    return tuple(sorted(id(f) for f in ax.normal(axis)))


def _product(graph: fx.Graph, a: fx.Node, b: Any) -> fx.Node:
    node = graph.call_function(operator.mul, (a, b))
    node.meta["val"] = a.meta["val"] * (b.meta["val"] if isinstance(b, fx.Node) else b)
    return node


def remove(comb: Comb, masks: Masks) -> tuple[Program, Removed]:
    """Remove indices from a program.

    masks: for each atom that loses indices, which stay (bool, length of the atom). Returns the new program and what was
    removed, `{parameter or buffer: {dim: sorted indices}}` in the original's numbering. Raises Refused if an atom is frozen
    or would become empty, if an operator would be left with too few entries, or if a size cannot be regenerated.
    """
    keeps = kept_indices(comb, masks)
    indices: dict[tuple[int, Any], torch.Tensor] = {}  # shared, since most axes belong to several tensors

    def index(keep: np.ndarray, device: torch.device) -> torch.Tensor:
        kept = indices.get((id(keep), device))
        if kept is None:
            kept = indices[id(keep), device] = torch.from_numpy(np.flatnonzero(keep)).to(device)
        return kept

    def take(name: str, value: Any) -> Any:
        if name not in keeps:
            return copy_tensor(name, value)
        return like(value, select(value.detach(), {d: index(keep, value.device) for d, keep in keeps[name].items()}))

    removed = {n: {d: np.flatnonzero(~keep).tolist() for d, keep in lost.items()} for n, lost in keeps.items()}
    return comb.program.derive(resized(comb, masks, take)), removed


def kept_indices(comb: Comb, masks: Masks) -> dict[str, dict[int, np.ndarray]]:
    """For each parameter or buffer that loses indices, by dimension, which stay (bool). Raises Refused as `remove` does."""
    masks, removed = _checked(comb, masks), {}
    known: dict[tuple[int, ...], np.ndarray] = {}

    def mask(axis: Axis) -> np.ndarray:
        key = tuple(map(id, ax.normal(axis)))
        if key not in known:
            known[key] = ax.kept_mask(axis, masks)
        return known[key]

    for name, axes in comb.parameters.items():
        lost = {d: mask(axis) for d, axis in enumerate(axes) if ax.touches(axis, masks)}
        if lost:
            removed[name] = lost
    return removed


def restored(comb: Comb, masks: Masks, module: TrainableModule) -> Program:
    """The original program with the values of a smaller module where indices were kept, and its own values elsewhere; the
    smaller module is an exact slice of it."""
    kept = kept_indices(comb, masks)

    def take(name: str, value: Any) -> Any:
        changed = fetch(module, name)
        if name not in kept:
            return copy_tensor(name, changed)
        full = value.detach().clone()
        places = (np.flatnonzero(kept[name][d]) if d in kept[name] else np.arange(n) for d, n in enumerate(full.shape))
        full[tuple(torch.from_numpy(i).to(full.device) for i in np.ix_(*places))] = changed.detach().to(full.device)
        return like(value, full)

    return comb.program.derive(rebuild(comb.module, take), stale=False)


def resized(comb: Comb, masks: Masks, take: Callable[[str, Any], Any]) -> TrainableModule:
    """The graph with every shape constant regenerated for the indices that the masks keep, around other tensors:
    `take(name, value)` returns the tensor in place of the original's `value`."""
    slicer = Slicer(comb, _checked(comb, masks))

    def rewrite_all(nodes: dict[fx.Node, fx.Node]) -> None:
        slicer.env = nodes
        for node, rewrite in comb.rewrites:
            rewrite(slicer, nodes[node])

    return rebuild(comb.module, take, rewrite_all)


def _checked(comb: Comb, masks: Masks) -> dict[Factor, np.ndarray]:
    """The masks that remove something. Raises Refused for what must not be removed."""
    masks = {ax.find(a): np.asarray(m, dtype=bool) for a, m in masks.items() if not np.all(m)}
    for atom, mask in masks.items():
        if atom.frozen is not None:
            raise Refused(f"a frozen atom of size {atom.size} cannot lose indices: {atom.frozen}")
        if len(mask) != atom.size or not mask.any():
            raise Refused(f"an atom of size {atom.size} cannot keep {int(mask.sum())} of {len(mask)} indices")
    sizes = {atom: int(mask.sum()) for atom, mask in masks.items()}
    for node, axes, count in comb.minima:
        if any(ax.touches(axis, sizes) for axis in axes) and math.prod(ax.kept_size(a, sizes) for a in axes) < count:
            raise Refused(f"{source(node)}: {op_name(node)} is undefined over fewer than {count} entries")
    return masks


BLOCK = 1 << 17  # elements of an intermediate that stays in a core's cache


def select(data: torch.Tensor, indices: dict[int, torch.Tensor]) -> torch.Tensor:
    """The entries of a tensor at the given indices of some dimensions.

    Rows are selected a block at a time, so that a selection along two dimensions passes through a small buffer instead of a
    second tensor. Trailing dimensions of size 1, which make index_select several times slower, are dropped first.
    """
    if data.dim() == 1:
        return data.index_select(0, indices[0])
    sizes = [len(indices[d]) if d in indices else n for d, n in enumerate(data.shape)]
    last = max(indices)
    flat = data.reshape([n for d, n in enumerate(data.shape) if d <= last or n > 1])
    if 0 not in indices or len(indices) != 2 or flat.numel() <= BLOCK:
        for d, index in indices.items():
            flat = flat.index_select(d, index)
        return flat.reshape(sizes)
    rows, columns = indices[0], indices[last]
    result = flat.new_empty([len(rows), *flat.shape[1:last], len(columns), *flat.shape[last + 1 :]])
    step = max(1, BLOCK // max(1, flat[0].numel()))
    buffer = flat.new_empty([step, *flat.shape[1:]])
    for start in range(0, len(rows), step):
        block = torch.index_select(flat, 0, rows[start : start + step], out=buffer[: len(rows) - start])
        torch.index_select(block, last, columns, out=result[start : start + step])
    return result.reshape(sizes)
