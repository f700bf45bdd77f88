"""Resize, Upsample and GridSample. Source: the ONNX specification.

Resampling is linear and works axis by axis, so every mode of ONNX is a matrix (out x in) for each axis. If a mode of
PyTorch's interpolate has the same matrix, that operator is used; else the matrix itself, or for nearest a gather.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ...errors import Refused
from ..table import Call, axis_of, is_static, operator

NATIVE = {3: ("nearest", "nearest-exact", "linear"), 4: ("nearest", "nearest-exact", "bilinear", "bicubic")}
NATIVE[5] = ("nearest", "nearest-exact", "trilinear")


@operator("Resize", "Upsample")
def resize(c: Call) -> Any:
    """Resampling; inputs are x and scales (Upsample, Resize of opset 10), later x, roi, scales and sizes."""
    x = c.tensor(0)
    at = 1 if c.step.op == "Upsample" or c.opset < 11 else 2
    axes = c.attribute("axes")
    axes = list(range(x.dim())) if axes is None else [axis_of(a, x.dim()) for a in axes]
    scales = c.list_of("scales", at) or None
    sizes = c.numbers(3) if c.has(3) else None
    if scales is None and not sizes:
        raise Refused("it has neither scales nor sizes")
    outs, factors = _targets(c, x, axes, scales, sizes)
    changed = [
        d for d, (a, b) in enumerate(zip(outs, x.shape, strict=True)) if is_static([a]) != is_static([b]) or a != b
    ]
    if c.store.batch is not None and is_static(outs[:1]) and outs[0] == c.store.batch:
        changed = [d for d in changed if d]
    if not changed or c.attribute("coordinate_transformation_mode") == "tf_crop_and_resize":
        if not changed:
            return x
        raise Refused("coordinate_transformation_mode tf_crop_and_resize")
    if not is_static([v for d in changed for v in (outs[d], x.shape[d])]):
        return _dynamic(c, x, changed, factors)
    kinds = {d: _Axis(int(x.shape[d]), int(outs[d]), *_settings(c, factors[d])) for d in changed}
    if changed[0] >= 2 and x.dim() in NATIVE:
        spatial = [int(outs[d]) if d in kinds else int(x.shape[d]) for d in range(2, x.dim())]
        for mode, corners in ((m, a) for m in NATIVE[x.dim()] for a in (False, True)):
            if corners and mode.startswith("nearest"):
                continue
            wanted = [kinds.get(d) or _Axis(int(x.shape[d]), int(x.shape[d]), *_PLAIN) for d in range(2, x.dim())]
            if all(_same(axis, mode, corners) for axis in wanted):
                align = None if mode.startswith("nearest") else corners
                return F.interpolate(x, size=spatial, mode=mode, align_corners=align)
    for d, axis in kinds.items():
        rows = matrix(axis)
        if ((rows == 0) | (rows == 1)).all() and (rows.sum(1) == 1).all():
            x = x.index_select(d, c.constant(rows.argmax(1)))
        else:
            weights = c.constant(rows.astype(np.float32)).to(x.dtype)
            x = F.linear(x.transpose(d, -1), weights).transpose(d, -1)
    return x


def _targets(
    c: Call, x: Tensor, axes: list[int], scales: list[Any] | None, sizes: list[Any] | None
) -> tuple[list[Any], list[float | None]]:
    """Output size and scale of each axis; None for a scale stands for the ratio of the sizes."""
    outs, factors = list[Any](x.shape), list[float | None]([None] * x.dim())
    if sizes:
        policy = c.only("keep_aspect_ratio_policy", "stretch", "not_larger", "not_smaller")
        if policy != "stretch":
            ratios = [n / int(x.shape[d]) for d, n in zip(axes, sizes, strict=True)]
            scale = min(ratios) if policy == "not_larger" else max(ratios)
            sizes = [int(np.floor(scale * int(x.shape[d]) + 0.5)) for d in axes]
            factors = [scale if d in axes else None for d in range(x.dim())]
        for d, n in zip(axes, sizes, strict=True):
            outs[d] = n
        return outs, factors
    for d, scale in zip(axes, scales or (), strict=True):
        if scale != 1:
            n = x.shape[d]
            outs[d] = int(np.floor(np.float32(n) * np.float32(scale))) if is_static([n]) else _times(n, scale)
            factors[d] = float(scale)
    return outs, factors


def _times(n: Any, scale: float) -> Any:
    if float(scale).is_integer():
        return n * int(scale)
    raise Refused(f"a dynamic size times {scale:g}; give the input a fixed size")


def _settings(c: Call, scale: float | None) -> tuple[float | None, str, str, str, float, bool, bool]:
    mode = c.only("mode", "nearest", "linear", "cubic")
    old = c.step.op == "Upsample" or c.opset < 11
    transform = "asymmetric" if old else c.attribute("coordinate_transformation_mode", "half_pixel")
    nearest = "floor" if old else c.attribute("nearest_mode", "round_prefer_floor")
    outside, antialias = bool(c.attribute("exclude_outside", 0)), bool(c.attribute("antialias", 0))
    return scale, mode, transform, nearest, c.attribute("cubic_coeff_a", -0.75), outside, antialias


class _Axis(tuple[Any, ...]):
    """What the matrix of one axis depends on: n, out, scale, mode, transform, nearest, a, outside, antialias."""

    def __new__(cls, *values: Any) -> _Axis:
        return super().__new__(cls, values)


_PLAIN = (None, "nearest", "asymmetric", "floor", -0.75, False, False)


def _same(axis: _Axis, mode: str, corners: bool) -> bool:
    """Whether PyTorch's mode has the same matrix."""
    n, out = axis[0], axis[1]
    kind = {"nearest": "nearest", "nearest-exact": "nearest", "bicubic": "cubic"}.get(mode, "linear")
    transform = "align_corners" if corners else "asymmetric" if mode == "nearest" else "half_pixel"
    nearest = "floor" if mode == "nearest" else "round_prefer_ceil"
    native = matrix(_Axis(n, out, None, kind, transform, nearest, -0.75, False, False))
    return bool(np.abs(native - matrix(axis)).max(initial=0.0) < 1e-5)


