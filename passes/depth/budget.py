"""Choices of blocks, and what a choice has to save."""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ...graph.comb.solve import Comb
from ...graph.errors import Unreachable
from ...graph.program import Program
from ...graph.workload.layer import rules_of, run_seconds
from ...graph.workload.layers import Layers
from ..base import Context
from ..common.latency import needed_latency

CUT = "without all attention the outputs no longer depend on the inputs"
DRAWS = 100  # random choices that are tried before the target counts as unreachable
Bits = tuple[bool, ...]  # by prunable block: whether it is pruned


@dataclass(frozen=True)
class Budget:
    """What a choice of blocks has to meet.

    saves: what pruning each block saves, in the target's unit (blocks, multiply-accumulates or seconds). needed: what a
    choice must save. reaches: whether the outputs depend on the inputs without the blocks of these indices. macs: the
    multiply-accumulates that pruning each block removes. spare: how many of these may go.
    """

    saves: Sequence[float]
    needed: float
    reaches: Callable[[Sequence[int]], bool] = lambda chosen: True
    macs: Sequence[float] = ()
    spare: float = math.inf

    @property
    def count(self) -> int:
        """Number of blocks to choose from."""
        return len(self.saves)

    def complete(self, order: Iterable[int]) -> Bits:
        """Blocks from the start of an order until they save enough, then without those that turn out to be unnecessary.
        Blocks are passed over that save nothing, would cut the outputs off from the inputs, or would take more MACs than
        may go.

        The result may save too little, since blocks may be passed over; `met` tells.
        """
        chosen: list[int] = []
        for i in order:
            if self._saved(chosen) >= self.needed:
                break
            if self.saves[i] > 0 and self._spares([*chosen, i]) and self.reaches([*chosen, i]):
                chosen.append(i)
        for i in list(chosen):
            rest = [j for j in chosen if j != i]
            if self._saved(rest) >= self.needed:
                chosen = rest
        return tuple(i in chosen for i in range(self.count))

    def _saved(self, chosen: Iterable[int]) -> float:
        return sum(self.saves[i] for i in chosen)

    def _spares(self, chosen: Sequence[int]) -> bool:
        return self.spare == math.inf or sum(self.macs[i] for i in chosen) <= self.spare

    def met(self, bits: Bits) -> bool:
        """Whether a choice saves enough."""
        return self._saved(i for i, bit in enumerate(bits) if bit) >= self.needed

    def widest(self) -> Bits:
        """As many blocks as may go together, whatever they save."""
        return Budget([1.0] * self.count, math.inf, self.reaches).complete(range(self.count))

    def draw(self, generator: random.Random) -> Bits:
        """A random choice that saves enough. Raises Unreachable if `DRAWS` choices in a row save too little."""
        for _ in range(DRAWS):
            bits = self.complete(generator.sample(range(self.count), self.count))
            if self.met(bits):
                return bits
        raise Unreachable(f"{CUT}, of every choice that meets the target")

    def greedy(self, alone: Sequence[float]) -> Bits:
        """The choice of the blocks that score best when pruned alone; the best choice if their losses add up."""
        bits = self.complete(sorted(range(self.count), key=lambda i: -alone[i]))
        return bits if self.met(bits) else self.draw(random.Random(0))

    def child(self, one: Bits, two: Bits, generator: random.Random) -> Bits:
        """A choice from two parents: what both prune comes first, then what one of them prunes, then other blocks; half of
        the time a random block comes before all."""
        order = generator.sample(range(self.count), self.count)
        new = order[0] if generator.random() < 0.5 else None
        bits = self.complete(sorted(order, key=lambda i: (i != new, -(one[i] + two[i]))))
        return bits if self.met(bits) else one


class Predictor:
    """Predicted seconds of a run of a program."""

    def __init__(self, context: Context, dense: Program):
        self.latency, self.progress = needed_latency(context.latency, "PruneDepth", dense), context.progress

    def __call__(self, program: Program) -> float:
        layers = Layers(Comb(program), rules=rules_of(self.latency))
        return run_seconds(self.latency, (layer for _, layer in layers.at({})), self.progress)
