"""Which entries go: the lowest scores overall, in every group, or in blocks that lose their entries in a given order.

Masks are bool, True where the weight goes. A pattern `(n, m)` keeps `n` of every `m` consecutive entries.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Pattern = tuple[int, int]


def lowest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the `count` lowest scores among all tensors together; of equal scores, the first go."""
    if not count:
        return [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    together = torch.cat([s.reshape(-1) for s in scores])
    threshold = together.kthvalue(min(count, len(together))).values
    ties = count - int((together < threshold).sum())
    masks = []
    for part in scores:
        equal = part == threshold
        equal &= (equal.reshape(-1).cumsum(0) <= ties).view_as(part)
        ties -= int(equal.sum())
        masks.append((part < threshold) | equal)
    return masks


def lowest_of_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask of the `m - n` lowest scores among every `m` consecutive entries of `scores` `(r, c)`."""
    n, m = pattern
    groups = scores.reshape(-1, m)
    order = groups.argsort(dim=1, stable=True)[:, : m - n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view_as(scores)


def portions(count: int, sizes: Sequence[int]) -> list[int]:
    """Divide `count` in proportion to the sizes; what rounding leaves over goes to the later ones."""
    shares, left = [], sum(sizes)
    for size in sizes:
        shares.append(round(count * size / left) if left else 0)
        count, left = count - shares[-1], left - size
    return shares


def increments(losses: Tensor) -> Tensor:
    """How much each further entry of a block adds to the loss, given the cumulated losses `(b, s)`; never less than an
    entry before it adds. The result has the same shape.

    Blocks lose their entries in a given order, so all blocks together should lose the entries with the lowest increments.
    Where the increments of a block fall, its entries are worth removing only together, hence the running maximum (ours).
    The paper's code ranks the cumulated losses instead, by which a block that has lost much at little cost stops losing.
    """
    steps = torch.diff(losses, dim=1, prepend=losses.new_zeros(len(losses), 1))
    return steps.nan_to_num(math.inf, math.inf).cummax(1).values  # beyond a block's last entry, inf - inf


def joined(tensors: Sequence[Tensor], value: float) -> Tensor:
    """Tensors `(b, s)` concatenated along `b`; those with fewer columns are filled up with a value."""
    most = max(t.shape[1] for t in tensors)
    return torch.cat([torch.nn.functional.pad(t, (0, most - t.shape[1]), value=value) for t in tensors])


def prefixes(losses: Sequence[Tensor], count: int) -> list[Tensor]:
    """How many entries each block loses when those with the `count` lowest losses go: `(b,)` for each tensor of losses.

    losses: `(b, s)`, not falling along a row (cumulated losses, or their `increments`).
    """
    together = torch.cat([part.reshape(-1) for part in losses])
    count = min(count, int(together.isfinite().sum()))
    if not count:
        return [torch.zeros(len(part), dtype=torch.int64) for part in losses]
    threshold = together.kthvalue(count).values
    ties = count - int((together < threshold).sum())
    lengths = []
    for part in losses:
        below, equal = (part < threshold).sum(1), (part == threshold).sum(1)
        # Of the entries at the threshold, the first blocks lose theirs.
        more = (ties - (equal.cumsum(0) - equal)).clamp(min=0).minimum(equal)
        ties -= int(more.sum())
        lengths.append(below + more)
    return lengths


def first(order: Tensor, lengths: Tensor, size: int) -> Tensor:
    """The mask `(b, B)`, with `B` the `size`, of the first `lengths[i]` entries in each block's order `(b, s)`."""
    later = torch.arange(order.shape[1], device=order.device) >= lengths.unsqueeze(1)
    mask = torch.zeros(len(order), size + 1, dtype=torch.bool, device=order.device)
    return mask.scatter_(1, order.long().masked_fill(later, size), True)[:, :size]


def lowest_of_rows(scores: Tensor, count: int) -> Tensor:
    """The mask of `count` entries of `scores` `(r, c)`: the lowest of each row, about equally many in each."""
    shares = portions(count, [scores.shape[1]] * len(scores))
    return torch.stack([lowest([row], share)[0] for row, share in zip(scores, shares, strict=True)])
