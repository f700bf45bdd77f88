"""The evolutionary search for the blocks that are missed least (UPDP's second stage; the details are ours)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from ...graph.edit import rebuild
from ...graph.nodes import arguments, fetch, op_name, set_argument
from ...graph.program import Program
from ..base import Context
from ..common.divergence import Divergence
from ..common.feed import Feed
from ..common.processes import accelerator, averaged, gathered, placed
from ..common.repeat import code_of
from ..common.samples import everywhere
from ..common.scoring import bar, evaluate
from .budget import Bits, Budget
from .relax import SWITCHES, set_switches


def search(
    judge: Judge,
    budget: Budget,
    population: int,
    generations: int,
    context: Context,
    scores: dict[str, float],
    keep: Callable[[dict[str, float]], None],
) -> tuple[Bits, dict[str, Any]]:
    """The choice of blocks with the best score, and the record of the search.

    The first generation holds the choice of the blocks that score best alone, and random choices; each next one keeps the
    better half and fills up with its children. scores: those known already, by choice (a string of 0 and 1); extended in
    place. keep: stores all scores whenever there are new ones.
    """
    total = budget.count + population * (generations + 1)
    with bar(context.progress, "search", total) as update:

        def score(choices: Iterable[Bits]) -> dict[Bits, float]:
            keys = {bits: "".join("01"[b] for b in bits) for bits in choices}
            new = [bits for bits, key in keys.items() if key not in scores]
            for start in range(0, len(new), judge.at_once):
                some = new[start : start + judge.at_once]
                scores.update(zip((keys[bits] for bits in some), judge(some), strict=True))
                keep(scores)
                update(len(scores), "")
            return {bits: scores[key] for bits, key in keys.items()}

        count = budget.count
        alone = list(score(tuple(i == j for j in range(count)) for i in range(count)).values())
        generator = random.Random(context.seed)
        members = [budget.greedy(alone)]
        while len(members) < population:
            members.append(budget.draw(generator))
        for _ in range(generations):
            scored = score(members)
            parents = sorted(scored, key=scored.__getitem__, reverse=True)[: max(2, population // 2)]
            members = parents + [
                budget.child(generator.choice(parents), generator.choice(parents), generator)
                for _ in range(population - len(parents))
            ]
        scored = score(members)
        best = max(scored, key=scored.__getitem__)
    return best, {"score": scored[best], "evaluated": len(scores), "alone": alone}


class Judge:
    """Scores choices of blocks in the supernet, up to `at_once` in a call: one in each process, as a single process would
    do it. Processes that do not see the same batches score every choice together.

    dense: the program that choices are to stay near, which needs no labels; if None, they are scored by the metric.
    """

    def __init__(self, supernet: Program, context: Context, calibrate: int, count: int, dense: Program | None = None):
        self.supernet, self.metric = supernet, context.metric
        self.calibrator = Calibrator(supernet, context, calibrate)
        labelled = dense is None and context.val is not None
        self.field = "val" if labelled else "data"
        self.batches = list(islice((context.val or ()) if labelled else context.batches, count))
        self.divergence = None if dense is None else Divergence(dense, self.batches)
        acc = accelerator()
        seen = {code_of([self.batches, [(b.args, b.kwargs) for b in self.calibrator.batches]])}
        self.index = acc.process_index
        self.at_once = acc.num_processes if len(seen.union(gathered(next(iter(seen))))) == 1 else 1

    def __call__(self, choices: Sequence[Bits]) -> list[float]:
        if self.at_once == 1:
            return [self._score(bits) for bits in choices]
        mine = choices[self.index : self.index + 1]
        # A process that fails must not leave the others waiting.
        scores = everywhere(lambda: [self._score(bits, alone=True) for bits in mine])
        return list(chain.from_iterable(gathered(scores)))

    def _score(self, bits: Bits, alone: bool = False) -> float:
        set_switches(self.supernet.module(), [1.0 - b for b in bits])
        self.calibrator()
        if self.divergence is not None:
            away = self.divergence(self.supernet)
            return -away if alone else -float(averaged(np.array([away]))[0])
        return evaluate(self.supernet, self.batches, self.metric, field=self.field, alone=alone)


# `Recalibrate` cannot do this: it pools statistics over all processes, each of which judges a choice of its own here, and it
# holds every batch's activations to run node after node, where one forward pass per batch serves to rank many choices.
class Calibrator:
    """Takes the batch statistics of a program anew from a few batches, with dropout off."""

    def __init__(self, program: Program, context: Context, count: int):
        self.program = program
        self.batches = list(islice(Feed(program).batches(context.batches), count))
        self.module = rebuild(program.module()).eval()
        norms = [n for n in self.module.graph.nodes if op_name(n) == "batch_norm"]
        self.norms = [n for n in norms if arguments(n)["running_mean"] is not None]
        for node in self.norms:
            set_argument(node, "training", True)
            set_argument(node, "momentum", 1.0)  # the running statistics become those of the batch

    @torch.no_grad()
    def __call__(self, only: str = "") -> None:
        """Take the statistics anew: the mean over batches of each batch's mean and variance. only: the prefix of the
        normalisations to set; others keep their statistics."""
        module, live = self.module, self.program.module()
        keys = {str(arguments(n)[k].target) for n in self.norms for k in ("running_mean", "running_var")}
        if SWITCHES in dict(live.named_buffers()):
            set_switches(module, fetch(live, SWITCHES).tolist())
        before = {k: fetch(module, k).clone() for k in keys}
        sums = {k: torch.zeros_like(v) for k, v in before.items()}
        device = accelerator().device
        with placed(module, device):
            for batch in self.batches:
                placed_batch = batch.to(device)
                module(*placed_batch.args, **placed_batch.kwargs)
                for k in keys:
                    sums[k] += fetch(module, k).to(sums[k].device)
        for k in keys:
            new = sums[k] / max(len(self.batches), 1) if k.startswith(only) and self.batches else before[k]
            fetch(live, k).copy_(new)
