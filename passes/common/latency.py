"""Latency targets: the seconds they allow, what predicts them, and what they may not take.

Predictions from a data sheet are off by a factor; a network that loses nine tenths of its arithmetic for one is lost for
nothing. So a latency target leaves a quarter of the multiply-accumulates where nothing was measured. Source: ours.
"""

import math
from collections.abc import Callable
from typing import Any

from ...graph.errors import BadInput, Unreachable
from ...graph.program import Program
from ...graph.workload.layer import Latency
from ..base import check_field

LEAST_MACS = 0.25  # share that a latency target leaves where nothing was measured
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def allowed_seconds(latency: float | str, dense: float, of: str) -> float:
    """What the latency target of a pass allows: a share of the dense program's seconds, or a time such as "3.5 ms".

    of: the pass, for the message. Raises BadInput for anything else.
    """
    try:
        if isinstance(latency, str):
            number, unit = latency.split()
            seconds = float(number) * UNITS[unit]
        else:
            seconds = latency * dense
        if not (0 < seconds < math.inf and (isinstance(latency, str) or latency <= 1)):
            raise ValueError
    except (ValueError, KeyError):
        raise BadInput(
            f'{of}.latency: a share above 0 and at most 1, or a time such as "3.5 ms", not {latency!r}'
        ) from None
    return seconds


def needed_latency(latency: Latency | None, of: str, program: Program) -> Latency:
    """What predicts latencies, scaled to the program's own where that can be measured. Raises BadInput, in the name of the
    pass, where nothing does."""
    if latency is None:
        raise BadInput(
            f"{of}.latency: nothing predicts latencies here; pass latency=, a LatencyTable or a Roofline (in a recipe: "
            "latency_table)"
        )
    anchored: Callable[[Program], Latency] | None = getattr(latency, "anchored", None)
    return latency if anchored is None else anchored(program)


def check_least(options: Any) -> None:
    """Raise BadInput for a pass whose `least_macs` makes no sense."""
    least = options.least_macs
    check_field(options, "least_macs", least is None or 0 <= least <= 1, "a share of the MACs from 0 to 1")
    if least is not None and options.latency is None:
        name = type(options).__name__
        raise BadInput(f"{name}.least_macs: is for a latency target; give latency, or leave it out")


def least_share(least_macs: float | None, latency: Latency | None) -> float:
    """The share of the multiply-accumulates that has to stay: what the pass says, else what the prediction is worth."""
    if least_macs is not None:
        return least_macs
    return 0.0 if getattr(latency, "measured", True) else LEAST_MACS


def below(of: str, latency: Latency, seconds: float, whole: float, share: float, least: float) -> Unreachable:
    """The error of a pass whose choices for a latency all leave too few multiply-accumulates.

    seconds, whole: predicted for one of them, and for the dense program. share: of the multiply-accumulates, that it leaves.
    """
    measured = getattr(latency, "measured", True)
    error = getattr(latency, "error", None)
    doubt = "" if measured else f", as {latency} predicts" + (f" ({error})" if error else "")
    advice = "" if measured else "calibrate the prediction with results of `graphcomb bundle` from the device, "
    return Unreachable(
        f"{of}.latency: {1e3 * seconds:.3g} of {1e3 * whole:.3g} ms{doubt}, leaves {share:.1%} of the MACs, "
        f"and least_macs is {least:.0%}; {advice}ask for a higher latency, or set least_macs"
    )
