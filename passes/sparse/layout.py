"""A weight as rows, one for each output channel, or as blocks of neighbours, and back."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.weights import WeightedLayer


def to_blocks(tensor: Tensor, size: int, channels_last: bool = False) -> Tensor:
    """A tensor as blocks `(b, size)` of its flattened entries, the last one filled up with zeros.

    channels_last: dimension 1 runs fastest, so that groups of neighbours lie along the input channels of one output
    channel and kernel position; otherwise the entries stay in their order.
    """
    flat = (tensor.movedim(1, -1) if channels_last else tensor).reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def from_blocks(blocks: Tensor, shape: Sequence[int], channels_last: bool = False) -> Tensor:
    """What `to_blocks` cut, put together again."""
    flat = blocks.reshape(-1)[: math.prod(shape)]
    if not channels_last:
        return flat.view(*shape)
    return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


def columns_of(layer: WeightedLayer) -> int:
    """How many weights a row of the layer has."""
    return layer.size // layer.shape[0]


def rows_of(weight: Tensor, channels_last: bool) -> Tensor:
    """A weight as `(out, c)` rows."""
    return (weight.movedim(1, -1) if channels_last else weight).reshape(len(weight), -1)


def column_order(layer: WeightedLayer, channels_last: bool) -> Tensor:
    """Where each of the columns of `rows_of` is in the flattened weight."""
    index = torch.arange(columns_of(layer)).view(layer.shape[1:])
    return (index.movedim(0, -1) if channels_last else index).reshape(-1)
