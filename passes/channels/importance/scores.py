"""Importances: one number for each index of each group, from weights alone or from gradients.

Gradient scores are exact to first order: the loss is differentiated with respect to one gate per index, which masks the
index wherever it is read (`.gates`; ours). "fisher" squares that derivative, "taylor" takes its absolute value, for each
batch.

The form that CPD publishes (arXiv 2408.03046) is available as "fisher-paper" and "taylor-paper": every parameter that an
index takes part in (writers, readers and norms) is scored by itself, and the mean over them counts. This adds up, without
signs, what several parameters say of one and the same gate, and divides by their number; so an index with many readers,
such as that of a residual trunk, is underrated, the more the deeper the network.

A function of the user's is called for each group, see `from_function`.

"fisher-unlabelled" needs no labels: it differentiates a random projection of the outputs instead of the loss. "repair" is
the loss that remains after the readers of an index are repaired (`repair.score`), in the same unit.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from ....graph.comb import axes as ax
from ....graph.comb.axes import Factor
from ....graph.comb.groups import Group
from ....graph.comb.solve import Comb
from ....graph.errors import BadInput, first_line
from ....graph.facts import NORMS
from ....graph.nodes import arguments, fetch, op_name
from ....graph.trainable import TrainableModule
from ...base import Context
from ...common.feed import Feed
from ...common.losses import UnlabelledLoss, task_loss
from ...common.processes import accelerator, agreed, averaged, placed, summed
from ...common.repeat import seeded
from ...common.samples import everywhere, sample_batches
from ...repair.readers import refittable
from ...repair.score import Losses, columns
from .gates import Gates
from .members import Members, Scores
from .reads import find_reads

Importance = Callable[..., Scores]
"""`importance(comb, groups, context, samples)`; samples: how many samples of the data to use, if it uses data."""


TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "taylor": np.abs,
    "fisher": np.square,
    "taylor-paper": np.abs,
    "fisher-paper": np.square,
    "fisher-unlabelled": np.square,
}
"""For each importance from gradients, the function from a batch's derivatives to its scores."""


class GradientScores:
    """Scores from the backward passes of one network: run it within `tapped`, then call `of_batch` after each backward
    pass.

    importance: a key of TRANSFORMS. masks: which indices of the groups the network still has. share: see `Gates.totals`.
    """

    def __init__(
        self,
        importance: str,
        comb: Comb,
        groups: Iterable[Group],
        masks: ax.Masks | None,
        module: TrainableModule,
        share: Callable[[np.ndarray], np.ndarray] = lambda values: values,
    ):
        wanted = [g.atom for g in groups]
        self.transform, self.module, self.share = TRANSFORMS[importance], module, share
        self.gates = None if importance.endswith("-paper") else Gates(comb, wanted, masks, module)
        self.members = Members(comb, wanted, masks) if self.gates is None else None

    def tapped(self) -> AbstractContextManager[None]:
        """A context in which the network's backward passes are observed."""
        return nullcontext() if self.gates is None else self.gates.tapped()

    def of_batch(self, scale: float = 1.0) -> Scores:
        """The scores by the gradients that the network has now. scale: see `Gates.totals`."""
        if self.members is not None:
            return self.members.gradient_scores(self.module, self.transform)
        assert self.gates is not None
        return {atom: self.transform(values) for atom, values in self.gates.totals(self.share, scale).items()}


def magnitude(comb: Comb, groups: list[Group], context: Context, samples: int = 0) -> Scores:
    """Squared L2 norm of the weights of each index, relative to the mean over the indices of the same parameter.

    Weights with two or more dimensions and the scales of normalisations count; other vectors only if there is nothing else.
    Norms are relative, so that parameters of different scale weigh the same within a group and groups compare globally.
    """
    return relative_norms(comb, groups, comb.module, {})


def relative_norms(comb: Comb, groups: list[Group], module: torch.nn.Module, masks: ax.Masks) -> Scores:
    """`magnitude` of a network that has lost what the masks remove."""
    normalising = [n for n in comb.module.graph.nodes if op_name(n) in (*NORMS, "batch_norm")]
    weights = [arguments(n).get("weight") for n in normalising]
    scales = {str(w.target) for w in weights if isinstance(w, torch.fx.Node) and w.op == "get_attr"}
    strong: dict[Factor, list[np.ndarray]] = defaultdict(list)
    weak: dict[Factor, list[np.ndarray]] = defaultdict(list)
    for name, sums in Members(comb, (g.atom for g in groups), masks).sums(module, gradients=False):
        into = strong if len(comb.parameters[name]) > 1 or name in scales else weak
        for atom, values in sums.items():
            mean = values[masks[atom]].mean() if atom in masks else values.mean()
            if mean > 0:
                into[atom].append(values / mean)
    result = {}
    for group in groups:
        norms = strong.get(group.atom) or weak.get(group.atom)
        result[group.atom] = np.mean(norms, axis=0) if norms else np.ones(group.size)
    return result


