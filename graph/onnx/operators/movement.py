"""Operators that move entries: reshapes, slices, gathers, padding. Source: the ONNX specification."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...errors import Refused
from ..table import Call, axis_of, is_static, operator
from .shapes import axes_of, new_shape, pieces, slices


@operator("Reshape")
def reshape(c: Call) -> Any:
    x = c.tensor()
    wanted = new_shape(c, tuple(x.shape))
    if c.store.batch is not None and is_static(wanted[:1]) and wanted[:1] == [c.store.batch]:
        wanted = [x.shape[0], *wanted[1:]]  # `parity.compare` proves this at another batch size, sample by sample
    return x.reshape(wanted)


@operator("Flatten")
def flatten(c: Call) -> Any:
    x = c.tensor()
    axis = c.attribute("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() > 1:
        return x.flatten(1)
    if axis == 0:
        return x.reshape(1, -1)
    return x.flatten(0, axis - 1).flatten(1) if axis < x.dim() else x.reshape(-1, 1)


@operator("Transpose")
def transpose(c: Call) -> Any:
    x = c.tensor()
    return x.permute(c.attribute("perm") or list(reversed(range(x.dim()))))


@operator("Squeeze")
def squeeze(c: Call) -> Any:
    x = c.tensor()
    axes = axes_of(c, x.dim())
    axes = [d for d, n in enumerate(x.shape) if is_static([n]) and n == 1] if axes is None else axes
    return x.squeeze(tuple(axes)) if len(axes) != 1 else x.squeeze(axes[0])


@operator("Unsqueeze")
def unsqueeze(c: Call) -> Any:
    x = c.tensor()
    for axis in sorted(axes_of(c, x.dim() + len(c.list_of("axes", 1))) or []):
        x = x.unsqueeze(axis)
    return x


@operator("Concat")
def concat(c: Call) -> Any:
    tensors, axis = [c.tensor(i) for i in range(len(c.values))], c.attribute("axis", 1)
    if c.store.batch == 1 and axis:  # such as a class token that is concatenated with every sample
        batch = next((t.shape[0] for t in tensors if not is_static(t.shape[:1]) or t.shape[0] != 1), 1)
        tensors = [t.expand(batch, *t.shape[1:]) if is_static(t.shape[:1]) and t.shape[0] == 1 else t for t in tensors]
    return torch.cat(tensors, axis) if len(tensors) > 1 else tensors[0]


@operator("Split")
def split(c: Call) -> Any:
    x = c.tensor()
    axis = axis_of(c.attribute("axis", 0), x.dim())
    return list(torch.split(x, pieces(c, x.shape[axis]), axis))


@operator("Slice")
def slice_(c: Call) -> Any:
    """A slice; for a negative step, the axis is reversed first."""
    x = c.tensor()
    for axis, part in enumerate(slices(c, tuple(x.shape))):
        step = 1 if part.step is None else part.step
        if step < 0:
            if not is_static([x.shape[axis]]):
                raise Refused("a negative step along a dynamic axis; give the input a fixed size")
            n = int(x.shape[axis])
            start, stop, _ = part.indices(n)
            x, part = x.flip(axis), slice(n - 1 - start, n - 1 - stop, -step)
            part = slice(part.start, max(part.start, part.stop), part.step)
        if part != slice(None) and part != slice(None, None, 1):
            x = x[(*[slice(None)] * axis, part)]
    return x


@operator("Gather")
def gather(c: Call) -> Any:
    x, indices = c.tensor(0), c.value(1)
    axis = axis_of(c.attribute("axis", 0), x.dim())
    if isinstance(indices, np.ndarray) and indices.size and is_static(indices.reshape(-1).tolist()):
        if indices.ndim == 0:
            return x.select(axis, int(indices))
        known = indices.reshape(-1)
        if indices.ndim == 1 and known[0] >= 0 and np.array_equal(known, np.arange(known[0], known[0] + len(known))):
            return x.narrow(axis, int(known[0]), len(known))  # the indices are a range
        if is_static([x.shape[axis]]):
            known = np.where(known < 0, known + int(x.shape[axis]), known)
            gathered = x.index_select(axis, c.constant(known.astype(np.int64)))
            return gathered if indices.ndim == 1 else gathered.unflatten(axis, indices.shape)
    ids = c.tensor(1).long()
    if axis == 0 and x.dim() == 2 and isinstance(x, torch.nn.Parameter):
        return F.embedding(ids, x)  # raises for a negative index, which a look-up of words does not have
    places: list[Any] = [slice(None)] * axis
    return x[(*places, ids)]


@operator("GatherElements")
def gather_elements(c: Call) -> Any:
    x, indices = c.tensor(0), c.tensor(1).long()
    axis = axis_of(c.attribute("axis", 0), x.dim())
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices))


@operator("GatherND")
def gather_nd(c: Call) -> Any:
    x, indices, batch = c.tensor(0), c.tensor(1).long(), c.attribute("batch_dims", 0)
    leading = []
    for d in range(batch):
        view = [1] * (indices.dim() - 1)
        view[d] = -1
        leading.append(torch.arange(x.shape[d], device=x.device).reshape(view))
    return x[(*leading, *indices.unbind(-1))]


@operator("ScatterElements")
def scatter_elements(c: Call) -> Any:
    x, indices, updates = c.tensor(0), c.tensor(1).long(), c.tensor(2)
    axis = axis_of(c.attribute("axis", 0), x.dim())
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    kind = c.only("reduction", "none", "add", "mul", "min", "max")
    if kind == "none":
        return torch.scatter(x, axis, indices, updates)
    reduce = {"add": "sum", "mul": "prod", "min": "amin", "max": "amax"}[kind]
    return torch.scatter_reduce(x, axis, indices, updates, reduce)


@operator("ScatterND")
def scatter_nd(c: Call) -> Any:
    x, indices, updates = c.tensor(0), c.tensor(1).long(), c.tensor(2)
    kind = c.only("reduction", "none", "add")
    return torch.index_put(x, list(indices.unbind(-1)), updates, accumulate=kind == "add")


@operator("Expand")
def expand(c: Call) -> Any:
    x, wanted = c.tensor(), c.numbers(1)
    rank = max(x.dim(), len(wanted))
    have, wanted = [1] * (rank - x.dim()) + list(x.shape), [1] * (rank - len(wanted)) + wanted
    sizes = [h if is_static([w]) and w == 1 else w for h, w in zip(have, wanted, strict=True)]
    return x.expand(sizes)


@operator("Tile")
def tile(c: Call) -> Any:
    return c.tensor().repeat(c.numbers(1))


@operator("Range")
def range_(c: Call) -> Any:
    start, limit, delta = (c.number(i, None) for i in range(3))
    return torch.arange(start, limit, delta)


@operator("ConstantOfShape")
def constant_of_shape(c: Call) -> Any:
    value = torch.from_numpy(np.array(c.attribute("value", np.zeros(1, np.float32))))
    return torch.full(c.numbers(0), value.reshape(-1)[0].item(), dtype=value.dtype)


@operator("Pad")
def pad(c: Call) -> Any:
    """Padding; the amounts are attributes before opset 11. Reflection and repetition along axes that PyTorch's pad does not
    take are gathers."""
    x, mode = c.tensor(), c.only("mode", "constant", "reflect", "edge", "wrap")
    flat, axes = c.list_of("pads", 1), c.list_of("axes", 3)
    axes = list(range(x.dim())) if axes is None else [axis_of(a, x.dim()) for a in axes]
    amounts: list[tuple[Any, Any]] = [(0, 0)] * x.dim()
    for axis, before, after in zip(axes, flat[: len(axes)], flat[len(axes) :], strict=True):
        amounts[axis] = before, after
    if is_static([n for pair in amounts for n in pair]) and not any(a or b for a, b in amounts):
        return x
    first = next(d for d, (a, b) in enumerate(amounts) if not is_static([a, b]) or a or b)
    if mode == "constant":
        value = c.attribute("value", 0.0) if "value" in c.step.attributes else c.number(2, 0)
        return F.pad(x, _last_first(amounts[first:]), value=value)
    if first >= 2 and x.dim() in (3, 4, 5) and all(n >= 0 for pair in amounts for n in pair):
        native = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode]
        return F.pad(x, _last_first(amounts[2:]), mode=native)
    for axis, (before, after) in enumerate(amounts):
        if before or after:
            if not is_static([x.shape[axis]]):
                raise Refused(f"padding by {mode} along a dynamic axis; give the input a fixed size")
            indices = np.pad(np.arange(int(x.shape[axis])), (max(before, 0), max(after, 0)), mode)
            indices = indices[max(-before, 0) : len(indices) - max(-after, 0)]
            x = x.index_select(axis, c.constant(indices.astype(np.int64)))
    return x


def _last_first(amounts: list[tuple[Any, Any]]) -> list[Any]:
    return [n for pair in reversed(amounts) for n in pair]


@operator("DepthToSpace")
def depth_to_space(c: Call) -> Any:
    """Mode CRD is PyTorch's pixel_shuffle; in mode DCR the block is outside of the channels."""
    x, block = c.tensor(), c.attribute("blocksize")
    if c.only("mode", "DCR", "CRD") == "CRD":
        return F.pixel_shuffle(x, block)
    n, channels, height, width = x.shape
    y = x.reshape(n, block, block, channels // (block * block), height, width)
    return y.permute(0, 3, 4, 1, 5, 2).reshape(n, channels // (block * block), height * block, width * block)


@operator("SpaceToDepth")
def space_to_depth(c: Call) -> Any:
    x, block = c.tensor(), c.attribute("blocksize")
    n, channels, height, width = x.shape
    y = x.reshape(n, channels, height // block, block, width // block, block)
    if c.only("mode", "DCR", "CRD") == "CRD":
        return F.pixel_unshuffle(x, block)
    return y.permute(0, 3, 5, 1, 2, 4).reshape(n, channels * block * block, height // block, width // block)
