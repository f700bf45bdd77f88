"""Local search for the indices of a group that stay: a removed and a remaining index are swapped while the loss falls.

The loss of removing columns S of a reader, with its other columns refitted, is (see `score`)

L(S) = tr(M G_SS),     M = (P_SS)^-1,     P = A^-1,  G = W^T diag(sensitivity) W.

Bringing i back and removing j instead changes it by -(M G M)_ii / M_ii + p_j / q_j, where p_j and q_j are the power of the
refitted column j and the diagonal of the refitted inverse without i; both are the values with i plus a rank-one term. So
all swaps of a group are judged at once, with a few matrix products for each swap that is made. Source: ours, after the
rank-one updates of the optimal brain surgeon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOST = 64  # most swaps in one group
WORTH = 1e-6  # a swap must lower the loss by more than this share of it


@dataclass(frozen=True)
class Columns:
    """A reader of a group. inverse, power: `A^-1` and `W^T G W` of all its columns, `(c, c)`. places: the column of each
    index of the group, -1 for an index without one."""

    inverse: Tensor
    power: Tensor
    places: np.ndarray

    def of(self, indices: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Which of the indices have a column (bool), and these columns."""
        has = self.places[indices] >= 0
        return has, torch.from_numpy(self.places[indices][has])


def loss(readers: Sequence[Columns], gone: np.ndarray) -> float:
    """The loss of removing these indices, after refitting."""
    total = 0.0
    for reader in readers:
        _, s = reader.of(gone)
        if len(s):
            total += float(torch.linalg.solve(reader.inverse[s][:, s], reader.power[s][:, s]).trace())
    return total


def swapped(readers: Sequence[Columns], mask: np.ndarray) -> tuple[np.ndarray, int]:
    """The mask (True stays) after swaps, and the number of swaps. Its loss is never higher than that of the given mask."""
    gone, left = np.flatnonzero(~mask), np.flatnonzero(mask)
    start = best = loss(readers, gone)
    swaps = 0
    while swaps < MOST and len(gone) and len(left):
        changes = _changes(readers, gone, left)
        i, j = np.unravel_index(int(changes.argmin()), changes.shape)
        if not changes[i, j] < -WORTH * start:
            break
        trial, other = gone.copy(), left.copy()
        trial[i], other[j] = left[j], gone[i]
        now = loss(readers, trial)
        if not now < best:  # the predicted gain was a rounding error
            break
        gone, left, best, swaps = trial, other, now, swaps + 1
    result = np.ones(len(mask), dtype=bool)
    result[gone] = False
    return result, swaps


def _changes(readers: Sequence[Columns], gone: np.ndarray, left: np.ndarray) -> np.ndarray:
    """The change of the loss for each swap, `(len(gone), len(left))`: rows come back, columns go."""
    total = np.zeros((len(gone), len(left)))
    for reader in readers:
        (back, s), (out, k) = reader.of(gone), reader.of(left)
        p, g, change = reader.inverse, reader.power, np.zeros_like(total)
        if len(s):
            m = torch.linalg.inv(p[s][:, s])
            squares = (m @ g[s][:, s] @ m).diagonal()
            x = m @ p[s][:, k]  # coefficients of the removed columns in the refit for column k
            rest = g[s][:, k] - g[s][:, s] @ x
            powers = g[k, k] - (g[s][:, k] * x).sum(0) - (rest * x).sum(0)
            inverses = p[k, k] - (p[s][:, k] * x).sum(0)
            change[back] -= (squares / m.diagonal()).numpy()[:, None]
            share = x / m.diagonal()[:, None]
            without = powers + 2 * share * (m @ rest) + share.square() * squares[:, None]
            costs = without.clamp(min=0) / (inverses + share * x)
            change[np.ix_(back, out)] += costs.numpy()
            alone = (powers.clamp(min=0) / inverses).numpy()
        else:
            alone = (g[k, k] / p[k, k]).numpy()
        change[np.ix_(~back, out)] += alone
        total += change
    return total
