"""Pooling. Source: the ONNX specification."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import Refused
from ..table import Call, is_static, operator
from .windows import pad, pads, spatial, symmetric

MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@operator("MaxPool", "AveragePool", "LpPool")
def pool(c: Call) -> Any:
    x, kernel = c.tensor(), list(c.attribute("kernel_shape"))
    rank = len(kernel)
    if rank not in MAX or c.used(1) or c.attribute("storage_order", 0):
        raise Refused("a pool over more than three axes, or whose indices are read")
    stride, dilation = spatial(c, "strides", rank), spatial(c, "dilations", rank)
    padding = pads(c, list(x.shape[2:]), kernel, stride, dilation)
    ceil = bool(c.attribute("ceil_mode", 0))
    ends = _ends(list(x.shape[2:]), kernel, stride, dilation, padding) if ceil else padding
    native = symmetric(padding) and all(2 * a <= k for (a, _), k in zip(padding, kernel, strict=True))
    if c.step.op == "MaxPool":
        if native and ends == padding:
            return MAX[rank](x, kernel, stride, [a for a, _ in padding], dilation)
        if ends is None:
            return MAX[rank](x, kernel, stride, [a for a, _ in padding], dilation, ceil_mode=True)
        low = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
        return MAX[rank](pad(x, ends, low), kernel, stride, 0, dilation)
    if any(d != 1 for d in dilation):
        raise Refused("an average over a dilated window")
    if c.step.op == "LpPool":
        p = c.attribute("p", 2)
        total = _average(pad(x.abs().pow(p), padding if ends is None else ends), kernel, stride) * math.prod(kernel)
        return total.pow(1 / p)
    include = bool(c.attribute("count_include_pad", 0))
    plain = not any(a or b for a, b in padding)
    if native and ends == padding:
        return AVERAGE[rank](x, kernel, stride, [a for a, _ in padding], False, include or plain)
    if ends is None:
        return AVERAGE[rank](x, kernel, stride, [a for a, _ in padding], True, include)
    # The sum over each window, divided by the number of its entries in the input (and in the padding, if that counts).
    ones = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype, device=x.device)
    ones = pad(ones, padding, 1.0 if include else 0.0)
    ones = pad(ones, [(0, e - b) for (_, e), (_, b) in zip(ends, padding, strict=True)])
    return _average(pad(x, ends), kernel, stride) / _average(ones, kernel, stride)


def _average(x: Tensor, kernel: list[int], stride: list[int]) -> Tensor:
    return AVERAGE[len(kernel)](x, kernel, stride)


def _ends(
    sizes: list[Any], kernel: list[int], stride: list[int], dilation: list[int], padding: list[tuple[int, int]]
) -> list[tuple[int, int]] | None:
    """The padding for which whole windows cover the same as with ceil_mode; windows that begin after the input are left
    out.

    None for dynamic sizes with symmetric padding, where PyTorch's own ceil_mode does this. Raises Refused for dynamic sizes
    with other padding.
    """
    if not is_static(sizes):
        if not symmetric(padding):
            raise Refused("ceil_mode with asymmetric padding and a dynamic size; give the input a fixed size")
        return None
    result = []
    for n, k, s, d, (before, after) in zip(sizes, kernel, stride, dilation, padding, strict=True):
        reach = (k - 1) * d + 1
        count = -(-(n + before + after - reach) // s) + 1
        if (count - 1) * s >= n + before:
            count -= 1
        result.append((before, max(after, (count - 1) * s + reach - n - before)))
    return result


@operator("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(c: Call) -> Any:
    x = c.tensor()
    axes = list(range(2, x.dim()))
    if c.step.op == "GlobalLpPool":
        return torch.linalg.vector_norm(x, c.attribute("p", 2), axes, keepdim=True)
    return x.mean(axes, keepdim=True) if c.step.op == "GlobalAveragePool" else x.amax(axes, keepdim=True)
