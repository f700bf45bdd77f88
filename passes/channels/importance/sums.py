"""Sums of products along the dimensions of many tensors, in few passes over memory and one transfer from a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

BLOCK = 1 << 17  # elements: a product of this size stays in a core's cache
Item = tuple[torch.Tensor, torch.Tensor | None, Iterable[int]]


def weighted_sums(items: Sequence[Item]) -> list[dict[int, np.ndarray]]:
    """For each `(values, factors, dims)` and each of its dimensions, the sums of values * factors over all other
    dimensions, in double precision; without factors, of squared values.

    Results of tensors on a device stay there until all sums are computed, so that there is one wait for all of them.
    """
    result: list[dict[int, np.ndarray]] = [{} for _ in items]
    waiting: list[tuple[int, int, torch.Tensor]] = []
    for i, (values, factors, dims) in enumerate(items):
        factors = values if factors is None else factors
        if values.device.type == "cpu":
            result[i] = _on_cpu(values, factors, dims)
            continue
        product = _wide(values) * _wide(factors)
        for d in dims:
            others = tuple(k for k in range(product.dim()) if k != d)
            waiting.append((i, d, product.sum(others) if others else product))
    if waiting:
        rows = torch.cat([row.double() for _, _, row in waiting]).cpu().numpy()
        ends = np.cumsum([len(row) for _, _, row in waiting])
        for (i, d, _), values_of in zip(waiting, np.split(rows, ends[:-1]), strict=True):
            result[i][d] = values_of
    return result


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.element_size() < 4 else tensor


def _on_cpu(values: torch.Tensor, factors: torch.Tensor, dims: Iterable[int]) -> dict[int, np.ndarray]:
    """`weighted_sums` of one tensor on the CPU, a block of rows at a time, so that the second sum finds the block in the
    cache; there numpy's einsum is several times faster than a product and two reductions."""
    left, right = _wide(values).numpy(), _wide(factors).numpy()
    if values.dim() == 1:
        return {0: (left * right).astype(np.float64)}
    left, right = (t.reshape(len(t), -1) for t in (left, right))
    step = max(1, BLOCK // max(1, left.shape[1]))
    wanted = set(dims)
    rows, columns = [], np.zeros(left.shape[1])
    for start in range(0, len(left), step):
        p, q = left[start : start + step], right[start : start + step]
        if 0 in wanted:
            rows.append(np.einsum("ij,ij->i", p, q))
        if wanted - {0}:
            columns += np.einsum("ij,ij->j", p, q)
    grid = columns.reshape(values.shape[1:])
    sums = {d: grid.sum(axis=tuple(k for k in range(grid.ndim) if k != d - 1)) for d in wanted if d > 0}
    return sums | ({0: np.concatenate(rows).astype(np.float64)} if 0 in wanted else {})
