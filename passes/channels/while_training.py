"""Pruning while training: scores from the gradients that training computes anyway, and events that cut the network.

CPD (arXiv 2408.03046) masks channels while it trains and slices once, at the end. Multiplying by masks is not enough for
that: a LayerNorm, GroupNorm or mean over a masked axis still counts the zeros, so the masked network would differ from the
sliced one. Here the masks are the state, in the original's numbering, and what trains is always the masked network in its
sliced form: every event cuts the graph, the weights and the optimizer's moments alike (ours). So masked equals sliced at
every step, by construction; training gets cheaper as the network shrinks; and `masked` puts the trained weights back into
the original's shape, to prove that one slice of it at the end is the result.

With `repair`, an event also gives the smaller network the weights that bring it nearest to the network as it was just
before the event, in closed form (`passes.repair`). The network before training would be the wrong reference, since that
would undo what was learnt since.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx

from ...graph.comb import axes as ax
from ...graph.comb.axes import Factor
from ...graph.comb.groups import Group
from ...graph.comb.solve import Comb
from ...graph.comb.surgery import Removed, kept_indices, resized, restored
from ...graph.edit import copy_tensor, like
from ...graph.errors import BadInput, GraphcombError
from ...graph.nodes import fetch
from ...graph.program import Program
from ...graph.trainable import TrainableModule
from ..base import plain
from ..batch import split_batch
from ..common.processes import averaged, gathered, move
from ..common.repeat import seeded
from ..repair.images import Images
from ..repair.repair import Repair
from ..train.callbacks import Callback, Kept, Surgery, select_kept
from ..train.distill import Distill
from ..train.features import feature_nodes
from .importance.scores import (
    TRANSFORMS,
    GradientScores,
    OwnImportance,
    Scores,
    importance_of,
    normalised,
    own_scores,
    relative_norms,
    together,
)
from .sizes.meet_target import Task
from .sizes.selection import lowest_removed

GONE = -np.finfo(np.float64).tiny  # score of a removed index: ranks below all others, yet adds nothing to a sum


def event_steps(schedule: str, total: int, interval: int, rounds: int, prune_share: float) -> dict[int, float]:
    """`{number of steps: share}`: after how many steps to prune, and which share of the way to the target is then gone.

    "adaptive": every `interval` steps within the first `prune_share` of all steps, along the cubic ramp of Zhu and Gupta
    (arXiv 1710.01878), which takes most while the network is still redundant. CPD takes one chunk per event; here an event
    takes as many as the ramp asks for (ours), so that the target is reached in any number of steps. "iterative": `rounds`
    equal parts. "one-shot": everything before the first step.
    """
    if schedule == "one-shot":
        return {0: 1.0}
    within = max(1, int(prune_share * total))
    if schedule == "iterative":
        rounds = min(rounds, within)
        return {within * i // rounds: i / rounds for i in range(1, rounds + 1)}
    count = within // interval
    if not count:
        return {within: 1.0}
    return {interval * i: 1 - (1 - i / count) ** 3 for i in range(1, count + 1)}


@dataclass
class Pruner(Callback):
    """Cuts a program while it trains.

    task: of the program as it was before training. importance: those from gradients sum the scores of all steps since the
    last event; "magnitude", "random" and functions look at the network when an event is due. events: see `event_steps`.
    samples: number of samples for the scores of a one-shot event, which come from a pass over the data before training.
    identity: see `Callback`.

    "magnitude" replaces gradients where these say nothing: where no step since the last event had any; and where nothing is
    cut yet and the only loss is the distance to a teacher that is the network itself, so that gradients are rounding errors
    and the noise of dropout and batch statistics. The log names the importance of each event.

    Under several processes gradients are averaged before they are scored, so the Fisher score is the square of the global
    batch's gradient, as one process would see it. Batch statistics are each process's own, so with trained BatchNorm the
    gradients, and near ties, differ from those of one process. All processes score alike and check that they cut alike.
    """

    task: Task
    importance: str | OwnImportance
    events: dict[int, float]
    samples: int
    identity: Any
    repair: Repair | None = None
    images: Images | None = None
    distill: Distill | None = None
    masks: dict[Factor, np.ndarray] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.comb, self.groups, self.context = self.task.comb, self.task.groups, self.task.context
        self.outputs = feature_nodes(self.comb.program)
        self._restart()

    def _restart(self) -> None:
        """Reset the scores."""
        self.scores: Scores = {g.atom: np.zeros(g.size) for g in self.groups}
        self.count = 0

    @property
    def sizes(self) -> dict[Factor, int]:
        """The size of each group that has lost some indices."""
        return {atom: int(mask.sum()) for atom, mask in self.masks.items()}

    # ------------------------------------------------------------------------------------------------------- the hooks
    def begin(self, module: TrainableModule) -> Surgery | None:
        self._take_images()
        if 0 not in self.events:
            return None
        if self.importance in TRANSFORMS and not self._labelled:
            return self._by_magnitude(0, module)
        scores = importance_of(self.importance)(self.comb, self.groups, self.context, self.samples)
        return self._event(0, module, scores)

    def training_context(self, module: TrainableModule) -> AbstractContextManager[Any]:
        if self.importance not in TRANSFORMS or len(self.log) == len(self.events):
            return nullcontext()
        self.gradients = GradientScores(str(self.importance), self.comb, self.groups, self.masks, module, averaged)
        return self.gradients.tapped()

    @cached_property
    def _labelled(self) -> bool:
        """Whether the data has labels to take gradients with before the first step; looking does not change the data's
        order."""
        with seeded(self.context.seed, self.context.data):
            first = next(iter(self.context.batches), None)
        labels = self.distill is None or self.distill.labels
        return labels and first is not None and split_batch(first)[2] is not None

    @cached_property
    def _own_teacher(self) -> bool:
        """Whether the only loss is the distance to a teacher that is the network as it was before training."""
        teacher = self.context.teacher
        if teacher is None or self.distill is None or (self.distill.alpha < 1 and self._labelled):
            return False
        theirs, ours = (p.module().state_dict() for p in (teacher, self.comb.program))
        return theirs.keys() == ours.keys() and all(
            t.shape == ours[k].shape and torch.equal(t, ours[k].to(t)) for k, t in theirs.items()
        )

    def after_backward(self, step: int, module: TrainableModule) -> None:
        if self.importance not in TRANSFORMS or step >= max(self.events):
            return
        scores = self.gradients.of_batch(self.loss_scale)
        if not all(np.isfinite(values).all() for values in scores.values()):
            return  # the gradient scaler skips this step
        for atom, values in scores.items():
            self.scores[atom] += values
        self.count += 1

    def after_step(self, step: int, module: TrainableModule) -> Surgery | None:
        done = step + 1
        if done not in self.events:
            return None
        if callable(self.importance):
            return self._event(done, module, own_scores(self.importance, self.comb, self.groups, module, self.masks))
        if self.importance == "random":
            generator = np.random.default_rng([self.context.seed, done])
            return self._event(done, module, {g.atom: generator.random(g.size) for g in self.groups})
        scores = {a: values / max(self.count, 1) for a, values in self.scores.items()}
        if not any(values.any() for values in scores.values()) or (not self.masks and self._own_teacher):
            return self._by_magnitude(done, module)
        return self._event(done, module, scores)

    def due(self, done: int) -> int | None:
        return max(self.events) if len(self.log) < len(self.events) else None

    def _by_magnitude(self, done: int, module: TrainableModule) -> Surgery | None:
        scores = relative_norms(self.comb, self.groups, module, self.masks)
        return self._event(done, module, scores, "magnitude")

    def state_dict(self) -> dict[str, Any]:
        names = {g.atom: g.name for g in self.groups}
        return {
            "masks": {names[a]: torch.from_numpy(m) for a, m in self.masks.items()},
            "scores": {names[a]: torch.from_numpy(s) for a, s in self.scores.items()},
            "count": self.count,
            "log": self.log,
        }

    def _take_images(self) -> None:
        """Take the images for repairs before training, whose pass over the data must not be disturbed."""
        if self.repair is not None:
            self.images = self.repair.images(self.comb.program, self.context)

    def load_state_dict(self, state: dict[str, Any]) -> TrainableModule:
        self._take_images()
        atoms = {g.name: g.atom for g in self.groups}
        self.masks = {atoms[name]: mask.numpy() for name, mask in state["masks"].items()}
        self._restart()
        self.scores |= {atoms[name]: scores.numpy().copy() for name, scores in state["scores"].items()}
        self.count, self.log = state["count"], state["log"]
        return self._cut(self.comb.module, self._kept({}), self.masks)

    # ---------------------------------------------------------------------------------------------------------- cutting
    def _event(
        self, done: int, module: TrainableModule, scores: Scores, importance: str | None = None
    ) -> Surgery | None:
        """Remove the least important indices until the event's share is gone. importance: what gave the scores, if not the
        pruner's."""
        scores = normalised(together(scores))
        for atom, mask in self.masks.items():
            scores[atom] = np.where(mask, scores[atom], GONE)
        sizes = self.task.chooser(self.sizes, scores, self.events[done])
        old, new = self.masks, dict(self.masks)
        for group in self.groups:
            keep = sizes.get(group.atom, group.size)
            if keep < self.sizes.get(group.atom, group.size):
                new[group.atom] = lowest_removed(scores[group.atom], keep)
        self._same_everywhere(new)
        lost = {g.name: self._lost(g, old, new) for g in self.groups if new.get(g.atom) is not old.get(g.atom)}
        cost = self.comb.cost({atom: int(mask.sum()) for atom, mask in new.items()})
        entry = {"step": done, "removed": lost, "importance": importance or plain(self.importance)}
        self.log.append(entry | {key: cost[key] for key in ("macs", "params")})
        self.masks = new
        self._restart()
        return self._surgery(module, old) if lost else None

    @staticmethod
    def _lost(group: Group, old: ax.Masks, new: ax.Masks) -> list[int]:
        before = old.get(group.atom, np.ones(group.size, dtype=bool))
        return np.flatnonzero(before & ~new[group.atom]).tolist()

    def _same_everywhere(self, masks: ax.Masks) -> None:
        removed = gathered([[g.name, np.flatnonzero(~masks[g.atom]).tolist()] for g in self.groups if g.atom in masks])
        if any(other != removed[0] for other in removed):
            raise GraphcombError("RemoveChannels: the processes would remove different channels; this is a bug")

    def _surgery(self, module: TrainableModule, old: ax.Masks) -> Surgery:
        tensors, values = self._kept(old), {}
        for node in self.outputs:
            axes = self.comb.axes[node]
            kept = {d: ax.kept_mask(axis, self.masks) for d, axis in enumerate(axes) if ax.touches(axis, self.masks)}
            values[node.name] = _relative(kept, axes, old)
        smaller = self._cut(module, tensors, self.masks)
        if self.repair is not None:
            self.log[-1]["repair"] = self._repaired(self.repair, module, smaller, tensors, old)
        return Surgery(smaller, tensors, values)

    def _repaired(
        self, repair: Repair, module: TrainableModule, smaller: TrainableModule, tensors: Kept, old: ax.Masks
    ) -> dict[str, Any]:
        """Repair the network that an event leaves, in place; returns the record. module: the network before the event. old:
        the masks before it."""
        before = self._cut(module, {}, old)  # a copy, since the module itself has taps and is in train mode
        removed: Removed = {}
        for name, dims in tensors.items():
            sizes = fetch(module, name).shape
            removed[name] = {d: sorted({*range(sizes[d])} - {*kept.tolist()}) for d, kept in dims.items()}
        for network in (before, smaller):
            move(network, torch.device("cpu"))  # the shapes of values are computed there
        derive = self.comb.program.derive
        return repair.apply(derive(before), derive(smaller), removed, self.context, self.images)

    def _kept(self, old: ax.Masks) -> Kept:
        """For each tensor, the indices that stay, counted among those that the old masks had left."""
        axes = self.comb.parameters
        return {n: _relative(dims, axes[n], old) for n, dims in kept_indices(self.comb, self.masks).items()}

    def _cut(self, module: TrainableModule, tensors: Kept, masks: ax.Masks) -> TrainableModule:
        """The network that the masks leave, with the `tensors` indices of the tensors of `module`."""

        def take(name: str, value: Any) -> Any:
            current = fetch(module, name)
            if not tensors.get(name):
                return copy_tensor(name, current)
            return like(value, select_kept(current.detach(), tensors[name]))

        return resized(self.comb, masks, take)

    # ----------------------------------------------------------------------------------------------------------- results
    def train(self, distill: Distill) -> tuple[Program, dict[str, Any]]:
        """Prune while training; returns the smaller program and the record. Raises BadInput if training ends before the
        last event."""
        student, self.distill = self.comb.program.copy(), distill
        training = distill.train(student, self.context, [self])
        if len(self.log) < len(self.events):
            raise BadInput(
                f"RemoveChannels.prune_share: training ended after {training['steps']} steps, before the event due at "
                f"{max(self.events)}; take a smaller share"
            )
        return student, training | {"events": self.log}

    def removed(self) -> Removed:
        """The removed indices of every tensor, in the original's numbering."""
        kept = kept_indices(self.comb, self.masks)
        return {name: {d: np.flatnonzero(~keep).tolist() for d, keep in dims.items()} for name, dims in kept.items()}

    def masked(self, module: TrainableModule) -> Program:
        """The original network with the trained weights, and its own where indices were removed."""
        return restored(self.comb, self.masks, module)


def _relative(kept: Mapping[int, np.ndarray], axes: list[ax.Axis], old: ax.Masks) -> dict[int, torch.Tensor]:
    """The indices that stay in each dimension, counted among those that the old masks had left; only dimensions with a
    change."""
    indices = {}
    for d, keep in kept.items():
        before = ax.kept_mask(axes[d], old)
        if before.sum() > keep.sum():
            indices[d] = torch.from_numpy(np.flatnonzero(keep[before]))
    return indices


def removed_values(comb: Comb, masks: ax.Masks, nodes: list[fx.Node]) -> list[dict[str, Any]]:
    """What the values of some nodes lose; nodes and dimensions that lose the same share a row: a list of {"nodes": [[name,
    dim], ...], "removed": indices in the original's numbering}. With it, a pass can relate a smaller network's features to
    the teacher's."""
    places: dict[tuple[int, ...], list[list[Any]]] = {}
    for node in nodes:
        for d, axis in enumerate(comb.axes[node]):
            if ax.touches(axis, masks):
                lost = tuple(np.flatnonzero(~ax.kept_mask(axis, masks)).tolist())
                places.setdefault(lost, []).append([node.name, d])
    return [{"nodes": where, "removed": list(lost)} for lost, where in places.items()]
