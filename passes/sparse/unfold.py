"""What a layer reads and gives as matrices in pieces that fit into memory, and checks of what is made of them."""

import math
from collections.abc import Iterator

from torch import Tensor

from ...graph.errors import BadInput
from ..common.weights import WeightedLayer


def pieces(windows: Tensor, largest: int, dim: int, flat: bool = True) -> Iterator[tuple[Tensor, slice | None]]:
    """What `windows` gives, cut along a dimension (1: samples, 2: the first of the positions, which a linear layer lacks)
    into pieces of about `largest` numbers; with `flat` each as rows `(groups, n, c)`. And where it lies, None for all."""
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
    """The outputs of a layer as `(groups, n, out / groups)` rows, in the order of the rows of `windows`."""
    if len(layer.shape) == 2:
        return y.reshape(1, -1, y.shape[-1])
    y = y.unflatten(1, (layer.groups, -1)).movedim(1, 0).movedim(2, -1)
    return y.reshape(layer.groups, -1, y.shape[-1])


def check_again(before: int, now: int) -> None:
    """Raise BadInput unless a further run over the data saw as many samples as the one before (0: there was none)."""
    if before not in (0, now):
        raise BadInput(f"data: yields {now} samples, and {before} the time before; it must be iterable again")


def check_finite(value: Tensor, what: str) -> None:
    """Raise BadInput, which starts with `what`, when a tensor has an entry that is not finite."""
    if not bool(value.isfinite().all()):
        raise BadInput(f"Sparsify: {what} not finite; check the data and the loss")
