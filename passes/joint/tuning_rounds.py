"""Rounds of choosing, building and measuring: what the built network shows corrects the predictions. Source: ours.

Losses do not add up and predicted times are off, so the chosen network is built, and its loss and its time are measured.
The first round also builds the networks that widths, blocks, precision and sparsity alone would give for the same budget:
the ratios of their measured to their predicted losses scale the losses of each kind, on which the choice between them
depends; a kind that cannot reach the budget alone is taken to be as far off as the others. The ratio of measured to
predicted time scales the budget, or, of a network with variants of layers such as INT8, what these save: of them tables
know least, and where they save less than that, narrow layers must not seem slow. Where the correction leads back to a
network that was built, a choice between the slowest network within the budget and the fastest beyond it is tried. Where
the tables say that even the fastest choice is too slow, but not by much, it is built before the budget is given up. A method
alone whose first network comes near the best gets rounds of its own. The best network within the budget wins, those of the
single methods and of other budgets included; so of several budgets all have to be built for (`within`, `losing`) before one
of them is answered (`best`, `fastest`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

from ...graph.errors import Refused, Unreachable
from ...graph.program import Program
from ..base import Context
from ..channels.sizes.fixed_sizes import some
from ..quantize.choose_layers import QUANTISED
from .carry_out import Decision, decision, passes
from .solver.problem import Problem
from .solver.solve import Solved, solve
from .tables import Tables

ROUNDS = 3
OVER = 1.02  # a time of up to this multiple of a budget is within it, since repeated measurements differ
DOUBT = 1.25  # times a budget that the fastest choice may take by tables that nothing has corrected and still be built
NEAR = 0.1  # share of a budget by which the achieved latency may be off before the run says that it missed
VARIANTS = ("precision", "sparsity")
METHODS = ("widths", "blocks", *VARIANTS)  # each of which may decide alone
LITTLE, MOST = 0.05, 2.0  # the share of the time below which what variants save is not corrected, the largest factor
NATS = 0.01  # of divergence for a point of accuracy, as a first guess; a small ResNet lost a point for 0.01 to 0.02
RIVAL = (
    2.0  # times the loss of the best network that the first one of a method alone may have for it to get further rounds
)
TRIES = 6  # most choices whose structure is checked before one is built


@dataclass(frozen=True)
class Time:
    """Seconds of a run, and the range from `low` to `high` in which the true value mostly lies. measured: whether the whole
    network was measured; else its layers were predicted."""

    seconds: float
    low: float
    high: float
    measured: bool = False


@dataclass(frozen=True)
class Built:
    """A network that was built: the decision, how it was made ("joint" or one of METHODS), its loss and time, and those
    that the tables predicted. why: why it cannot be used; then its loss is infinite."""

    decided: Decision
    how: str
    program: Program
    loss: float
    time: Time
    predicted_loss: float
    predicted_seconds: float
    why: str | None = None

    @property
    def seconds(self) -> float:
        """The seconds of a run."""
        return self.time.seconds


@dataclass
class Correction:
    """The factors by which the tables are multiplied: of seconds, of the seconds that variants of layers save, and of the
    losses of each kind of change."""

    seconds: float = 1.0
    saved: float = 1.0
    losses: dict[str, float] = field(default_factory=lambda: dict.fromkeys(METHODS, 1.0))


@dataclass
class Tuner:
    """Chooses networks for several budgets with the same tables.

    build: makes the network of a decision. time: that of a program, measured or predicted layer by layer. rounds: how
    often the joint choice is built. say: gets a line of text for each network that is built. Attributes `whole` and
    `dense`: time and seconds of the dense program, by the same measure.
    """

    tables: Tables
    build: Callable[[Decision], Program]
    time: Callable[[Program], Time]
    rounds: int = ROUNDS
    say: Callable[[str], None] = lambda text: None
    correction: Correction = field(default_factory=Correction)
    built: dict[tuple[Any, ...], Built] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole = self.time(self.tables.space.program)
        self.dense = self.whole.seconds
        self.correction.seconds = self.dense / self.tables.times.whole

    def within(self, budget: float, how: str = "joint") -> Built:
        """The network that loses least within a budget in seconds; how: "joint", or one of METHODS alone.

        If none that was built is within the budget, the fastest of them. Raises Unreachable if no choice in the tables and
        no network that was built is within the budget, and if nothing that was built can be used."""
        try:
            return self._within_budget(budget, how)
        except Unreachable:  # by the times as they are corrected now, which what was built for another budget may belie
            best = _best([b for b in self.built.values() if how in ("joint", b.how)], budget)
            if best is None or best.seconds > OVER * budget:
                raise
            return best

    def _within_budget(self, budget: float, how: str) -> Built:
        if how != "joint":
            return self._usable(list(self._rounds(budget, how)), budget)
        singles: dict[str, Built] = {}
        for _ in self._rounds(budget, how):
            singles = singles or self._singles(budget)  # after the first choice, which corrects the times
        best = self.best(budget)
        for single, first in singles.items():
            if best is None or first.loss <= RIVAL * best.loss:
                with suppress(Unreachable):  # by the times as they are corrected now
                    list(self._rounds(budget, single))
        return self._usable(self.built.values(), budget)

    def best(self, budget: float) -> Built | None:
        """The network that loses least within a budget in seconds, of all that were built for any; the fastest if none is
        within it. None if none that can be used was built."""
        return _best(self.built.values(), budget)

    def _usable(self, tried: Collection[Built], budget: float) -> Built:
        best = _best(tried, budget)
        if best is None:
            why = next(b.why for b in tried)
            raise Unreachable(f"tune.latency: for {1e3 * budget:.3g} ms no network that was built can be used: {why}")
        return best

    def fastest(self, loss: float, lost: Callable[[Program], float] | None = None) -> Built | None:
        """The fastest network that loses no more than that, of all that were built for any budget; None if none does. See
        `losing` for the arguments."""
        usable = [b for b in self.built.values() if b.why is None]
        fits = [b for b in usable if (b.loss if lost is None else lost(b.program)) <= loss]
        return min(fits, key=lambda b: (b.seconds, b.loss), default=None)

    def _rounds(self, budget: float, how: str) -> Iterator[Built]:
        """Choose, build and measure until the choice does not change; yields the networks. Raises Unreachable, where only
        the tables say so not before the fastest choice was built."""
        tried: list[tuple[Solved, Built]] = []
        builds, doubted = 0, False
        while builds < self.rounds:
            limit = budget / self.correction.seconds
            seconds = [(self._now(solved), network.seconds <= OVER * budget) for solved, network in tried]
            # By the tables, the slowest within the budget and the fastest beyond it.
            inside = max((s for s, within in seconds if within), default=0.0)
            outside = min((s for s, within in seconds if not within), default=math.inf)
            if inside and outside < math.inf and not inside < limit < outside:
                limit = math.sqrt(inside * outside)  # no one factor fits both networks; try between them
            solved = self._choose(how, limit)
            if solved is None and not tried:
                solved, doubted = self._doubtful(how, DOUBT * limit), True
            if solved is None:
                break
            before = len(self.built)
            network = self._built(solved, how)
            if any(network is t for _, t in tried):
                break
            builds += len(self.built) > before
            self._correct_times(solved, network.seconds)
            tried.append((solved, network))
            yield network
        if not tried or (doubted and all(network.seconds > OVER * budget for _, network in tried)):
            raise self._unreachable(self._problem(how), budget)

    def _correct_times(self, solved: Solved, measured: float) -> None:
        """Correct the tables so that they say what was measured of a choice, whose seconds are theirs at present."""
        problem, factor = self._problem("joint"), 1.0
        saved = problem.seconds(problem.plain(solved.choice)) - problem.seconds(solved.choice)
        plain = solved.seconds + saved
        if saved >= LITTLE * plain:
            factor = (plain - measured / self.correction.seconds) / saved  # below 0 if it is slower than without
            factor = min(max(factor, -MOST), MOST)
            self.correction.saved *= factor
        self.correction.seconds = measured / (plain - factor * saved)

    def _now(self, solved: Solved) -> float:
        """The seconds that the tables, as they are corrected by now, say of an earlier choice."""
        problem = self._problem("joint")
        return self._seconds(problem, replace(solved, seconds=problem.seconds(solved.choice)))

    def losing(self, loss: float, lost: Callable[[Program], float] | None = None) -> Built:
        """The fastest network that loses no more than `loss`: in nats, or by another measure of a program, `lost`, such as
        points of accuracy. The tables are in nats; each round corrects how many of them the budget is. Raises Unreachable if
        no network that was built loses as little."""
        bound = loss if lost is None else NATS * loss
        low, high = 0.0, math.inf  # the largest budget in nats that held so far, the smallest loss that was too much
        for _ in range(self.rounds + (1 if lost is None else 4)):
            solved = self._settled("joint", partial(self._solved, loss=bound))
            if solved is None:
                break
            network = self._built(solved, "joint")
            measured = network.loss if lost is None else lost(network.program)
            ratio = min(max(loss / measured, 0.1), 2.0) if measured > 0 else 2.0
            if measured <= loss:
                low = bound
                bound = min(ratio * bound, math.sqrt(bound * high))
            else:
                high = min(high, solved.loss)
                bound = max(ratio * solved.loss, math.sqrt(low * high))
        best = self.fastest(loss, lost)
        if best is None:
            unit = "" if lost is None else " points"
            raise Unreachable(f"tune.loss: nothing that was built loses as little as {loss:g}{unit}; ask for more")
        return best

    def _problem(self, how: str) -> Problem:
        """The choice to make, by the losses known and corrected by now."""
        problem = self.tables.problem.scaled(self.correction.losses).saving(self.correction.saved)
        return problem if how == "joint" else problem.only(how)

    def _solved(self, problem: Problem, **limit: float) -> Solved | None:
        return solve(problem, connects=self.tables.space.connects, **limit)

    def _fastest(self, problem: Problem) -> Solved | None:
        """The choice whose structure is fastest, of those that the tables say are fastest, by all means and by each alone;
        None if there is none. (The tables add up what blocks save; where several go, they say too much.)"""
        parts = (problem, *(problem.only(how) for how in METHODS))
        solved = [choice for choice in map(self._solved, parts) if choice is not None]
        return min(solved, key=lambda choice: self._seconds(problem, choice), default=None)

    def _doubtful(self, how: str, allowed: float) -> Solved | None:
        """The fastest choice, if it changes anything and takes no longer than these seconds."""
        solved = self._settled(how, lambda problem: self._checked(problem, self._fastest(problem)))
        if solved is None or decision(self.tables.problem, solved.choice) == Decision():
            return None
        return solved if solved.seconds <= allowed else None

    def _choose(self, how: str, allowed: float) -> Solved | None:
        """The best choice within these seconds of the tables, also when checked on the program's structure."""
        return self._settled(how, lambda problem: self._within(problem, allowed))

    def _settled(self, how: str, choose: Callable[[Problem], Solved | None]) -> Solved | None:
        """A choice in which no loss is a mere guess: those that are get measured, and the choice is made again."""
        while True:
            solved = choose(self._problem(how))
            guessed = [] if solved is None else self.tables.guessed(solved.choice)
            if not guessed:
                return solved
            self.say(f"measuring the losses of least sizes: {some([f'{g.name} {size}' for g, size in guessed])}")
            for group, size in guessed:
                self.tables.losses.width(group, size)

    def _within(self, problem: Problem, allowed: float) -> Solved | None:
        """The best choice within these seconds, which are those of its structure, as are the seconds of the result. One that
        takes longer if the tries do not suffice; None if there is none by the tables."""
        best: Solved | None = None
        limit, low, high = allowed, 0.0, math.inf  # limits by the tables whose choices are fast enough, and are not
        for _ in range(TRIES):
            solved = self._checked(problem, self._solved(problem, seconds=limit))
            if solved is not None and solved.seconds <= OVER * allowed:
                best, low = solved, limit
                if high == math.inf or solved.seconds >= (1 - NEAR) * allowed:
                    break
            elif solved is None and best is None:
                break
            else:
                high = limit
            limit = math.sqrt(low * high) if low else limit * allowed / solved.seconds  # type: ignore[union-attr]
        if best is not None:
            return best
        fastest = self._checked(problem, self._fastest(problem))  # what the tables underrate may hide a fast one
        return fastest if fastest and fastest.seconds <= OVER * allowed else solved

    def _checked(self, problem: Problem, solved: Solved | None) -> Solved | None:
        """A choice with the seconds of its structure."""
        return solved and replace(solved, seconds=self._seconds(problem, solved))

    def _seconds(self, problem: Problem, solved: Solved) -> float:
        """The seconds of a choice by the tables, where the blocks and widths are those of the program's structure."""
        structure = problem.plain(solved.choice)  # variants of layers are taken from the tables
        return self.tables.seconds(decision(problem, structure)) + solved.seconds - problem.seconds(structure)

    def _singles(self, budget: float) -> dict[str, Built]:
        """Build the networks of each method alone, as far as these reach the budget; they correct the losses."""
        problem, limit = self.tables.problem, budget / self.correction.seconds
        kinds = {axis.kind for axis in problem.axes} | ({"blocks"} if problem.blocks else set())
        networks: dict[str, Built] = {}
        factors: dict[str, float] = {}
        for how in METHODS:
            solved = self._choose(how, limit) if how in kinds and len(kinds) > 1 else None
            if solved is None:
                continue
            networks[how] = network = self._built(solved, how)
            if how in VARIANTS:
                self._correct_times(solved, network.seconds)
            if solved.loss > 0 and 0 < network.loss < math.inf:
                factors[how] = network.loss / solved.loss
        # Losses that are added up are mostly too small, the more so the more goes. If a kind that cannot reach the budget
        # alone kept its factor, it would look cheaper than the others only because nobody has measured it.
        common = math.exp(fmean(map(math.log, factors.values()))) if factors else 1.0
        for how in METHODS:
            self.correction.losses[how] *= factors.get(how, common)
        return networks

    def _built(self, solved: Solved, how: str) -> Built:
        """The network of a choice; the same network is built only once."""
        decided = decision(self.tables.problem, solved.choice)
        key = (
            decided.blocks, *(tuple(sorted(part.items())) for part in (decided.widths, decided.precisions)), decided.sparse,
        )  # fmt: skip
        if key not in self.built:
            expected = self.correction.seconds * solved.seconds
            program = self.build(decided)
            loss = self.tables.losses.divergence(program)
            why = None if math.isfinite(loss) else "its outputs are not finite"
            try:
                time = self.time(program)
            except Refused as error:  # such as an export that differs from the program: nobody could use this network
                loss, time, why = math.inf, Time(expected, expected, expected), str(error)
            self.built[key] = Built(decided, how, program, loss, time, solved.loss, expected, why)
            self.say(
                f"{how}: {told(decided)}: "
                f"{1e3 * time.seconds:.3g} ms (predicted {1e3 * expected:.3g}), "
                f"loss {loss:.3g} (predicted {solved.loss:.3g})" + (f"; {why}" if why else "")
            )
        return self.built[key]

    def _unreachable(self, problem: Problem, budget: float) -> Unreachable:
        """The error for a budget that is too small: the smallest one that can be reached, and what prevents more."""
        fastest, space = self._fastest(problem), self.tables.space
        least = math.nan if fastest is None else self.correction.seconds * self._seconds(problem, fastest)
        hand = self.tables.fixed
        fixed = [*hand.widths, *(n for n, goes in hand.blocks.items() if not goes), *hand.precisions, *hand.sparse]
        refused = [name for name in space.refused if name not in fixed]
        why = [f"fixed by hand: {some(fixed)}"] if fixed else []
        why += [f"cannot shrink or go: {some(refused)} ({space.refused[refused[0]]})"] if refused else []
        why += [] if space.groups or space.blocks else ["there is nothing to prune"]
        return Unreachable(
            f"tune.latency: {1e3 * budget:.3g} of {1e3 * self.dense:.3g} ms cannot be reached; {1e3 * least:.3g} ms can"
            + (f"; {'; '.join(why)}" if why else "")
        )


