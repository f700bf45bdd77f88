"""Would the oracle notice? Single wrong indices planted in single parameter dimensions of a pruned program. Source: ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphcomb.graph.nodes import op_name
from graphcomb.graph.program import Program
from graphcomb.graph.verify.check import TOLERANCE, Trial
from graphcomb.graph.verify.evaluate import Evaluator, relative_error, tensors_of
from graphcomb.graph.verify.removal import checked, kept, sliced

DRAWS = 3  # inputs to try before a mutation counts as missed


@dataclass(frozen=True)
class Mutation:
    """In one dimension of one parameter, the removed index `wrong` stands where the kept index `right` belongs.

    error: how far the outputs are from the oracle's. why: for a mutation that is missed, where its effect ends.
    """

    parameter: str
    dim: int
    right: int
    wrong: int
    error: float
    why: str = ""

    @property
    def caught(self) -> bool:
        return self.error > TOLERANCE


@dataclass(frozen=True)
class MutationReport:
    """Statistics over mutations; the missed ones with where their effect ends."""

    total: int
    caught: int
    missed: tuple[Mutation, ...]

    @property
    def share(self) -> float:
        return self.caught / self.total if self.total else 1.0


def mutation_test(before: Program, result: Any, *, seed: int = 0, count: int | None = None) -> MutationReport:
    """Plant `count` mutations (default: one in every dimension of every parameter that lost indices) and count those that
    outputs on random weights give away."""
    tried = list(mutate(before, result, seed=seed, count=count))
    missed = tuple(m for m in tried if not m.caught)
    return MutationReport(len(tried), len(tried) - len(missed), missed)


def mutate(before: Program, result: Any, *, seed: int = 0, count: int | None = None) -> Iterator[Mutation]:
    """Mutations in random order; see `mutation_test`. The pruned program must be right to begin with."""
    removed, after = checked(before, result.removed), result.program
    trial = Trial(before, after, removed, seed)
    trial.prepare()
    cases = [(trial.inputs, trial.expected(trial.inputs)[0])]
    generator = torch.Generator().manual_seed(seed)
    for name, d in _places(before, after, removed, generator, count):
        n = trial.weights[name].shape[d]
        wrong = removed[name][d][int(torch.randint(len(removed[name][d]), (), generator=generator))]
        stay = kept(n, removed[name][d])
        at = int(abs(stay - wrong).argmin())
        planted = _plant(trial, name, d, at, wrong)
        if torch.equal(planted[name], trial.sliced[name]):
            yield Mutation(name, d, int(stay[at]), wrong, 0.0, "the two entries are equal")
            continue
        error, tries = 0.0, 0
        while error <= TOLERANCE and tries < DRAWS:
            if tries == len(cases):
                fresh = trial.fresh_inputs()
                cases.append((fresh, trial.expected(fresh)[0]))
            inputs, expected = cases[tries]
            error, tries = relative_error(Evaluator(after, planted).run(inputs), expected), tries + 1
        why = "" if error > TOLERANCE else _end_of_effect(trial, planted)
        yield Mutation(name, d, int(stay[at]), wrong, error, why)


def _places(
    before: Program,
    after: Program,
    removed: dict[str, dict[int, list[int]]],
    generator: torch.Generator,
    count: int | None,
) -> list[tuple[str, int]]:
    """(name, dim) pairs to plant in, each tied tensor once, shuffled."""
    tensors, ours = tensors_of(before), tensors_of(after)
    once = {id(tensors[name]): name for name in removed if name in ours and tensors[name].is_floating_point()}
    places = [(name, d) for name in once.values() for d in removed[name]]
    order = torch.randperm(len(places), generator=generator).tolist()
    return [places[i] for i in order][:count]


def _plant(trial: Trial, name: str, d: int, at: int, wrong: int) -> dict[str, torch.Tensor]:
    """The pruned program's weights with one wrong index in one dimension of one tensor (and of those tied to it)."""
    original, lost = trial.weights[name], dict(trial.removed[name])
    del lost[d]
    stray = sliced(original.narrow(d, wrong, 1), lost).squeeze(d)
    tensor = trial.sliced[name].clone()
    tensor.select(d, at).copy_(stray)
    tied = [n for n, t in trial.weights.items() if t is original]
    return {**trial.sliced, **dict.fromkeys(tied, tensor)}


def _end_of_effect(trial: Trial, planted: dict[str, torch.Tensor]) -> str:
    """The nodes at which a difference goes in and none comes out."""
    clean: dict[fx.Node, Any] = {}
    Evaluator(trial.after, trial.sliced).run(trial.inputs, lambda n, v: clean.update({n: v}))
    differs: set[fx.Node] = set()

    def look(node: fx.Node, value: Any) -> None:
        if relative_error(value, clean[node]) > TOLERANCE:
            differs.add(node)

    Evaluator(trial.after, planted).run(trial.inputs, look)
    reached = [n for n in clean if n not in differs and any(i in differs for i in n.all_input_nodes)]
    ends = [n for n in reached if op_name(n) != "getitem"]  # other results of an operator are no end
    names = ", ".join(f"{n.name} ({op_name(n)})" for n in ends[:3])
    return f"the difference ends at {names}" if names else "no node differs"
