"""Checks of merges in float64: each one by itself on random inputs, and all together on the whole network."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...graph.nodes import shape
from ...graph.program import Program
from ...graph.verify.evaluate import Evaluator, double_weights, evaluated, invoke, random_inputs, relative_error
from .choose_merges import Merge
from .merge_weights import Kernel
from .parts import Values
from .regions import constant_value

TOLERANCE, EPSILON = 1e-10, torch.finfo(torch.float64).eps


def random_values(values: Values, generator: torch.Generator) -> Values:
    """A reader of random tensors in the place of the stored ones: same shapes and signs, sizes from 0.5 to 1.5,
    float64.

    A tensor is drawn once, so that every read of it gives the same values. Integer tensors are the stored ones.
    """
    drawn: dict[str, torch.Tensor] = {}

    def read(stored: fx.Node) -> torch.Tensor:
        name = str(stored.target)
        if name not in drawn:
            value = values(stored)
            size = torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5
            drawn[name] = torch.where(value < 0, -size, size) if value.is_floating_point() else value
        return drawn[name]

    return read


def merge_error(
    merge: Merge,
    kernel: Kernel,
    values: Values,
    nodes: Iterable[fx.Node],
    current: Callable[[fx.Node], fx.Node],
    generator: torch.Generator,
) -> float:
    """Relative error of a merged map on a random input, borders included, in float64.

    values: reads stored tensors. nodes: all nodes of the graph, in order. current: maps a node of the plan to the node
    that computes its value now.
    """
    x = torch.randn(_window(merge), generator=generator, dtype=torch.float64)
    env: dict[fx.Node, Any] = {current(merge.source): x}
    inner = set().union(*(b.members for b in merge.branches))
    folds = {step.nodes[i]: step for step in merge.steps() if step.folds for i in (0, -1)}
    for node in nodes:
        if node in folds:  # the sizes in its arguments are the network's, not this input's
            step = folds[node]
            outer = env[current(step.source)]
            env[node] = outer.flatten(0, -2) if node is step.nodes[0] else env[step.nodes[1]].reshape(outer.shape)
        elif node in inner:
            env |= {n: constant_value(n, values) for n in node.all_input_nodes if n not in env}
            env[node] = invoke(node, evaluated(node, env))
    expected = sum(b.factor * env[current(b.end)] for b in merge.branches)
    return relative_error(kernel.run(x), expected)


def _window(merge: Merge) -> list[int]:
    """Sizes of a small input that has all borders and an inside: two samples, spatial sizes cut to a few kernels."""
    size = shape(merge.source)
    result = [2, *(min(s, 3) for s in size[1:])]
    result[merge.axis] = size[merge.axis]
    if merge.axis == 1:
        for d, (span, stride) in enumerate(zip(merge.geometry.span, merge.geometry.stride, strict=True), 2):
            result[d] = min(size[d], 2 * (span + stride))
    return result


# ---------------------------------------------------------------------------------------------------- the whole network
@dataclass(frozen=True)
class Proof:
    """What running a merged network beside the original showed.

    error: the worst relative error, of the outputs or, where `magnified` is not None, of any node on the values that
    its inputs have in the original. magnified: relative change of the outputs when the inputs change by one rounding
    error, where that is why comparing outputs proves nothing. wrong: wrong merges, by the name of the node of the
    original whose value each gives, with the reason.
    """

    error: float
    magnified: float | None = None
    wrong: dict[str, str] = field(default_factory=dict)


def prove(
    original: Program, fused: Program, twins: Mapping[fx.Node, fx.Node], exact: dict[str, torch.Tensor], seed: int
) -> Proof:
    """Run the merged program and the original on the same random inputs in float64, and compare.

    twins: for each node of the merged program whose value the original has too, the original's node. exact: merged
    weights before rounding to the program's precision.
    """
    inputs = random_inputs(original, torch.Generator().manual_seed(seed))
    new = Evaluator(fused, double_weights(fused) | exact)
    old = Evaluator(original, double_weights(original))
    expected = old.run(inputs)
    error = relative_error(new.run(inputs), expected)
    if error <= TOLERANCE:
        return Proof(error)
    errors = _node_errors(old, new, twins, inputs)
    wrong = {n.name: f"in the whole network it is {e:.1e} off" for n, e in errors.items() if not e <= TOLERANCE}
    moved = [x * (1 + EPSILON) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    return Proof(max(errors.values(), default=0.0), relative_error(old.run(moved), expected), wrong)


@torch.no_grad()
def _node_errors(
    old: Evaluator, new: Evaluator, twins: Mapping[fx.Node, fx.Node], inputs: list[Any]
) -> dict[fx.Node, float]:
    """Relative error of each node of the original: its twin is computed from the original's values of the twin's
    inputs.
    """
    values: dict[fx.Node, Any] = {}
    old.run(inputs, values.__setitem__)
    env: dict[fx.Node, Any] = {}
    errors: dict[fx.Node, float] = {}
    for node in new.module.graph.nodes:
        twin = twins.get(node)
        if node.op == "get_attr":
            env[node] = new.fetch(str(node.target))
        elif node.op == "call_function":
            env[node] = new.call(node, env)
            if twin is not None:
                errors[twin] = relative_error(env[node], values[twin])
        if twin is not None and node.op in ("placeholder", "call_function"):
            env[node] = values[twin]
    return errors
