"""How far the outputs of a program are from those of the dense one, without labels.

For class scores it is the Kullback-Leibler divergence in nats, averaged over samples and positions (an output of a
softmax has the logarithms of its probabilities as scores); for other outputs that of two Gaussians with the dense
output's variance, which is half the mean square of the change in units of that variance (ours). Those of several outputs
are added. Whether an output has class scores along a dimension is seen from the dense network's (`tell_classes`); where
it has values instead, each index of the dimension has a variance of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from ...graph.compat import pytree
from ...graph.errors import BadInput
from ...graph.facts import COPIES, SOFTMAXES
from ...graph.nodes import arguments, op_name
from ...graph.program import Program, flatten_outputs
from .class_axis import class_axis, scores_node
from .feed import Batch, Feed
from .losses import deviations, tell_classes
from .processes import accelerator, placed
from .scoring import evaluating

NOT_FINITE = "the network's outputs are not finite"


class Divergence:
    """Measures how far a program's floating-point outputs are from the dense program's, on the given batches.

    others: further batches, which are not measured on. Raises BadInput for a program without such outputs, for outputs that
    are not finite, and for batches that all give the same outputs, since nothing could be told apart.
    """

    def __init__(self, dense: Program, batches: list[Any], others: list[Any] | None = None):
        self.feed = Feed(dense)
        self.batches = list(self.feed.batches(batches, pad=True))
        nodes = [n for n in pytree.tree_leaves(dense.graph.output_node().args) if _is_floating(n)]
        if not nodes:
            raise BadInput("program: no output is floating point, such as class scores, so no loss can be measured")
        scores = scores_node(dense)
        self.scores = nodes.index(scores) if scores in nodes else None
        self.axis = class_axis(dense)
        self.softmaxes = {i: dim for i, node in enumerate(nodes) if (dim := _softmax_dim(node)) is not None}
        self.dense = self._outputs(dense, self.batches)
        if not all(bool(t.isfinite().all()) for outputs in self.dense for t in outputs):
            raise BadInput(f"data: {NOT_FINITE} on it, so no loss can be measured")
        self.kinds = [self._kind(i, list(c)) for i, c in enumerate(zip(*self.dense, strict=True))]
        more = self._outputs(dense, self.feed.batches(others or (), pad=True))
        alike = self.images > 1 and not _vary(self.dense)
        if alike or not _vary([*self.dense, *more]):
            raise BadInput("data: all calibration images give the same outputs; give images with variety")

    @property
    def images(self) -> int:
        """The number of images on which losses are measured."""
        return sum(batch.size for batch in self.batches)

    def _outputs(self, program: Program, batches: Iterable[Batch]) -> list[list[torch.Tensor]]:
        """The floating-point outputs of a program, for each batch."""
        module, device = program.graph_module, accelerator().device
        with evaluating(module), placed(module, device), torch.no_grad():
            return [self._floats(module, batch.to(device)) for batch in batches]

    def _floats(self, module: Callable[..., Any], batch: Batch) -> list[torch.Tensor]:
        outputs = self.feed.cut(module(*batch.args, **batch.kwargs), batch)
        return [t.cpu() for t in flatten_outputs(outputs) if isinstance(t, torch.Tensor) and t.is_floating_point()]

    def __call__(self, program: Program) -> float:
        """The loss of a program; infinite if its outputs are not finite."""
        total, count = 0.0, 0
        outputs = self._outputs(program, self.batches)
        for batch, ours, theirs in zip(self.batches, self.dense, outputs, strict=True):
            size = batch.size or 1
            count += size
            for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                total += size * self._between(i, a.double(), b.double())
        return max(total / count, 0.0) if math.isfinite(total) else math.inf

    def _kind(self, output: int, batches: list[torch.Tensor]) -> int | torch.Tensor:
        """The dimension of an output's classes, or, of values, their standard deviations."""
        axis = self.softmaxes.get(output, self.axis if output == self.scores else None)
        if axis is None and batches[0].dim() == 2 and batches[0].shape[1] > 1:
            axis = 1
        rows = torch.cat([t if t.dim() else t[None] for t in batches])
        if axis is not None and (output in self.softmaxes or tell_classes(rows, axis)):
            return axis
        return deviations(rows, axis)

    def _between(self, output: int, dense: torch.Tensor, other: torch.Tensor) -> float:
        kind = self.kinds[output]
        if isinstance(kind, torch.Tensor):
            return float(((dense - other) / kind).square().mean()) / 2
        if output in self.softmaxes:  # other outputs count as logits; those of log_softmax stay what they are
            dense, other = (t.clamp_min(torch.finfo(torch.float32).tiny).log() for t in (dense, other))
        p, q = dense.log_softmax(kind), other.log_softmax(kind)
        return float((p.exp() * (p - q)).sum(kind).mean())


def _is_floating(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _softmax_dim(node: Any) -> int | None:
    """The dimension of the softmax that computes a value; None for another value."""
    while isinstance(node, fx.Node) and op_name(node) in COPIES:
        node = node.args[0]
    if not isinstance(node, fx.Node) or op_name(node) not in SOFTMAXES or "log" in op_name(node):
        return None
    return int(arguments(node)["dim"])


def _rows(output: torch.Tensor) -> torch.Tensor:
    """An output in double precision, with a row for each sample; a scalar is one row."""
    return output.double().reshape(len(output) if output.dim() else 1, -1)


def _vary(batches: list[list[torch.Tensor]]) -> bool:
    """Whether some output differs between samples."""
    for columns in zip(*batches, strict=True):
        rows = torch.cat([_rows(t) for t in columns])
        if float((rows - rows[:1]).abs().max()) > 1e-9 * float(rows.abs().max() + 1e-30):
            return True
    return False
