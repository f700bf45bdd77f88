"""What a layer reads and gives as matrices, in pieces that fit into memory, and checks of what is made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, fx

from ...graph.errors import BadInput
from ...graph.nodes import arguments, conv_padding, per_dim
from ..common.weights import Layer


def windows(node: fx.Node, x: Tensor, layer: Layer) -> Tensor:
    """The inputs of a layer as a view `(groups, samples, *positions, c...)`: what each output value is computed from."""
    if len(layer.shape) == 2:
        return x.reshape(1, -1, x.shape[-1])
    a, kernel = arguments(node), layer.shape[2:]
    strides, dilations = (per_dim(a[key], len(kernel)) for key in ("stride", "dilation"))
    x = F.pad(x, [p for pair in reversed(conv_padding(node)) for p in pair])
    for d, (k, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        x = x.unfold(2 + d, dilation * (k - 1) + 1, stride)[..., ::dilation]
    x = x.unflatten(1, (layer.groups, -1))  # (N, groups, channels, *out, *kernel)
    rank = len(kernel)
    return x.permute(1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))


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


def outputs_of(y: Tensor, layer: Layer) -> Tensor:
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
