"""Axes that an engine computes wider than the model has them, and which widths would avoid that. Source: ours.

A grouped convolution is padded inside each of its groups, so the width of a group is what counts, and only multiples of
the number of groups are widths at all. What would double a model to spare it some padding is no advice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Pad:
    """An axis that the engine computes wider than the model has it.

    how: "kernel" (a kernel of its own pads it, or cuts the padding off), "fused" (a kernel that moves or computes data
    anyway pads it in passing) or "weights" (zeros stored in the weights: more work, no more kernels). axis: of the
    tensor or weight. before, after: the extent in the model and in the engine. alignment: an extent that is a multiple
    of it needs no padding here; None where no such extent can be advised. note: what else the advice depends on, or why
    there is none.
    """

    kernel: str
    how: str
    nodes: tuple[str, ...]
    axis: int
    before: int
    after: int
    alignment: int | None
    note: str = ""

    def __str__(self) -> str:
        where = ", ".join(self.nodes[:3]) or self.kernel
        advice = "no width avoids it" if self.alignment is None else f"multiples of {self.alignment} are not"
        note = f" ({self.note})" if self.note else ""
        return f"{where}: axis {self.axis} is padded from {self.before} to {self.after}; {advice}{note}"


def advice(before: int, after: int, aligned: int, groups: int = 1, inner: bool = False) -> tuple[int | None, str]:
    """The `alignment` and `note` of a padded axis.

    aligned: the target's alignment, 0 where that is unknown; where it does not explain the padding, the largest power of
    two in the padded extent is advised. groups: of the convolution whose channels these are. inner: the axis holds the
    channels of one group.
    """
    inside = groups > 1 and before % groups == after % groups == 0 and not inner
    width, wide = (before // groups, after // groups) if inside else (before, after)
    step = aligned if aligned and _rounded(width, aligned) == wide else wide & -wide
    if groups > 1 and (inside or inner):
        if _rounded(width, step) >= 2 * width:
            return None, f"each of its {groups} groups has {width}, which the engine pads to {wide}"
        return (step, f"in each of its {groups} groups") if inner else (step * groups, f"its groups are {groups}")
    if groups > 1:  # either there are more groups, or they are wider
        step = min(math.lcm(step, max(before // groups, 1)), math.lcm(step, groups), key=lambda s: _rounded(before, s))
    if _rounded(before, step) > 2 * before:
        return None, f"the next width without it is {_rounded(before, step)}"
    return step, ""


def _rounded(n: int, step: int) -> int:
    return -(-n // step) * step