@functools.lru_cache(maxsize=256)
def matrix(axis: _Axis) -> np.ndarray:
    """The weight of each input entry in each output entry, float64 (out, in)."""
    n, out, scale, mode, transform, nearest, a, outside, antialias = axis
    rows = np.zeros((out, n))
    ratio = out / n if scale is None else scale
    for i in range(out):
        x = _coordinate(i, n, out, ratio, transform)
        if mode == "nearest":
            rows[i, min(max(_round(x, nearest), 0), n - 1)] = 1
            continue
        support = 1 if mode == "linear" else 2
        wide = max(1.0, 1 / ratio) if antialias else 1.0
        first = int(np.floor(x - support * wide)) if antialias else int(np.floor(x)) - support + 1
        last = int(np.ceil(x + support * wide)) if antialias else int(np.floor(x)) + support
        pixels = np.arange(first, last + 1)
        weights = _kernel((pixels - x) / wide, mode, a)
        if outside:
            weights = np.where((pixels >= 0) & (pixels < n), weights, 0)
        if outside or antialias:
            weights = weights / weights.sum()
        np.add.at(rows[i], np.clip(pixels, 0, n - 1), weights)
    return rows


def _coordinate(i: int, n: int, out: int, ratio: float, transform: str) -> float:
    if transform == "align_corners":
        return i * (n - 1) / (out - 1) if out > 1 else 0.0
    if transform == "asymmetric":
        return i / ratio
    if transform == "half_pixel_symmetric":
        adjustment = out / (ratio * n)
        return n / 2 * (1 - adjustment) + (i + 0.5) / ratio - 0.5
    if transform == "half_pixel" or (transform == "pytorch_half_pixel" and out > 1):
        return (i + 0.5) / ratio - 0.5
    if transform == "pytorch_half_pixel":
        return 0.0
    raise Refused(f"coordinate_transformation_mode {transform}")


def _round(x: float, how: str) -> int:
    if how == "floor":
        return int(np.floor(x))
    if how == "ceil":
        return int(np.ceil(x))
    return int(np.ceil(x - 0.5)) if how == "round_prefer_floor" else int(np.floor(x + 0.5))


def _kernel(t: np.ndarray, mode: str, a: float) -> np.ndarray:
    t = np.abs(t)
    if mode == "linear":
        return np.maximum(0, 1 - t)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


UPWARDS = {("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel", "round_prefer_ceil")}


def _dynamic(c: Call, x: Tensor, changed: list[int], factors: list[float | None]) -> Tensor:
    """Resampling of dynamic sizes, in the cases where PyTorch's mode is the same for all sizes. Raises Refused in other
    cases."""
    _, mode, transform, nearest, *rest = _settings(c, None)
    pair: tuple[str, bool | None] | None = None
    whole = all(f is not None and float(f).is_integer() for d, f in enumerate(factors) if d in changed)
    if mode == "nearest" and (transform, nearest) in UPWARDS:  # by a whole factor, each entry is repeated
        pair = ("nearest", None)
    if mode == "linear" and not rest[2]:
        corners = {"half_pixel": False, "pytorch_half_pixel": False, "align_corners": True}.get(transform)
        pair = None if corners is None else ({3: "linear", 4: "bilinear", 5: "trilinear"}.get(x.dim(), ""), corners)
    if pair is None or not whole or changed[0] < 2 or x.dim() not in NATIVE:
        raise Refused(f"{mode} resampling ({transform}) of a dynamic size; give the input a fixed size")
    size = [x.shape[d] * int(factors[d] or 1) for d in range(2, x.dim())]
    return F.interpolate(x, size=size, mode=pair[0], align_corners=pair[1])


@operator("GridSample")
def grid_sample(c: Call) -> Any:
    modes = {
        "linear": "bilinear",
        "cubic": "bicubic",
        "bilinear": "bilinear",
        "bicubic": "bicubic",
        "nearest": "nearest",
    }
    mode = modes[c.only("mode", "linear", "bilinear", "cubic", "bicubic", "nearest")]
    padding = c.only("padding_mode", "zeros", "border", "reflection")
    return F.grid_sample(c.tensor(0), c.tensor(1), mode, padding, bool(c.attribute("align_corners", 0)))


@operator("AffineGrid")
def affine_grid(c: Call) -> Any:
    return F.affine_grid(c.tensor(0), c.numbers(1), bool(c.attribute("align_corners", 0)))
