"""The loss of a student's outputs against a teacher's, where there are more than class scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...graph.errors import BadInput
from ...graph.outputs import pick
from ..common.losses import class_dim, task_loss

FORMS = ("binary", "boxes", "values")
Forms = Mapping[str, "int | str"]


def check_forms(forms: Any, weights: Mapping[str, float]) -> str | None:
    """What is wrong with the forms of outputs, or with their weights, for a message; None if nothing is."""
    if callable(forms):
        return "weights are for outputs by name" if weights else None
    if not forms:
        return "weights are for outputs by name" if weights else "names at least one output"
    for name, form in forms.items():
        if isinstance(form, bool) or not ((isinstance(form, int) and form != 0) or form in FORMS):
            return f"the dimension of the classes or one of {', '.join(FORMS)} for {name}"
    odd = sorted(set(weights) - set(forms)) or [n for n, w in weights.items() if not w >= 0]
    return f"the weight of {odd[0]} belongs to no output named, or is below 0" if odd else None


def taught(
    forms: Forms | Callable[[Any, Any], Tensor],
    weights: Mapping[str, float],
    student: Any,
    teacher: Any,
    temperature: float,
    confident: float,
    background: int | None,
) -> Tensor:
    """The weighted sum of the losses of all named outputs, a scalar; or the result of the user's function of both outputs.

    forms, weights, confident, background: see `Distill`. Raises BadInput for outputs that are missing, are no
    floating-point tensors or have different shapes.
    """
    if callable(forms):
        return task_loss(forms, student, teacher, "Distill.outputs")
    ours, theirs = (pick(outputs, list(forms), "Distill.outputs") for outputs in (student, teacher))
    for name, value in ours.items():
        other = theirs[name]
        if not (isinstance(value, Tensor) and value.is_floating_point() and isinstance(other, Tensor)):
            raise BadInput(f"Distill.outputs: {name} is no floating-point tensor")
        if value.shape != other.shape:
            raise BadInput(f"teacher: its output {name} is {tuple(other.shape)}, the program's {tuple(value.shape)}")
    parts = []
    for name, form in forms.items():
        s, t = ours[name].float(), theirs[name].float()
        if form == "binary":
            part = binary_kl(s, t, temperature)
        elif form == "boxes":
            part = _boxes(s, t, _confidence(name, forms, theirs, background), confident)
        elif form == "values":
            part = (s - t).square().mean() / (t.square().mean() + 1e-12)
        else:
            part = soft_kl(s, t, temperature, class_dim(s, known=int(form)))
        parts.append(weights.get(name, 1.0) * part)
    return torch.stack(parts).sum()


def soft_kl(student: Tensor, teacher: Tensor, temperature: float, dim: int | None = None) -> Tensor:
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))` over the classes of class scores, in nats, averaged over the
    other dimensions (Hinton et al., arXiv 1503.02531).

    dim: the dimension of the classes; None if the rank tells (`class_dim`). Raises BadInput for different shapes.
    """
    if student.shape != teacher.shape:
        raise BadInput(f"teacher: its class scores are {tuple(teacher.shape)}, the program's {tuple(student.shape)}")
    dim = class_dim(student, instead="give dim=") if dim is None else dim
    ours, theirs = ((t.float() / temperature).log_softmax(dim) for t in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim).mean()


def binary_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2` times the KL divergence between the yes or no of the teacher and the student for each of independent classes,
    summed, and divided by the number of objects that the teacher expects: the sum of its probabilities, at least 1 (ours,
    after the normalisation of focal losses). Both arguments are logits."""
    ours, theirs = student / temperature, teacher / temperature
    p = theirs.sigmoid()
    kl = p * (F.logsigmoid(theirs) - F.logsigmoid(ours)) + (1 - p) * (F.logsigmoid(-theirs) - F.logsigmoid(-ours))
    return temperature**2 * kl.sum() / teacher.sigmoid().sum().clamp(min=1)


def _boxes(student: Tensor, teacher: Tensor, confidence: tuple[Tensor, int] | None, least: float) -> Tensor:
    """The mean L1 distance of coordinates at positions where the teacher's confidence is at least `least`; 0 if there are
    none.

    confidence: see `_confidence`; None uses all positions.
    """
    distance = (student - teacher).abs()
    if confidence is None:
        return distance.mean()
    scores, dim = confidence
    sure = (scores >= least).to(distance.dtype)
    return (distance.mean(dim) * sure).sum() / sure.sum().clamp(min=1)


def _confidence(
    name: str, forms: Forms, teacher: Mapping[str, Tensor], background: int | None
) -> tuple[Tensor, int] | None:
    """The teacher's highest class probability at each position of an output with boxes, and the dimension of the boxes'
    coordinates.

    The class scores are those that have the boxes' shape except in this dimension; None if no output has.
    """
    boxes = teacher[name]
    for other, form in forms.items():
        scores = teacher[other].float()
        if form in ("boxes", "values") or scores.dim() != boxes.dim():
            continue
        odd = [d for d in range(1, scores.dim()) if scores.shape[d] != boxes.shape[d]]
        dim = int(form) % scores.dim() if isinstance(form, int) else odd[0] if len(odd) == 1 else None
        if dim is None or any(d != dim for d in odd):
            continue
        if form == "binary":
            return scores.sigmoid().amax(dim), dim
        share = scores.softmax(dim)
        if background is not None:
            share = share.index_fill(dim, torch.tensor(background % share.shape[dim], device=share.device), 0)
        return share.amax(dim), dim
    return None
