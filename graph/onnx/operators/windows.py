"""Padding of windows, for convolutions and pools. Source: the ONNX specification."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...errors import Refused
from ..table import Call, is_static


def spatial(c: Call, name: str, rank: int) -> list[int]:
    """Strides or dilations, by default 1."""
    return list(c.attribute(name) or [1] * rank)


def pads(c: Call, sizes: list[Any], kernel: list[int], stride: list[int], dilation: list[int]) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis, from `pads` or `auto_pad`. Raises Refused for auto_pad with a stride and
    a dynamic size."""
    kind, rank = c.only("auto_pad", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"), len(kernel)
    if kind == "VALID":
        return [(0, 0)] * rank
    if kind == "NOTSET":
        flat = c.attribute("pads") or [0] * 2 * rank
        return list(zip(flat[:rank], flat[rank:], strict=True))
    result = []
    for n, k, s, d in zip(sizes, kernel, stride, dilation, strict=True):
        if not is_static([n]) and s != 1:
            raise Refused(f"auto_pad={kind} with a stride and a dynamic size; give the input a fixed size")
        total = (k - 1) * d if s == 1 else max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
        small, large = total // 2, total - total // 2
        result.append((small, large) if kind == "SAME_UPPER" else (large, small))
    return result


def symmetric(padding: list[tuple[int, int]]) -> bool:
    return all(a == b for a, b in padding)


def pad(x: Tensor, padding: list[tuple[int, int]], value: float = 0.0) -> Tensor:
    """The tensor with its last axes padded; negative padding crops."""
    if not any(a or b for a, b in padding):
        return x
    return F.pad(x, [n for pair in reversed(padding) for n in pair], value=value)
