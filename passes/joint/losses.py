"""The loss table: one part of the dense network is replaced and repaired, and the change of the outputs is measured.

The loss of a program is its divergence from the dense one (`common.divergence`) on calibration images that the repair did
not see.

A block is measured as removed. A width is measured at one or two of its sizes; between them the curve has the shape of the
cumulated importance scores, with a scale that is interpolated logarithmically. The least size is measured when a choice has
it, since few indices lose far more than the curve says. Measured losses are stored in a file, so
that an interrupted table continues. Source: replace-one-thing scores as in Puzzle (arXiv 2411.19146).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...graph.comb.groups import Group
from ...graph.comb.surgery import remove
from ...graph.compat import pytree
from ...graph.errors import BadInput, GraphcombError
from ...graph.files import write_json
from ...graph.program import Program
from ..base import Context
from ..batch import Split
from ..channels.importance.scores import importance_of
from ..common.divergence import NOT_FINITE, Divergence
from ..common.feed import Feed
from ..common.repeat import code_of, fingerprint, seeded, sources
from ..common.samples import drawn
from ..common.scoring import bar
from ..depth.blocks import Block
from ..depth.prune_depth import PruneDepth
from ..repair.repair import Repair
from .space import Space

LITTLE = 1e-12  # losses and sums below this count as this, so that they have a logarithm


@dataclass(frozen=True)
class Images:
    """Calibration batches. repair: those for repairs. judge: those on which losses are measured. held_out: whether the two
    differ."""

    repair: list[Any]
    judge: list[Any]
    held_out: bool


def take(program: Program, context: Context, samples: int) -> Images:
    """Divide the first batches of the data between repair and judge by turns, until both have a batch, if there are two, and
    each has about this many samples; of a single batch each gets half if the program takes that. Raises BadInput without
    data or batches."""
    if context.data is None:
        raise BadInput("tune: needs images (labels are not needed); pass data=")
    with seeded(context.seed, context.data):
        batches: list[Any] = []
        for raw in drawn(context.data, 2 * samples, context.seed, batches=2):
            batches.append(raw)
            if len(batches) > 1 and len(batches) * _size(raw) >= 2 * samples:
                break
    if not batches:
        raise BadInput("data: yields no batch; it must be iterable again")
    if len(batches) == 1 and Feed(program).static is None:
        batches = _halves(batches[0])
    return Images(batches[::2], batches[1::2] or batches, len(batches) > 1)


def _halves(raw: Any) -> list[Any]:
    """The two halves of a batch; the batch alone unless it consists of tensors with one and the same number of samples."""
    parts = (raw.args, raw.kwargs, raw.labels) if isinstance(raw, Split) else raw
    leaves = [leaf for leaf in pytree.tree_leaves(parts) if leaf is not None]
    if not all(isinstance(t, torch.Tensor) and t.dim() and 1 < len(t) == len(leaves[0]) for t in leaves):
        return [raw]
    halves = [pytree.tree_map(lambda t, k=k: t if t is None else t[k::2], parts) for k in range(2)]
    return [Split(*half) for half in halves] if isinstance(raw, Split) else halves


def _size(raw: Any) -> int:
    leaves = pytree.tree_leaves(list(raw) if isinstance(raw, tuple) else raw)
    return next((len(t) for t in leaves if isinstance(t, torch.Tensor) and t.dim()), 1)


@dataclass(frozen=True)
class Curve:
    """The loss of a group at any size. size: of the whole group. sums: sums[n] adds up the scores of the n least important
    indices. measured: losses by size."""

    size: int
    sums: np.ndarray
    measured: Mapping[int, float]

    def __call__(self, size: int) -> float:
        """The loss when this many indices are left."""
        if size in self.measured:
            return self.measured[size]
        return float(self.sums[self.size - size]) * self._scale(size)

    def _scale(self, size: int) -> float:
        """The factor of the sums at a size: log-linear between measured sizes, and constant beyond them."""
        known = [
            (n, math.log(max(loss, LITTLE) / max(float(self.sums[self.size - n]), LITTLE)))
            for n, loss in sorted(self.measured.items())
            if n < self.size and math.isfinite(loss)
        ]
        if not known:
            return 1.0
        sizes, logs = zip(*known, strict=True)
        return math.exp(float(np.interp(size, sizes, logs)))


class Losses:
    """The loss table of a space.

    importance: the order in which a group loses its indices, a name of `RemoveChannels.importance`. samples: number of
    images for repair, and as many to judge. points: number of sizes at which each width is measured, 1 or 2. folder: where
    the measured losses are stored; None for nowhere.
    """

    def __init__(
        self, space: Space, context: Context, importance: str = "repair", samples: int = 64, points: int = 1,
        folder: Path | None = None,
    ):  # fmt: skip
        self.space, self.samples, self.points = space, samples, points
        self.images = take(space.program, context, samples)
        self.context = replace(
            context, data=self.images.repair, val=None, teacher=space.program, plan=None, out=None, progress=False
        )
        self.divergence = Divergence(space.program, self.images.judge, self.images.repair)
        parts = (code_of(self.images.repair), code_of(self.images.judge), importance, samples, context.seed, sources())
        key = fingerprint(space.program.module(), *parts)
        self.path = None if folder is None else folder / f"losses-{key}.json"
        self.known: dict[str, Any] = self._read()
        self._shared: Any = None
        self.sums = {g.name: np.concatenate([[0.0], np.cumsum(np.sort(s))]) for g, s in self._scores(importance)}

    def _read(self) -> dict[str, Any]:
        try:
            stored = json.loads(self.path.read_text()) if self.path is not None else {}
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) else {}

    def _keep(self, key: str, value: Any) -> Any:
        self.known[key] = value
        if self.path is not None:
            write_json(self.path, self.known)
        return value

    def _scores(self, importance: str) -> Iterable[tuple[Group, np.ndarray]]:
        """The groups with the importance of their indices, finite and not negative."""
        groups = self.space.groups
        if any(f"scores {g.name}" not in self.known for g in groups):
            scores = importance_of(importance)(self.space.comb, groups, self.context, self.samples)
            for g in groups:
                values = np.nan_to_num(np.asarray(scores[g.atom], dtype=float), posinf=0.0)
                self.known[f"scores {g.name}"] = np.maximum(values, 0.0).tolist()
            self._keep("importance", importance)
        self.scores = {g.name: np.array(self.known[f"scores {g.name}"]) for g in groups}
        return [(g, self.scores[g.name]) for g in groups]

    def measure(self, progress: bool = False) -> None:
        """Measure the losses that the table lacks."""
        widths = [(g, n) for g in self.space.groups for n in self._points(g)]
        with bar(progress, "losses", len(widths) + len(self.space.blocks)) as update:
            for done, (g, n) in enumerate(widths, 1):
                self.width(g, n)
                update(done, f"{g.name} {n}")
            for done, block in enumerate(self.space.blocks, len(widths) + 1):
                self.block(block)
                update(done, block.name)

    def _points(self, group: Group) -> list[int]:
        """The sizes at which a group is measured at first."""
        smaller = self.space.even[group.name][:-1] or self.space.sizes[group.name][:-1]
        return sorted({smaller[len(smaller) // 2], *([smaller[0]] if self.points > 1 else [])})

    def width(self, group: Group, size: int) -> float:
        """The loss when this many indices of one group are left and its readers are repaired."""
        key = f"width {group.name} {size}"
        if key not in self.known:
            mask = np.ones(group.size, dtype=bool)
            mask[np.argsort(self.scores[group.name], kind="stable")[: group.size - size]] = False
            self._keep(key, self._replaced(group, mask))
        return _number(self.known[key])

    def guessed(self, group: Group, size: int) -> bool:
        """Whether the loss at a size below the evenly spaced ones is extrapolated, not measured."""
        return size < self.space.even[group.name][0] and f"width {group.name} {size}" not in self.known

    def _replaced(self, group: Group, mask: np.ndarray) -> float | None:
        smaller, removed = remove(self.space.comb, {group.atom: mask})
        readers = tuple(name for name, _ in group.members)
        repair = Repair(samples=self.samples)
        if self._shared is None:
            self._shared = repair.images(self.space.program, self.context)
        # The names of parameters serve as patterns, since they have no special characters.
        replace(repair, include=readers).apply(self.space.program, smaller, removed, self.context, self._shared)
        return _stored(self.divergence(smaller))

    def block(self, block: Block) -> float:
        """The loss without one block, after a repair of the layers behind it; infinite if the block cannot go by itself."""
        key = f"block {block.name}"
        if key not in self.known:
            try:
                pruned = PruneDepth(names=(block.name,), repair=True)(self.space.program, self.context).program
                self._keep(key, _stored(self.divergence(pruned)))
            except GraphcombError as error:
                self.known[f"why {key}"] = str(error)
                self._keep(key, None)
        return _number(self.known[key])

    def why(self, block: Block) -> str | None:
        """Why the loss without a block is infinite; None if it is not."""
        if math.isfinite(self.block(block)):
            return None
        return str(self.known.get(f"why block {block.name}", f"without it {NOT_FINITE}"))

    def kept(self, key: str, measure: Callable[[], float]) -> float:
        """The loss of something else that is stored under this key; it is measured if it is missing."""
        if key not in self.known:
            self._keep(key, _stored(measure()))
        return _number(self.known[key])

    def curve(self, group: Group) -> Curve:
        """The loss of a group by its size, with the losses measured so far."""
        prefix = f"width {group.name} "
        measured = {int(k.removeprefix(prefix)): _number(v) for k, v in self.known.items() if k.startswith(prefix)}
        return Curve(group.size, self.sums[group.name], measured | {group.size: 0.0})

    def at(self, group: Group, sizes: Iterable[int]) -> tuple[float, ...]:
        """The losses of a group at the given sizes, in ascending order of size; they never rise with the size."""
        curve, losses, most = self.curve(group), [], 0.0
        for n in sorted(sizes, reverse=True):
            most = max(most, 0.0 if n == group.size else curve(n))
            losses.append(most)
        return tuple(reversed(losses))


def _stored(loss: float) -> float | None:
    """A loss as a JSON value; None for infinity."""
    return loss if math.isfinite(loss) else None


def _number(stored: float | None) -> float:
    return math.inf if stored is None else float(stored)
