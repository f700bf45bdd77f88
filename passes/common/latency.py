"""Latency targets: the seconds that they allow, what predicts the seconds, and how many MACs must stay.

Predictions from a data sheet are off by a factor, and a network must not lose nine tenths of its arithmetic to such an
error. So a latency target leaves a quarter of the multiply-accumulates (MACs) unless latencies were measured. Source:
ours.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from ...graph.errors import BadInput, Unreachable
from ...graph.program import Program
from ...graph.workload.layer import Latency
from ..base import check_field

LEAST_MACS = 0.25  # share of the MACs that a latency target leaves where nothing was measured
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def allowed_seconds(latency: float | str, dense: float, of: str) -> float:
    """The seconds that a latency target allows. latency: a share of the dense program's seconds, or a time such as "3.5
    ms".

    dense: the dense program's seconds. of: name of the pass, for the message. Raises BadInput for any other `latency`.
    """
    try:
        if isinstance(latency, str):
            number, unit = latency.split()
            seconds = float(number) * UNITS[unit]
        elif isinstance(latency, Real) and not isinstance(latency, bool) and latency <= 1:
            seconds = latency * dense
        else:
            raise ValueError
        if not 0 < seconds < math.inf:
            raise ValueError
    except (ValueError, KeyError):
        raise BadInput(
            f'{of}.latency: a share above 0 and at most 1, or a time such as "3.5 ms", not {latency!r}'
        ) from None
    return seconds


def needed_latency(latency: Latency | None, of: str, program: Program) -> Latency:
    """The latency model, scaled to a measurement of the program where it has one. Raises BadInput, naming the pass
    `of`, if `latency` is None.
    """
    if latency is None:
        raise BadInput(
            f"{of}.latency: nothing predicts latencies here; pass latency=, a LatencyTable or a Roofline (in a recipe: "
            "latency_table)"
        )
    anchored: Callable[[Program], Latency] | None = getattr(latency, "anchored", None)
    return latency if anchored is None else anchored(program)


def check_least(options: Any) -> None:
    """Raise BadInput for a pass whose `least_macs` is no share, or is given without `latency`."""
    least = options.least_macs
    check_field(options, "least_macs", least is None or 0 <= least <= 1, "a share of the MACs from 0 to 1")
    if least is not None and options.latency is None:
        name = type(options).__name__
        raise BadInput(f"{name}.least_macs: is for a latency target; give latency, or leave it out")


def least_share(least_macs: float | None, latency: Latency | None) -> float:
    """The share of the MACs that must stay: the pass's `least_macs`; else 0 for a measured latency model and
    `LEAST_MACS` for another.
    """
    if least_macs is not None:
        return least_macs
    return 0.0 if getattr(latency, "measured", True) else LEAST_MACS


def below(of: str, latency: Latency, seconds: float, whole: float, share: float, least: float) -> Unreachable:
    """The error for a pass none of whose choices both meets the latency and leaves enough MACs.

    seconds, whole: predicted for the nearest such choice, and for the dense program. share: of the dense program's
    MACs, what that choice leaves. least: the share that must stay.
    """
    measured = getattr(latency, "measured", True)
    error = getattr(latency, "error", None)
    doubt = "" if measured else f", as {latency} predicts" + (f" ({error})" if error else "")
    advice = "" if measured else "calibrate the prediction with results of `graphcomb bundle` from the device, "
    return Unreachable(
        f"{of}.latency: {1e3 * seconds:.3g} of {1e3 * whole:.3g} ms{doubt}, leaves {share:.1%} of the MACs, "
        f"and least_macs is {least:.0%}; {advice}ask for a higher latency, or set least_macs"
    )
