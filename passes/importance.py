"""How much each index of each group matters: one number per index, from weights alone or from gradients.

A parameter's entry-wise score is summed onto the indices of each of its dimensions and from there onto the atoms they
are made of; a group's score is the mean over the parameters it takes part in (CPD, arXiv 2408.03046).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np
import torch

from ..graph import axes as ax
from ..graph.axes import Factor
from ..graph.comb import Comb, Group
from ..graph.errors import BadInput
from ..graph.ops import arguments, fetch, op_name
from .base import Context

Scores = dict[Factor, np.ndarray]
NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")


def magnitude(comb: Comb, groups: list[Group], context: Context) -> Scores:
    """Squared L2 norm of the weights of each index, relative to the mean over the indices of the same parameter.

    Weights with two or more dimensions and the scales of normalisations count; other vectors only where there is nothing
    else. Relative, so that parameters of different scale weigh the same within a group and groups compare globally.
    """
    scales = {str(n.target) for n in _norm_scales(comb)}
    strong: dict[Factor, list[np.ndarray]] = defaultdict(list)
    weak: dict[Factor, list[np.ndarray]] = defaultdict(list)
    wanted = {g.atom: None for g in groups}
    for name, tensor in comb.module.named_parameters():
        touched = {d: a for d, a in enumerate(comb.parameters.get(name, [])) if ax.touches(a, wanted)}
        if not touched:
            continue
        into = strong if tensor.dim() > 1 or name in scales else weak
        for dim, sums in _sums(tensor.detach(), None, touched).items():
            for atom, own in _folded(touched[dim], sums).items():
                mean = own.mean()
                if atom in wanted and mean > 0:
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

    Works a block of rows at a time, so that the second sum finds it in the cache; numpy's einsum is several times faster
    here than a product and two reductions.
    """
    left, right = (_array(t) for t in (values, values if factors is None else factors))
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


def _folded(axis: ax.Axis, values: np.ndarray) -> Scores:
    found: Scores = {}
    ax.fold(axis, values, found)
    return found


def taylor(comb: Comb, groups: list[Group], context: Context) -> Scores:
    """First-order Taylor: |sum of weight * gradient| over the entries of an index, accumulated over batches
    (Molchanov et al. 2019, arXiv 1906.10771)."""
    return _from_gradients(comb, groups, context, np.abs)


def fisher(comb: Comb, groups: list[Group], context: Context) -> Scores:
    """Empirical Fisher: (sum of weight * gradient)^2 over the entries of an index, accumulated over batches: the Hessian
    term of masking the index (CPD, arXiv 2408.03046)."""
    return _from_gradients(comb, groups, context, np.square)


def random(comb: Comb, groups: list[Group], context: Context) -> Scores:
    """Uniform random numbers, a baseline; seeded by the context."""
    generator = np.random.default_rng(context.seed)
    return {g.atom: generator.random(g.size) for g in groups}


def _from_gradients(comb: Comb, groups: list[Group], context: Context, transform: Callable[..., np.ndarray]) -> Scores:
    from .batches import split_batch
    from .training import task_loss

    if context.data is None:
        raise BadInput("importance from gradients needs data: give data= (batches of inputs and labels)")
    module = comb.program.copy().module()
    module.eval()
    names = {name for name, _ in module.named_parameters()}
    sums: dict[Factor, np.ndarray] = {g.atom: np.zeros(g.size) for g in groups}
    count = 0
    for batch in context.data:
        args, kwargs, labels = split_batch(batch)
        if labels is None:
            raise BadInput(
                "importance from gradients needs labels, and the data yields none; use importance: magnitude"
            )
        module.zero_grad(set_to_none=True)
        loss = task_loss(context.loss, module(*args, **kwargs), labels)
        if not torch.isfinite(loss):
            raise BadInput(f"importance: the loss of batch {count} is {float(loss)}; check the data and the model")
        loss.backward()
        for atom, values in _batch_scores(comb, module, names, sums, transform).items():
            sums[atom] += values
        count += 1
    if count == 0:
        raise BadInput("importance from gradients: the data yields no batch")
    return {atom: values / count for atom, values in sums.items()}


def _batch_scores(
    comb: Comb, module: torch.nn.Module, names: set[str], wanted: Scores, transform: Callable[..., np.ndarray]
) -> Scores:
    found: dict[Factor, list[np.ndarray]] = defaultdict(list)
    for name in names:
        parameter = fetch(module, name)
        if parameter.grad is None:
            continue
        touched = {d: a for d, a in enumerate(comb.parameters.get(name, [])) if ax.touches(a, wanted)}
        if not touched:
            continue
        for dim, values in _sums(parameter.detach(), parameter.grad, touched).items():
            for atom, own in _folded(touched[dim], values).items():
                if atom in wanted:
                    found[atom].append(transform(own))
    return {atom: np.mean(values, axis=0) for atom, values in found.items()}


IMPORTANCES: dict[str, Callable[[Comb, list[Group], Context], Scores]] = {
    "magnitude": magnitude,
    "taylor": taylor,
    "fisher": fisher,
    "random": random,
}
