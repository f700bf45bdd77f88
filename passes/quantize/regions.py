"""Regions of layers between which values can stay INT8, and programs in which only some layers are quantised. Source: ours.

A value stays INT8 from one layer to the next if only pointwise operators, pooling and views of that one value lie between
them. Everything else (a residual addition, a gate, a normalisation) computes in floating point, so a region ends there and
pays for its conversions alone: what regions save adds up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import fx

from ...graph.edit import Editor
from ...graph.facts import FAKE_PER_TENSOR, FAKE_QUANTISATION, MAPS
from ...graph.nodes import arguments, op_name, set_argument
from ...graph.program import Program
from ..common.weights import WeightedLayer
from .calibrate import UINT8
from .placement import grid_of, passed_on, place, producer, quantised_reads


def regions(known: Sequence[WeightedLayer]) -> list[list[WeightedLayer]]:
    """The layers in regions, in the order of their first layers. Layers that read the same value are in one region."""
    owner = {layer.name: i for i, layer in enumerate(known)}
    layer_of = {node: layer for layer in known for node in layer.nodes}

    def root(i: int) -> int:
        while owner[known[i].name] != i:
            i = owner[known[i].name]
        return i

    def join(a: WeightedLayer, b: WeightedLayer) -> None:
        i, j = sorted((root(owner[a.name]), root(owner[b.name])))
        owner[known[j].name] = i

    first_reader: dict[fx.Node, WeightedLayer] = {}
    for layer in known:
        for node in layer.nodes:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            join(layer, first_reader.setdefault(source, layer))
            source = producer(source)
            if source in layer_of and all(_stays(user, layer_of) for user in source.users):
                join(layer, layer_of[source])
    by_root: dict[int, list[WeightedLayer]] = {}
    for i, layer in enumerate(known):
        by_root.setdefault(root(i), []).append(layer)
    return list(by_root.values())


def _stays(node: fx.Node, layer_of: dict[fx.Node, WeightedLayer]) -> bool:
    """Whether all that becomes of a value at a node, and behind it, is read by layers."""
    return node in layer_of or (passed_on(node) is not None and all(_stays(u, layer_of) for u in node.users))


def quantised_layers(program: Program) -> Iterator[tuple[fx.Node, str]]:
    """Yield the layers of a program whose weights are quantised, each with the name of its weight."""
    for node in program.graph.nodes:
        if op_name(node) in MAPS and op_name(weight := arguments(node)["weight"]) in FAKE_QUANTISATION:
            yield node, str(weight.all_input_nodes[0].target)


def quantised_alone(program: Program, weights: Collection[str]) -> Program:
    """A copy of a quantised program in which only the layers with these weights are quantised, with the scales that they
    have, and the values that `quantised_reads` names for them."""
    new = program.copy()
    edit = Editor(new.module())
    integer = set()
    for node, name in list(quantised_layers(new)):
        if name in weights:
            integer.add(node)
        else:
            set_argument(node, "weight", arguments(node)["weight"].all_input_nodes[0])
    grids = {}
    for node in new.graph.nodes:
        if op_name(node) in FAKE_PER_TENSOR:
            value = node.args[0]
            assert isinstance(value, fx.Node)
            grids[value] = grid_of(node)
            node.replace_all_uses_with(value)
    cpu = any(grid.format == UINT8 for grid in grids.values())
    edit.finish()
    place(edit, quantised_reads(new.graph, integer, cpu), grids)
    edit.finish()
    return new
