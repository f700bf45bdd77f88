"""Pruning a module that keeps its shapes: what would be removed is held at zero where it is read, and removed at the end.

So the user's own class, hooks and trainer work on unchanged. If only trained weights read an index, then the index has no
effect exactly when the columns that read it are zero, whatever its writers, norms and activations still compute. If
something else reads it (the statistics of a LayerNorm over it, the product of queries and keys, frozen weights), zeros
differ from removal; such groups stay whole, with the reason. Source: ours.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from ...graph.comb import axes as ax
from ...graph.comb.groups import Group
from ...graph.comb.solve import Comb
from ...graph.comb.surgery import kept_indices
from ...graph.nodes import fetch, source
from ...graph.program import Program
from ...graph.trainable import TrainableModule
from ..common.processes import averaged
from ..train.callbacks import Surgery
from .importance.gates import Gates
from .importance.scores import TRANSFORMS, GradientScores
from .while_training import Pruner


def not_held(comb: Comb, groups: list[Group], own: TrainableModule) -> dict[str, str]:
    """The groups that zeros cannot remove, by name with the reason. own: the graph around the tensors of the user's own
    module."""
    gates = Gates(comb, [g.atom for g in groups], None, own)
    read_at: dict[Any, fx.Node] = {}
    for read, _, _ in gates.reads:
        read_at |= dict.fromkeys(read.atoms, read.node)
    for moments, tap in gates.moments:
        read_at |= {g.atom: moments.node for g in groups if any(ax.touches(a, {g.atom: None}) for a in tap.axes)}
    return {
        g.name: f"it is read by {source(read_at[g.atom])}, not by trained weights alone, so zeros would not be its removal; "
        'cut="during" can remove it'
        for g in groups
        if g.atom in read_at
    }


@dataclass
class HeldPruner(Pruner):
    """A `Pruner` that keeps the shape of every tensor. own: the graph around the tensors of the module that trains."""

    own: TrainableModule = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._gates = Gates(self.comb, [g.atom for g in self.groups], None, self.own)
        self._zeros: list[tuple[str, int, torch.Tensor]] = []

    def training_context(self, module: TrainableModule) -> AbstractContextManager[Any]:
        if self.importance in TRANSFORMS:
            self.gradients = GradientScores(self.importance, self.comb, self.groups, None, self.own, averaged)
        return nullcontext()

    def after_backward(self, step: int, module: TrainableModule) -> None:
        super().after_backward(step, module)
        for name, dim, gone in self._zeros:  # no momentum may build up where weights stay zero
            gradient = fetch(module, name).grad
            if gradient is not None:
                gradient.index_fill_(dim, gone.to(gradient.device), 0)

    def after_step(self, step: int, module: TrainableModule) -> Surgery | None:
        seen = self._smaller(self.own) if step + 1 in self.events else self.own
        super().after_step(step, seen)
        self.hold(self.own)
        return None

    def hold(self, module: torch.nn.Module) -> None:
        """Set the columns that read removed indices to zero, in place."""
        with torch.no_grad():
            for name, dim, gone in self._zeros:
                parameter = fetch(module, name)
                parameter.index_fill_(dim, gone.to(parameter.device), 0)

    def cut(self, trained: Program) -> Program:
        """The exact slice of a trained program that has the original's shapes."""
        return trained.derive(self._smaller(trained.module()))

    def load_state_dict(self, state: dict[str, Any]) -> None:  # type: ignore[override]
        super().load_state_dict(state)
        self._hold_columns()

    def _smaller(self, module: TrainableModule) -> TrainableModule:
        """A copy of a module of the original's shapes, without what the masks remove."""
        return self._cut(module, self._kept({}), self.masks)

    def _surgery(self, module: TrainableModule, old: ax.Masks) -> None:  # type: ignore[override]
        if self.repair is not None:
            with torch.no_grad():
                self._take_back(super()._surgery(module, old).module, self.own)
        self._hold_columns()

    def _take_back(self, smaller: TrainableModule, module: TrainableModule) -> None:
        """Write the tensors of a smaller network to their places in a module of the original's shapes."""
        kept = kept_indices(self.comb, self.masks)
        for name, value in smaller.state_dict().items():
            full = fetch(module, name)
            dims = [np.flatnonzero(kept.get(name, {}).get(d, np.ones(n, dtype=bool))) for d, n in enumerate(full.shape)]
            full[tuple(torch.from_numpy(i).to(full.device) for i in np.ix_(*dims))] = value.to(full.device)

    def _hold_columns(self) -> None:
        """Hold at zero the columns that read what the masks remove."""
        self._zeros = [
            (name, dim, torch.from_numpy(np.flatnonzero(~ax.kept_mask(tap.axes[0], self.masks))))
            for name, dim, tap in self._gates.parameters
            if ax.touches(tap.axes[0], self.masks)
        ]
        self.hold(self.own)
