"""The dimension of a program's class scores that holds the classes, as far as the graph tells."""

import torch
from torch import fx

from ...graph.comb.axes import normal, segments
from ...graph.comb.solve import Comb
from ...graph.compat import output_spec, pytree
from ...graph.errors import GraphcombError
from ...graph.facts import MAPS
from ...graph.nodes import arguments, op_name, shape
from ...graph.outputs import output_nodes
from ...graph.program import Program
from .losses import NAMES, logits_of


def class_axis(program: Program) -> int | None:
    """The dimension of the class scores that holds the outputs, or a slice of the outputs, of the last layer before
    them; the comb's axes tell. None where no single dimension does, or where there are no single scores.
    """
    scores = scores_node(program)
    before = {scores} if scores is not None else set()
    layer = None
    for node in reversed(program.graph.nodes):
        if node in before and layer is None:
            before.update(node.all_input_nodes)
            layer = node if op_name(node) in MAPS else None
    if scores is None or layer is None or len(shape(layer)) < len(shape(arguments(layer)["weight"])):
        return None
    axes = Comb(program).axes
    whole = normal(axes[layer][-1 if op_name(layer) == "linear" else 1])
    places = [whole, *(segments(whole[0]) if len(whole) == 1 else [])]
    fits = [d for d, axis in enumerate(map(normal, axes[scores])) if d and axis and axis in places]
    return fits[0] if len(fits) == 1 else None


def scores_node(program: Program) -> fx.Node | None:
    """The node of the class scores that `logits_of` finds among the outputs, or None."""
    nodes = pytree.tree_leaves(program.graph.output_node().args)
    spec = output_spec(program.graph)
    values = [n.meta.get("val") if isinstance(n, fx.Node) else n for n in nodes]
    try:
        scores = logits_of(pytree.tree_unflatten(values, spec))
    except GraphcombError:
        return None
    return next(n for n, value in zip(nodes, values, strict=True) if value is scores)


def other_outputs(program: Program) -> list[str]:
    """Names of the floating-point outputs besides the class scores; empty where the class scores are unknown."""
    if (scores := scores_node(program)) is None:
        return []
    nodes = {name: n for name, n in output_nodes(program.graph).items() if isinstance(n, fx.Node) and n is not scores}
    values = {name: n.meta.get("val") for name, n in nodes.items() if n.name not in NAMES}
    return [name for name, value in values.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