def random(comb: Comb, groups: list[Group], context: Context, samples: int = 0) -> Scores:
    """Uniform random numbers, a baseline; seeded by the context."""
    generator = np.random.default_rng(context.seed)
    return {g.atom: generator.random(g.size) for g in groups}


UNLABELLED = "fisher-unlabelled"
SAMPLES = 1024  # default number of samples for scores from gradients


def from_gradients(importance: str) -> Importance:
    """An importance from gradients by its name: the mean over batches of a batch's score, in eval mode.

    "taylor" is |derivative with respect to the index's gate| (Molchanov et al., arXiv 1906.10771), "fisher" its square, the
    empirical Fisher's term for masking the index. A batch's loss is differentiated as a whole, so "fisher" is the square of
    a mean over its samples. Batches are taken until there are as many samples as asked for (`common.samples` says which);
    processes divide them and add up their scores. The importance raises BadInput without data, batches or (needed) labels,
    and for a loss that is not finite.
    """

    def scores(comb: Comb, groups: list[Group], context: Context, samples: int = SAMPLES) -> Scores:
        if context.data is None:
            raise BadInput("importance from gradients needs data: give data= (batches of inputs and labels)")
        module = comb.program.copy().module()
        module.eval().requires_grad_()  # weights that are frozen for training have an importance, too
        gradients = GradientScores(importance, comb, groups, None, module)
        sums = {g.atom: np.zeros(g.size) for g in groups}
        count = everywhere(lambda: _add_up(sums, gradients, comb, context, samples, importance == UNLABELLED))
        mine = torch.from_numpy(np.concatenate([[count], *sums.values()])).to(accelerator().device)
        total = summed(mine).cpu().numpy()
        if not total[0]:
            raise BadInput("importance from gradients: the data yields no batch")
        parts = np.split(total[1:] / total[0], np.cumsum([len(values) for values in sums.values()])[:-1])
        return dict(zip(sums, parts, strict=True))

    return scores


def _add_up(
    sums: Scores, gradients: GradientScores, comb: Comb, context: Context, samples: int, unlabelled: bool
) -> int:
    """Add the scores of this process's batches to the sums; returns the number of batches.

    Without labels, returns the number of samples: random projections are drawn independently for each sample, so that the
    expected square of their sum is the sum of their squares.
    """
    module, feed, count = gradients.module, Feed(comb.program), 0
    unlabelled_loss = UnlabelledLoss(torch.Generator().manual_seed(context.seed + accelerator().process_index))
    with (
        seeded(context.seed, context.data), placed(module, accelerator().device), gradients.tapped(), torch.enable_grad()
    ):  # fmt: skip
        for batch, many in sample_batches(feed, context, samples, "importance", share=True):
            if batch.labels is None and not unlabelled:
                raise BadInput(
                    "importance from gradients needs labels, and the data yields none; use importance: fisher-unlabelled"
                )
            module.zero_grad(set_to_none=True)
            outputs = module(*batch.args, **batch.kwargs)
            loss = unlabelled_loss(outputs) if unlabelled else task_loss(context.loss, outputs, batch.labels)
            if not torch.isfinite(loss):
                raise BadInput(
                    f"importance: the loss of batch {count} is {float(loss.detach())}; check the data and the model"
                )
            loss.backward()
            for atom, values in gradients.of_batch().items():
                sums[atom] += values
            count += many if unlabelled else 1
    return count


def normalised(scores: Scores) -> Scores:
    """The scores times one power of two that makes the largest about 1, so that no threshold or sum in the selection
    depends on the scale of the loss."""
    largest = max((float(values.max()) for values in scores.values() if len(values)), default=0.0)
    if not 0 < largest < np.inf:
        return dict(scores)
    _, exponent = np.frexp(largest)
    return {atom: np.ldexp(values, -int(exponent)) for atom, values in scores.items()}


def together(scores: Scores) -> Scores:
    """The mean of the scores over all processes, bitwise the same in each."""
    if not scores:
        return {}
    values = averaged(np.concatenate(list(scores.values())))
    parts = np.split(values, np.cumsum([len(part) for part in scores.values()])[:-1])
    return dict(zip(scores, parts, strict=True))


def after_repair(
    comb: Comb, groups: list[Group], context: Context, samples: int = SAMPLES, losses: Losses | None = None
) -> Scores:
    """For each index, the loss that remains after repair (`repair.score`).

    An axis that no linear layer reads, such as the widths of queries and keys, or that something else reads, too, such as a
    recurrence, a layer whose weight is shared, or a sum over channels, is scored by "fisher-unlabelled", which has the same
    unit. losses: those of the same groups and data, if they are known already.
    """
    scores = (losses or losses_of(comb, groups, context, samples)).scores()
    unread = [g for g in groups if not np.isfinite(scores[g.atom]).all()]
    return scores | (from_gradients(UNLABELLED)(comb, unread, context, samples) if unread else {})


