"""Reordering of channels so that an N:M pattern loses less; the function of the network stays the same.

Where the comb knows a whole axis and finds it free, the order of its channels is arbitrary: permuting it in every tensor
that has the axis changes no output. But the order decides which entries share a group, and a group of four large weights
has to give up two of them (Pool and Yu, "Channel permutations for N:M sparsity", NeurIPS 2021). Permuting through the axes
of the comb is ours.
"""

from collections.abc import Collection, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...graph.comb import axes as ax
from ...graph.comb.axes import Axis, Factor
from ...graph.comb.solve import Comb
from ...graph.edit import copy_tensor, like, rebuild
from ...graph.nodes import fetch
from ...graph.program import Program
from ...graph.verify import equivalence
from ..train.features import block_outputs
from .ranking import Pattern

ROUNDS, ROWS = 60, 4096  # rounds of exchanges between random pairs of groups; most rows of weights that are considered
TOLERANCE = 1e-9

Orders = Mapping[Factor, np.ndarray]


def permuted(
    program: Program, names: Collection[str], pattern: Pattern, seed: int
) -> tuple[Program, list[dict[str, Any]]]:
    """The program with the input channels of the named weights reordered so that the pattern keeps more of their squared
    magnitude; and rows `{"what": weights, "kept_before": share, "kept_after": share}` for what was permuted.

    Only axes that are one free group by themselves are permuted, and no outputs of blocks, whose channels are compared with
    a teacher's. The result equals the program to 1e-9 in float64 on random inputs; where it does not, it is the program
    itself.
    """
    comb = Comb(program)
    outer = {atom for node in block_outputs(program) for atom in ax.atoms(comb.axes[node])}
    readers: dict[Factor, list[str]] = {}
    for name in names:
        axis = ax.normal(comb.parameters[name][1])
        atom = axis[0] if len(axis) == 1 else None
        if atom is not None and atom.segments is None and atom.frozen is None and atom not in outer:
            readers.setdefault(atom, []).append(name)
    orders: dict[Factor, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    generator = torch.Generator().manual_seed(seed)
    for atom, read_by in readers.items():
        weights = [fetch(program.module(), n).detach().movedim(1, -1).flatten(0, -2) for n in read_by]
        squares = torch.cat(weights).square().float().cpu()
        if len(squares) > ROWS:
            squares = squares[torch.randperm(len(squares), generator=generator)[:ROWS]]
        order = best_order(squares, pattern, generator)
        before, after = (float(kept(squares[:, o], pattern) / squares.sum()) for o in (torch.arange(atom.size), order))
        if after > before:
            orders[atom] = order.numpy()
            rows.append({"what": read_by, "kept_before": before, "kept_after": after})
    if not orders:
        return program, []

    def take(name: str, value: Any) -> Any:
        changed = {d: a for d, a in enumerate(comb.parameters.get(name, ())) if ax.touches(a, orders)}
        if not changed:
            return copy_tensor(name, value)
        data = value.detach()
        for d, axis in changed.items():
            data = data.index_select(d, torch.from_numpy(positions(axis, orders)).to(data.device))
        return like(value, data)

    result = program.derive(rebuild(program.graph_module, take), stale=False)
    error = equivalence(program, result, seed=seed)
    return (result, rows) if error <= TOLERANCE else (program, [])


def positions(axis: Axis, orders: Orders) -> np.ndarray:
    """For every index of an axis after its atoms were permuted, its index before."""
    result = np.zeros(1, dtype=np.int64)
    for factor in ax.normal(axis):
        if factor.segments is not None:
            starts = np.cumsum([0, *(ax.size(part) for part in factor.segments)])
            parts = zip(starts, factor.segments, strict=False)
            indices = np.concatenate([start + positions(part, orders) for start, part in parts])
        else:
            indices = orders[factor] if factor in orders else np.arange(factor.size)
        result = (result[:, None] * len(indices) + indices).reshape(-1)
    return result


def kept(squares: Tensor, pattern: Pattern) -> Tensor:
    """The sum of the `n` largest of every `m` consecutive columns of `squares` `(r, c)`."""
    n, m = pattern
    return squares.reshape(len(squares), -1, m).topk(n, -1).values.sum()


def best_order(squares: Tensor, pattern: Pattern, generator: torch.Generator) -> Tensor:
    """An order of the columns of `squares` `(r, c)` in which a pattern keeps more.

    Hill climbing: in every round the groups are paired at random, and each pair's columns are divided between its two
    groups in the best of all ways.
    """
    m = pattern[1]
    order = torch.arange(squares.shape[1]).view(-1, m)
    if len(order) < 2:
        return order.flatten()
    first = torch.tensor([(0, *rest) for rest in combinations(range(1, 2 * m), m - 1)])
    ways = torch.stack([torch.cat([w, torch.tensor([i for i in range(2 * m) if i not in w.tolist()])]) for w in first])
    for _ in range(ROUNDS):
        shuffled = torch.randperm(len(order), generator=generator)
        pairs = shuffled[: len(order) // 2 * 2].view(-1, 2)
        columns = order[pairs].flatten(1)  # (pairs, 2m)
        values = squares[:, columns]  # (r, pairs, 2m)
        gains = [values[..., w].unflatten(-1, (2, m)).topk(pattern[0], -1).values.sum((0, 2, 3)) for w in ways]
        best = ways[torch.stack(gains).argmax(0)]
        order[pairs] = columns.gather(1, best).view(-1, 2, m)
    return order.flatten()
