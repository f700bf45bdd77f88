"""The loss that remains when an index is removed and its readers are repaired: an importance that takes repair into
account.

A reader `y = W x` that loses column i and has its other columns refitted (see `least_squares`) loses, summed over the rows,

|w_i|^2 / (A^-1)_ii,        A = sum x x^T + lambda diag,

and the losses for a next index follow from a rank-one update of `A^-1` and W, as in the optimal brain surgeon. For several
columns S at once: tr(W_S ((A^-1)_SS)^-1 W_S^T). All kernel positions of a convolution share the refit here. Each output is
weighted by how much the network's result depends on it: the mean square of its gradient, of the log-probability of a class
drawn from the network's own prediction, or of a random projection of other outputs, so no labels are needed. Source: ours,
after OBS (Hassibi and Stork, 1993) and the Gauss-Newton diagonal by random projections (Hutchinson).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ...graph.comb import axes as ax
from ...graph.comb.axes import Axis, Factor
from ...graph.comb.solve import Comb, Group
from ...graph.compat import pytree
from ...graph.nodes import arguments, fetch, op_name
from ..base import Context
from ..common.feed import Feed
from ..common.losses import unlabelled_loss
from ..common.observe import Observer
from ..common.processes import accelerator, placed, summed
from ..common.repeat import seeded
from ..common.samples import everywhere, sample_batches
from ..common.scoring import evaluating
from .consumers import PRODUCTS
from .images import halves
from .swaps import Columns, swapped

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # shares of the diagonal of A that the held-out halves choose among
STEPS = 64  # about the most steps in which a group is emptied, each with new losses


@dataclass
class Reader:
    """A linear layer or convolution that reads groups, with sums over rows.

    axis: of its inputs. centred: whether a bias or a BatchNorm behind it takes up a constant. weight: (o * kernel, c).
    outputs: o. Sums in float64, for each half of the samples: count (2), x (2, c), xx (2, c, c). Sums over all samples:
    sensitivity (o), the squared gradients at the outputs; coherent (2), see `sense`.
    """

    node: fx.Node
    axis: Axis
    centred: bool
    weight: Tensor
    outputs: int
    count: Tensor
    x: Tensor
    xx: Tensor
    sensitivity: Tensor
    coherent: Tensor

    def add(self, rows: Tensor, half: Tensor) -> None:
        """Add the inputs of a batch. rows: (samples, positions, c). half: the half of each sample."""
        for k in range(2):
            part = rows[half == k].flatten(0, 1)
            self.count[k] += len(part)
            self.x[k] += part.sum(0)
            self.xx[k] += part.T @ part

    def sense(self, gradient: Tensor, output: Tensor) -> None:
        """Add the gradients at the outputs of a batch; both arguments are (samples, positions, o).

        Later layers add up an error that has the same sign all over an image, so it counts for more than its squares say.
        How much more is estimated from the outputs themselves: the first number of `coherent` has the squares of sums over
        positions, the second the sums of squares.
        """
        self.sensitivity += gradient.square().sum((0, 1))
        product = gradient * (output - output.mean((0, 1)))
        self.coherent += torch.stack([product.sum(1).square().sum(), product.square().sum()])

    def moments(self, which: slice) -> Tensor:
        """`A` over one half or both, about the mean if a constant is free."""
        count, x, xx = self.count[which].sum(), self.x[which].sum(0), self.xx[which].sum(0)
        return xx - x[:, None] * x[None, :] / count.clamp(min=1) if self.centred else xx

    def prepared(self) -> tuple[Tensor, Tensor]:
        """`A^-1` and `W^T G W` for one sample, both (c, c), with the sensitivities of the outputs on the diagonal of G. The
        ridge is the one whose predictions of each column by the others, from one half, are best on the other half."""
        together = float(self.coherent[0] / self.coherent[1]) if self.coherent[1] > 0 else 1.0
        root = (self.sensitivity * together / self.count.sum().clamp(min=1)).sqrt()
        weighted = self.weight * root.repeat_interleave(len(self.weight) // self.outputs)[:, None]
        power = weighted.T @ weighted
        whole = self.moments(slice(0, 2))
        if min(self.count.tolist()) == 0:
            return _inverse(whole, RIDGES[-1]), power
        halves = [self.moments(slice(k, k + 1)) for k in range(2)]
        lost = {ridge: sum(_held_out(halves[k], halves[1 - k], power, ridge) for k in range(2)) for ridge in RIDGES}
        return _inverse(whole, min(lost, key=lambda ridge: lost[ridge])), power


def _inverse(a: Tensor, ridge: float) -> Tensor:
    diagonal = a.diagonal()
    scale = diagonal.clamp(min=1e-6 * float(diagonal.mean())).clamp(min=1e-300)
    return torch.cholesky_inverse(torch.linalg.cholesky(a + torch.diag(ridge * scale)))


def _held_out(fitted: Tensor, other: Tensor, power: Tensor, ridge: float) -> float:
    """The loss of removing each column by itself, on one half with the rest refitted on the other; summed over columns."""
    inverse = _inverse(fitted, ridge)
    residual = inverse / inverse.diagonal()  # column i: x_i minus its prediction by the others
    return float((power.diagonal() * (residual * (other @ residual)).sum(0)).sum())


def readers(comb: Comb, groups: list[Group], context: Context, samples: int) -> tuple[list[Reader], int]:
    """The readers of some groups, with their sums over the data, and the number of samples."""
    module, device = comb.module, accelerator().device
    wanted = {g.atom: None for g in groups}
    by_node: dict[fx.Node, Reader] = {}
    for node in module.graph.nodes:
        if op_name(node) not in PRODUCTS or (weight := arguments(node)["weight"]).op != "get_attr":
            continue
        a, tensor = arguments(node), fetch(module, str(weight.target))
        into = 0 if op_name(node).startswith("conv_transpose") else 1
        axis = comb.axes[a["input"]][-1 if op_name(node) == "linear" else 1]
        if (a.get("groups", 1) > 1) or not ax.touches(axis, wanted):
            continue
        flat = tensor.detach().double().movedim(into, -1).reshape(-1, tensor.shape[into])
        behind = [op_name(u) for u in node.users] == ["batch_norm"]
        size, outputs = tensor.shape[into], tensor.shape[1 - into]
        by_node[node] = Reader(
            node, axis, a["bias"] is not None or behind, flat, outputs, flat.new_zeros(2), flat.new_zeros(2, size),
            flat.new_zeros(2, size, size), flat.new_zeros(outputs), flat.new_zeros(2),
        )  # fmt: skip
    generator = torch.Generator().manual_seed(context.seed)

    def add_up() -> int:
        seen = 0
        for batch, many in sample_batches(Feed(comb.program), context, samples, "score", share=True):
            inputs = pytree.tree_leaves((batch.args, batch.kwargs))
            _add(module, by_node, inputs, halves(seen, batch.size, many), generator)
            seen += many
        return seen

    with seeded(context.seed, context.data), evaluating(module), placed(module, device):
        count = everywhere(add_up)
    for reader in by_node.values():
        for tensor in (reader.count, reader.x, reader.xx, reader.sensitivity, reader.coherent):
            tensor.copy_(summed(tensor))
    return list(by_node.values()), int(summed(torch.tensor(float(count))))


def _add(
    module: Any, readers: dict[fx.Node, Reader], inputs: list[Any], half: Tensor, generator: torch.Generator
) -> None:
    """Add the sums of one batch."""
    outputs: dict[fx.Node, Tensor] = {}

    def see(node: fx.Node, value: Tensor, values: dict[fx.Node, Any]) -> None:
        x = _positions(node, values[arguments(node)["input"]].detach())
        readers[node].add(x.double(), half)
        outputs[node] = value

    leaves = [t.detach().requires_grad_(True) if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    with torch.enable_grad():
        result = Observer(module, readers, see).run(*leaves, enable_io_processing=False)
        loss = unlabelled_loss(result, generator)
        gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
    for (node, value), gradient in zip(outputs.items(), gradients, strict=True):
        if gradient is not None:
            readers[node].sense(*(_positions(node, t).double() for t in (gradient, value.detach())))


def _positions(node: fx.Node, value: Tensor) -> Tensor:
    """A layer's input or output as `(samples, positions, channels)`."""
    value = value.movedim(-1 if op_name(node) == "linear" else 1, -1)
    return value.reshape(len(value), -1, value.shape[-1])


