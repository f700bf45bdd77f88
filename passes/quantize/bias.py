"""Bias correction: the mean of every output channel of a quantised layer becomes that of the layer in floating point.

Rounding weights and saturating inputs shifts the means of a layer's outputs, which all later layers see. The shift is
measured layer by layer, with all earlier biases corrected already, and subtracted from the bias: the means on the
calibration data are then exact. Source: Nagel et al., arXiv 1906.04721, section 4.2, with empirical means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from ...graph.compat import pytree
from ...graph.edit import Editor
from ...graph.nodes import arguments, fetch, op_name, set_argument
from ...graph.trainable import TrainableModule
from ..common.feed import Batch
from ..common.weights import WeightedLayer
from ..repair.stepwise import Memory, Stepwise

BYTES = 4e9  # of activations in memory; the rest goes to temporary files


def channel_means(node: fx.Node, values: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The mean of each output channel of a layer `(out,)` over several batches. counts: of each, the samples that count."""
    axis = -1 if op_name(node) == "linear" else 1
    rows = [v[:n].movedim(axis, 0).flatten(1).double() for v, n in zip(values, counts, strict=True)]
    return torch.stack([r.sum(1) for r in rows]).sum(0) / sum(r.shape[1] for r in rows)


class Means:
    """The channel means of layers over all batches, each batch with the number of its samples that count."""

    def __init__(self, batches: Sequence[tuple[Batch, int]]):
        self.inputs = [pytree.tree_leaves((b.args, b.kwargs)) for b, _ in batches]
        self.counts = [count for _, count in batches]

    def of(self, module: TrainableModule, layers: Sequence[fx.Node]) -> dict[str, Tensor]:
        """The means by name of the node."""
        run = Stepwise(module, self.inputs, Memory(BYTES))
        means = {}
        for node in layers:
            run.run_through(node)
            means[node.name] = channel_means(node, run.values[node], self.counts)
        return means

    def correct(
        self, module: TrainableModule, layers: Sequence[WeightedLayer], wanted: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Shift the biases of layers such that their means are the wanted ones (by name of the node).

        layers: in the order of the graph, each called once; one without a bias gets one. Returns the largest shift of a
        channel by weight.
        """
        edit = Editor(module)
        biases = [_own_bias(edit, layer) for layer in layers]
        edit.finish()
        run, largest = Stepwise(module, self.inputs, Memory(BYTES)), {}
        for layer, bias in zip(layers, biases, strict=True):
            (node,) = layer.nodes
            run.run_through(node)
            shift = wanted[node.name] - channel_means(node, run.values[node], self.counts)
            bias.data += shift.to(bias)
            places = shift if op_name(node) == "linear" else shift.view(-1, *[1] * (len(layer.shape) - 2))
            for value in run.values[node]:
                value += places.to(value)
            largest[layer.name] = float(shift.abs().max())
        return largest


def correctable(layer: WeightedLayer) -> bool:
    """Whether a layer has a bias of its own to shift: it is called once, and its bias is stored or missing."""
    bias = arguments(layer.nodes[0])["bias"]
    return len(layer.nodes) == 1 and (bias is None or bias.op == "get_attr")


def _own_bias(edit: Editor, layer: WeightedLayer) -> nn.Parameter:
    """The bias of a layer as a parameter that nothing else reads."""
    (node,), old = layer.nodes, arguments(layer.nodes[0])["bias"]
    stored = None if old is None else fetch(edit.module, str(old.target))
    others = [n for n in edit.graph.nodes if n.op == "get_attr" and fetch(edit.module, str(n.target)) is stored]
    if isinstance(stored, nn.Parameter) and len(others) == len(old.users) == 1:
        return stored
    weight = fetch(edit.module, layer.name)
    bias = nn.Parameter(weight.new_zeros(layer.shape[0]) if stored is None else stored.detach().clone())
    with edit.before(node):
        name = edit.free_name(f"{layer.name.rpartition('.')[0]}.bias".lstrip("."))
        set_argument(node, "bias", edit.store(name, bias))
    return bias
