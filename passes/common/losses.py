"""The default loss and metric, and how class scores are found among a model's outputs."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ...graph.compat import pytree
from ...graph.errors import BadInput, first_line

FLAT = 0.05  # share of the largest entropy by which that of class scores is smaller
ENOUGH = 8  # samples and positions in which the same winner is no chance
POSITIONS = 1 << 16  # about so many samples and positions are looked at to tell them
NAMES = ("logits", "out")  # names of the class scores among several outputs


def logits_of(outputs: Any, instead: str = "") -> torch.Tensor:
    """The class scores among a model's outputs: the only floating-point tensor, or the entry "logits" or "out" of a
    mapping.

    Raises BadInput where that is no single tensor of at least two dimensions; `instead` is what its message proposes
    besides.
    """
    if isinstance(outputs, dict):
        for name in NAMES:
            if isinstance(outputs.get(name), torch.Tensor):
                return outputs[name]
    tensors = [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if len(tensors) != 1 or tensors[0].dim() < 2:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors) or "none"
        way = 'name it "logits" or "out"' + (f", or {instead}" if instead else "")
        raise BadInput(f"outputs: no single tensor of class scores (found {shapes}); {way}")
    return tensors[0]


def class_dim(
    scores: torch.Tensor, labels: Any = None, known: int | None = None, of_graph: int | None = None, instead: str = ""
) -> int:
    """The dimension of class scores that holds the classes.

    It is `known` where the user gave it; else the one dimension whose removal leaves the shape of the labels (class
    indices); else `of_graph`, what the graph tells (`class_axis`); else 1 for scores `(N, C)` and `(N, C, H, W)`.
    Raises BadInput for a `known` that is no dimension besides the batch, and where nothing decides, such as for `(N,
    queries, classes)`; `instead` is what its message proposes.
    """
    rank = scores.dim()
    if known is not None:
        if not 1 <= known % rank < rank or not -rank <= known < rank:
            raise BadInput(
                f"class_dim: {known} is no dimension of class scores {tuple(scores.shape)} besides the batch"
            )
        return known % rank
    fits = []
    if isinstance(labels, torch.Tensor) and not labels.is_floating_point():
        fits = [d for d in range(1, rank) if labels.shape == scores.shape[:d] + scores.shape[d + 1 :]]
    if len(fits) == 1:
        return fits[0]
    if of_graph is not None and (not fits or of_graph in fits):
        return of_graph
    if rank in (2, 4):
        return 1
    way = instead or "give loss= and metric="
    raise BadInput(f"outputs: any dimension of the class scores {tuple(scores.shape)} may be the classes; {way}")


def default_loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of class scores `(N, C, ...)` against class indices `(N, ...)`; label -100 is ignored.

    The classes may be in another dimension if the labels' shape shows which. Raises BadInput without single class
    scores, IndexError for a label that is no class.
    """
    instead = "give loss= (in a recipe, loss: module:callable)"
    scores = logits_of(outputs, instead)
    scores = scores.float().movedim(class_dim(scores, labels, instead=instead), 1)
    if scores.device.type != "cpu" and not labels.is_floating_point():  # there it would end the whole process
        wrong = labels[((labels < 0) & (labels != -100)) | (labels >= scores.shape[1])]
        if len(wrong):
            raise IndexError(f"Target {int(wrong[0])} is out of bounds.")
    return F.cross_entropy(scores, labels)


def accuracy(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """1 where the highest score is the label's, else 0, for every sample or pixel whose label is not negative.

    Raises BadInput without single class scores, ValueError for labels of another shape than the scores without their
    classes.
    """
    instead = "give metric= (in a recipe, metric: module:callable)"
    scores = logits_of(outputs, instead)
    best = scores.argmax(class_dim(scores, labels, instead=instead))
    if best.shape != labels.shape:
        raise ValueError(
            f"the scores have a class for each of {tuple(best.shape)}, the labels are {tuple(labels.shape)}"
        )
    return (best == labels).float()[labels >= 0]


def task_loss(loss: Callable[..., Any] | None, outputs: Any, labels: Any, field: str = "loss") -> torch.Tensor:
    """`loss(outputs, labels)`, by default `default_loss`, as a scalar tensor. Raises BadInput, naming `field`, where
    the loss fails or gives no scalar tensor.
    """
    value = applied(field, loss or default_loss, outputs, labels)
    if not isinstance(value, torch.Tensor) or value.dim():
        raise BadInput(f"{field}: must return a scalar tensor, got {type(value).__name__}")
    return value


def applied(field: str, function: Callable[..., Any], *values: Any) -> Any:
    """`function(*values)`, with outputs and labels as values. Raises BadInput of one line, naming `field`, for an error
    in it.
    """
    try:
        return function(*values)
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
        shapes = [tuple(t.shape) for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor)]
        text = first_line(error) or "no message"
        takes = f"does not take these outputs and labels (shapes {shapes})" if values else "fails"
        raise BadInput(f"{field}: {takes}: {text[:200]}") from error