def columns(axis: Axis, atom: Factor) -> np.ndarray:
    """For each entry of an axis, the index of the atom that it belongs to; -1 for none."""
    indices = np.full(1, -1)
    for factor in ax.normal(axis):
        if factor.segments is not None:
            inside = np.concatenate([columns(part, atom) for part in factor.segments])
        else:
            inside = np.arange(factor.size) if factor is atom else np.full(factor.size, -1)
        indices = np.maximum.outer(indices, inside).reshape(-1)
    return indices


class Losses:
    """The loss of a network's result when indices of groups go and the rest is repaired. samples: number of samples for the
    sums."""

    def __init__(self, comb: Comb, groups: list[Group], context: Context, samples: int):
        self.groups = groups
        self.readers, _ = readers(comb, groups, context, samples)
        self.prepared = {id(r): r.prepared() for r in self.readers}

    def scores(self) -> dict[Factor, np.ndarray]:
        """For each group, the loss of each index when all go one after another, in the best order found, with a repair
        after each. Groups that no linear layer reads get infinity."""
        return {g.atom: _emptied(g, self._readers(g), self.prepared) for g in self.groups}

    def swapped(self, masks: ax.Masks) -> tuple[dict[Factor, np.ndarray], dict[str, int]]:
        """The masks (True stays) after a local search in each group, and the number of swaps by group name. A group is not
        searched if a reader has several columns for one index, as after flattening."""
        result, counts = dict(masks), {}
        for group in self.groups:
            if group.atom not in masks:
                continue
            state = []
            for reader in self._readers(group):
                where = columns(reader.axis, group.atom)
                held = np.flatnonzero(where >= 0)
                places = np.full(group.size, -1)
                places[where[held]] = held
                state.append(Columns(*self.prepared[id(reader)], places))
                if len(np.unique(where[held])) < len(held):
                    break
            else:
                result[group.atom], counts[group.name] = swapped(state, masks[group.atom])
        return result, {name: count for name, count in counts.items() if count}

    def _readers(self, group: Group) -> list[Reader]:
        return [r for r in self.readers if ax.touches(r.axis, {group.atom: None})]


