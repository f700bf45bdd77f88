"""How much each index of each group matters: one number per index, from weights alone or from gradients.

A parameter's entry-wise score is summed onto the indices of each of its dimensions and from there onto the atoms they
are made of; a group's score is the mean over the parameters it takes part in (CPD, arXiv 2408.03046).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from ..graph import axes as ax
from ..graph.axes import Factor
from ..graph.comb import Comb, Group
from ..graph.errors import BadInput
from ..graph.ops import arguments, op_name
from .base import Context

Scores = dict[Factor, np.ndarray]
NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")


class Members:
    """Where the indices of some atoms lie in the parameters of a network that may have lost some of them already.

    masks: which indices of each atom the network still has, by default all. Sums are per index of the original atoms, 0
    where the network has lost it.
    """

    def __init__(self, comb: Comb, wanted: Iterable[Factor], masks: ax.Masks | None = None):
        self.wanted, self.masks = dict.fromkeys(wanted), masks or {}
        self._axes: dict[str, dict[int, tuple[ax.Axis, np.ndarray | None]]] = {}
        for name, axes in comb.parameters.items():
            touched = {d: axis for d, axis in enumerate(axes) if ax.touches(axis, self.wanted)}
            if touched:
                self._axes[name] = {d: (axis, self._kept(axis)) for d, axis in touched.items()}

    def _kept(self, axis: ax.Axis) -> np.ndarray | None:
        return ax.kept_mask(axis, self.masks) if ax.touches(axis, self.masks) else None

    def sums(self, module: torch.nn.Module, gradients: bool) -> Iterator[tuple[str, Scores]]:
        """For every parameter and dimension, the sums over the entries of each index: of weight * gradient, or of the
        squared weight."""
        for name, tensor in module.named_parameters():
            if name not in self._axes or (gradients and tensor.grad is None):
                continue
            axes = self._axes[name]
            for dim, values in _sums(tensor.detach(), tensor.grad if gradients else None, axes).items():
                axis, kept = axes[dim]
                if kept is not None:
                    values, given = np.zeros(len(kept)), values
                    values[kept] = given
                found: Scores = {}
                ax.fold(axis, values, found)
                yield name, {atom: own for atom, own in found.items() if atom in self.wanted}

    def gradient_scores(self, module: torch.nn.Module, transform: Callable[[np.ndarray], np.ndarray]) -> Scores:
        """For every atom the mean over its members of the transformed sums of weight * gradient."""
        found: dict[Factor, list[np.ndarray]] = defaultdict(list)
        for _, sums in self.sums(module, gradients=True):
            for atom, own in sums.items():
                found[atom].append(transform(own))
        return {atom: np.mean(values, axis=0) for atom, values in found.items()}


TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"taylor": np.abs, "fisher": np.square}


def magnitude(comb: Comb, groups: list[Group], context: Context) -> Scores:
    """Squared L2 norm of the weights of each index, relative to the mean over the indices of the same parameter.

    Weights with two or more dimensions and the scales of normalisations count; other vectors only where there is nothing
    else. Relative, so that parameters of different scale weigh the same within a group and groups compare globally.
    """
    return relative_norms(comb, groups, comb.module, {})


def relative_norms(comb: Comb, groups: list[Group], module: torch.nn.Module, masks: ax.Masks) -> Scores:
    """`magnitude` of a network that has lost what the masks say."""
    scales = {str(n.target) for n in _norm_scales(comb)}
    strong: dict[Factor, list[np.ndarray]] = defaultdict(list)
    weak: dict[Factor, list[np.ndarray]] = defaultdict(list)
    for name, sums in Members(comb, (g.atom for g in groups), masks).sums(module, gradients=False):
        into = strong if len(comb.parameters[name]) > 1 or name in scales else weak
        for atom, own in sums.items():
            mean = own[masks[atom]].mean() if atom in masks else own.mean()
            if mean > 0:
                into[atom].append(own / mean)
    result = {}
    for group in groups:
        found = strong.get(group.atom) or weak.get(group.atom)
        result[group.atom] = np.mean(found, axis=0) if found else np.ones(group.size)
    return result


def _norm_scales(comb: Comb) -> Iterable[torch.fx.Node]:
    for node in comb.module.graph.nodes:
        if op_name(node) in NORMS:
            weight = arguments(node).get("weight")
            if isinstance(weight, torch.fx.Node) and weight.op == "get_attr":
                yield weight


BLOCK = 1 << 17  # elements: a product of this size stays in a core's cache


def _sums(values: torch.Tensor, factors: torch.Tensor | None, dims: Iterable[int]) -> dict[int, np.ndarray]:
    """For each of the dimensions, the sums of values * factors (or of squared values) over all others.

    On a CPU a block of rows at a time, so that the second sum finds it in the cache; numpy's einsum is several times
    faster there than a product and two reductions.
    """
    factors = values if factors is None else factors
    if values.device.type != "cpu":
        product = values.float() * factors.float()
        others = {d: tuple(k for k in range(product.dim()) if k != d) for d in dims}
        return {d: (product.sum(o) if o else product).double().cpu().numpy() for d, o in others.items()}
    left, right = _array(values), _array(factors)
    if values.dim() == 1:
        return {0: (left * right).astype(np.float64)}
    left, right = (t.reshape(len(t), -1) for t in (left, right))
    step = max(1, BLOCK // left.shape[1])
    rows, columns = [], np.zeros(left.shape[1])
    for start in range(0, len(left), step):
        p, q = left[start : start + step], right[start : start + step]
        rows.append(np.einsum("ij,ij->i", p, q))
        columns += np.einsum("ij,ij->j", p, q)
    grid = columns.reshape(values.shape[1:])
    found = {0: np.concatenate(rows).astype(np.float64)}
    for d in dims:
        if d > 0:
            found[d] = grid.sum(axis=tuple(k for k in range(grid.ndim) if k != d - 1))
    return {d: found[d] for d in dims}


def _array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.element_size() < 4 else tensor).cpu().numpy()


def taylor(comb: Comb, groups: list[Group], context: Context) -> Scores:
    """First-order Taylor: |sum of weight * gradient| over the entries of an index, accumulated over batches
    (Molchanov et al. 2019, arXiv 1906.10771)."""
    return _from_gradients(comb, groups, context, TRANSFORMS["taylor"])


def fisher(comb: Comb, groups: list[Group], context: Context) -> Scores:
    """Empirical Fisher: (sum of weight * gradient)^2 over the entries of an index, accumulated over batches: the Hessian
    term of masking the index (CPD, arXiv 2408.03046)."""
    return _from_gradients(comb, groups, context, TRANSFORMS["fisher"])


def random(comb: Comb, groups: list[Group], context: Context) -> Scores:
    """Uniform random numbers, a baseline; seeded by the context."""
    generator = np.random.default_rng(context.seed)
    return {g.atom: generator.random(g.size) for g in groups}


def _from_gradients(comb: Comb, groups: list[Group], context: Context, transform: Callable[..., np.ndarray]) -> Scores:
    from .batches import Feed
    from .training import task_loss

    if context.data is None:
        raise BadInput("importance from gradients needs data: give data= (batches of inputs and labels)")
    module = comb.program.copy().module()
    module.eval().requires_grad_()  # what is frozen for training matters all the same
    members = Members(comb, (g.atom for g in groups))
    sums: dict[Factor, np.ndarray] = {g.atom: np.zeros(g.size) for g in groups}
    count = 0
    for batch in Feed(comb.program).batches(context.data):
        if batch.labels is None:
            raise BadInput(
                "importance from gradients needs labels, and the data yields none; use importance: magnitude"
            )
        module.zero_grad(set_to_none=True)
        loss = task_loss(context.loss, module(*batch.args, **batch.kwargs), batch.labels)
        if not torch.isfinite(loss):
            raise BadInput(f"importance: the loss of batch {count} is {float(loss)}; check the data and the model")
        loss.backward()
        for atom, values in members.gradient_scores(module, transform).items():
            sums[atom] += values
        count += 1
    if count == 0:
        raise BadInput("importance from gradients: the data yields no batch")
    return {atom: values / count for atom, values in sums.items()}


IMPORTANCES: dict[str, Callable[[Comb, list[Group], Context], Scores]] = {
    "magnitude": magnitude,
    "taylor": taylor,
    "fisher": fisher,
    "random": random,
}