def number(field: str, value: Any) -> float:
    """The value that a user's function returned, as a float. Raises BadInput, naming `field`, unless it is one number."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, (int, float)):
        return float(value)
    what = f"a mapping with {', '.join(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__
    raise BadInput(f"{field}: has to give one number, not {what[:200]}")


def tell_classes(values: torch.Tensor, dim: int) -> bool:
    """Whether outputs look like class scores along a dimension, not like values such as coordinates, angles or colours.

    The highest of a classifier's scores is not always that of the same class, in ENOUGH samples and positions, and its
    probabilities are not all alike: their mean entropy is at least FLAT below that of equal shares. The softmax of values in
    different units always has the same winner, that of values between 0 and 1 is flat; a divergence of either would see
    almost nothing.
    """
    scores = values.detach().movedim(dim, -1).flatten(0, -2)
    scores = scores[:: max(len(scores) // POSITIONS, 1)].double()
    log, most = scores.log_softmax(-1), math.log(max(scores.shape[-1], 2))
    entropy = float(-(log.exp() * log).nan_to_num().sum(-1).mean())
    first = scores.argmax(-1)
    return (len(first) < ENOUGH or bool((first != first[0]).any())) and entropy <= (1 - FLAT) * most


def deviations(values: torch.Tensor, dim: int | None) -> torch.Tensor:
    """The standard deviation of outputs over samples and positions, for each index of a dimension apart, since each may
    have a unit of its own, or of all together; broadcasts to their shape. Where nothing varies, the size of the values."""
    if dim is None or values.shape[dim] == 1:
        rows, shape = values.double().reshape(1, -1), [1] * values.dim()
    else:
        rows = values.double().movedim(dim, 0).flatten(1)
        shape = [-1 if d == dim % values.dim() else 1 for d in range(values.dim())]
    least = 1e-6 * rows.square().mean(1).sqrt()
    found = rows.std(1) if rows.shape[1] > 1 else rows.abs().mean(1)
    return torch.maximum(found, least).clamp(min=1e-12).reshape(shape)


class UnlabelledLoss:
    """A loss to differentiate where there are no labels, summed over samples (a float64 scalar): the mean square of its
    derivatives estimates the diagonal of the Gauss-Newton matrix (Hutchinson).

    For class scores `(samples, classes)`, the log-probability of a class that is drawn from them; for other outputs, a
    random projection in units of their standard deviation (a single number: of its size), divided by the square root of the
    entries of a sample. The first batch decides which of them `(samples, values)` are (`tell_classes`), and the unit of each
    value if it has ENOUGH samples. Not finite where the outputs are not.
    """

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.units: dict[int, torch.Tensor | None] = {}  # of outputs (samples, values); None for class scores

    def __call__(self, outputs: Any) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i, out in enumerate(pytree.tree_leaves(outputs)):
            if not isinstance(out, torch.Tensor) or not out.is_floating_point():
                continue
            columns = out.dim() == 2 and out.shape[1] > 1
            if columns and i not in self.units:
                own = 1 if len(out) >= ENOUGH else None
                self.units[i] = None if tell_classes(out, 1) else deviations(out.detach(), own)
            if columns and self.units[i] is None:
                log = out.double().log_softmax(1)
                if bool(log.isnan().any()):
                    return log.sum()
                chosen = torch.multinomial(log.detach().exp().cpu(), 1, generator=self.generator).to(out.device)
                total = total.to(out.device) + log.gather(1, chosen).sum()
            else:
                spread = self.units[i] if columns else deviations(out.detach(), None)
                spread = spread * max(1, out[0].numel() if out.dim() else 1) ** 0.5
                noise = torch.randn(out.shape, generator=self.generator, dtype=torch.float64).to(out.device)
                total = total.to(out.device) + (out.double() * noise / spread).sum()
        return total