def _emptied(group: Group, readers: list[Reader], prepared: dict[int, tuple[Tensor, Tensor]]) -> np.ndarray:
    """The loss of each index when it goes, but never less than that of an index before it."""
    score = np.full(group.size, np.inf)
    if not readers:
        return score
    state = []
    for reader in readers:
        inverse, power = (t.clone() for t in prepared[id(reader)])
        where = columns(reader.axis, group.atom)
        state.append((inverse, power, [np.flatnonzero(where == i) for i in range(group.size)]))
    left, least = list(range(group.size)), 0.0
    step = max(1, group.size // STEPS)
    while left:
        losses = sum(_losses(inverse, power, places, left) for inverse, power, places in state)
        order = np.argsort(losses, kind="stable")[:step]
        going = [left[i] for i in order]
        for i, loss in zip(going, np.asarray(losses)[order], strict=True):
            least = max(least, float(loss))
            score[i] = least
        gone = set(going)
        left = [i for i in left if i not in gone]
        for inverse, power, places in state:
            _remove(inverse, power, np.concatenate([places[i] for i in going]))
    return score


def _losses(inverse: Tensor, power: Tensor, places: list[np.ndarray], left: list[int]) -> np.ndarray:
    if all(len(places[i]) <= 1 for i in left):
        at = torch.tensor([places[i][0] if len(places[i]) else -1 for i in left])
        values = power.diagonal()[at] / inverse.diagonal()[at].clamp(min=1e-300)
        return torch.where(at >= 0, values, 0.0).clamp(min=0).numpy()
    losses = []
    for i in left:
        s = torch.from_numpy(places[i])
        losses.append(float(torch.linalg.solve(inverse[s][:, s], power[s][:, s]).trace()) if len(s) else 0.0)
    return np.maximum(losses, 0)


def _remove(inverse: Tensor, power: Tensor, places: np.ndarray) -> None:
    """Remove columns in place: `A^-1` and `W^T G W` become those of the refitted remainder."""
    s = torch.from_numpy(places)
    if not len(s):
        return
    r = torch.linalg.solve(inverse[s][:, s], inverse[s])  # (k, c); identity at s
    # W' = W - W_S r, so that W' is zero at s
    cross = power[:, s] @ r
    power.sub_(cross + cross.T - r.T @ power[s][:, s] @ r)
    inverse.sub_(inverse[:, s] @ r)
    for matrix in (inverse, power):
        matrix[s] = 0
        matrix[:, s] = 0
    inverse[s, s] = 1.0
