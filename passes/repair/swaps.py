"""Local search over which indices of a group stay: swaps of one that is gone and one that is left, while the loss falls.

The loss of removing columns S of a reader after its other columns were refitted is (see `score`)

    L(S) = tr(M G_SS),     M = (P_SS)^-1,     P = A^-1,  G = W^T diag(sensitivity) W.

Taking i back and removing j instead changes it by -(M G M)_ii / M_ii + p_j / q_j, where p_j and q_j are the power of the
refitted column j and the diagonal of the refitted inverse without i: those with i plus a rank-one term each. So all swaps
of a group are judged at once, with a few matrix products for each swap that is made. Source: ours, after the rank-one
updates of the optimal brain surgeon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOST = 64  # swaps in one group
WORTH = 1e-6  # a swap lowers the loss by more than this share


@dataclass(frozen=True)
class Columns:
    """A reader of a group: `A^-1` and `W^T G W` of all its columns, and which of them each index of the group is, -1 where
    it is none."""

    inverse: Tensor
    power: Tensor
    places: np.ndarray

    def of(self, indices: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Which of the indices it has columns of, and these."""
        has = self.places[indices] >= 0
        return has, torch.from_numpy(self.places[indices][has])


def loss(readers: Sequence[Columns], gone: np.ndarray) -> float:
    """What is lost without some indices, refitted."""
    total = 0.0
    for reader in readers:
        _, s = reader.of(gone)
        if len(s):
            total += float(torch.linalg.solve(reader.inverse[s][:, s], reader.power[s][:, s]).trace())
    return total


def swapped(readers: Sequence[Columns], mask: np.ndarray) -> tuple[np.ndarray, int]:
    """The mask (True stays) after swaps, and how many there were. It never loses more than the mask given."""
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
        if not now < best:  # rounding: what was predicted is not there
            break
        gone, left, best, swaps = trial, other, now, swaps + 1
    result = np.ones(len(mask), dtype=bool)
    result[gone] = False
    return result, swaps


def _changes(readers: Sequence[Columns], gone: np.ndarray, left: np.ndarray) -> np.ndarray:
    """By how much the loss changes with each swap: rows are those that come back, columns those that go."""
    total = np.zeros((len(gone), len(left)))
    for reader in readers:
        (back, s), (out, k) = reader.of(gone), reader.of(left)
        p, g, own = reader.inverse, reader.power, np.zeros_like(total)
        if len(s):
            m = torch.linalg.inv(p[s][:, s])
            squares = (m @ g[s][:, s] @ m).diagonal()
            x = m @ p[s][:, k]  # what refits column k says of the columns that are gone
            rest = g[s][:, k] - g[s][:, s] @ x
            powers = g[k, k] - (g[s][:, k] * x).sum(0) - (rest * x).sum(0)
            inverses = p[k, k] - (p[s][:, k] * x).sum(0)
            own[back] -= (squares / m.diagonal()).numpy()[:, None]
            share = x / m.diagonal()[:, None]
            without = powers + 2 * share * (m @ rest) + share.square() * squares[:, None]
            costs = without.clamp(min=0) / (inverses + share * x)
            own[np.ix_(back, out)] += costs.numpy()
            alone = (powers.clamp(min=0) / inverses).numpy()
        else:
            alone = (g[k, k] / p[k, k]).numpy()
        own[np.ix_(~back, out)] += alone
        total += own
    return total
