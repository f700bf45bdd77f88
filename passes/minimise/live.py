"""Which indices of which groups a network's outputs depend on. Source: ours, after dead-code elimination.

An index is live when something that is kept reads it: a layer through a weight that is not zero, in a row that stays. What
is read is traced back from the outputs, so that layers which only read and write one another's dead channels go, too. A read
counts for nothing where the value there is known to be zero; nor where it is a known constant `k` at every position, and the
layer can take `W k` into its bias.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ...graph.comb import axes as ax
from ...graph.comb.axes import Axis, Factor
from ...graph.comb.groups import Group
from ...graph.comb.solve import Comb
from ...graph.facts import CONVS, TRANSPOSED_CONVS
from ...graph.nodes import arguments, conv_padding, fetch, op_name, shape, source
from ..channels.importance.reads import Read, find_reads
from ..repair.consumers import mean_behind, uses_of
from .constants import Constants

Masks = dict[Factor, np.ndarray]
LAYERS = ("linear", *CONVS, *TRANSPOSED_CONVS)
STORED = (torch.float32, torch.float64)  # what takes a sum without losing what the network computes


@dataclass(frozen=True)
class LayerRead:
    """A layer with stored weights that reads groups. nonzero: `(groups, out, in)`, each by group of the convolution, whether
    some kernel position's weight is. rows, columns: the axes of its output and of its input channels. sums: the weights
    summed over kernel positions, float64. takes: the name of what can take a constant, a bias (sign 1) or a running mean
    (-1); refuses: why nothing can."""

    node: fx.Node
    nonzero: np.ndarray
    rows: Axis
    columns: Axis
    sums: Tensor
    takes: str | None
    sign: int
    refuses: str
    known: np.ndarray
    constant: np.ndarray

    def needed(self, masks: Masks) -> np.ndarray:
        """For each input channel, whether a row that stays reads it."""
        rows = ax.kept_mask(self.rows, masks).reshape(len(self.nonzero), -1, 1)
        return (self.nonzero & rows).any(1).reshape(-1)

    @property
    def exempt(self) -> np.ndarray:
        """The input channels that need not be there to be read: zeros, and constants that can be folded."""
        return (self.constant == 0) | (np.isfinite(self.constant) & (self.takes is not None))


@dataclass(frozen=True)
class OtherRead:
    """Any other sum over an axis, and statistics along it. live: the indices that count; known: those whose value is known,
    though they count."""

    node: fx.Node
    axis: Axis
    live: np.ndarray
    known: np.ndarray
    why: str


@dataclass
class Liveness:
    """The reads of a program, and of each atom the indices that something needs (`live`) and those that stay (`masks`):
    these, and where an operator needs more, as many others (`forced`)."""

    comb: Comb
    groups: list[Group]
    layers: list[LayerRead] = field(default_factory=list)
    others: list[OtherRead] = field(default_factory=list)
    live: Masks = field(default_factory=dict)
    masks: Masks = field(default_factory=dict)
    forced: dict[Factor, int] = field(default_factory=dict)

    def solve(self) -> None:
        """Find the reads, and trace what the outputs need back to a fixpoint."""
        atoms: dict[Factor, None] = dict.fromkeys(g.atom for g in self.groups)
        reads, moments = find_reads(self.comb, atoms)
        places = [(o.source, o.dim) for r in reads for o in r.operands] + [
            (m.source, d) for m in moments for d in m.dims
        ]
        constants = Constants(self.comb.program).over(places)
        uses = uses_of(self.comb.module)
        for read in reads:
            weight, x = read.operands[0], read.operands[-1]
            if op_name(read.node) in LAYERS and weight.source.op == "get_attr":
                self.layers.append(_layer(self.comb, read.node, uses, *constants[x.source, x.dim]))
            else:
                self.others.append(_other(self.comb, read, constants))
        for m in moments:
            for d in m.dims:
                known = constants[m.source, d][0].cpu().numpy()
                why = f"{op_name(m.node)} takes statistics over it at {source(m.node)}"
                axis = self.comb.axes[m.source][d]
                self.others.append(OtherRead(m.node, axis, np.ones(len(known), dtype=bool), known, why))
        self.live = {atom: np.zeros(atom.size, dtype=bool) for atom in atoms}
        self._settle()

    def _settle(self) -> None:
        """Trace what the outputs need, and keep as many indices as operators cannot do without. Where no row that counts
        reads an index, what it computes does not matter. Where all are read, as constants that could have gone, one has to
        stay what it is, which may make others live."""
        held: Counter[Factor] = Counter()
        settled = False
        while not settled:
            self._grow()
            self.masks = {atom: mask.copy() for atom, mask in self.live.items()}
            read: Masks = {atom: np.zeros(atom.size, dtype=bool) for atom in self.live}
            for other in self.others:
                self._mark(read, other.axis, np.ones_like(other.live))
            for layer in self.layers:
                self._mark(read, layer.columns, layer.needed(self.live))
            self.forced, settled = dict(held), True
            for group in self.groups:
                live, missing = self.live[group.atom], group.least - int(self.live[group.atom].sum())
                if missing > 0:
                    spare = np.flatnonzero(~live)
                    chosen = spare[np.argsort(read[group.atom][spare], kind="stable")][:missing]
                    self.masks[group.atom][chosen] = True
                    self.forced[group.atom] = held[group.atom] + missing
                    kept = chosen[read[group.atom][chosen]]
                    live[kept] = True
                    held[group.atom] += len(kept)
                    settled = settled and len(kept) == 0

    def _grow(self) -> None:
        """Mark what is read until nothing more is."""
        changed = True
        while changed:
            before = sum(int(mask.sum()) for mask in self.live.values())
            for other in self.others:
                self._mark(self.live, other.axis, other.live)
            for layer in reversed(self.layers):
                self._mark(self.live, layer.columns, layer.needed(self.live) & ~layer.exempt)
            changed = sum(int(mask.sum()) for mask in self.live.values()) != before

    @staticmethod
    def _mark(masks: Masks, axis: Axis, where: np.ndarray) -> None:
        for atom, counts in _folded(axis, where).items():
            if atom in masks:
                masks[atom] |= counts > 0

    # ------------------------------------------------------------------------------------------------------- results
    def folds(self) -> dict[str, Tensor]:
        """What each bias or running mean takes for constants that are no longer there: `W k`, for all of its rows."""
        found: dict[str, Tensor] = {}
        for layer in self.layers:
            gone = ~ax.kept_mask(layer.columns, self.masks) & np.isfinite(layer.constant) & (layer.constant != 0)
            k = torch.from_numpy(np.where(gone, layer.constant, 0)).to(layer.sums).reshape(len(layer.nonzero), 1, -1)
            added = (layer.sums * k).sum(2).flatten()
            if layer.takes is not None and bool((added != 0).any()):
                found[layer.takes] = layer.sign * added
        return found

    def dead(self) -> dict[Factor, np.ndarray]:
        """Of each atom, the indices with a reader to which they are constant wherever they are read."""
        live: dict[Factor, np.ndarray] = defaultdict(lambda: np.zeros(1))
        seen: dict[Factor, np.ndarray] = defaultdict(lambda: np.zeros(1))
        rows = [(r.columns, r.known, r.nonzero.any(1).reshape(-1)) for r in self.layers]
        for axis, known, read in [*rows, *((o.axis, o.known, np.ones_like(o.known)) for o in self.others)]:
            for table, where in ((seen, read), (live, read & ~known)):
                for atom, counts in _folded(axis, where).items():
                    table[atom] = table[atom] + counts
        return {a: (seen[a] > 0) & (live[a] == 0) for a in self.masks if a in seen}

    def left(self) -> dict[Factor, dict[str, np.ndarray]]:
        """Of each atom, the indices that could go but for some reader, by the reason."""
        dead = self.dead()
        found: dict[Factor, dict[str, np.ndarray]] = defaultdict(dict)
        reasons: list[tuple[Axis, np.ndarray, str]] = []
        needed: Counter[Factor] = Counter()
        wanted: dict[Factor, np.ndarray] = {a: np.zeros(a.size, dtype=bool) for a in self.masks}
        for layer in self.layers:
            live = layer.needed(self.live)
            for atom, counts in _folded(layer.columns, live & ~layer.exempt).items():
                if atom in wanted:
                    wanted[atom] |= counts > 0
                    needed[atom] += 1
            uneven = live & layer.known & np.isnan(layer.constant)
            reasons.append(
                (layer.columns, uneven, f"its constant is not the same at all positions of {source(layer.node)}")
            )
            steady = live & np.isfinite(layer.constant) & ~layer.exempt
            reasons.append((layer.columns, steady, f"its constant is not zero, and {layer.refuses}"))
        for axis, where, why in reasons:
            for atom, counts in _folded(axis, where).items():
                if atom in dead and (hit := (counts > 0) & dead[atom]).any():
                    found[atom][why] = hit
        for other in self.others:
            for atom, counts in _folded(other.axis, other.live).items():
                if atom in self.masks and needed[atom] and (hit := (counts > 0) & ~wanted[atom]).any():
                    found[atom][other.why] = hit
        return found


def _folded(axis: Axis, where: np.ndarray) -> dict[Factor, np.ndarray]:
    """How many of the marked positions of an axis belong to each index of its atoms."""
    found: dict[Factor, np.ndarray] = {}
    if where.any():
        ax.fold(axis, where.astype(np.float64), found)
    return found


def _layer(comb: Comb, node: fx.Node, uses: dict[int, int], known: Tensor, constant: Tensor) -> LayerRead:
    a, name = arguments(node), op_name(node)
    weight = fetch(comb.module, str(a["weight"].target)).detach().double()
    groups, last = a.get("groups", 1), name == "linear"
    if name in TRANSPOSED_CONVS:  # (in, out / groups, *kernel)
        by_group = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    else:
        by_group = weight.unflatten(0, (groups, -1))
    by_group = by_group.flatten(3) if by_group.dim() > 3 else by_group[..., None]
    takes, sign, refuses = _takes(comb, node, uses)
    return LayerRead(
        node,
        (by_group != 0).any(3).cpu().numpy(),
        comb.axes[node][-1 if last else 1],
        comb.axes[a["input"]][-1 if last else 1],
        by_group.sum(3),
        takes,
        sign,
        refuses,
        known.cpu().numpy(),
        constant.cpu().numpy(),
    )


def _takes(comb: Comb, node: fx.Node, uses: dict[int, int]) -> tuple[str | None, int, str]:
    """The stored tensor that a constant in a layer's outputs can be added to, and with which sign; or why there is none."""
    a, name, where = arguments(node), op_name(node), source(node)
    if name in TRANSPOSED_CONVS:
        return None, 1, f"{where} adds up other kernel positions at its border"
    if name != "linear" and any(before or after for before, after in conv_padding(node)):
        return None, 1, f"{where} pads its input with zeros"
    bias = a["bias"]
    if bias is None:
        target = mean_behind(node, comb.module, uses)
        if target is None:
            return None, 1, f"{where} has no bias and no BatchNorm of its own"
    elif bias.op != "get_attr" or uses[id(fetch(comb.module, str(bias.target)))] > 1:
        return None, 1, f"the bias of {where} is computed or used more than once"
    else:
        target = str(bias.target)
    stored: Any = fetch(comb.module, target)
    if stored.dtype not in STORED:
        return None, 1, f"{target} is stored in {str(stored.dtype).removeprefix('torch.')}"
    return target, 1 if bias is not None else -1, ""


