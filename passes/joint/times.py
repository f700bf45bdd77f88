"""The time table: seconds of every layer at every combination of the sizes that it depends on, with and without its block.

A layer of the program counts while its block stays. What a block becomes is seen in the program without it: layers at the
places of its nodes, and layers without a namesake in the program, count if the block is gone, at the sizes of the remaining
groups. Other changes (a sum that moves into another kernel) are one number for each block, which is exact if nothing
shrinks. Source: ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from torch import fx

from ...graph.comb import axes as ax
from ...graph.comb.axes import Factor
from ...graph.workload.layer import Latency, Layer
from ..channels.sizes.knapsack import Predictor
from ..common.scoring import bar
from ..quantize.choose_layers import QUANTISED
from .solver.problem import Term
from .space import Space, weight_of
from .variants import CHANGED, FLOAT, Variants

CELLS = 1300  # most combinations of sizes for one table of a layer: four groups of six sizes


At = Callable[[Sequence[int]], float]


class Times:
    """The terms of a problem, in seconds.

    latency: predicts layers, and measures those that it does not know. variants: of layers; their axes follow those of the
    groups.
    """

    def __init__(self, space: Space, latency: Latency, progress: bool = False, variants: Variants | None = None):
        self.space, self.latency, self.variants = space, latency, variants or Variants()
        self.places = {g.atom: i for i, g in enumerate(space.groups)}
        self.options = {g.atom: space.sizes[g.name] for g in space.groups}
        self.dense = Predictor(space.comb, latency)
        self.dense.prepare(self.options, progress)
        self.whole = self.dense.total({})
        self.constant = latency.per_run
        self.terms: list[Term] = []
        nodes = self.dense.layers.nodes
        owner = {name: b for b, block in enumerate(space.blocks) for name in block.nodes}
        outside = {node.name for node in nodes}
        inner = {self.places[g.atom]: space.inner[g.name] for g in space.groups if g.name in space.inner}
        owned: dict[int | None, set[str]] = {}  # names of nodes, by the block with which their terms go
        with bar(progress, "times", len(nodes) + len(space.blocks)) as update:
            for index, node in enumerate(nodes):
                atoms = [a for a in self.dense.atoms(index) if a in self.places]
                blocks = {owner.get(node.name), *(inner.get(self.places[a]) for a in atoms)} - {None}
                owning = min(blocks) if blocks else None  # type: ignore[type-var]
                owned.setdefault(owning, set()).add(node.name)
                # A layer that reads groups inside of two blocks depends on the sizes in the first block only.
                known = [a for a in atoms if inner.get(self.places[a]) in (None, owning)]
                self.terms += self._tables(self.dense, index, {a: a for a in known}, owning, False)
                update(index + 1, "")
            self.terms += [term for i, _ in enumerate(self.variants.offered) for term in self._conversions(i, inner)]
            merged = Predictor(space.form([]).comb, latency) if space.blocks else self.dense
            for b, block in enumerate(space.blocks):
                form = space.form([b])
                pruned = Predictor(form.comb, latency)
                # Groups inside of other blocks have no size of their own where those go, too.
                twins = {t: o for t, o in form.twins.items() if o in self.places and self.places[o] not in inner}
                pruned.prepare({t: self.options[o] for t, o in twins.items()}, progress)
                self._pruned(b, set(block.nodes), outside, owned.get(b, set()), merged, pruned, twins)
                update(len(nodes) + b + 1, block.name)

    def _pruned(
        self, b: int, names: set[str], outside: set[str], owned: set[str], merged: Predictor, pruned: Predictor,
        twins: dict[Factor, Factor],
    ) -> None:  # fmt: skip
        """Add the terms of what a block becomes. owned: names of the nodes whose terms go with it. merged: predicts the
        program with all blocks, merged as it is without some: what merging saves in the other blocks (their layer scales,
        say) it saves only once, so no block gets it."""
        start = len(self.terms)
        for index, node in enumerate(pruned.layers.nodes):
            if node.name in names or node.name not in outside:
                inside = {t: o for t, o in twins.items() if t in pruned.atoms(index)}
                self.terms += self._tables(pruned, index, inside, b, True)
        added = sum(_last(t) for t in self.terms[start:])
        saved = sum(merged.node(i, {}) for i, node in enumerate(merged.layers.nodes) if node.name in owned)
        rest = pruned.total({}) - (merged.total({}) - saved + added)
        self.terms.append(Term((), np.array(rest), b, True))

    def _tables(
        self, predictor: Predictor, index: int, atoms: Mapping[Factor, Factor], block: int | None, gone: bool
    ) -> list[Term]:
        """The terms of one layer. atoms: by the atoms of the predictor's program that the layer depends on, the space's
        atoms."""
        ours = list(dict.fromkeys(atoms.values()))
        options = [tuple(self.options[a]) for a in ours]
        axes = tuple(self.places[a] for a in ours)

        variants = self.variants.of(predictor.layers.nodes[index]) if predictor is self.dense else []
        changes = [self.variants.offered[v].option for v in variants]
        options += [(CHANGED, FLOAT)] * len(variants)
        axes += tuple(len(self.places) + v for v in variants)

        def at(sizes: Sequence[int]) -> float:
            size = dict(zip(ours, sizes, strict=False))
            theirs = {atom: size[indices] for atom, indices in atoms.items()}
            changed = [change for change, k in zip(changes, sizes[len(ours) :], strict=True) if k == CHANGED]
            return self._changed(predictor, index, theirs, changed)

        if math.prod(map(len, options)) <= CELLS:
            return [Term(axes, _table(at, options), block, gone)]
        return [Term(tuple(axes[i] for i in indices), table, block, gone) for indices, table in _pairwise(at, options)]

    def _changed(self, predictor: Predictor, index: int, sizes: Mapping[Factor, int], changed: Sequence[str]) -> float:
        """Seconds of a layer with these variants. A layer with both takes the shares that each of them leaves."""
        seconds = predictor.node(index, sizes)
        layer = predictor.layers.numbered(index, predictor.layers.sizer(sizes)) if changed else None
        if layer is None or seconds <= 0:
            return seconds
        weight = weight_of(predictor.layers.nodes[index])
        return seconds * math.prod(self.variants.share(option, weight, layer, seconds) for option in changed)

    def conversions(self, variant: int) -> float:
        """Seconds of the conversions at the borders of a quantised region, if nothing shrinks."""
        inner = {self.places[g.atom]: self.space.inner[g.name] for g in self.space.groups if g.name in self.space.inner}
        terms = self._conversions(variant, inner)  # the variant is the last axis
        return sum(float(term.seconds[(*[-1] * (term.seconds.ndim - 1), CHANGED)]) for term in terms)

    def _conversions(self, variant: int, inner: Mapping[int, int]) -> Iterator[Term]:
        """The terms of the conversions at the borders of a quantised region: kernels that copy the values."""
        region, nodes = self.variants.offered[variant], self.dense.layers.comb.module.graph.nodes
        if region.option not in QUANTISED or self.variants.quantised is None:
            return  # a share that was measured contains them
        known = {node.name: node for node in nodes}
        borders = [(name, self.variants.quantised) for name in region.read] + [
            (n, self.latency) for n in region.written
        ]
        for name, model in borders:
            node = known.get(name)
            if node is None or self.dense.layers.comb.axes.get(node) is None:
                continue
            atoms = [a for a in ax.atoms(self.dense.layers.comb.flat(node)) if a in self.places]
            atoms = [a for a in atoms if inner.get(self.places[a]) in (None, region.block)]

            def at(
                sizes: Sequence[int], node: fx.Node = node, atoms: list[Factor] = atoms, model: Latency = model
            ) -> float:
                if sizes[-1] == FLOAT:
                    return 0.0
                size = self.dense.layers.sizer(dict(zip(atoms, sizes, strict=False)))
                return model.seconds(Layer("copy", (("entries", self.dense.layers.entries(node, size)),)))

            options = [*(self.options[a] for a in atoms), (CHANGED, FLOAT)]
            axes = (*(self.places[a] for a in atoms), len(self.places) + variant)
            if math.prod(map(len, options)) <= CELLS:
                yield Term(axes, _table(at, options), region.block)
            else:  # of a long concatenation, at full width
                full = [o[-1] for o in options[:-1]]
                yield Term(axes[-1:], np.array([at([*full, CHANGED]), 0.0]), region.block)


def _table(at: At, options: Sequence[Sequence[int]]) -> np.ndarray:
    shape = [len(o) for o in options]
    return np.array([at(sizes) for sizes in itertools.product(*options)]).reshape(shape)


def _pairwise(at: At, options: Sequence[Sequence[int]]) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """A function of many sizes (a long concatenation) as a sum of functions of two sizes each: the hub and one other, while
    the rest have their middle sizes. This is exact for a product of the hub with a sum of the others, such as the
    arithmetic of a layer that reads a concatenation. The hub is the size for which random combinations fit best."""
    middle = [o[len(o) // 2] for o in options]
    count, best = len(options), None
    draw = np.random.default_rng(0)
    probes = [[int(draw.choice(o)) for o in options] for _ in range(8)]

    def sizes(**places: int) -> list[int]:
        return [places.get(f"p{i}", m) for i, m in enumerate(middle)]

    for hub in range(count):

        def near(probe: Sequence[int], hub: int = hub) -> float:
            base = at(sizes(**{f"p{hub}": probe[hub]}))
            others = (at(sizes(**{f"p{hub}": probe[hub], f"p{i}": probe[i]})) for i in range(count) if i != hub)
            return base + sum(other - base for other in others)

        error = sum(abs(near(p) - at(p)) for p in probes)
        if best is None or error < best[0]:
            best = error, hub
    assert best is not None
    hub = best[1]
    alone = np.array([at(sizes(**{f"p{hub}": n})) for n in options[hub]])
    terms: list[tuple[tuple[int, ...], np.ndarray]] = [((hub,), alone)]
    for i in range(count):
        if i != hub:
            rows = [[at(sizes(**{f"p{hub}": n, f"p{i}": m})) for m in options[i]] for n in options[hub]]
            terms.append(((hub, i), np.array(rows) - alone[:, None]))
    return terms


def _last(term: Term) -> float:
    """A term's seconds if nothing shrinks."""
    return float(term.seconds[(-1,) * term.seconds.ndim])
