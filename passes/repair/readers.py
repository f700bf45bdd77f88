"""The layers that read groups, with sums over the data that tell what is lost when some of their columns go.

Source: ours, after the optimal brain surgeon (Hassibi and Stork, 1993) and the Gauss-Newton diagonal by random projections
(Hutchinson).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ...graph.comb import axes as ax
from ...graph.comb.axes import Axis
from ...graph.comb.solve import Comb, Group
from ...graph.compat import exact_kernels, pytree
from ...graph.errors import BadInput
from ...graph.facts import MAPS
from ...graph.nodes import arguments, fetch, op_name
from ...graph.sparse import sparse_weights
from ..base import Context
from ..common.feed import Feed
from ..common.losses import UnlabelledLoss
from ..common.observe import Observer
from ..common.processes import accelerator, placed, summed
from ..common.repeat import seeded
from ..common.samples import everywhere, sample_batches
from ..common.scoring import evaluating
from .consumers import has_rows, uses_of
from .images import by_sample, halves, spread

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # shares of the diagonal of A that the held-out halves choose among
WIDE = 4096  # inputs above which only those that can lose indices are columns (see `layout`)
MOST = 8192  # columns above which a reader's sums would take gigabytes
FLAT = 1e-13  # the share of its square below which the variance of an input is a rounding error


@dataclass(frozen=True)
class Prepared:
    """What the losses of removing a reader's columns are computed from.

    inverse: `A^-1`. power: `W^T G W` for one sample, with the sensitivities of the outputs on the diagonal of G. halves:
    `A^-1` of each half of the samples; nothing if there is a single half. All (c, c).
    """

    inverse: Tensor
    power: Tensor
    halves: tuple[Tensor, ...]


@dataclass(frozen=True)
class Reader:
    """A linear layer or convolution that reads groups, with sums over rows.

    axis: of its columns. into: the dimension of its weight that its inputs are. sizes, kept: see `layout`. centred: whether
    a bias or a BatchNorm behind it takes up a constant. weight: (o * kernel, c), float64. shape, dtype: of the network's
    weight. Sums in float64, for each half of the samples: count (2), x (2, c), xx (2, c, c). Sums over all samples:
    sensitivity (o), the squared gradients at the outputs; coherent (2), see `sense`. samples: the number of all samples, 0
    before the sums are complete.
    """

    node: fx.Node
    axis: Axis
    into: int
    centred: bool
    weight: Tensor
    shape: torch.Size
    dtype: torch.dtype
    count: Tensor
    x: Tensor
    xx: Tensor
    sensitivity: Tensor
    coherent: Tensor
    sizes: tuple[int, ...]
    kept: tuple[int, ...]
    samples: int = 0

    @classmethod
    def of(cls, comb: Comb, node: fx.Node) -> Reader:
        """The reader of a node out of `refittable`."""
        a = arguments(node)
        stored = fetch(comb.module, str(a["weight"].target)).detach()
        into = 0 if op_name(node).startswith("conv_transpose") else 1
        axis, sizes, kept = layout(comb, node)
        flat = _columns(stored.double().movedim(into, -1), sizes, kept)
        flat = flat.reshape(-1, flat.shape[-1])
        size, outputs = flat.shape[-1], stored.shape[1 - into]
        behind = [op_name(u) for u in node.users] == ["batch_norm"]
        return cls(
            node, axis, into, a["bias"] is not None or behind, flat, stored.shape, stored.dtype, flat.new_zeros(2),
            flat.new_zeros(2, size), flat.new_zeros(2, size, size), flat.new_zeros(outputs), flat.new_zeros(2),
            sizes, kept,
        )  # fmt: skip

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return self.count, self.x, self.xx, self.sensitivity, self.coherent

    @property
    def finite(self) -> bool:
        """Whether the layer's inputs and the gradients at its outputs are finite numbers."""
        return all(bool(t.isfinite().all()) for t in self.sums)

    def add(self, rows: Tensor, half: Tensor) -> None:
        """Add the inputs of a batch. rows: (entries, positions, inputs). half: the half of each entry."""
        rows = _columns(rows, self.sizes, self.kept).flatten(1, -2)
        for k in range(2):
            part = rows[half == k].flatten(0, 1)
            self.count[k] += len(part)
            self.x[k] += part.sum(0).to(self.x.device)
            self.xx[k] += (part.T @ part).to(self.xx.device)

    def sense(self, gradient: Tensor, output: Tensor) -> None:
        """Add the gradients at the outputs of a batch; both arguments are (samples, positions, o).

        Later layers add up an error that has the same sign all over an image, so it counts for more than its squares say.
        How much more is estimated from the outputs themselves: the first number of `coherent` has the squares of sums over
        positions, the second the sums of squares.
        """
        self.sensitivity.add_(gradient.square().sum((0, 1)).to(self.sensitivity.device))
        product = gradient * (output - output.mean((0, 1)))
        squares = torch.stack([product.sum(1).square().sum(), product.square().sum()])
        self.coherent.add_(squares.to(self.coherent.device))

    def moments(self, which: slice) -> Tensor:
        """`A` over one half or both, about the mean if a constant is free."""
        count, x, xx = self.count[which].sum(), self.x[which].sum(0), self.xx[which].sum(0)
        if not self.centred:
            return xx
        about = xx - x[:, None] * x[None, :] / count.clamp(min=1)
        varies = about.diagonal() > FLAT * xx.diagonal()  # else what is left is a rounding error
        return about * varies[:, None] * varies

    def prepared(self) -> Prepared:
        """What losses are computed from. The ridge is the one whose predictions of each column by the others, from one
        half, are best on the other half."""
        together = float(self.coherent[0] / self.coherent[1]) if self.coherent[1] > 0 else 1.0
        root = (self.sensitivity * together / self.count.sum().clamp(min=1) / max(self.samples, 1)).sqrt()
        weighted = self.weight * root.repeat_interleave(len(self.weight) // len(root))[:, None]
        power = weighted.T @ weighted
        whole = self.moments(slice(0, 2))
        if min(self.count.tolist()) == 0:
            return Prepared(_inverse(whole, RIDGES[-1]), power, ())
        parts = [self.moments(slice(k, k + 1)) for k in range(2)]
        lost = {ridge: sum(_held_out(parts[k], parts[1 - k], power, ridge) for k in range(2)) for ridge in RIDGES}
        ridge = min(lost, key=lambda ridge: lost[ridge])
        return Prepared(_inverse(whole, ridge), power, tuple(_inverse(part, ridge) for part in parts))

    def change(self, inverse: Tensor, places: np.ndarray, half: int) -> tuple[Tensor, Tensor]:
        """How the weight changes, in its own shape, and the constant, `(o,)`, if these columns go and the others are
        refitted on one half of the samples. inverse: `A^-1` of that half."""
        s = torch.from_numpy(places)
        rest = torch.linalg.solve(inverse[s][:, s], inverse[s])  # (k, c), identity at s: what the others do not predict
        flat = -self.weight[:, s] @ rest
        outputs, kernel = len(self.sensitivity), self.shape[2:]
        change = _inputs(flat.reshape(outputs, *kernel, math.prod(self.sizes)), self.sizes, self.kept).movedim(
            -1, self.into
        )
        if not self.centred or self.into == 0:  # what a transposed convolution adds up differs between positions
            return change, flat.new_zeros(outputs)
        mean = self.x[half] / self.count[half].clamp(min=1)
        return change, -(flat @ mean).unflatten(0, (outputs, -1)).sum(1)


def layout(comb: Comb, node: fx.Node) -> tuple[Axis, tuple[int, ...], tuple[int, ...]]:
    """The axis of a reader's columns, the sizes of the parts that its inputs are a product of, and which of these parts are
    columns: all inputs are one part, but of a linear layer with more than `WIDE` only those that can lose indices. The
    others, such as positions, count as kernel positions, which share the refit."""
    axis = ax.normal(comb.axes[arguments(node)["input"]][-1 if op_name(node) == "linear" else 1])
    if op_name(node) != "linear" or ax.size(axis) <= WIDE:
        return axis, (ax.size(axis),), (0,)
    groups = {g.atom: None for g in comb.groups if g.frozen is None}
    free = tuple(i for i, factor in enumerate(axis) if ax.touches([factor], groups))
    if len(free) in (0, len(axis)):
        return axis, (ax.size(axis),), (0,)
    return [axis[i] for i in free], tuple(factor.size for factor in axis), free


def _order(sizes: tuple[int, ...], kept: tuple[int, ...]) -> list[int]:
    return [i for i in range(len(sizes)) if i not in kept] + list(kept)


def _columns(inputs: Tensor, sizes: tuple[int, ...], kept: tuple[int, ...]) -> Tensor:
    """A tensor whose last dimension is a reader's inputs, with its columns there instead, and before it the other parts."""
    before, order = inputs.dim() - 1, _order(sizes, kept)
    parts = inputs.unflatten(-1, sizes).permute(*range(before), *(before + i for i in order))
    return parts.flatten(before + len(order) - len(kept))


def _inputs(flat: Tensor, sizes: tuple[int, ...], kept: tuple[int, ...]) -> Tensor:
    """The inverse of `_columns` for a tensor in which the other parts and the columns are one dimension, the last."""
    before, order = flat.dim() - 1, _order(sizes, kept)
    parts = flat.unflatten(-1, [sizes[i] for i in order])
    return parts.permute(*range(before), *(before + order.index(i) for i in range(len(order)))).flatten(before)


def refittable(comb: Comb) -> list[fx.Node]:
    """The linear layers and convolutions whose weight a repair may change freely: a parameter that is read once, by all
    outputs alike, has no zeros that must stay, and at most `MOST` columns."""
    uses, sparse, found = uses_of(comb.module), sparse_weights(comb.program), []
    for node in comb.module.graph.nodes:
        if op_name(node) not in MAPS or not has_rows(node):
            continue
        a = arguments(node)
        weight = fetch(comb.module, str(a["weight"].target)) if a["weight"].op == "get_attr" else None
        free = (
            isinstance(weight, torch.nn.Parameter) and uses[id(weight)] == 1 and str(a["weight"].target) not in sparse
        )
        if free and a.get("groups", 1) == 1 and ax.size(layout(comb, node)[0]) <= MOST:
            found.append(node)
    return found


def _inverse(a: Tensor, ridge: float) -> Tensor:
    """`(A + ridge D)^-1`. Where rounding made that indefinite, as with columns that vary much less than others or than their
    mean, the least larger ridge out of powers of ten times this one under which it is not."""
    diagonal = a.diagonal()
    scale = diagonal.clamp(min=1e-6 * float(diagonal.mean()))
    scale = torch.where(scale > 0, scale, 1.0)  # where no input varies
    factor, failed = torch.linalg.cholesky_ex(a + torch.diag(ridge * scale))
    return torch.cholesky_inverse(factor) if not failed else _inverse(a, 10 * ridge)


def _held_out(fitted: Tensor, other: Tensor, power: Tensor, ridge: float) -> float:
    """The loss of removing each column by itself, on one half with the rest refitted on the other; summed over columns."""
    inverse = _inverse(fitted, ridge)
    residual = inverse / inverse.diagonal()  # column i: x_i minus its prediction by the others
    return float((power.diagonal() * (residual * (other @ residual)).sum(0)).sum())


@dataclass(frozen=True)
class Seen:
    """What a layer read and wrote in a batch: input, output, the gradient at the output (None if nothing depends on it)."""

    x: Tensor
    output: Tensor
    gradient: Tensor | None


Look = Callable[[dict[fx.Node, Seen], Tensor], None]
"""Gets what layers saw in a batch, and the half of each of its samples (see `images.halves`)."""


def look(comb: Comb, nodes: Sequence[fx.Node], context: Context, samples: int, title: str, see: Look) -> int:
    """Run the dense network forwards and backwards over the data and show what some layers saw, batch by batch; returns the
    number of samples in all processes. The loss that is differentiated needs no labels (`UnlabelledLoss`)."""
    module, device = comb.module, accelerator().device
    loss = UnlabelledLoss(torch.Generator().manual_seed(context.seed))

    def batches() -> int:
        done = 0
        for batch, many in sample_batches(Feed(comb.program), context, samples, title, share=True):
            leaves = pytree.tree_leaves((batch.args, batch.kwargs))
            see(_seen(module, nodes, leaves, loss), halves(done, batch.size, many))
            done += many
        return done

    with (
        seeded(context.seed, context.data), evaluating(module), placed(module, device), _differentiable(module),
        exact_kernels(),
    ):  # fmt: skip
        count = everywhere(batches)
    return int(summed(torch.tensor(float(count))))


@contextmanager
def _differentiable(module: torch.nn.Module) -> Iterator[None]:
    """All parameters take part in gradients, also those that are frozen for training."""
    frozen = [p for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _seen(module: Any, nodes: Sequence[fx.Node], leaves: list[Any], of: UnlabelledLoss) -> dict[fx.Node, Seen]:
    values: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def see(node: fx.Node, value: Tensor, earlier: dict[fx.Node, Any]) -> None:
        values[node] = earlier[arguments(node)["input"]].detach(), value

    inputs = [t.detach().requires_grad_(True) if isinstance(t, Tensor) and t.is_floating_point() else t for t in leaves]
    with torch.enable_grad():
        result = Observer(module, nodes, see).run(*inputs, enable_io_processing=False)
        loss = of(result)
        if not bool(loss.isfinite()):
            raise BadInput("importance: the outputs are not finite numbers; check the data and the model")
        gradients = torch.autograd.grad(loss, [output for _, output in values.values()], allow_unused=True)
    pairs = zip(values.items(), gradients, strict=True)
    return {node: Seen(x, output.detach(), gradient) for (node, (x, output)), gradient in pairs}


def readers(comb: Comb, groups: list[Group], context: Context, samples: int) -> tuple[list[Reader], int]:
    """The readers of some groups, with their sums over the data, and the number of samples."""
    wanted = {g.atom: None for g in groups}
    made = (Reader.of(comb, node) for node in refittable(comb))
    by_node = {r.node: r for r in made if ax.touches(r.axis, wanted)}

    def add(seen: dict[fx.Node, Seen], half: Tensor) -> None:
        for node, values in seen.items():
            rows = last(node, entries(node, arguments(node)["input"], values.x, len(half))).double()
            by_node[node].add(rows, spread(half, len(rows)).to(rows.device))
            if values.gradient is not None:
                both = (last(node, entries(node, node, t, len(half))) for t in (values.gradient, values.output))
                by_node[node].sense(*(_samples(t, half).double() for t in both))

    if not by_node:
        return [], 0
    count = look(comb, list(by_node), context, samples, "score", add)
    for reader in by_node.values():
        for tensor in reader.sums:
            tensor.copy_(summed(tensor))
    return [replace(reader, samples=count) for reader in by_node.values()], count


def _samples(rows: Tensor, half: Tensor) -> Tensor:
    """Entries that count as `(samples, positions, o)`. What no input of the network reaches, such as a table of positions,
    has the gradient of all samples together; its square is the sum of theirs, since their losses are drawn independently."""
    if len(rows) % len(half):
        return rows.reshape(1, -1, rows.shape[-1])
    return rows.reshape(len(half), -1, rows.shape[-1])[(half >= 0).to(rows.device)]


def entries(layer: fx.Node, node: fx.Node, value: Tensor, samples: int) -> Tensor:
    """A layer's input or output, which is the value of `node`, with samples in the first dimension, perhaps together with
    positions (see `by_sample`)."""
    return by_sample(value, samples, node) if op_name(layer) == "linear" else value


def last(layer: fx.Node, value: Tensor) -> Tensor:
    """Entries of a layer's input or output as `(entries, positions, channels)`."""
    value = value if op_name(layer) == "linear" else value.movedim(1, -1)
    return value.reshape(len(value), -1, value.shape[-1])
