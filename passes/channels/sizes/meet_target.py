"""How small the groups of a program become: for a ratio, a cost or a latency, with a plan, at once or step by step; or why
a target cannot be met (`Unreachable`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from ....graph.comb.axes import Factor
from ....graph.comb.groups import Group
from ....graph.comb.solve import Comb
from ....graph.errors import Unreachable
from ...base import Context
from ...common.latency import allowed_seconds, below, least_share, needed_latency
from ...common.processes import agreed
from ..groups import alike
from ..importance.members import Scores
from .costs import TERMS, Costs, mac_terms
from .fixed_sizes import Planned, some
from .knapsack import Floor, Predictor, knapsack, towards
from .selection import Selection
from .ties import Ties

Sizes = dict[Factor, int]


@dataclass(frozen=True)
class Target:
    """What is asked of the sizes, and how they may be chosen.

    name: "ratio" (value: the share of indices that goes), "macs" or "params" (value: what may remain, a share of the dense
    program's up to 1, else a number) or "latency" (value: what may remain, a share or a time such as "3.5 ms"). scope: as in
    `RemoveChannels`: "local" takes the same share of each group, "global" ranks all groups together by their scores,
    "isomorphic" ranks those of one kind together and takes the same share of each kind. per_cost: whether scores are changes
    of the loss, to be divided by the cost that an index saves. alignment: sizes are multiples of it. min_channels: how many
    indices every group keeps at least. least_macs: see `common.latency`.
    """

    name: str
    value: float | str
    scope: str | None
    per_cost: bool
    alignment: int
    min_channels: int
    least_macs: float | None

    def remaining(self, dense: float) -> float:
        """What may remain of a dense program's cost, or seconds."""
        if self.name == "latency":
            return allowed_seconds(self.value, dense, "RemoveChannels")
        assert not isinstance(self.value, str)
        return self.value * dense if self.value <= 1 else self.value


class Chooser:
    """Chooses the sizes of groups for a target.

    ties: the groups that may shrink, and bundles of them: sizes are chosen for the bundles' wholes, but arguments and
    results are for the groups themselves. plan: see `read_plan`. untrained: groups that may not shrink because training
    cannot score or remove them, with the reason. If the plan as a whole misses the target, its rows that are no decisions
    are chosen anew. A call, or `require`, raises Unreachable for a macs, params or latency target that cannot be met; a
    ratio raises nothing.
    """

    def __init__(
        self,
        target: Target,
        comb: Comb,
        ties: Ties,
        plan: Mapping[str, Planned],
        context: Context,
        untrained: Mapping[str, str] = MappingProxyType({}),
    ):
        self.target, self.comb, self.ties, self.untrained = target, comb, ties, untrained
        self.groups, self.all = ties.chosen, ties.alike(g for g in comb.groups if g.frozen is None)
        self.predictor = self._predictor(context)
        self.least = least_share(target.least_macs, self.predictor.latency if self.predictor else None)
        self._end: Sizes | None = None  # the last sizes that met a latency target
        keeps = self.ties.kept({name: row.keep for name, row in plan.items()})
        fixed = {self.ties.whole(g).atom for g in comb.groups if g.name in plan and plan[g.name].fixed}
        rows = [(g, Planned(keeps[g.name], g.atom in fixed)) for g in self.all if g.name in keeps]
        self.plan = [(g, row.keep) for g, row in rows]
        if not all(row.fixed for _, row in rows) and not self._meets():
            self.plan = [(g, row.keep) for g, row in rows if row.fixed]

    def _predictor(self, context: Context) -> Predictor | None:
        """What predicts the latency, prepared for all sizes that the groups may have; None without a latency target."""
        if self.target.name != "latency":
            return None
        latency = needed_latency(context.latency, "RemoveChannels", self.comb.program)
        predictor = Predictor(self.comb, latency, ties=self.ties)
        selection = self._selection({})
        predictor.prepare({g.atom: selection.allowed(g) for g in self.groups}, context.progress)
        return predictor

    @property
    def prediction(self) -> list[Any]:
        """With a latency target, the latency model's name and the dense program's seconds; else empty."""
        return [] if self.predictor is None else [str(self.predictor.latency), self.predictor.total({})]

    def _selection(self, sizes: Mapping[Factor, int]) -> Selection:
        target = self.target
        return Selection(self.comb, self.groups, target.alignment, target.min_channels, sizes, self.ties)

    def _meets(self) -> bool:
        try:
            return self._choose(self._planned({}), self._flat(), 1.0)
        except Unreachable:
            return False

    def _flat(self) -> Scores:
        return {g.atom: np.ones(g.size) for g in self.all}

    def _planned(self, sizes: Mapping[Factor, int]) -> Selection:
        """A selection that starts from these sizes, with the groups of the plan at their final sizes."""
        selection = self._selection(sizes)
        selection.sizes |= {g.atom: keep for g, keep in self.plan}
        return selection

    def require(self) -> None:
        """Raise Unreachable where a macs, params or latency target cannot be met, whatever the scores."""
        self._sizes({}, self._flat(), 1.0)

    def require_macs(self, sizes: Sizes) -> None:
        """Raise Unreachable where a latency target leaves fewer MACs than it must."""
        if self.predictor is None:
            return
        share = self.comb.macs(sizes) / max(self.comb.macs({}), 1)
        if share < self.least:
            seconds, whole = self.predictor.total(self.ties.joined(sizes)), self.predictor.total({})
            raise below("RemoveChannels", self.predictor.latency, seconds, whole, share, self.least)

    def _floor(self) -> Floor | None:
        """The MACs that have to remain, as a floor; None if none have to."""
        if not self.least:
            return None
        costs = Costs(mac_terms(self.comb), self.all, self.ties.units)
        return Floor(costs.at, self.least * costs.total)

    def __call__(self, sizes: Mapping[Factor, int], scores: Scores, share: float = 1.0) -> Sizes:
        """The size of each group when `share` of the way to the target is gone. sizes: of groups that have lost some
        already.

        Raises Unreachable, see `Chooser`.
        """
        return self.ties.spread(self._sizes(self.ties.joined(sizes), self.ties.scores(scores), share))

    def _sizes(self, sizes: Mapping[Factor, int], scores: Scores, share: float) -> Sizes:
        selection = self._planned(sizes)
        self._choose(selection, scores, share)
        for group, keep in self.plan:
            selection.approach(group, keep, share)
        return selection.sizes

    def _choose(self, selection: Selection, scores: Scores, share: float) -> bool:
        """Shrink the groups that the plan leaves free: choose sizes that meet the target, then go `share` of the way there
        from the whole program, with planned groups at their final sizes.

        Returns whether the target was met; only for a ratio can it be False, since the others raise Unreachable.
        """
        planned = {g.atom: keep for g, keep in self.plan}
        groups = [g for g in self.groups if g.atom not in planned]
        value = self.target.value
        if self.target.name == "latency":
            self._within_latency(selection, groups, scores, planned, share)
        elif self.target.name != "ratio":
            self._within_cost(selection, groups, scores, planned, share)
        elif self.target.scope == "isomorphic":
            ends = [selection.by_count(alike, scores, float(value), share, kind) for kind, alike in self._kinds(groups)]
            return all(ends)
        elif self.target.scope == "global":
            return selection.by_count(groups, scores, float(value), share, self.groups)
        else:
            selection.uniform(groups, float(value) * share)
        return True

    def _kinds(self, groups: list[Group]) -> list[tuple[list[Group], list[Group]]]:
        """For each kind, all groups that may shrink, and those of them that the plan leaves free."""
        free = {g.atom for g in groups}
        return [(kind, [g for g in kind if g.atom in free]) for kind in alike(self.comb, self.groups)]

    def _within_latency(
        self, selection: Selection, groups: list[Group], scores: Scores, planned: Sizes, share: float
    ) -> None:
        assert self.predictor is not None
        dense = self.predictor.total({})
        seconds = self.target.remaining(dense)
        options = {a: [n] for a, n in planned.items()} | {g.atom: selection.allowed(g) for g in groups}
        flat = {a: scores.get(a, np.ones(a.size)) for a in options}
        sizes = knapsack(self.predictor, options, flat, seconds, self._floor())
        if sizes is None and self._end is not None and all(n in options[a] for a, n in self._end.items()):
            sizes = self._end  # a search from another start may miss them
        if sizes is None:
            if self.least and (without := knapsack(self.predictor, options, flat, seconds)) is not None:
                self.require_macs(self.ties.spread(without))
            least = self.predictor.total({a: min(o) for a, o in options.items()})
            raise self._unreachable(*(f"{1e3 * t:.3g} ms" for t in (seconds, dense, least)))
        self._end = sizes
        whole = self.predictor.total(planned)
        goal = whole - share * max(whole - seconds, 0)
        selection.sizes |= sizes if share == 1 else towards(self.predictor, options, flat, sizes, goal)

    def _within_cost(
        self, selection: Selection, groups: list[Group], scores: Scores, planned: Sizes, share: float
    ) -> None:
        costs = Costs(TERMS[self.target.name](self.comb), self.all, self.ties.units)
        dense = costs.total
        whole = costs.at(planned)
        costs.at({g.atom: selection.kept(g) for g in groups})
        end = self.target.remaining(dense)
        goal = end if share == 1 else whole - share * max(whole - end, 0)  # the last event's goal is exactly the end
        if self.target.scope == "isomorphic":
            kinds = [alike for _, alike in self._kinds(groups)]
            reached = selection.alike_until(kinds, scores, costs, goal) <= goal
        elif self.target.scope == "global":
            reached = selection.greedy(groups, scores, costs, goal, self.target.per_cost, end)
        else:
            reached = selection.uniform_until(groups, costs, goal) <= goal
        if not reached:
            raise self._unreachable(f"{end:,.0f}", f"{dense:,}", f"{costs.total:,} ({costs.total / dense:.1%})")

    def _unreachable(self, wanted: str, dense: str, reached: str) -> Unreachable:
        frozen = [g.name for g in self.comb.groups if g.frozen]
        why = [f"alignment {self.target.alignment}", f"min_channels {self.target.min_channels}"]
        if self.plan:
            why.append("the sizes in the plan for " + some([f"{g.name} ({keep})" for g, keep in self.plan]))
        message = (
            f"RemoveChannels.{self.target.name}: {wanted} of {dense} cannot be reached; {reached} can, with "
            f"{', '.join(why[:-1])} and {why[-1]}; frozen: {some(frozen) or 'nothing'}"
        )
        return Unreachable(message + (f"; {untrained(self.untrained)}" if self.untrained else ""))

    def record(self, sizes: Sizes) -> dict[str, Any]:
        """What was asked for and what the sizes leave, as shares of the dense program, and if these differ, why."""
        target = self.target.name
        if target == "latency":
            assert self.predictor is not None
            dense, left = self.predictor.total({}), self.predictor.total(self.ties.joined(sizes))
        elif target == "ratio":
            dense = sum(g.size for g in self.ties.groups)
            left = sum(sizes.get(g.atom, g.size) for g in self.ties.groups)
        else:
            dense, left = (self.comb.cost(s)[target] for s in ({}, sizes))
        asked = 1 - float(self.target.value) if target == "ratio" else self.target.remaining(dense) / dense
        reached = left / dense if dense else 1.0
        record = {"target": target, "asked": asked, "reached": reached}
        if abs(asked - reached) > NEAR:
            record["why"] = self._why(self.ties.joined(sizes), reached < asked)
        return record

    def latency_record(self, sizes: Sizes) -> dict[str, Any]:
        """The predicted seconds before and after; see `Predictor.record`."""
        assert self.predictor is not None
        return self.predictor.record(self.ties.joined(sizes))

    def step(self, group: Group) -> int:
        """Number of indices by which a group may shrink at a time."""
        whole = self.ties.whole(group)
        return self._selection({}).step(whole) * (group.size // whole.size)

    def _why(self, sizes: Sizes, beyond: bool) -> str:
        if self.plan:
            return "the plan fixes " + some([f"{g.name} at {keep}" for g, keep in self.plan])
        selection = self._selection(sizes)
        groups = [g for g in self.groups if g.atom in sizes or not beyond]
        steps = [f"{g.name} in steps of {selection.step(g)} of {g.size}" for g in groups]
        how = f"alignment {self.target.alignment} and min_channels {self.target.min_channels}"
        what = "no size that was removed would fit back" if beyond else "nothing more can go"
        return f"{what}, with {how}: {some(steps)}"


class SharedChooser:
    """A `Chooser` in the main process, whose answers and errors all processes share, since measured times differ."""

    def __init__(self, comb: Comb, make: Callable[[], Chooser]):
        self.comb, self._make = comb, make
        self._places = {g.atom: i for i, g in enumerate(comb.groups)}
        self.prediction: list[Any] = self.ask(lambda chooser: chooser.prediction)

    @cached_property
    def _chooser(self) -> Chooser:
        return self._make()

    def ask(self, question: Callable[[Chooser], Any]) -> Any:
        """The main process's answer, in all processes. It must pickle, so it may have no atoms, which are told apart by
        identity."""
        return agreed(lambda: question(self._chooser))

    def __call__(self, sizes: Sizes, scores: Scores, share: float = 1.0) -> Sizes:
        """See `Chooser`. Processes exchange the places of groups instead of atoms."""
        chosen = self.ask(lambda chooser: {self._places[a]: n for a, n in chooser(sizes, scores, share).items()})
        return {self.comb.groups[i].atom: n for i, n in chosen.items()}


NEAR = 0.02  # the record gives a reason where asked and reached shares of the dense program differ by more


def untrained(unscored: Mapping[str, str]) -> str:
    """The end of a message: how many groups training cannot score or remove, and the reason for the first."""
    return f"left alone: {len(unscored)} groups ({some(list(unscored))}); of the first: {next(iter(unscored.values()))}"


def nothing_to_prune(comb: Comb) -> str:
    """The message for a program in which no group may shrink."""
    frozen = [f"{g.name}: {g.frozen}" for g in comb.groups if g.frozen]
    others = len(comb.groups) - len(frozen)
    return (
        f"RemoveChannels: nothing to prune: of {len(comb.groups)} groups {len(frozen)} are frozen "
        f"({some(frozen, 2) or 'none'}) and {others} are left out by kinds, include and exclude or as small as can be"
    )


@dataclass(frozen=True)
class Task:
    """What `RemoveChannels` has to do with one program.

    groups: those that may shrink, or that a plan fixes. chooser: chooses their sizes. unscored: groups that training cannot
    score or a class cannot express, with the reason; unfit: the latter alone. planned: the plan's rows by group name. ties:
    which groups are tied.
    """

    comb: Comb
    groups: list[Group]
    chooser: SharedChooser
    context: Context
    unscored: dict[str, str]
    unfit: dict[str, str]
    planned: dict[str, Planned]
    ties: Ties
