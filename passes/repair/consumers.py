"""Which layers can be repaired, and what they compute from what, as rows. Source: ours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from ...graph.nodes import arguments, fetch, op_name
from ...graph.program import Program, TrainableModule
from ..common.weights import windows

Removed = dict[str, dict[int, list[int]]]
PRODUCTS = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@dataclass(frozen=True)
class Consumer:
    """A layer `y = W x + b` of the smaller program whose weights may change, and its twin in the dense one.

    weight, bias: names of parameters; bias is None where there is none of its own. mean: where there is no bias, the
    running mean of the BatchNorm behind, which a constant can be taken from instead. outputs, inputs: of the dense weight,
    which indices are left. whole: each output is fitted to what the dense layer computes, from all entries that it reads;
    otherwise all kernel positions share one map from the channels that are left to those that were there.
    """

    node: fx.Node
    twin: fx.Node
    weight: str
    bias: str | None
    mean: str | None
    groups: int
    outputs: np.ndarray
    inputs: np.ndarray
    whole: bool

    @property
    def x(self) -> fx.Node:
        return arguments(self.node)["input"]

    @property
    def dense_x(self) -> fx.Node:
        return arguments(self.twin)["input"]

    @property
    def transposed(self) -> bool:
        return op_name(self.node).startswith("conv_transpose")

    @property
    def linear(self) -> bool:
        return op_name(self.node) == "linear"

    def left(self, y: Tensor) -> Tensor:
        """Of what the dense layer gives, the outputs that are left."""
        return y.index_select(-1 if self.linear else 1, torch.from_numpy(self.outputs).to(y.device))


def find(
    dense: Program, smaller: TrainableModule, removed: Removed, same: set[fx.Node], largest: int
) -> tuple[list[Consumer], list[dict[str, str]]]:
    """The layers that read what a removal has changed, in the order they run, and those that must stay as they are, each
    with the reason.

    same: nodes whose values are those of the dense program. largest: how many unknowns an output may have.
    """
    twins = {node.name: node for node in dense.graph.nodes}
    uses = uses_of(smaller)
    consumers, refused = [], []
    for node in smaller.graph.nodes:
        if op_name(node) not in PRODUCTS or arguments(node)["input"] in same:
            continue
        found = consumer_of(node, twins.get(node.name), dense, smaller, removed, uses, largest)
        if isinstance(found, Consumer):
            consumers.append(found)
        else:
            weight = arguments(node)["weight"]
            refused.append({"what": str(weight.target) if weight.op == "get_attr" else node.name, "why": found})
    return consumers, refused


def uses_of(module: TrainableModule) -> dict[int, int]:
    """How many nodes read each stored tensor, by its id."""
    uses: dict[int, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(found := fetch(module, str(node.target)), Tensor):
            uses[id(found)] = uses.get(id(found), 0) + len(node.users)
    return uses


def consumer_of(
    node: fx.Node,
    twin: fx.Node | None,
    dense: Program,
    smaller: TrainableModule,
    removed: Removed,
    uses: dict[int, int],
    largest: int,
) -> Consumer | str:
    """The consumer, or the reason why it is none."""
    a, name = arguments(node), op_name(node)
    weight, bias = a["weight"], a["bias"]
    if weight.op != "get_attr":
        quantised = op_name(weight).startswith("fake_quantize")
        return "it is quantised; Quantize comes last" if quantised else "its weight is computed, not a stored parameter"
    parameter = fetch(smaller, str(weight.target))
    if not isinstance(parameter, torch.nn.Parameter):
        return "its weight is a constant"
    if uses[id(parameter)] > 1:
        return "its weight is used more than once"
    if bias is not None and bias.op != "get_attr":
        return "its bias is computed, not a stored parameter"
    if twin is None or op_name(twin) != name:
        return "the dense network has no such layer to compare with"
    groups, transposed = a.get("groups", 1), name.startswith("conv_transpose")
    if groups > 1 and transposed:
        return "a grouped transposed convolution"
    full = fetch(dense.module(), str(arguments(twin)["weight"].target))
    lost = {int(d): lost for d, lost in removed.get(str(weight.target), {}).items()}
    kept = [np.delete(np.arange(n), lost.get(d, [])) for d, n in enumerate(full.shape)]
    if [len(k) for k in kept] != list(parameter.shape):
        return "what was removed from its weight is not known"
    into = 1 if not transposed else 0
    own = bias is not None and uses[id(fetch(smaller, str(bias.target)))] == 1
    unknowns = math.prod(parameter.shape[1:])
    whole = not transposed and unknowns <= largest
    mean = _mean_behind(node, smaller, uses) if bias is None and whole else None
    if not whole and groups > 1:
        return f"{unknowns} unknowns for each output, and {largest} are the most"
    return Consumer(
        node,
        twin,
        str(weight.target),
        str(bias.target) if own else None,
        mean,
        groups,
        kept[1 - into],
        kept[into],
        whole,
    )


def _mean_behind(node: fx.Node, module: TrainableModule, uses: dict[int, int]) -> str | None:
    """The running mean of a BatchNorm that alone reads a layer: `BN(y + c)` is BN with `mean - c` of `y`."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None or op_name(reader) != "batch_norm" or arguments(reader)["input"] is not node:
        return None
    mean = arguments(reader)["running_mean"]
    if mean is None or mean.op != "get_attr" or uses[id(fetch(module, str(mean.target)))] > 1:
        return None
    return str(mean.target)


def rows_of_inputs(consumer: Consumer, x: Tensor) -> Tensor:
    """What each output value of a layer is computed from: `(samples, positions, groups, u)`."""
    if consumer.linear:
        return x.reshape(len(x), -1, 1, x.shape[-1]) if x.dim() > 1 else x[None, None, None]
    if not consumer.whole:
        return x.movedim(1, -1).flatten(1, -2)[:, :, None]
    rows = windows(consumer.node, x)
    rank = (rows.dim() - 3) // 2
    return rows.flatten(2 + rank).flatten(2, 1 + rank).permute(1, 2, 0, 3)


def rows_of_outputs(consumer: Consumer, y: Tensor) -> Tensor:
    """The values of the outputs that are left, in the order of `rows_of_inputs`: `(samples, positions, groups, o)`."""
    y = consumer.left(y)
    if consumer.linear:
        return y.reshape(len(y), -1, 1, y.shape[-1]) if y.dim() > 1 else y[None, None, None]
    return y.movedim(1, -1).flatten(1, -2).unflatten(2, (consumer.groups, -1))
