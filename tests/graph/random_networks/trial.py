"""Random networks from the operators that the comb follows: the material of the property tests. Source: ours.

`network(seed)` draws a small network step by step. Every step is an operation on values computed before, so that residuals,
concatenations, broadcasts, shared modules and tied weights arise by themselves; a step that does not fit the shapes at hand
is drawn again. `removal(comb, seed)` draws which indices of which groups go, of every kind and of several factors of one
product at once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from graphcomb import Program, capture, verify
from graphcomb.graph.comb.axes import Factor, monomials
from graphcomb.graph.comb.solve import Comb
from graphcomb.graph.comb.surgery import remove
from graphcomb.graph.nodes import op_name
from graphcomb.passes.base import PassResult

from ...oracles.restriction import restriction
from . import convolutions, movement, products  # noqa: F401  # fill the table; another order is another network a seed
from .builder import OPERATIONS, Builder, Network, Skip


def _head(b: Builder, i: int) -> int:
    """From a value to an output; outputs are frozen, so most heads keep the value's own axes inside."""
    x = b.values[i]
    kind = b.rng.random()
    if kind < 0.45:
        return b.add(lambda m, x: m(x.flatten(1)), [i], nn.Linear(x[0].numel(), 3))
    if kind < 0.85:
        d = b.rng.randrange(1, x.dim())
        others = [k for k in range(1, x.dim()) if k != d]
        return b.add(lambda m, x: m(x.mean(others) if others else x), [i], nn.Linear(x.shape[d], 3))
    if x.dim() == 4 and kind < 0.93:
        return b.add(lambda m, x: m(x), [i], nn.Conv2d(x.shape[1], 2, 1))
    return b.add(lambda m, x: m(x), [i], nn.Linear(x.shape[-1], 2))


@dataclass(frozen=True)
class Drawn:
    """A network, an example input, and whether its batch is to be dynamic."""

    model: Network
    x: Tensor
    dynamic: bool

    def capture(self) -> Program:
        return capture(self.model, (self.x,), dynamic_shapes="batch" if self.dynamic else None)


def network(seed: int, smallest: int = 3, largest: int = 10) -> Drawn:
    """The random network of a seed, with `smallest` to `largest` operations and one to three outputs."""
    b = Builder(seed)
    torch.manual_seed(seed)
    batch = b.rng.choice((2, 3, 5))
    if b.chance(0.65):
        side = b.rng.choice((4, 4, 6, 8))
        x = torch.randn(batch, 3, side, side)
        b.values.append(x)
        b.add(lambda m, x: m(x), [0], nn.Conv2d(3, b.width(), b.rng.choice((1, 3)), padding=0 if b.chance(0.3) else 1))
    else:
        x = torch.randn(batch, b.rng.choice((4, 5, 9)), 5)
        b.values.append(x)
        b.add(lambda m, x: m(x), [0], nn.Linear(5, b.width()))
    b.names.append("stem")
    wanted, tries = b.rng.randint(smallest, largest), 0
    while len(b.names) <= wanted and tries < 200:
        tries += 1
        i = len(b.values) - 1 if b.chance(0.7) else b.rng.randrange(1, len(b.values))
        fitting = [(w, f) for w, ranks, f in OPERATIONS if b.values[i].dim() in ranks]
        if not fitting:
            continue
        function = b.rng.choices([f for _, f in fitting], [w for w, _ in fitting])[0]
        marks = len(b.values), len(b.steps)
        try:
            function(b, i)
        except (Skip, RuntimeError, ValueError):
            del b.values[marks[0] :]
            del b.steps[marks[1] :], b.inputs[marks[1] :]
            continue
        b.names.append(function.__name__)
    ends = {len(b.values) - 1} | {b.rng.randrange(1, len(b.values)) for _ in range(b.rng.choice((0, 1, 1, 2)))}
    outputs = [_head(b, i) for i in sorted(ends)]
    return Drawn(Network(b.steps, b.inputs, outputs, b.names), x, b.chance(0.25))


def removal(comb: Comb, seed: int) -> dict[Factor, np.ndarray]:
    """Random masks (True: stays) for a random part of the groups that are not frozen, of every kind."""
    rng = np.random.default_rng(seed)
    free = [g for g in comb.groups if g.frozen is None and g.size > g.least]
    chosen = rng.random(len(free)) < rng.choice([0.3, 0.7, 1.0])
    if free and not chosen.any():
        chosen[rng.integers(len(free))] = True
    masks = {}
    for group in (g for g, yes in zip(free, chosen, strict=True) if yes):
        mask = np.zeros(group.size, dtype=bool)
        mask[rng.choice(group.size, int(rng.integers(group.least, group.size)), replace=False)] = True
        masks[group.atom] = mask
    return masks


@dataclass(frozen=True)
class Trial:
    """What became of one network: "exact", "wrong", "vacuous" (no output could change), or "frozen" (nothing to remove).

    absence, restriction: the errors of the two oracles. why: the first disagreement. kinds: how many groups of each kind
    lost indices; products: axes of parameters of which two factors or more lost some. operators: names in the graph.
    """

    seed: int
    outcome: str
    absence: float = 0.0
    restriction: float = 0.0
    why: str = ""
    kinds: Counter[str] = field(default_factory=Counter)
    products: int = 0
    dynamic: bool = False
    operators: frozenset[str] = frozenset()


def trial(seed: int) -> Trial:
    """Draw the network of a seed and a removal, slice it, and ask both oracles."""
    drawn = network(seed)
    program = drawn.capture()
    comb = Comb(program)
    masks = removal(comb, seed)
    operators = frozenset(op_name(n) for n in program.graph.nodes if n.op == "call_function")
    if not masks:
        return Trial(seed, "frozen", dynamic=drawn.dynamic, operators=operators)
    smaller, removed = remove(comb, masks)
    result = PassResult(smaller, {}, removed)
    verdict = verify.check(program, result, seed=seed)
    second = restriction(program, result, seed=seed, comb=comb) if not verdict.disagreements else float("inf")
    right = max(verdict.error, second) <= verify.TOLERANCE and not verdict.disagreements
    why = verdict.disagreements[0] if verdict.disagreements else "" if right else "the restriction oracle differs"
    distinct = {id(axis): axis for axes in comb.parameters.values() for axis in axes}.values()
    return Trial(
        seed,
        "wrong" if not right else "vacuous" if verdict.vacuous else "exact",
        verdict.error,
        second,
        why,
        Counter(g.kind for g in comb.groups if g.atom in masks),
        sum(any(len(masks.keys() & set(m)) > 1 for m in monomials(axis)) for axis in distinct),
        drawn.dynamic,
        operators,
    )
