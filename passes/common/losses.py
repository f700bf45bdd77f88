"""The default loss and metric, and where they find class scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from ...graph.errors import BadInput


def logits_of(outputs: Any) -> torch.Tensor:
    """The class scores `(N, C, ...)` among a model's outputs: the only floating-point tensor, or the entry "logits" or
    "out" of a mapping. Raises BadInput when there are several."""
    if isinstance(outputs, dict):
        for name in ("logits", "out"):
            if isinstance(outputs.get(name), torch.Tensor):
                return outputs[name]
    found = [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if len(found) != 1 or found[0].dim() < 2:
        shapes = ", ".join(str(tuple(t.shape)) for t in found) or "none"
        raise BadInput(f'outputs: no single tensor of class scores (found {shapes}); name it "logits" or "out"')
    return found[0]


def default_loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of class scores `(N, C, ...)` against class indices `(N, ...)`; label -100 is ignored."""
    return F.cross_entropy(logits_of(outputs).float(), labels)


def accuracy(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """1 where the highest score is the label's, else 0, for every sample or pixel whose label is not negative."""
    hits = (logits_of(outputs).argmax(1) == labels).float()
    return hits[labels >= 0]


def task_loss(loss: Callable[..., Any] | None, outputs: Any, labels: Any) -> torch.Tensor:
    """`loss(outputs, labels)`, by default `default_loss`: a scalar. BadInput when they do not fit together."""
    found = applied("loss", loss or default_loss, outputs, labels)
    if not isinstance(found, torch.Tensor) or found.dim():
        raise BadInput(f"loss: must return a scalar tensor, got {type(found).__name__}")
    return found


def applied(field: str, function: Callable[..., Any], outputs: Any, labels: Any) -> Any:
    try:
        return function(outputs, labels)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        shapes = [tuple(t.shape) for t in pytree.tree_leaves((outputs, labels)) if isinstance(t, torch.Tensor)]
        text = (str(error).splitlines() or ["no message"])[0]
        raise BadInput(f"{field}: does not take these outputs and labels (shapes {shapes}): {text[:200]}") from error


LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "ProcessGroup")  # in what collectives raise
PLAIN = ("epoch", "position", "step", "log", "curve", "recent")
