"""Inputs and outputs of a layer as matrices, in pieces that fit into memory, and checks of statistics made of them."""

import math
from collections.abc import Iterator

from torch import Tensor

from ....graph.errors import BadInput
from ...common.weights import WeightedLayer


def pieces(windows: Tensor, largest: int, dim: int, flat: bool = True) -> Iterator[tuple[Tensor, slice | None]]:
    """Cut the result of `windows` along a dimension into pieces of about `largest` numbers, and yield each with its place
    along the dimension (None for all of it).

    dim: 1 for samples, 2 for the first position dimension, which a linear layer lacks. flat: whether pieces are rows
    `(groups, n, c)`.
    """
    rank = (windows.dim() - 3) // 2
    if dim == 2 and not rank:
        yield windows, None
        return
    step = max(1, largest // max(1, windows.numel() // max(1, windows.shape[dim])))
    for start in range(0, windows.shape[dim], step):
        piece = windows.narrow(dim, start, min(step, windows.shape[dim] - start))
        if flat:
            piece = piece.reshape(len(piece), -1, math.prod(piece.shape[2 + rank :]))
        yield piece, slice(start, start + step)


def outputs_of(y: Tensor, layer: WeightedLayer) -> Tensor:
    """The outputs `y` of a layer as rows `(groups, n, out / groups)`, in the order of the rows of `windows`."""
    if len(layer.shape) == 2:
        return y.reshape(1, -1, y.shape[-1])
    y = y.unflatten(1, (layer.groups, -1)).movedim(1, 0).movedim(2, -1)
    return y.reshape(layer.groups, -1, y.shape[-1])


def check_again(before: int, now: int) -> None:
    """Raise BadInput unless a run over the data saw as many samples as the run before (0: there was none)."""
    if before not in (0, now):
        raise BadInput(f"data: yields {now} samples, and {before} the time before; it must be iterable again")


def check_finite(value: Tensor, what: str) -> None:
    """Raise BadInput for a tensor with entries that are not finite; `what` is the subject and verb of its message."""
    if not bool(value.isfinite().all()):
        raise BadInput(f"Sparsify: {what} not finite; check the data and the loss")