def _best(tried: Collection[Built], budget: float) -> Built | None:
    """The network that loses least within the budget, or the fastest if none is; of equals the one that is better in the
    other respect. None if none can be used."""
    usable = [b for b in tried if b.why is None]
    fits = [b for b in usable if b.seconds <= OVER * budget]
    if fits:
        return min(fits, key=lambda b: (b.loss, b.seconds))
    return min(usable, key=lambda b: (b.seconds, b.loss), default=None)


def told(decided: Decision) -> str:
    """A decision in a few words."""
    counts = (
        (decided.blocks, "blocks gone"), (decided.widths, "groups narrower"), (decided.sparse, "layers 2:4 sparse"),
        *(([p for p in decided.precisions.values() if p == option], f"layers in {option.upper()}") for option in QUANTISED),
    )  # fmt: skip
    return ", ".join(f"{len(what)} {name}" for what, name in counts if what) or "nothing changes"


def builder(tables: Tables, importance: str, samples: int, context: Context) -> Callable[[Decision], Program]:
    """A function that makes the network of a decision, with the passes that a plan would run, on the images for repair."""

    def build(decided: Decision) -> Program:
        program = tables.space.program
        for pass_ in passes(tables.space, decided, importance, samples):
            program = pass_(program, context).program
        return program

    return build
