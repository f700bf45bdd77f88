"""Removed indices, `{parameter or buffer: {dim: indices}}` in the original's numbering, and slicing by them alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import BadInput
from ..program import Program
from .evaluate import eval_flags, tensors_of, to_double

Removed = Mapping[str, Mapping[int, Sequence[int]]]


def removed_since(before: Program, result: Any) -> Removed:
    """The indices removed since `before`, in its numbering: by the last pass, or by all of them if the result's history
    names several passes since then that removed something. Raises BadInput if the records do not fit the program."""
    history, past = getattr(result.program, "history", []), len(before.history)
    since = history[past:] if history[:past] == before.history else []
    steps = [record["removed"] for record in since if record.get("removed")]
    if len(steps) < 2:
        return result.removed
    try:
        return checked(before, composed(steps))
    except BadInput as error:
        raise BadInput(f"{error}; verify one pass after the other") from error


def composed(steps: Iterable[Removed]) -> dict[str, dict[int, list[int]]]:
    """One removal that stands for several, one after the other, in the numbering before the first one."""
    removed: dict[str, dict[int, list[int]]] = {}
    for step in steps:
        for name, lost in step.items():
            earlier = removed.setdefault(name, {})
            for d, indices in lost.items():
                gone = earlier.get(int(d), [])
                numbers = np.arange(max(indices, default=-1) + len(gone) + 1)  # enough, however large the tensor was
                left = np.setdiff1d(numbers, gone)
                earlier[int(d)] = sorted([*gone, *left[list(indices)].tolist()])
    return removed


def checked(before: Program, removed: Removed) -> dict[str, dict[int, list[int]]]:
    """The same removal, without empty entries and with every name of tied tensors. Raises BadInput if it does not fit the
    program."""
    tensors = tensors_of(before)
    tied: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        tied.setdefault(id(tensor), []).append(name)
    result: dict[str, dict[int, list[int]]] = {}
    for name, lost in removed.items():
        if name not in tensors:
            raise BadInput(f"removed: the program has no parameter or buffer {name}")
        entry = {}
        for d, indices in lost.items():
            n = tensors[name].shape[d] if 0 <= d < tensors[name].dim() else -1
            gone = sorted(int(i) for i in indices)
            if n < 0 or len(set(gone)) != len(gone) or (gone and not 0 <= gone[0] <= gone[-1] < n):
                raise BadInput(f"removed: {name} dimension {d} (size {n}) cannot lose these indices")
            if len(gone) == n:
                raise BadInput(f"removed: nothing is left of {name} dimension {d}")
            if gone:
                entry[d] = gone
        for other in tied[id(tensors[name])] if entry else ():
            if result.setdefault(other, entry) != entry:
                raise BadInput(f"removed: {name} and {other} are one tensor and lose different indices")
    return result


def kept(n: int, indices: Sequence[int]) -> np.ndarray:
    """The indices below n that were not removed."""
    return np.delete(np.arange(n), np.asarray(indices, dtype=np.int64))


def sliced(tensor: torch.Tensor, lost: Mapping[int, Sequence[int]]) -> torch.Tensor:
    """The tensor without the lost indices."""
    for d, indices in lost.items():
        tensor = tensor.index_select(d, torch.from_numpy(kept(tensor.shape[d], indices)).to(tensor.device))
    return tensor


def pruned_weights(weights: Mapping[str, torch.Tensor], removed: Removed, after: Program) -> dict[str, torch.Tensor]:
    """Weights for the pruned program: those of the original, sliced by `removed`. Tables of integers, and constants that
    only the pruned program has, are its own."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(after).items():
        shared = name in weights and (tensor.is_floating_point() or tensor.is_complex())
        result[name] = sliced(weights[name], removed.get(name, {})) if shared else to_double(tensor)
    return result


def differences(before: Program, after: Program, removed: Removed, retrained: bool = False) -> list[str]:
    """Messages, one line each, about parameters and buffers of the pruned program that are not slices of the original's,
    and about operators whose eval mode differs between the two. retrained: the weights were trained on, so only shapes are
    compared."""
    originals, misfits, changed = tensors_of(before), [], []
    for name, value in tensors_of(after).items():
        if name not in originals:
            continue
        lost = removed.get(name, {})
        shape = tuple(n - len(lost.get(d, ())) for d, n in enumerate(originals[name].shape))
        if tuple(value.shape) != shape:
            misfits.append(f"{name} has shape {tuple(value.shape)}, but removed leaves {shape}")
        elif not retrained and value.is_floating_point():
            expected = sliced(originals[name].detach(), lost).to(value.dtype)
            if not torch.equal(value.detach(), expected) and not torch.equal(value.nan_to_num(), expected.nan_to_num()):
                changed.append(f"{name} does not hold the kept values of the original")
    flags = eval_flags(before)
    for name, now in eval_flags(after).items():
        if flags.get(name, now) != now:
            changed.append(f"{name} has {now} in eval mode, the original {flags[name]}")
    return misfits or changed
