"""The pass that removes channels, heads, hidden units and groups of channels."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from ...graph.comb.axes import Factor
from ...graph.comb.groups import DEFAULT_KINDS, KINDS, Group
from ...graph.comb.solve import Comb
from ...graph.comb.surgery import Removed, remove, restored
from ...graph.cost import require_counted
from ...graph.errors import BadInput, GraphcombError, Unreachable
from ...graph.program import Program
from ...graph.trainable import TrainableModule
from ...graph.verify import TOLERANCE, check
from ..base import Change, Context, Pass, PassResult, Refusal, check_field
from ..common.feed import Feed
from ..common.latency import allowed_seconds, check_least
from ..common.repeat import functions_code
from ..repair.repair import Repair
from ..repair.score import Losses
from ..train.distill import Distill
from ..train.features import feature_nodes
from ..train.loop import total_steps
from ..train.trainee import Work
from .for_class import class_ties
from .groups import movable, not_trained, require_no_pattern
from .importance.scores import (
    IMPORTANCES,
    SAMPLES,
    TRANSFORMS,
    UNLABELLED,
    OwnImportance,
    Scores,
    after_repair,
    importance_of,
    losses_of,
    normalised,
    swapped,
    together,
)
from .kernel_count import kernel_record
from .masked_module import HeldPruner, not_held
from .sizes.costs import Costs, layer_costs, mac_terms
from .sizes.fixed_sizes import kept_by_pattern, read_plan
from .sizes.meet_target import Chooser, SharedChooser, Target, Task, nothing_to_prune, untrained
from .sizes.selection import Selection, lowest_removed
from .sizes.ties import Ties
from .while_training import Pruner, event_steps, removed_values

DURING = ("schedule", "interval", "rounds", "prune_share")  # options of pruning while training
DEFAULT_ALIGNMENT = 8  # that of fp16 tensor cores, used without a target


@dataclass(frozen=True)
class RemoveChannels(Pass):
    """Remove the least important indices of every prunable group, exactly: at once, or while the network trains.

    An index is one channel, head, hidden unit, or group of channels; a group is what the comb finds to be one axis of
    several tensors, which have to lose the same indices. Where an axis is a product, such as heads times head width, one
    factor shrinks, heads first.

    The target is one of four; without any it is ratio 0.5, or 0 with `keep`.

    - ratio: the share of indices that goes, from 0 to under 1: of each group (scope "local") or of all together ("global").
      Alignment, `min_channels` or a plan may leave more than that; this is no error, and the record's `target` says what
      was reached and why. Each of the following targets raises Unreachable instead.
    - macs, params: the multiply-accumulates or parameters that may remain: a share of the dense program's up to 1, or a
      whole number. MACs are those of the example input.
    - latency: the time that a run may take as the context's `latency` predicts it: a share of the dense program's, or a
      time such as "3.5 ms" or "800 us". Sizes come from a knapsack over all groups (`channels.knapsack`).
    - least_macs: the share of the MACs that a latency target has to leave. None is 0.25 where a data sheet predicts, which
      may be off by a factor, and 0 where something was measured.

    Besides the target, keep: what the groups keep whose names (as `plan` lists them) match a pattern, as a share up to 1 or
    a number of indices: `{"layer4.*": 0.5, "layer4.2.*": 32}`; the last match counts. The other groups meet the target.

    What goes, and in which portions:

    - importance: "magnitude"; "taylor" or "fisher", from gradients, which need labelled data and are exact to first order
      (`channels.importance`); "taylor-paper" or "fisher-paper", the form that CPD publishes (arXiv 2408.03046); or
      "random". "fisher-unlabelled" and "repair" need images without labels, and exclude `train`; the latter is the loss
      that remains after `repair`. Or a function, see `channels.importance.scores.from_function`. None is fisher with
      `train`, else magnitude.
    - repair: give the remaining weights their least-squares values, as `Repair` does with its defaults, from images of the
      data without labels; with `train` after each event, against the network just before it.
    - samples: number of samples, in whole batches, that gradients are taken from before anything is removed
      (`common.samples` says which).
    - scope: "local" takes the same share of each group, "global" ranks all groups together, "isomorphic" takes the same
      share of each kind of groups and ranks those of a kind together (`channels.groups.alike`), since different kinds do
      not compare. For a cost, global ranks gradient scores, which are changes of the loss, by importance per cost saved
      (after CPD; the exact cost is ours), higher the less of a group is left. None is global with `train` or a latency
      target, else local.
    - round_to: sizes stay multiples of it; None is the target's alignment for the context's dtype, or 8.
    - min_channels: how many indices every group keeps at least.
    - for_class: choose only sizes that the model's class can hold, for `transplant`: equal pieces where it splits, one
      number of heads in a layer, as many channels as heads times their width (`channels.for_class` says what the graph
      shows). The record's `tied` lists what shrinks together; groups that a class cannot express stay whole.
    - kinds: which kinds of groups may shrink. include, exclude: patterns over names of parameters and groups.

    While training, where `train` says how (the options of `Distill`; CPD's way):

    - schedule: "adaptive" removes a little every `interval` steps, "iterative" in `rounds` equal parts, "one-shot" all
      before the first step. Scores are summed over the steps since the last removal, from gradients of training.
    - prune_share: the share of all steps in which the target is reached; the rest fine-tunes what is left.

    The record then also has `Distill`'s, and the `events`; `channels.while_training` describes events and masks.

    Raises BadInput for options that make no sense and for missing data, Refused where a pattern of `Sparsify` would break
    or a MACs target meets uncounted operators, Unreachable for a target that cannot be met (see ratio) and, with `train` or
    a target other than ratio, if there is nothing to prune. Frozen groups stay whole, and are named with the reason.
    """

    ratio: float | None = None
    macs: float | None = None
    params: float | None = None
    latency: float | str | None = None
    least_macs: float | None = None
    importance: str | OwnImportance | None = None
    scope: Literal["local", "global", "isomorphic"] | None = None
    round_to: int | None = None
    min_channels: int = 1
    kinds: tuple[str, ...] = DEFAULT_KINDS
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    train: Distill | None = None
    schedule: Literal["adaptive", "iterative", "one-shot"] = "adaptive"
    interval: int = 50
    rounds: int = 5
    prune_share: float = 0.5
    samples: int = SAMPLES
    repair: bool = False
    keep: Mapping[str, float] = field(default_factory=dict)
    for_class: bool = False
    _unsaid: ClassVar[dict[str, Any]] = {}  # an instance sets it: options left to a default that depends on `train`

    def __post_init__(self) -> None:
        unsaid = {k: None for k in ("importance", "scope") if getattr(self, k) is None}
        object.__setattr__(self, "_unsaid", unsaid)
        if self.importance is None:
            object.__setattr__(self, "importance", "fisher" if self.train else "magnitude")
        if self.scope is None:
            object.__setattr__(self, "scope", "global" if self.train or self.latency is not None else "local")
        targets = [k for k in ("ratio", "macs", "params", "latency") if getattr(self, k) is not None]
        if len(targets) > 1:
            raise BadInput(f"RemoveChannels: give one of ratio, macs, params and latency, not {' and '.join(targets)}")
        if self.latency is not None:
            allowed_seconds(self.latency, 1.0, "RemoveChannels")
            says = "global with a latency target, which a knapsack over all groups meets"
            check_field(self, "scope", self.scope == "global", says)
        check_field(self, "ratio", self.ratio is None or 0 <= self.ratio < 1, "a share of at least 0 and under 1")
        check_least(self)
        for key in ("macs", "params"):
            value = getattr(self, key)
            says = "what may remain: a share above 0 and at most 1, or a whole number above 1"
            check_field(self, key, value is None or 0 < value <= 1 or (value > 1 and value == int(value)), says)
        known = callable(self.importance) or self.importance in IMPORTANCES
        check_field(self, "importance", known, f"one of {', '.join(IMPORTANCES)}, or a function")
        for size in self.keep.values():
            says = "by pattern what stays: a share above 0 and at most 1, or a whole number above 1"
            check_field(self, "keep", 0 < size <= 1 or (size > 1 and size == int(size)), says)
        check_field(self, "prune_share", 0 < self.prune_share <= 1, "a share above 0, at most 1")
        for key in ("round_to", "min_channels", "interval", "rounds", "samples"):
            value = getattr(self, key)
            check_field(self, key, value is None or value >= 1, "a whole number of at least 1")
        if self.train is not None:
            says = "one of the loss that trains, with `train`: others are of the network as it was before"
            check_field(self, "importance", self.importance not in ("repair", UNLABELLED), says)
        for kind in self.kinds:
            if kind not in KINDS:
                raise BadInput(f"RemoveChannels.kinds: some of {', '.join(KINDS)}, not {kind!r}")

    @property
    def target(self) -> str:
        """The name of the target option."""
        return next((t for t in ("macs", "params", "latency") if getattr(self, t) is not None), "ratio")

    def check_alone(self) -> None:
        for option in dataclasses.fields(self):
            said = option.name in DURING and getattr(self, option.name) not in (option.default, "one-shot")
            if said and self.train is None:
                raise BadInput(
                    f"RemoveChannels.{option.name}: says how to prune while training, so it needs `train`; without it "
                    "everything goes at once"
                )

    def run(self, program: Program, context: Context) -> PassResult:
        if self.train is not None:
            steps = total_steps(self.train, context.batches, "RemoveChannels.train", Feed(program))
            pruner = self.pruner(program, context, steps)
            return self.concluded(pruner, *pruner.train(self.train))
        task = self._task(program, context)
        losses: Losses | None = None
        swaps: dict[str, int] = {}
        if self.importance == "repair" and task.groups:
            losses = losses_of(task.comb, task.groups, context, self.samples)
        scores = normalised(together(self._score(task.comb, task.groups, context, losses)))
        sizes = task.chooser({}, scores, 1.0)
        masks = {g.atom: lowest_removed(scores[g.atom], sizes.get(g.atom, g.size)) for g in task.groups}
        if losses is not None:
            masks, swaps = swapped(task.groups, losses, masks)
        smaller, removed = remove(task.comb, masks)
        result = self._result(task, masks, smaller, removed, {"swaps": swaps} if swaps else {})
        if self.repair and removed:
            result.record["repair"] = Repair().apply(program, smaller, removed, context)
            result.masked = restored(task.comb, masks, smaller.module())
            result.record["verified"] = self._proven(program, result, context)
        return result

    def in_loop(self, program: Program, context: Context, steps: int, own: TrainableModule | None) -> Work:
        training = dataclasses.replace(self, train=self.train or Distill(), **self._unsaid)
        pruner = training.pruner(program, context, steps, own)

        def conclude(trained: Program) -> PassResult:
            smaller = pruner.cut(trained) if isinstance(pruner, HeldPruner) else trained
            return training.concluded(pruner, smaller, {"events": pruner.log})

        return Work([pruner], conclude, None if self.train is None else self.train.loss_in_loop(program, context))

    def pruner(self, program: Program, context: Context, steps: int, own: TrainableModule | None = None) -> Pruner:
        """The callback that cuts the program during this many training steps, or with `own` holds zeros in it
        (`HeldPruner`). Raises, before any training, for a target that cannot be met or a sparse pattern that would break.
        """
        task = self._task(program, context, own)
        require_no_pattern(program, task.groups)
        task.chooser.ask(Chooser.require)
        events = event_steps(self.schedule, steps, self.interval, self.rounds, self.prune_share)
        rows = {name: [row.keep, row.fixed] for name, row in task.planned.items()}
        identity = [self.options(), functions_code(self), self.alignment(context), rows, task.chooser.prediction]
        assert self.importance is not None
        repair = Repair() if self.repair else None
        options = (task, self.importance, events, self.samples, identity, repair)
        return Pruner(*options) if own is None else HeldPruner(*options, own=own)

    def concluded(self, pruner: Pruner, smaller: Program, training: dict[str, Any]) -> PassResult:
        """The result of a pruner that has cut the program to `smaller`, proven to be one slice of the masked network.
        training: the record of the training."""
        result = self._result(pruner.task, pruner.masks, smaller, pruner.removed(), training)
        result.masked = pruner.masked(smaller.module())
        if result.removed:
            result.record["verified"] = self._proven(pruner.comb.program, result, pruner.context)
        return result

    def _task(self, program: Program, context: Context, own: TrainableModule | None = None) -> Task:
        comb = Comb(program)
        free, unscored = self._movable(comb)
        if own is not None:
            unscored |= not_held(comb, free, own)
            free = [g for g in free if g.name not in unscored]
        # The ties that the model's class requires, and the groups that it forbids to shrink.
        ties, unfit = class_ties(comb, free, self.min_channels) if self.for_class else (Ties(free), {})
        free, unscored = ties.groups, unscored | unfit
        selection = Selection(comb, ties.chosen, self.alignment(context), self.min_channels, ties=ties)
        planned = kept_by_pattern(self.keep, comb, free, selection) | read_plan(comb, context.plan)
        for g in comb.groups:
            if g.name in unfit and g.name in planned and planned[g.name].keep < g.size:
                raise BadInput(f"RemoveChannels.for_class: the plan shrinks {g.name}: {unfit[g.name]}")
        atoms = {g.atom for g in free}
        groups = [g for g in comb.groups if g.atom in atoms or g.name in planned]
        self._require_groups(comb, groups, unscored)
        target = self._target(context)
        chooser = SharedChooser(comb, lambda: Chooser(target, comb, ties, planned, context, unscored))
        return Task(comb, groups, chooser, context, unscored, unfit, planned, ties)

    def _result(
        self, task: Task, masks: dict[Factor, np.ndarray], smaller: Program, removed: Removed, training: dict[str, Any]
    ) -> PassResult:
        comb, chooser = task.comb, task.chooser
        masks = {atom: mask for atom, mask in masks.items() if not mask.all()}
        sizes = {atom: int(mask.sum()) for atom, mask in masks.items()}
        chooser.ask(lambda c: c.require_macs(sizes))
        smaller.known_cost = comb.cost(sizes)
        cut = [g for g in comb.groups if g.atom in sizes]
        whole = [g for g in comb.groups if g.frozen or g.name in task.unscored]
        refused = [Refusal(g.name, g.frozen or task.unscored[g.name], {"kind": g.kind, "size": g.size}) for g in whole]
        record = training | {
            "changed": [Change(g.name, {"kind": g.kind, "before": g.size, "after": sizes[g.atom]}) for g in cut],
            "refused": [*refused, *training.get("refused", [])],
            "layers": layer_costs(comb, sizes),
            "cost": {"before": comb.cost({}), "after": smaller.cost()},
            "target": chooser.ask(lambda c: c.record(sizes)),
            "alignment": self.alignment(task.context),
            "kernels": kernel_record(comb, sizes, smaller.structure, task.context),
            "removed": removed,
            "features": removed_values(comb, masks, feature_nodes(comb.program)),
        }
        if self.for_class:
            record["tied"] = task.ties.record()
        if chooser.prediction:
            record["latency"] = chooser.ask(lambda c: c.latency_record(sizes))
        return PassResult(smaller, record, removed)

    @staticmethod
    def _proven(program: Program, result: PassResult, context: Context) -> dict[str, Any]:
        """Prove that the result is one slice of the masked network: the same weights, and the outputs of the absence
        oracle."""
        verdict = check(program, result, seed=context.seed)
        if not verdict.ok:
            why = verdict.disagreements[0] if verdict.disagreements else "nothing the oracle sees has changed"
            raise GraphcombError(f"RemoveChannels: the result is not the masked network ({why}); a bug of graphcomb")
        return {"oracle": "absence oracle", "error": verdict.error, "tolerance": TOLERANCE}

    def _movable(self, comb: Comb) -> tuple[list[Group], dict[str, str]]:
        """The groups that may shrink; and, with the reason, those without a score from training (one-shot needs none)."""
        groups = movable(comb, self.kinds, self.include, self.exclude)
        if self.train is None or self.importance not in TRANSFORMS or self.schedule == "one-shot":
            return groups, {}
        unscored = not_trained(comb, groups)
        return [g for g in groups if g.name not in unscored], unscored

    def _require_groups(self, comb: Comb, groups: list[Group], unscored: Mapping[str, str]) -> None:
        """Raise Unreachable where there is nothing to prune, unless nothing is asked for; for a ratio without `train` only
        warn, since a share of no axes is met. Raises Refused for a target in MACs where not all operators are counted."""
        if self.target == "macs":
            require_counted(comb.module, "RemoveChannels.macs")
        if groups or (self.train is None and getattr(self, self.target) in (0, 1, 1.0)):
            return
        if unscored:
            raise Unreachable(f"RemoveChannels: nothing to prune; {untrained(unscored)}")
        if self.train is not None or self.target != "ratio":
            raise Unreachable(nothing_to_prune(comb))
        warnings.warn(nothing_to_prune(comb), stacklevel=4)

    def _score(self, comb: Comb, groups: list[Group], context: Context, losses: Losses | None = None) -> Scores:
        """The importance of each index of each group. losses: the statistics of "repair", if they are known."""
        if not groups:
            return {}
        if losses is not None:
            return after_repair(comb, groups, context, self.samples, losses)
        assert self.importance is not None  # __post_init__ has seen to it
        return importance_of(self.importance)(comb, groups, context, self.samples)

    def plan(self, program: Program, context: Context | None = None) -> list[dict[str, Any]]:
        """The rows that the pass would apply, one for each group: name, kind, size, keep, the share of MACs saved, and why
        it is frozen.

        Edit the `keep` values, add `"prune": False` or take rows out, and give the list back as `context.plan` to apply it.
        A row that is changed is a decision. The others stand as proposed if the target is met with them, else they are
        chosen anew, as are groups without a row.
        """
        context = dataclasses.replace(context or Context(), plan=None)
        task = self._task(program, context)
        comb, unfit = task.comb, task.unfit
        sizes = task.chooser({}, self._score(comb, task.groups, context))
        steps = task.chooser.ask(lambda c: {g.name: c.step(g) for g in comb.groups if not g.frozen})
        whole = Costs(mac_terms(comb), [g for g in comb.groups if g.frozen is None])
        rows = []
        for g in comb.groups:
            keep = sizes.get(g.atom, g.size)
            row: dict[str, Any] = {"name": g.name, "kind": g.kind, "size": g.size, "keep": keep}
            if g.frozen or g.name in unfit:
                rows.append(row | {"frozen": g.frozen or unfit[g.name]})
            else:
                share = whole.saving(g.atom, g.size - keep) / max(whole.total, 1)
                rows.append(row | {"proposed": keep, "saves_macs": round(share, 4), "step": steps[g.name]})
        return rows

    def _target(self, context: Context) -> Target:
        value = getattr(self, self.target)
        value = (0.0 if self.keep else 0.5) if value is None else value
        per_cost = self.importance in TRANSFORMS or self.importance == "repair"
        sizes = self.alignment(context), self.min_channels, self.least_macs
        return Target(self.target, value, self.scope, per_cost, *sizes)

    def alignment(self, context: Context) -> int:
        """The number that widths are multiples of."""
        if self.round_to is not None:
            return self.round_to
        return DEFAULT_ALIGNMENT if context.target is None else int(context.target.alignment(context.dtype))
