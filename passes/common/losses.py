"""The default loss and metric, and how class scores are found among a model's outputs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ...graph.compat import pytree
from ...graph.errors import BadInput, first_line

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
    scores.
    """
    instead = "give loss= (in a recipe, loss: module:callable)"
    scores = logits_of(outputs, instead)
    return F.cross_entropy(scores.float().movedim(class_dim(scores, labels, instead=instead), 1), labels)


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


def unlabelled_loss(outputs: Any, generator: torch.Generator) -> torch.Tensor:
    """A loss to differentiate where there are no labels, summed over samples (a float64 scalar): the mean square of its
    derivatives estimates the diagonal of the Gauss-Newton matrix (Hutchinson).

    For class scores `(samples, classes)`, the log-probability of a class that is drawn from them; for other outputs, a
    random projection in units of their standard deviation (a single number: of its size), divided by the square root of the
    entries of a sample. Not finite where the outputs are not.
    """
    total = torch.zeros((), dtype=torch.float64)
    for out in pytree.tree_leaves(outputs):
        if not isinstance(out, torch.Tensor) or not out.is_floating_point():
            continue
        if out.dim() == 2 and out.shape[1] > 1:
            log = out.double().log_softmax(1)
            if bool(log.isnan().any()):
                return log.sum()
            chosen = torch.multinomial(log.detach().exp().cpu(), 1, generator=generator).to(out.device)
            total = total.to(out.device) + log.gather(1, chosen).sum()
        else:
            values = out.detach().double()
            spread = float((values.std() if values.numel() > 1 else values.abs().mean()).clamp(min=1e-12))
            spread *= max(1, out[0].numel() if out.dim() else 1) ** 0.5
            noise = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)
            total = total.to(out.device) + (out.double() * noise).sum() / spread
    return total
