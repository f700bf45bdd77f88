"""Affine parts of a graph: single steps, and sums of branches; and any of these, or a chain of them, as one map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import fx

from ...graph.nodes import shape
from .merge_weights import Geometry, Kernel

Values = Callable[[fx.Node], torch.Tensor]  # the float64 value of a stored tensor


@dataclass(frozen=True)
class Part:
    """Nodes of a graph that compute `last` from `source` by an affine map.

    axis: the dimension of the value that holds the channels; None where the map does not depend on it.
    """

    nodes: tuple[fx.Node, ...]
    source: fx.Node
    axis: int | None
    branches: ClassVar[tuple[Branch, ...]] = ()  # only a `Sum` has some

    @property
    def last(self) -> fx.Node:
        """The node that computes the part's value."""
        return self.nodes[-1]

    @property
    def members(self) -> set[fx.Node]:
        """The nodes of the part, those of its branches included."""
        return set(self.nodes).union(*(b.members for b in self.branches))

    def steps(self) -> Iterator[Step]:
        """All single steps of the part, in order."""
        for branch in self.branches:
            for part in branch.parts:
                yield from part.steps()

    @property
    def carriers(self) -> list[fx.Node]:
        """The layers whose weights the part uses."""
        return [step.carrier for step in self.steps() if step.carrier]


@dataclass(frozen=True)
class Step(Part):
    """One affine map, whose nodes follow one another.

    geometry: a function of the number of channels and of spatial dimensions that gives the map's geometry. numbers: a
    function that takes a reader of stored tensors and gives weight (or scale) and bias (or shift); each is a tensor or
    one number for all channels, the bias may be None. carrier: the layer whose weights the map uses, if any. folds:
    whether the first node folds all dimensions but the last into one and the last node unfolds them.
    """

    geometry: Callable[[int, int], Geometry]
    numbers: Callable[[Values], tuple[Any, Any]]
    carrier: fx.Node | None = None
    folds: bool = False

    def steps(self) -> Iterator[Step]:
        yield self


@dataclass(frozen=True)
class Branch:
    """One term of a sum: `factor` times the value of `end`, which `parts` compute from the sum's source."""

    factor: float
    end: fx.Node
    parts: tuple[Part, ...]

    @property
    def members(self) -> set[fx.Node]:
        """The nodes of the branch's parts."""
        return set().union(*(p.members for p in self.parts))


@dataclass(frozen=True)
class Sum(Part):
    """Branches that start at one source, and the nodes that add them up."""

    branches: tuple[Branch, ...] = ()  # type: ignore[misc]


# --------------------------------------------------------------------------------------------------------- as one map
Leaf = Callable[[Step | None, int, int], Any]  # the map of a step (None: the identity), by channels and dimensions


def geometry_of(step: Step | None, channels: int, dims: int) -> Geometry:
    """The leaf for maps without weights: the geometry of a step."""
    return Geometry.scaling(channels, dims, False) if step is None else step.geometry(channels, dims)


def kernel_of(values: Values) -> Leaf:
    """The leaf for maps with weights, which `values` reads: the kernel of a step, in float64."""

    def leaf(step: Step | None, channels: int, dims: int) -> Kernel:
        g = geometry_of(step, channels, dims)
        weight, bias = step.numbers(values) if step else (1, None)
        filled = _filled(weight, (g.outputs, g.inputs // g.groups, *g.extent))
        return Kernel(g, filled, None if bias is None else _filled(bias, (g.outputs,)))

    return leaf


def _filled(value: Any, size: tuple[int, ...]) -> torch.Tensor:
    """A float64 tensor of that size, from a tensor of as many entries, from one entry, or from a number."""
    entries = torch.as_tensor(value, dtype=torch.float64).flatten()
    return entries.expand(math.prod(size)).reshape(size)


def map_of(part: Part, axis: int, leaf: Leaf) -> Any:
    """A part as one map: a `Geometry` or a `Kernel`, whichever `leaf` makes. Raises Inexact where no one map computes
    it.
    """
    if isinstance(part, Step):
        return leaf(part, *_layout(part.source, axis))
    return map_of_branches(part.branches, axis, part.source, leaf)


def map_of_chain(parts: Sequence[Part], axis: int, source: fx.Node, leaf: Leaf) -> Any:
    """Parts in a row as one map; no parts at all are the identity. Raises Inexact where no one map computes them."""
    if not parts:
        return leaf(None, *_layout(source, axis))
    result = map_of(parts[-1], axis, leaf)
    for part in reversed(parts[:-1]):
        result = map_of(part, axis, leaf).then(result)
    return result


def map_of_branches(branches: Iterable[Branch], axis: int, source: fx.Node, leaf: Leaf) -> Any:
    """The sum of branches of one source as one map. Raises Inexact where no one map computes it."""
    maps = ((b.factor, map_of_chain(b.parts, axis, source, leaf)) for b in branches)
    first, *others = (m if factor == 1 else m.scaled(factor) for factor, m in maps)
    return reduce(lambda a, b: a.plus(b), others, first)


def _layout(source: fx.Node, axis: int) -> tuple[int, int]:
    """The number of channels and of spatial dimensions of a value whose channels are in dimension `axis`."""
    sizes = shape(source)
    return sizes[axis], len(sizes) - 2 if axis == 1 else 0