def losses_of(comb: Comb, groups: list[Group], context: Context, samples: int) -> Losses:
    """The statistics that the "repair" importance is computed from. Raises BadInput without data."""
    if context.data is None:
        raise BadInput("importance repair needs images (labels are not needed): give data=")
    reads, moments = find_reads(comb, {g.atom: None for g in groups})
    refitted = set(refittable(comb))
    beside = {atom for read in reads if read.node not in refitted for atom in read.atoms}
    for m in moments:  # of statistics such as means, whose result lacks the axis; later layers read what norms give
        axes = comb.axes[m.source] or ()
        beside |= ax.atoms(axes[d] for d in m.dims).keys() - ax.atoms(comb.flat(m.node)).keys()
    return Losses(comb, groups, context, samples, beside)


OwnImportance = Callable[[Group, dict[str, torch.Tensor]], Any]
"""A user's function `importance(group, weights)`; see `from_function`."""


def swapped(
    groups: list[Group], losses: Losses, masks: dict[Factor, np.ndarray]
) -> tuple[dict[Factor, np.ndarray], dict[str, int]]:
    """Masks after a local search, the same in all processes, and how many swaps were made in each group. (Between
    processes, the places of groups are exchanged instead of atoms, which are told apart by identity.)"""

    def search() -> tuple[list[np.ndarray], dict[str, int]]:
        swapped_masks, swaps = losses.swapped(masks)
        return [swapped_masks[g.atom] for g in groups], swaps

    kept, swaps = agreed(search)
    return {g.atom: mask for g, mask in zip(groups, kept, strict=True)}, swaps


def from_function(function: OwnImportance) -> Importance:
    """An importance made of a user's function, which is called for each group.

    Its arguments are the group (name, kind, size, members) and the network's parameters and buffers that have the group's
    indices, as `{"parameter:dim": tensor (group.size, entries)}`. It returns one finite number for each index, as a tensor,
    array or list; the lowest are removed first.
    """

    def scores(comb: Comb, groups: list[Group], context: Context, samples: int = 0) -> Scores:
        return own_scores(function, comb, groups, comb.module, {})

    return scores


def own_scores(
    function: OwnImportance, comb: Comb, groups: list[Group], module: TrainableModule, masks: ax.Masks
) -> Scores:
    """`from_function` for a network that has lost what the masks remove: the function sees the remaining indices of each
    group; the others score 0. Raises BadInput unless it returns a finite number for each index."""
    scores: Scores = {}
    for group in groups:
        mask = masks.get(group.atom, np.ones(group.size, dtype=bool))
        left = dataclasses.replace(group, size=int(mask.sum()))
        weights = {
            f"{name}:{dim}": _entries(fetch(module, name).detach(), dim, comb.parameters[name][dim], group, masks)
            for name, dim in group.members
        }
        try:
            values = torch.as_tensor(function(left, weights)).detach().double().cpu().numpy()
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
            text = first_line(error) or "no message"
            raise BadInput(f"RemoveChannels.importance: fails for {group.name} ({text[:200]})") from error
        if values.shape != (left.size,) or not np.isfinite(values).all():
            what = f"{values.shape}" if values.shape != (left.size,) else "numbers that are not finite"
            raise BadInput(
                f"RemoveChannels.importance: gives {what} for {group.name}; it takes one finite number for each of its "
                f"{left.size} indices"
            )
        scores[group.atom] = np.zeros(group.size)
        scores[group.atom][mask] = values
    return scores


def _entries(tensor: torch.Tensor, dim: int, axis: ax.Axis, group: Group, masks: ax.Masks) -> torch.Tensor:
    """The entries of a tensor by the remaining indices of a group, `(indices, entries)`."""
    index = columns(axis, group.atom)
    if ax.touches(axis, masks):
        index = index[ax.kept_mask(axis, masks)]
    order = np.argsort(index, kind="stable")[int((index < 0).sum()) :]  # sorted by index; all have equally many entries
    rows = tensor.movedim(dim, 0)[torch.from_numpy(order).to(tensor.device)]
    return rows.reshape(len(np.unique(index[index >= 0])), -1)


def importance_of(importance: str | OwnImportance) -> Importance:
    """The importance of a name, or of a user's function."""
    return from_function(importance) if callable(importance) else IMPORTANCES[importance]


IMPORTANCES: dict[str, Importance] = {
    "magnitude": magnitude,
    "repair": after_repair,
    "random": random,
    **{name: from_gradients(name) for name in TRANSFORMS},
}
