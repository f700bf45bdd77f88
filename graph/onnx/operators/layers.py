"""Layers with weights: convolutions, linear layers, normalisations, embeddings. Source: the ONNX specification."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...errors import Refused
from ..table import LINEAR, Call, axis_of, operator
from .windows import pad, pads, spatial, symmetric

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@operator("Conv")
def conv(c: Call) -> Any:
    """A convolution; padding that differs between the two sides of an axis becomes an operator of its own before it."""
    x, weight, bias = c.tensor(0), c.tensor(1), c.optional(2)
    rank = x.dim() - 2
    if rank not in CONVOLUTIONS:
        raise Refused(f"a convolution over {rank} axes")
    stride, dilation = spatial(c, "strides", rank), spatial(c, "dilations", rank)
    padding = pads(c, list(x.shape[2:]), list(weight.shape[2:]), stride, dilation)
    if not symmetric(padding):
        x, padding = pad(x, padding), [(0, 0)] * rank
    before = [a for a, _ in padding]
    return CONVOLUTIONS[rank](x, weight, bias, stride, before, dilation, c.attribute("group", 1))


@operator("ConvTranspose")
def conv_transpose(c: Call) -> Any:
    """A transposed convolution; if its padding crops the two sides of an axis differently, the crop is done afterwards."""
    x, weight, bias = c.tensor(0), c.tensor(1), c.optional(2)
    rank = x.dim() - 2
    if rank not in TRANSPOSED:
        raise Refused(f"a transposed convolution over {rank} axes")
    stride, dilation = spatial(c, "strides", rank), spatial(c, "dilations", rank)
    extra = spatial(c, "output_padding", rank) if c.attribute("output_padding") else [0] * rank
    flat = c.attribute("pads") or [0] * 2 * rank
    cut = list(zip(flat[:rank], flat[rank:], strict=True))
    kind = c.only("auto_pad", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
    wanted = c.attribute("output_shape")
    if wanted is None and kind.startswith("SAME"):
        wanted = [n * s for n, s in zip(x.shape[2:], stride, strict=True)]
    if wanted is not None:
        cut = []
        for n, k, s, d, e, out in zip(
            x.shape[2:], weight.shape[2:], stride, dilation, extra, wanted[-rank:], strict=True
        ):
            total = (n - 1) * s + e + (k - 1) * d + 1 - out
            small, large = total // 2, total - total // 2
            cut.append((small, large) if kind == "SAME_UPPER" else (large, small))
    group = c.attribute("group", 1)
    fits = symmetric(cut) and all(0 <= e < max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True))
    if fits and all(a >= 0 for a, _ in cut):
        return TRANSPOSED[rank](x, weight, bias, stride, [a for a, _ in cut], extra, group, dilation)
    whole = TRANSPOSED[rank](x, weight, bias, stride, 0, 0, group, dilation)
    short = [(-a, e - b) for (a, b), e in zip(cut, extra, strict=True)]
    if bias is not None and any(a > 0 or b > 0 for a, b in short):
        raise Refused("output_padding beyond what the kernel reaches, with a bias")
    return pad(whole, short)


@operator(LINEAR)
def linear(c: Call) -> Any:
    return F.linear(c.tensor(0), c.tensor(1), c.optional(2))


@operator("MatMul")
def matmul(c: Call) -> Any:
    return torch.matmul(c.tensor(0), c.tensor(1))


@operator("Gemm")
def gemm(c: Call) -> Any:
    """alpha A' B' + beta C of computed matrices. (With a constant B it is a linear layer, see `weights`.)"""
    a, b = (c.tensor(i).t() if c.attribute(name, 0) else c.tensor(i) for i, name in enumerate(("transA", "transB")))
    product = torch.matmul(a, b)
    alpha, beta = c.attribute("alpha", 1.0), c.attribute("beta", 1.0)
    product = product if alpha == 1 else product * alpha
    if not c.has(2) or beta == 0:
        return product
    return product + (c.tensor(2) if beta == 1 else c.tensor(2) * beta)


@operator("BatchNormalization")
def batch_norm(c: Call) -> Any:
    """Batch normalisation. ONNX's momentum is the share of the old statistics, PyTorch's that of the new ones.

    With training_mode the statistics are those of the batch. Exports of weight standardisation compute it of a weight
    (ScaledStdConv of timm), which is folded.
    """
    training = c.attribute("training_mode", 0)
    folded = isinstance(c.value(0), np.ndarray)
    if c.attribute("spatial", 1) == 0 or (not folded and (training or c.used(1))):
        raise Refused("a BatchNormalization in training mode or over positions; export the model in eval mode")
    x, scale, bias = (c.tensor(i) for i in range(3))
    momentum, epsilon = 1.0 - c.attribute("momentum", 0.9), c.attribute("epsilon", 1e-5)
    if training:
        axes = [i for i in range(x.dim()) if i != 1]
        statistics = ((3, x.mean(axes)), (4, x.var(axes, correction=0)))
        moved = [c.tensor(i) * (1.0 - momentum) + value * momentum for i, value in statistics]
        return [F.batch_norm(x, None, None, scale, bias, True, momentum, epsilon), *moved]
    return F.batch_norm(x, c.tensor(3), c.tensor(4), scale, bias, c.store.training, momentum, epsilon)


@operator("InstanceNormalization")
def instance_norm(c: Call) -> Any:
    scale, bias = c.value(1), c.value(2)
    if isinstance(scale, np.ndarray) and isinstance(bias, np.ndarray) and (scale == 1).all() and (bias == 0).all():
        return F.instance_norm(c.tensor(0), None, None, eps=c.attribute("epsilon", 1e-5))
    scale, bias = c.tensor(1), c.tensor(2)
    return F.instance_norm(c.tensor(0), None, None, scale, bias, eps=c.attribute("epsilon", 1e-5))


@operator("GroupNormalization")
def group_norm(c: Call) -> Any:
    """Group normalisation; scale and bias have an entry for each group before opset 21, for each channel since then."""
    x, scale, bias = c.tensor(0), c.tensor(1), c.tensor(2)
    groups = c.attribute("num_groups")
    if scale.shape[0] == groups != x.shape[1]:
        scale, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (scale, bias))
    return F.group_norm(x, groups, scale, bias, c.attribute("epsilon", 1e-5))


@operator("LayerNormalization")
def layer_norm(c: Call) -> Any:
    x, epsilon = c.tensor(0), c.attribute("epsilon", 1e-5)
    axis = axis_of(c.attribute("axis", -1), x.dim())
    shape = list(x.shape[axis:])
    scale, bias = c.optional(1), c.optional(2)
    if any(v is not None and list(v.shape) != shape for v in (scale, bias)):  # they broadcast along the normalised axes
        y = F.layer_norm(x, shape, None, None, epsilon)
        y = y if scale is None else y * scale
        y = y if bias is None else y + bias
    else:
        y = F.layer_norm(x, shape, scale, bias, epsilon)
    if not c.used(1) and not c.used(2):
        return y
    axes = list(range(axis, x.dim()))
    return [y, x.mean(axes, keepdim=True), torch.rsqrt(x.var(axes, correction=0, keepdim=True) + epsilon)]


@operator("RMSNormalization")
def rms_norm(c: Call) -> Any:
    x = c.tensor(0)
    shape = list(x.shape[axis_of(c.attribute("axis", -1), x.dim()) :])
    return F.rms_norm(x, shape, None, c.attribute("epsilon", 1e-5)) * c.tensor(1)


@operator("LRN")
def local_response_norm(c: Call) -> Any:
    size = c.attribute("size")
    if size % 2 == 0:
        raise Refused("LRN over an even number of channels")
    alpha, beta, bias = c.attribute("alpha", 1e-4), c.attribute("beta", 0.75), c.attribute("bias", 1.0)
    return F.local_response_norm(c.tensor(), size, alpha, beta, bias)


@operator("MeanVarianceNormalization")
def mean_variance_norm(c: Call) -> Any:
    x, axes = c.tensor(), list(c.attribute("axes") or [0, 2, 3])
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.pow(2).mean(axes, keepdim=True).sqrt() + 1e-9)


@operator("LpNormalization")
def lp_normalization(c: Call) -> Any:
    x, p = c.tensor(), c.only("p", 2, 1)
    length = torch.linalg.vector_norm(x, p, c.attribute("axis", -1), keepdim=True)
    return torch.where(length == 0, torch.zeros_like(x), x / length)


@operator("Einsum")
def einsum(c: Call) -> Any:
    return torch.einsum(c.attribute("equation"), *(c.tensor(i) for i in range(len(c.values))))
