"""Where the indices of a group lie in the parameters, and sums over a parameter's entries of each index."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from ....graph.comb import axes as ax
from ....graph.comb.axes import Factor
from ....graph.comb.solve import Comb
from .sums import weighted_sums

Scores = dict[Factor, np.ndarray]


def by_atom(axis: ax.Axis, values: np.ndarray, masks: ax.Masks | None = None) -> Scores:
    """For each atom of an axis, the sums of `values` over the entries of each of its indices.

    values: one for each index of the axis that the masks leave; by default all are left. Indices that are gone get 0.
    """
    if masks and ax.touches(axis, masks):
        kept = ax.kept_mask(axis, masks)
        left, values = values, np.zeros(len(kept))
        values[kept] = left
    sums: Scores = {}
    ax.fold(axis, values, sums)
    return sums


class Members:
    """Where the indices of atoms lie in the parameters of a network, which may have lost some of them.

    wanted: the atoms. masks: which indices of each atom the network still has, by default all. Sums are per index of the
    original atoms, 0 for an index that the network has lost.
    """

    def __init__(self, comb: Comb, wanted: Iterable[Factor], masks: ax.Masks | None = None):
        self.wanted, self.masks = dict.fromkeys(wanted), masks or {}
        self._axes: dict[str, dict[int, ax.Axis]] = {}
        for name, axes in comb.parameters.items():
            if touched := {d: axis for d, axis in enumerate(axes) if ax.touches(axis, self.wanted)}:
                self._axes[name] = touched

    def sums(self, module: torch.nn.Module, gradients: bool) -> Iterator[tuple[str, Scores]]:
        """For every parameter and dimension with wanted atoms, yield the parameter's name and, by atom, the sums over the
        entries of each index: of weight * gradient, or of the squared weight."""
        parameters = [(name, tensor) for name, tensor in module.named_parameters() if name in self._axes]
        if gradients:
            parameters = [(name, tensor) for name, tensor in parameters if tensor.grad is not None]
        items = [(t.detach(), t.grad if gradients else None, self._axes[name]) for name, t in parameters]
        for (name, _), sums in zip(parameters, weighted_sums(items), strict=True):
            for dim, values in sums.items():
                folded = by_atom(self._axes[name][dim], values, self.masks)
                yield name, {atom: sums_of for atom, sums_of in folded.items() if atom in self.wanted}

    def gradient_scores(self, module: torch.nn.Module, transform: Callable[[np.ndarray], np.ndarray]) -> Scores:
        """For every atom, the mean over its members of `transform` of the sums of weight * gradient."""
        scores: dict[Factor, list[np.ndarray]] = defaultdict(list)
        for _, sums in self.sums(module, gradients=True):
            for atom, value in sums.items():
                scores[atom].append(transform(value))
        return {atom: np.mean(values, axis=0) for atom, values in scores.items()}
