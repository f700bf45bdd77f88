"""Rounds of choosing, building and measuring: what the built network shows corrects the predictions. Source: ours.

Losses do not add up and predicted times are off, so the chosen network is built, and its loss and its time are measured.
The first round also builds the networks that widths alone and blocks alone would give for the same budget: the ratios of
their measured to their predicted losses scale the losses of all widths and of all blocks, on which the choice between the
two depends. The ratio of measured to predicted time scales the budget. The best network within the budget wins, those of
the single methods included, so that on the calibration images the result is never worse than they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...graph.errors import Unreachable
from ...graph.program import Program
from ..base import Context
from ..channels.plan import some
from .carry_out import Decision, decision, passes
from .problem import Problem
from .solve import Solved, solve
from .tables import Tables

ROUNDS = 2
OVER = 1.02  # a time of up to this multiple of a budget is within it, since repeated measurements differ
NEAR = 0.1  # share of a budget by which the achieved latency may be off before the run says that it missed
TRIES = 4  # most choices whose structure is checked before one is built


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
    """A network that was built: the decision, how it was made ("joint", "widths" or "blocks"), its loss and time, and those
    that the tables predicted."""

    decided: Decision
    how: str
    program: Program
    loss: float
    time: Time
    predicted_loss: float
    predicted_seconds: float

    @property
    def seconds(self) -> float:
        """The seconds of a run."""
        return self.time.seconds


@dataclass
class Correction:
    """The factors by which the tables are multiplied: of seconds, and of the losses of widths and of blocks."""

    seconds: float = 1.0
    widths: float = 1.0
    blocks: float = 1.0


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
        """The network that loses least within a budget in seconds; how: "joint", or one method alone, "widths" or "blocks".
        If none that was built is within the budget, the fastest of them. Raises Unreachable if no choice in the tables is
        within the budget."""
        problem, tried = self.tables.problem, []
        part = problem if how == "joint" else problem.only(**{how: True})
        for attempt in range(self.rounds):
            found = self._choose(part, budget)
            if found is None and not attempt:
                raise self._unreachable(part, budget)
            if found is None:
                break
            before, expected = len(self.built), self.correction.seconds * found.seconds
            network = self._built(problem, found, how)
            tried.append(network)
            self.correction.seconds *= network.seconds / expected
            if not attempt and how == "joint":
                tried += self._singles(problem, budget)
            if len(self.built) == before:
                break
        inside = [b for b in tried if b.seconds <= OVER * budget]
        return min(inside, key=lambda b: b.loss) if inside else min(tried, key=lambda b: b.seconds)

    def losing(self, loss: float) -> Built:
        """The fastest network that loses no more than `loss`. Raises Unreachable if no network that was built loses as
        little."""
        problem, best, bound = self.tables.problem, None, loss
        for _ in range(self.rounds + 1):
            found = solve(self._scaled(problem), loss=bound, connects=self.tables.space.connects)
            if found is None:
                break
            network = self._built(problem, found, "joint")
            if network.loss <= loss and (best is None or network.seconds < best.seconds):
                best = network
            if network.loss > 0:
                bound *= min(max(loss / network.loss, 0.25), 2.0)
        if best is None:
            raise Unreachable(f"tune.loss: nothing that was built loses as little as {loss:g}; ask for more")
        return best

    def _scaled(self, problem: Problem) -> Problem:
        return problem.scaled(self.correction.widths, self.correction.blocks)

    def _choose(self, problem: Problem, budget: float) -> Solved | None:
        """The best choice whose seconds, checked on the program's structure, really are within the budget."""
        allowed = budget / self.correction.seconds
        limit, found = allowed, None
        for _ in range(TRIES):
            found = solve(self._scaled(problem), seconds=limit, connects=self.tables.space.connects)
            if found is None:
                return None
            actual = self.tables.seconds(decision(problem, found.choice))
            if actual <= OVER * allowed:
                return found
            limit *= allowed / actual
        return found

    def _singles(self, problem: Problem, budget: float) -> list[Built]:
        """The networks of widths alone and of blocks alone, as far as these reach the budget; they correct the losses."""
        networks = []
        for how, part in (("widths", problem.only(widths=True)), ("blocks", problem.only(blocks=True))):
            found = self._choose(part, budget) if problem.blocks and problem.axes else None
            if found is None:
                continue
            network = self._built(problem, found, how)
            networks.append(network)
            factor = network.loss / found.loss if found.loss > 0 and math.isfinite(network.loss) else 0.0
            if factor > 0:
                setattr(self.correction, how, factor * getattr(self.correction, how))
        return networks

    def _built(self, problem: Problem, found: Solved, how: str) -> Built:
        """The network of a choice; the same network is built only once."""
        decided = decision(problem, found.choice)
        key = (decided.blocks, tuple(sorted(decided.widths.items())))
        if key not in self.built:
            expected = self.correction.seconds * found.seconds
            program = self.build(decided)
            loss, time = self.tables.losses.divergence(program), self.time(program)
            self.built[key] = Built(decided, how, program, loss, time, found.loss, expected)
            self.say(
                f"{how}: {len(decided.blocks)} blocks gone, {len(decided.widths)} groups narrower: "
                f"{1e3 * time.seconds:.3g} ms (predicted {1e3 * expected:.3g}), loss {loss:.3g} (predicted {found.loss:.3g})"
            )
        return self.built[key]

    def _unreachable(self, problem: Problem, budget: float) -> Unreachable:
        """The error for a budget that is too small: the smallest one that can be reached, and what prevents more."""
        fastest, space = solve(problem, connects=self.tables.space.connects), self.tables.space
        least = math.nan if fastest is None else self.correction.seconds * fastest.seconds
        fixed = [*self.tables.fixed.widths, *(n for n, goes in self.tables.fixed.blocks.items() if not goes)]
        refused = [name for name in space.refused if name not in fixed]
        why = [f"fixed by hand: {some(fixed)}"] if fixed else []
        why += [f"cannot shrink or go: {some(refused)} ({space.refused[refused[0]]})"] if refused else []
        why += [] if space.groups or space.blocks else ["there is nothing to prune"]
        return Unreachable(
            f"tune.latency: {1e3 * budget:.3g} of {1e3 * self.dense:.3g} ms cannot be reached; {1e3 * least:.3g} ms can"
            + (f"; {'; '.join(why)}" if why else "")
        )


def builder(tables: Tables, importance: str, samples: int, context: Context) -> Callable[[Decision], Program]:
    """A function that makes the network of a decision, with the passes that a plan would run, on the images for repair."""

    def build(decided: Decision) -> Program:
        program = tables.space.program
        for pass_ in passes(tables.space, decided, importance, samples):
            program = pass_(program, context).program
        return program

    return build
