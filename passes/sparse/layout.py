"""A weight as rows, one for each output channel, or as blocks of consecutive entries, and back."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.weights import WeightedLayer


def to_blocks(tensor: Tensor, size: int, channels_last: bool = False) -> Tensor:
    """A tensor as blocks `(b, size)` of its flattened entries; the last block is filled up with zeros.

    channels_last: dimension 1 runs fastest, so that consecutive entries are input channels of one output channel and kernel
    position; otherwise the entries keep their order.
    """
    flat = (tensor.movedim(1, -1) if channels_last else tensor).reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def from_blocks(blocks: Tensor, shape: Sequence[int], channels_last: bool = False) -> Tensor:
    """The tensor of that shape that `to_blocks` cut into these blocks."""
    flat = blocks.reshape(-1)[: math.prod(shape)]
    if not channels_last:
        return flat.view(*shape)
    return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


def columns_of(layer: WeightedLayer) -> int:
    """Number of weights in a row of the layer."""
    return layer.size // layer.shape[0]


def rows_of(weight: Tensor, channels_last: bool) -> Tensor:
    """A weight as rows `(out, c)`."""
    return (weight.movedim(1, -1) if channels_last else weight).reshape(len(weight), -1)


def column_order(layer: WeightedLayer, channels_last: bool) -> Tensor:
    """For each column of `rows_of`, its index in the flattened row of the weight."""
    index = torch.arange(columns_of(layer)).view(layer.shape[1:])
    return (index.movedim(0, -1) if channels_last else index).reshape(-1)
