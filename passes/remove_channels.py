"""Structured removal of channels, heads, hidden units and groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..graph.axes import Factor
from ..graph.comb import DEFAULT_KINDS, KINDS, Comb, Group, Sizer
from ..graph.cost import require_counted
from ..graph.errors import BadInput, GraphcombError, Refused, Unreachable
from ..graph.ops import arguments, op_name
from ..graph.program import Program
from ..graph.sparse import sparse_weights
from ..graph.surgery import remove
from ..graph.verify import TOLERANCE, check
from .adaptive import Pruner, event_steps, removed_values
from .base import Context, Pass, PassResult, check_field
from .batches import Feed
from .distill import Distill, block_outputs
from .importance import IMPORTANCES, SAMPLES, TRANSFORMS, Scores, normalised, together
from .knapsack import Predictor, allowed_seconds, knapsack, needed_latency, towards
from .legalise import Costs, mac_terms, movable, parameter_terms
from .selection import Selection, lowest_removed, planned_sizes
from .training import agreed, total_steps

DEFAULT_ALIGNMENT = 8  # fp16 tensor cores; what a target says goes before it


@dataclass(frozen=True)
class RemoveChannels(Pass):
    """Remove the least important indices of every prunable group, exactly: at once, or while the network trains.

    One of four targets: `ratio`, the share of every unfrozen axis removed (scope "local"), or of all prunable indices
    together (scope "global"); `macs` or `params`, what may remain, as a share of the dense program (at most 1) or as an
    absolute number; `latency`, what a run may take as the context's latency model predicts it, as a share of the dense
    program or as a time ("3.5 ms", "800 us"), by a knapsack over all groups (`passes.knapsack`). Without a target, ratio
    0.5. Where an axis is a product, one factor shrinks: heads before head width.

    importance: "magnitude", "taylor", "fisher" (both need data, and are exact to first order: `passes.importance`; with
    "-paper" after them in CPD's published form) or "random"; by default magnitude, with `train` fisher. samples: how many
    of the data's samples gradients are taken of before anything is cut (without `train`, or with schedule "one-shot"), in
    whole batches: random ones where a loader goes through its data set in order, else the first it yields.
    scope: by default local, with `train` global. round_to: widths stay multiples of it; None takes the target's alignment
    for the dtype, or 8. min_channels: what every group keeps at least. kinds: which kinds of groups may shrink. include,
    exclude: patterns over parameter names.

    A global selection for a cost ranks chunks by importance; gradient scores, which are changes of the loss, by importance
    per cost saved (after CPD, arXiv 2408.03046; the exact cost is ours), and more so the less of a group is left.

    train: prune while training, with the options of `Distill` (CPD's way). Scores are summed after every backward pass of
    the network as it then is, with the loss it trains on. schedule: "adaptive" prunes every `interval` steps, a little
    each time; "iterative" in `rounds` equal parts; "one-shot" before the first step. prune_share: the share of all steps in
    which the first two reach the target; the rest fine-tunes what is left. Learning rates, labels and checkpoints are
    those of `train`. The record is that of training, with the `events`; `passes.adaptive` says when they come and what
    masks mean.

    Raises BadInput for options that make no sense, Unreachable when a target cannot be met, Refused for a pattern of
    `Sparsify` that would break.
    """

    ratio: float | None = None
    macs: float | None = None
    params: float | None = None
    latency: float | str | None = None
    importance: str | None = None
    scope: str | None = None
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

    def __post_init__(self) -> None:
        for key, alone, training in (("importance", "magnitude", "fisher"), ("scope", "local", "global")):
            if getattr(self, key) is None:
                object.__setattr__(self, key, training if self.train else alone)
        given = [k for k in ("ratio", "macs", "params", "latency") if getattr(self, k) is not None]
        if len(given) > 1:
            raise BadInput(f"RemoveChannels: give one of ratio, macs, params and latency, not {' and '.join(given)}")
        if self.latency is not None:
            allowed_seconds(self.latency, 1.0, "RemoveChannels")
        check_field(self, "ratio", self.ratio is None or 0 <= self.ratio < 1, "a share of at least 0 and under 1")
        for key in ("macs", "params"):
            value = getattr(self, key)
            check_field(self, key, value is None or value > 0, "what may remain, a share or a number above 0")
        schedules = ("adaptive", "iterative", "one-shot")
        check_field(self, "importance", self.importance in IMPORTANCES, f"one of {', '.join(IMPORTANCES)}")
        check_field(self, "scope", self.scope in ("local", "global"), "local or global")
        check_field(self, "schedule", self.schedule in schedules, "adaptive, iterative or one-shot")
        check_field(self, "prune_share", 0 < self.prune_share <= 1, "a share above 0, at most 1")
        for key in ("round_to", "min_channels", "interval", "rounds", "samples"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise BadInput(f"RemoveChannels.{key}: a whole number of at least 1, not {value}")
        for key in ("kinds", "include", "exclude"):
            value = getattr(self, key)
            object.__setattr__(self, key, (value,) if isinstance(value, str) else tuple(value))
        for kind in self.kinds:
            if kind not in KINDS:
                raise BadInput(f"RemoveChannels.kinds: some of {', '.join(KINDS)}, not {kind!r}")

    def run(self, program: Program, context: Context) -> PassResult:
        comb = Comb(program)
        free = movable(comb, self.kinds, self.include, self.exclude)
        planned, step = planned_sizes(comb, context.plan), self.alignment(context)
        silent = self._without_gradients(comb, free)
        free = [g for g in free if g.name not in silent]
        atoms = {g.atom for g in free}
        groups = [g for g in comb.groups if g.atom in atoms or g.name in planned]
        places = {g.atom: i for i, g in enumerate(comb.groups)}
        predictor: Predictor | None = None

        def predict() -> list[Any]:
            nonlocal predictor
            predictor = self._predictor(comb, free, context)
            return [str(predictor.latency), predictor.total({})] if predictor else []

        def choose(sizes: dict[Factor, int], scores: Scores, share: float) -> dict[Factor, int]:
            found = agreed(lambda: {places[atom]: n for atom, n in select(sizes, scores, share).items()})
            return {comb.groups[i].atom: n for i, n in found.items()}

        def select(sizes: dict[Factor, int], scores: Scores, share: float) -> dict[Factor, int]:
            selection = Selection(comb, free, step, self.min_channels, sizes)
            fixed = [g for g in groups if g.name in planned]
            selection.sizes |= {g.atom: planned[g.name] for g in fixed}  # where they end decides what else must go
            self._choose(selection, [g for g in free if g.name not in planned], scores, predictor, share)
            for group in fixed:
                selection.approach(group, planned[group.name], share)
            return selection.sizes

        training: dict[str, Any] = {}
        masked, predicted = None, agreed(predict)  # only the main process measures
        if self.train is None:
            scores = normalised(together(self._score(comb, groups, context)))
            sizes = choose({}, scores, 1.0)
            masks = {g.atom: lowest_removed(scores[g.atom], sizes.get(g.atom, g.size)) for g in groups}
            smaller, removed = remove(comb, masks)
        else:
            self._require_no_pattern(program, groups)  # what cannot be done is said before training
            choose({}, {g.atom: np.ones(g.size) for g in groups}, 1.0)
            total = total_steps(self.train, context.batches, "RemoveChannels.train", Feed(program))
            events = event_steps(self.schedule, total, self.interval, self.rounds, self.prune_share)
            identity = [self.options(), step, planned, predicted]
            pruner = Pruner(comb, groups, choose, str(self.importance), events, context, self.samples, identity)
            smaller, training = pruner.train(self.train)
            masks, removed, masked = pruner.masks, pruner.removed(), pruner.masked(smaller.module())
        masks = {atom: mask for atom, mask in masks.items() if not mask.all()}
        sizes = {atom: int(mask.sum()) for atom, mask in masks.items()}
        smaller.known_cost = comb.cost(sizes)
        frozen = [
            {"what": g.name, "kind": g.kind, "size": g.size, "why": g.frozen or silent[g.name]}
            for g in comb.groups
            if g.frozen or g.name in silent
        ]
        record = training | {
            "changed": [
                {"what": g.name, "kind": g.kind, "before": g.size, "after": sizes[g.atom]}
                for g in comb.groups
                if g.atom in sizes
            ],
            "refused": frozen + training.get("refused", []),
            "layers": layers(comb, sizes),
            "cost": {"before": comb.cost({}), "after": smaller.cost()},
            "alignment": step,
            "removed": removed,
            "features": removed_values(comb, masks, block_outputs(program)),
        }
        if predicted:
            record["latency"] = agreed(lambda: predictor.record(sizes) if predictor else None)
        result = PassResult(smaller, record, removed, masked)
        if masked is not None and removed:
            record["verified"] = self._proven(program, result, context)
        return result

    @staticmethod
    def _proven(program: Program, result: PassResult, context: Context) -> dict[str, Any]:
        """That the result is one slice of the masked network: the same weights, and what the absence oracle computes."""
        verdict = check(program, result, seed=context.seed)
        if not verdict.ok:
            why = verdict.disagreements[0] if verdict.disagreements else "nothing the oracle sees has changed"
            raise GraphcombError(f"RemoveChannels: the result is not the masked network ({why}); a bug of graphcomb")
        return {"oracle": "absence oracle", "error": verdict.error, "tolerance": TOLERANCE}

    @staticmethod
    def _require_no_pattern(program: Program, groups: list[Group]) -> None:
        sparse, shrinking = sparse_weights(program), {member for g in groups for member in g.members}
        for name, pattern in sparse.items():
            if pattern and (name, 1) in shrinking:
                raise Refused(
                    f"RemoveChannels: removing input channels one by one would break the pattern of {name}, which Sparsify "
                    f"made {pattern}; run RemoveChannels before Sparsify"
                )

    def _without_gradients(self, comb: Comb, groups: list[Group]) -> dict[str, str]:
        """Groups that training gives no scores, by name: all of their parameters are frozen. As they would score 0, they
        would be the first to go."""
        if self.train is None or self.importance not in TRANSFORMS:
            return {}
        trained = {name for name, p in comb.module.named_parameters(remove_duplicate=False) if p.requires_grad}
        why = "its parameters are frozen (requires_grad is False), so training gives it no score"
        return {g.name: why for g in groups if not any(name in trained for name, _ in g.members)}

    def _score(self, comb: Comb, groups: list[Group], context: Context) -> Scores:
        """How much each index of each group matters."""
        return IMPORTANCES[str(self.importance)](comb, groups, context, self.samples)

    def plan(self, program: Program, context: Context | None = None) -> list[dict[str, Any]]:
        """What the pass would do, group by group: name, kind, size, keep, the MACs removal saves, and why it is frozen.

        Edit the `keep` values and give the list back as `context.plan` to apply it.
        """
        context = context or Context()
        comb = Comb(program)
        groups = movable(comb, self.kinds, self.include, self.exclude)
        selection = Selection(comb, groups, self.alignment(context), self.min_channels)
        predictor = self._predictor(comb, groups, context)
        self._choose(selection, groups, self._score(comb, groups, context), predictor)
        whole = Costs(mac_terms(comb), [g for g in comb.groups if g.frozen is None])
        rows = []
        for g in comb.groups:
            keep = selection.kept(g)
            row: dict[str, Any] = {"name": g.name, "kind": g.kind, "size": g.size, "keep": keep}
            if g.frozen:
                rows.append(row | {"frozen": g.frozen})
            else:
                share = whole.saving(g.atom, g.size - keep) / max(whole.total, 1)
                rows.append(row | {"saves_macs": round(share, 4), "step": selection.step(g)})
        return rows

    def alignment(self, context: Context) -> int:
        """The step widths are multiples of."""
        if self.round_to is not None:
            return self.round_to
        return DEFAULT_ALIGNMENT if context.target is None else int(context.target.alignment(context.dtype))

    def _predictor(self, comb: Comb, groups: list[Group], context: Context) -> Predictor | None:
        """What predicts the latency, ready for all sizes that the groups may have; None without a latency target."""
        if self.latency is None:
            return None
        predictor = Predictor(comb, needed_latency(context.latency, "RemoveChannels", comb.program))
        selection = Selection(comb, groups, self.alignment(context), self.min_channels)
        predictor.prepare({g.atom: selection.allowed(g) for g in groups}, context.progress)
        return predictor

    def _choose(
        self, selection: Selection, groups: list[Group], scores: Scores, predictor: Predictor | None, share: float = 1.0
    ) -> None:
        """Shrink the groups of a selection: choose the sizes that meet the target, then go `share` of the way to them, from
        where they are whole. Other groups of the selection stay as they are."""
        rest = {a: n for a, n in selection.sizes.items() if a not in {g.atom for g in groups}}
        if predictor is not None and self.latency is not None:
            seconds = allowed_seconds(self.latency, predictor.total({}), "RemoveChannels")
            options = {a: [n] for a, n in rest.items()} | {g.atom: selection.allowed(g) for g in groups}
            flat = {a: scores.get(a, np.ones(a.size)) for a in options}
            sizes = knapsack(predictor, options, flat, seconds)
            if sizes is None:
                whole, least = predictor.total({}), predictor.total({a: min(o) for a, o in options.items()})
                raise self._unreachable("latency", selection, *(f"{1e3 * t:.3g} ms" for t in (seconds, whole, least)))
            whole = predictor.total(rest)
            selection.sizes |= towards(predictor, options, flat, sizes, whole - share * max(whole - seconds, 0))
            return
        target = next((t for t in ("macs", "params") if getattr(self, t) is not None), None)
        if target is None:
            ratio = 0.5 if self.ratio is None else self.ratio
            if self.scope == "local":
                selection.uniform(groups, ratio * share)
            else:
                selection.by_count(groups, scores, ratio, share)
            return
        if target == "macs":
            require_counted(selection.comb.module, "RemoveChannels.macs")
        terms = mac_terms(selection.comb) if target == "macs" else parameter_terms(selection.comb)
        costs = Costs(terms, [g for g in selection.comb.groups if g.frozen is None])
        dense = costs.total
        for atom, size in rest.items():
            costs.set(atom, size)
        whole = costs.total
        for g in groups:
            costs.set(g.atom, selection.kept(g))
        wanted = getattr(self, target)
        end = wanted * dense if wanted <= 1 else wanted
        goal = end if share == 1 else whole - share * max(whole - end, 0)  # exactly, in floating point too
        if self.scope == "local":
            reached = selection.uniform_until(groups, costs, goal) <= goal
        else:
            reached = selection.greedy(groups, scores, costs, goal, self.importance in TRANSFORMS, end)
        if not reached:
            least = costs.total
            raise self._unreachable(target, selection, f"{end:,.0f}", f"{dense:,}", f"{least:,} ({least / dense:.1%})")

    @staticmethod
    def _unreachable(target: str, selection: Selection, wanted: str, dense: str, reached: str) -> Unreachable:
        frozen = [g.name for g in selection.comb.groups if g.frozen]
        return Unreachable(
            f"RemoveChannels.{target}: {wanted} of {dense} cannot be reached; {reached} can, with alignment "
            f"{selection.alignment} and min_channels {selection.minimum}; "
            f"frozen: {', '.join(frozen[:4]) or 'nothing'}{' and more' if len(frozen) > 4 else ''}"
        )


def layers(comb: Comb, sizes: dict[Factor, int]) -> list[dict[str, Any]]:
    """Convolutions and linears with their channels and MACs before and after."""
    rows = []
    dense, kept = Sizer({}), Sizer(sizes)
    for node, terms in comb.cost_terms():
        name = op_name(node)
        if not (name.startswith("conv") or name == "linear"):
            continue
        a = arguments(node)
        weight = a["weight"]
        channel = 1 if name.startswith("conv") else -1
        into, out = comb.axes[a["input"]][channel], comb.axes[node][channel]
        macs = [sum(math.prod(map(size, m)) for m in terms) for size in (dense, kept)]
        rows.append(
            {
                "name": str(weight.target) if weight.op == "get_attr" else node.name,
                "kind": "linear" if name == "linear" else "depthwise" if 1 < a["groups"] == dense(into) else "conv",
                "channels": {"before": [dense(into), dense(out)], "after": [kept(into), kept(out)]},
                "macs": {"before": macs[0], "after": macs[1]},
            }
        )
    return rows