def _other(comb: Comb, read: Read, constants: dict[tuple[fx.Node, int], tuple[Tensor, Tensor]]) -> OtherRead:
    """A product of two values, or a sum: nothing comes of an index at which an operand is zero."""
    first = read.operands[0]
    size = shape(first.source)[first.dim]
    zero, known = np.zeros(size, dtype=bool), np.ones(size, dtype=bool)
    for operand in read.operands:
        own, constant = (t.cpu().numpy() for t in constants[operand.source, operand.dim])
        known = known & own
        if len(read.operands) == 2 or op_name(read.node) == "sum":
            zero = zero | (constant == 0)
    return OtherRead(read.node, comb.axes[first.source][first.dim], ~zero, known, f"it is read at {source(read.node)}")


def frozen_zeros(comb: Comb, groups: Iterable[Group]) -> dict[Factor, int]:
    """Of groups that may not shrink: how many indices have no weight that is not zero before them, or none behind them."""
    found: dict[Factor, np.ndarray] = {}
    atoms = {g.atom for g in groups}
    for node in comb.module.graph.nodes:
        if op_name(node) not in LAYERS or arguments(node)["weight"].op != "get_attr":
            continue
        name = str(arguments(node)["weight"].target)
        weight = fetch(comb.module, name).detach()
        for d, axis in enumerate(comb.parameters[name][:2]):
            if not any(atom in atoms for atom in ax.atoms([axis])):
                continue
            nonzero = (weight != 0).movedim(d, 0).flatten(1).any(1).cpu().numpy()
            counts: dict[Factor, np.ndarray] = {}
            ax.fold(axis, nonzero.astype(np.float64), counts)
            for atom, values in counts.items():
                if atom in atoms:
                    found[atom] = (found[atom] if atom in found else np.zeros(atom.size, dtype=bool)) | (values == 0)
    return {atom: int(where.sum()) for atom, where in found.items() if where.any()}
