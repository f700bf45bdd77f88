"""The indices of groups that a network's outputs depend on. Source: ours, after dead-code elimination.

An index is live when something that is kept reads it: a layer with a weight that is not zero, in a row that is live. Reads
are traced back from the outputs, so that layers that only read and write one another's dead channels go, too. A read does
not count where the value is known to be zero, or is a known constant `k` at every position and the layer can take `W k`
into its bias.
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
from ...graph.facts import MAPS, TRANSPOSED_CONVS
from ...graph.nodes import arguments, conv_padding, fetch, op_name, shape, source
from ..channels.importance.members import by_atom
from ..channels.importance.reads import Read, find_reads
from ..repair.consumers import mean_behind, uses_of
from .constants import Constants

Masks = dict[Factor, np.ndarray]
STORED = (torch.float32, torch.float64)  # dtypes of a bias to which a constant can be added without losing digits


@dataclass(frozen=True)
class LayerRead:
    """A layer with stored weights that reads groups.

    nonzero: bool `(groups, out per group, in per group)`, whether the weight is non-zero at any kernel position. rows,
    columns: the axes of the output and of the input channels. sums: the weights summed over kernel positions, float64, of
    the same shape as `nonzero`. takes: the name of the tensor that can take a constant, a bias (sign 1) or a running mean
    (sign -1), or None; refuses: why nothing can. known: bool `(in,)`, whether all values of an input channel are
    independent of the network's inputs. constant: float64 `(in,)`, the one value of an input channel at all positions, NaN
    where there is none.
    """

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
        """For each input channel, whether a row that stays reads it: bool `(in,)`."""
        rows = ax.kept_mask(self.rows, masks).reshape(len(self.nonzero), -1, 1)
        return (self.nonzero & rows).any(1).reshape(-1)

    @property
    def exempt(self) -> np.ndarray:
        """The input channels that may be removed although they are read: zeros, and constants that can be folded; bool
        `(in,)`."""
        return (self.constant == 0) | (np.isfinite(self.constant) & (self.takes is not None))


@dataclass(frozen=True)
class OtherRead:
    """A sum over an axis other than a layer's, or statistics along it, at a node.

    live: bool, the indices whose read counts. known: bool, the indices whose values are known, whether or not their read
    counts. why: the reason that is given for indices that cannot go.
    """

    node: fx.Node
    axis: Axis
    live: np.ndarray
    known: np.ndarray
    why: str


@dataclass
class Liveness:
    """The reads of a program, and what they keep of each group's atom.

    live: the indices that something needs. masks: the indices that stay: the live ones, and further ones where a group has
    a minimum size. forced: how many stay only for that minimum.
    """

    comb: Comb
    groups: list[Group]
    layers: list[LayerRead] = field(default_factory=list)
    others: list[OtherRead] = field(default_factory=list)
    live: Masks = field(default_factory=dict)
    masks: Masks = field(default_factory=dict)
    forced: dict[Factor, int] = field(default_factory=dict)

    def solve(self) -> None:
        """Find the reads, and trace what the outputs need back to a fixed point."""
        atoms: dict[Factor, None] = dict.fromkeys(g.atom for g in self.groups)
        reads, moments = find_reads(self.comb, atoms)
        places = [(o.source, o.dim) for r in reads for o in r.operands]
        places += [(m.source, d) for m in moments for d in m.dims]
        constants = Constants(self.comb.program).over(places)
        uses = uses_of(self.comb.module)
        for read in reads:
            weight, x = read.operands[0], read.operands[-1]
            if op_name(read.node) in MAPS and weight.source.op == "get_attr":
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
        """Trace what the outputs need, and keep as many further indices as operators require.

        Preferably these are indices that no live row reads, whose values do not matter. If all are read, as constants that
        could have been removed, one of them has to stay and keep its value, which may make others live.
        """
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
        """Mark the indices that are read, until no more are."""
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
        """For each bias or running mean, what to add to it for removed constants, `W k`, in all of its rows."""
        additions: dict[str, Tensor] = {}
        for layer in self.layers:
            gone = ~ax.kept_mask(layer.columns, self.masks) & np.isfinite(layer.constant) & (layer.constant != 0)
            k = torch.from_numpy(np.where(gone, layer.constant, 0)).to(layer.sums).reshape(len(layer.nonzero), 1, -1)
            added = (layer.sums * k).sum(2).flatten()
            if layer.takes is not None and bool((added != 0).any()):
                additions[layer.takes] = layer.sign * added
        return additions

    def dead(self) -> dict[Factor, np.ndarray]:
        """Of each atom, the indices that are read and whose values are known wherever they are read."""
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
        kept: dict[Factor, dict[str, np.ndarray]] = defaultdict(dict)
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
            steady = live & np.isfinite(layer.constant) & ~layer.exempt
            why = f"its constant is not the same at all positions of {source(layer.node)}"
            reasons.append((layer.columns, uneven, why))
            reasons.append((layer.columns, steady, f"its constant is not zero, and {layer.refuses}"))
        for axis, where, why in reasons:
            for atom, counts in _folded(axis, where).items():
                if atom in dead and (hit := (counts > 0) & dead[atom]).any():
                    kept[atom][why] = hit
        for other in self.others:
            for atom, counts in _folded(other.axis, other.live).items():
                if atom in self.masks and needed[atom] and (hit := (counts > 0) & ~wanted[atom]).any():
                    kept[atom][other.why] = hit
        return kept


def _folded(axis: Axis, where: np.ndarray) -> dict[Factor, np.ndarray]:
    """For each atom of an axis, how many of the marked positions belong to each index."""
    return by_atom(axis, where.astype(np.float64)) if where.any() else {}


def _layer(comb: Comb, node: fx.Node, uses: dict[int, int], known: Tensor, constant: Tensor) -> LayerRead:
    a, name = arguments(node), op_name(node)
    weight = fetch(comb.module, str(a["weight"].target)).detach().double()
    by_group = weight.unflatten(0, (a.get("groups", 1), -1))
    if name in TRANSPOSED_CONVS:  # (in, out / groups, *kernel)
        by_group = by_group.transpose(1, 2)
    by_group = by_group.flatten(3) if by_group.dim() > 3 else by_group[..., None]
    takes, sign, refuses = _takes(comb, node, uses)
    channels = -1 if name == "linear" else 1
    return LayerRead(
        node, (by_group != 0).any(3).cpu().numpy(), comb.axes[node][channels], comb.axes[a["input"]][channels],
        by_group.sum(3), takes, sign, refuses, known.cpu().numpy(), constant.cpu().numpy(),
    )  # fmt: skip


def _takes(comb: Comb, node: fx.Node, uses: dict[int, int]) -> tuple[str | None, int, str]:
    """The stored tensor that can take a constant in a layer's outputs, and its sign; or None, 1, and why there is none."""
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
    """The read of a product of two values, or of a sum; an index does not count where an operand is zero."""
    first = read.operands[0]
    size = shape(first.source)[first.dim]
    zero, known = np.zeros(size, dtype=bool), np.ones(size, dtype=bool)
    for operand in read.operands:
        constant_here, constant = (t.cpu().numpy() for t in constants[operand.source, operand.dim])
        if len(constant) != size:  # the channels of all groups, which a computed weight of a grouped convolution shares
            known = np.zeros(size, dtype=bool)
            continue
        known = known & constant_here
        if len(read.operands) == 2 or op_name(read.node) == "sum":
            zero = zero | (constant == 0)
    return OtherRead(read.node, comb.axes[first.source][first.dim], ~zero, known, f"it is read at {source(read.node)}")


def frozen_zeros(comb: Comb, groups: Iterable[Group]) -> dict[Factor, int]:
    """Of groups that may not shrink, how many indices only have zero weights before them, or only zero weights behind
    them."""
    zeros: dict[Factor, np.ndarray] = {}
    atoms = {g.atom for g in groups}
    for node in comb.module.graph.nodes:
        if op_name(node) not in MAPS or arguments(node)["weight"].op != "get_attr":
            continue
        name = str(arguments(node)["weight"].target)
        weight = fetch(comb.module, name).detach()
        for d, axis in enumerate(comb.parameters[name][:2]):
            if not any(atom in atoms for atom in ax.atoms([axis])):
                continue
            nonzero = (weight != 0).movedim(d, 0).flatten(1).any(1).cpu().numpy()
            for atom, values in by_atom(axis, nonzero.astype(np.float64)).items():
                if atom in atoms:
                    zeros[atom] = zeros.get(atom, False) | (values == 0)
    return {atom: int(where.sum()) for atom, where in zeros.items() if where.any()}
