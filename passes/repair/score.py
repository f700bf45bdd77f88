"""The loss that remains when an index is removed and its readers are repaired: an importance that takes repair into
account.

A reader `y = W x` that loses column i and has its other columns refitted (see `least_squares`) loses, summed over the rows,

|w_i|^2 / (A^-1)_ii,        A = sum x x^T + lambda diag,

and the losses for a next index follow from a rank-one update of `A^-1` and W, as in the optimal brain surgeon. For several
columns S at once: tr(W_S ((A^-1)_SS)^-1 W_S^T). All kernel positions of a convolution share the refit here. Each output is
weighted by how much the network's result depends on it: the mean square of its gradient, of the log-probability of a class
drawn from the network's own prediction, or of a random projection of other outputs, so no labels are needed.

So the order is found in which a group's indices go. What a part of them loses together is then judged anew, for a few parts:
with the refit from one half of the samples, the change d of the readers' outputs on the other half is multiplied by the
gradient g there, and the mean over samples of (sum g d)^2 is taken, the sum being over all outputs, positions and readers.
That is the Gauss-Newton form itself; half of it is the divergence, as far as second order goes. It sees what the diagonal
does not: that the refit knows its own samples too well, that errors cancel over positions or do not, and that they are large
where the network looks. But all of this is so for the images at hand: late layers, whose channels stand for things that are
not in them, can seem to lose nothing. So a loss is never taken to be less than a quarter of what the diagonal says. Source:
ours, after OBS (Hassibi and Stork, 1993) and the Gauss-Newton matrix by random projections (Hutchinson).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor, fx

from ...graph.comb import axes as ax
from ...graph.comb.axes import Axis, Factor
from ...graph.comb.solve import Comb, Group
from ...graph.nodes import arguments
from ..base import Context
from ..common.processes import summed
from .images import spread
from .readers import Reader, Seen, entries, look, readers
from .swaps import Columns, swapped

STEPS = 64  # about the most steps in which a group is emptied, each with new losses
JUDGED = (1 / 16, 1 / 4, 5 / 8)  # shares of a group whose loss is judged on held-out samples
# The least share of the diagonal's loss that is believed. Chosen with EfficientNet-Lite0, MobileNetV2 and the networks on
# Fashion-MNIST, on draws of images that are not reported; without it EfficientNet-Lite0 keeps a third less.
LEAST = 0.25


def columns(axis: Axis, atom: Factor) -> np.ndarray:
    """For each entry of an axis, the index of the atom that it belongs to; -1 for none."""
    indices = np.full(1, -1)
    for factor in ax.normal(axis):
        if factor.segments is not None:
            inside = np.concatenate([columns(part, atom) for part in factor.segments])
        else:
            inside = np.arange(factor.size) if factor is atom else np.full(factor.size, -1)
        indices = np.maximum.outer(indices, inside).reshape(-1)
    return indices


Trial = tuple[Reader, list[tuple[Tensor, ...]]]
"""A reader and, by the half of the samples that it is refitted on, the changes of its weight and constant."""


def _product(reader: Reader, seen: Seen, change: tuple[Tensor, ...], half: Tensor, judged: int) -> Tensor:
    """For each sample of a batch that is in the judged half, the change of a reader's outputs times the gradients there,
    summed: `(n,)`, float64."""
    node, chosen = reader.node, half == judged
    if seen.gradient is None or not bool(chosen.any()):
        return torch.zeros(int(chosen.sum()), dtype=torch.float64)
    a = arguments(node)
    x, gradient = (entries(node, n, t, len(half)) for n, t in ((a["input"], seen.x), (node, seen.gradient)))
    shared = len(x) % len(half) != 0  # no input of the network reaches it, and its gradient is that of all samples
    if not shared:
        x, gradient = (t[spread(chosen, len(t)).to(t.device)] for t in (x, gradient))
    weight, constant = (t.to(x) for t in change)
    outputs = node.target(**a | {"input": x, "weight": weight, "bias": constant})  # type: ignore[operator]
    product = outputs * gradient
    if not shared:
        return product.reshape(int(chosen.sum()), -1).sum(1, dtype=torch.float64).cpu()
    one = torch.zeros(int(chosen.sum()), dtype=torch.float64)
    one[:1] = float(product.sum(dtype=torch.float64)) * 0.5**0.5  # its square is shared between the two halves
    return one


class Losses:
    """The loss of a network's result when indices of groups go and the rest is repaired. samples: number of samples for the
    sums. unrepaired: the atoms of groups whose loss the repaired layers behind them do not tell, since others read them, too
    (`importance.scores.losses_of` finds them)."""

    def __init__(
        self, comb: Comb, groups: list[Group], context: Context, samples: int, unrepaired: Collection[Factor] = ()
    ):
        self.comb, self.groups, self.context, self.samples = comb, groups, context, samples
        self.unrepaired = set(unrepaired)
        self.readers, self.count = readers(comb, groups, context, samples)
        self.prepared = {}
        for reader in self.readers:
            if reader.finite:
                self.prepared[id(reader)] = reader.prepared()
            else:
                self.unrepaired |= ax.atoms([reader.axis]).keys()

    def scores(self) -> dict[Factor, np.ndarray]:
        """For each group, the loss of each index for a sample when all go one after another, in the best order found, with a
        repair after each, but never less than that of an index before it. Groups that no linear layer reads, and
        unrepaired ones, get infinity."""
        result = {g.atom: np.full(g.size, np.inf) for g in self.groups}
        read = [g for g in self.groups if self._readers(g)]
        orders = {g.atom: self._order(g) for g in read}
        factors = self._factors({atom: order for atom, (order, _) in orders.items()})
        for group in read:
            order, losses = orders[group.atom]
            cumulated, logs = np.cumsum(losses), {}
            for count, held_out in factors[group.atom].items():
                if held_out > 0 and cumulated[count - 1] > 0:
                    logs[count] = np.log(max(held_out / cumulated[count - 1], LEAST))
            if logs:
                losses = losses * np.exp(np.interp(np.arange(1, group.size + 1), list(logs), list(logs.values())))
            result[group.atom][order] = np.maximum.accumulate(losses)
        return result

    def _order(self, group: Group) -> tuple[list[int], np.ndarray]:
        """The order in which the indices of a group go, and what each loses, by the diagonal and on the refit's samples."""
        state = []
        for reader in self._readers(group):
            known, where = self.prepared[id(reader)], columns(reader.axis, group.atom)
            held = torch.from_numpy(np.flatnonzero(where >= 0))  # the other columns of a concatenation do not matter
            state.append((known.inverse[held][:, held], known.power[held][:, held], _places(where[held], group.size)))
        left, order, losses = list(range(group.size)), [], []
        step = max(1, group.size // STEPS)
        while left:
            now = np.asarray(sum(_losses(inverse, power, places, left) for inverse, power, places in state))
            least = np.argsort(now, kind="stable")[:step]
            going = [left[i] for i in least]
            order += going
            losses += now[least].tolist()
            gone = set(going)
            left = [i for i in left if i not in gone]
            for inverse, power, places in state:
                _remove(inverse, power, np.concatenate([places[i] for i in going]))
        return order, np.array(losses)

    def _factors(self, orders: dict[Factor, list[int]]) -> dict[Factor, dict[int, float]]:
        """For each group, by number of the first indices in its order, their loss together in the Gauss-Newton form, with
        the refit from one half of the samples and judged on the other."""
        trials = self._trials(orders)
        lost = {key: torch.zeros((), dtype=torch.float64) for key in trials}

        def see(seen: dict[fx.Node, Seen], half: Tensor) -> None:
            for key, changes in trials.items():
                for fitted in range(2):
                    products = [_product(r, seen[r.node], by_half[fitted], half, 1 - fitted) for r, by_half in changes]
                    lost[key] += torch.stack(products).sum(0).square().sum()

        if trials:
            nodes = list({r.node: None for changes in trials.values() for r, _ in changes})
            look(self.comb, nodes, self.context, self.samples, "judge", see)
        result: dict[Factor, dict[int, float]] = {atom: {} for atom in orders}
        for (atom, count), loss in lost.items():
            result[atom][count] = float(summed(loss)) / max(self.count, 1)
        return result

    def _trials(self, orders: dict[Factor, list[int]]) -> dict[tuple[Factor, int], list[Trial]]:
        """The changes of the readers if the first indices of a group's order go, for a few numbers of them."""
        trials: dict[tuple[Factor, int], list[Trial]] = {}
        for group in self.groups:
            known = [(r, self.prepared[id(r)].halves) for r in self._readers(group)]
            if not known or not all(halves for _, halves in known):
                continue
            for count in sorted({max(1, round(share * group.size)) for share in JUDGED}):
                changes: list[Trial] = []
                for reader, halves in known:
                    places = _places(columns(reader.axis, group.atom), group.size)
                    gone = np.concatenate([places[i] for i in orders[group.atom][:count]])
                    by_half = [reader.change(inverse, gone, k) for k, inverse in enumerate(halves)]
                    changes.append((reader, [tuple(t.to(reader.dtype) for t in change) for change in by_half]))
                trials[group.atom, count] = changes
        return trials

    def swapped(self, masks: ax.Masks) -> tuple[dict[Factor, np.ndarray], dict[str, int]]:
        """The masks (True stays) after a local search in each group, and the number of swaps by group name. A group is not
        searched if a reader has several columns for one index, as after flattening."""
        result, counts = dict(masks), {}
        for group in self.groups:
            if group.atom not in masks:
                continue
            state = []
            for reader in self._readers(group):
                where = columns(reader.axis, group.atom)
                held = np.flatnonzero(where >= 0)
                places = np.full(group.size, -1)
                places[where[held]] = held
                known = self.prepared[id(reader)]
                state.append(Columns(known.inverse, known.power, places))
                if len(np.unique(where[held])) < len(held):
                    break
            else:
                result[group.atom], counts[group.name] = swapped(state, masks[group.atom])
        return result, {name: count for name, count in counts.items() if count}

    def _readers(self, group: Group) -> list[Reader]:
        touched = [] if group.atom in self.unrepaired else self.readers
        return [r for r in touched if ax.touches(r.axis, {group.atom: None})]


def _places(where: np.ndarray, size: int) -> list[np.ndarray]:
    """The columns that belong to each index of a group. where: the index that each column belongs to (see `columns`)."""
    return [np.flatnonzero(where == i) for i in range(size)]


def _losses(inverse: Tensor, power: Tensor, places: list[np.ndarray], left: list[int]) -> np.ndarray:
    if all(len(places[i]) <= 1 for i in left):
        at = torch.tensor([places[i][0] if len(places[i]) else -1 for i in left])
        values = power.diagonal()[at] / inverse.diagonal()[at].clamp(min=1e-300)
        return torch.where(at >= 0, values, 0.0).clamp(min=0).numpy()
    losses = []
    for i in left:
        s = torch.from_numpy(places[i])
        losses.append(float(torch.linalg.solve(inverse[s][:, s], power[s][:, s]).trace()) if len(s) else 0.0)
    return np.maximum(losses, 0)


def _remove(inverse: Tensor, power: Tensor, places: np.ndarray) -> None:
    """Remove columns in place: `A^-1` and `W^T G W` become those of the refitted remainder."""
    s = torch.from_numpy(places)
    if not len(s):
        return
    r = torch.linalg.solve(inverse[s][:, s], inverse[s])  # (k, c); identity at s
    # W' = W - W_S r, so that W' is zero at s
    cross = power[:, s] @ r
    power.sub_(cross + cross.T - r.T @ power[s][:, s] @ r)
    inverse.sub_(inverse[:, s] @ r)
    for matrix in (inverse, power):
        matrix[s] = 0
        matrix[:, s] = 0
    inverse[s, s] = 1.0
