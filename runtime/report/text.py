"""Format numbers for the report: with units and few digits, and as a dash if there is no finite number."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

NOT_FINITE = "not finite"  # a metric of outputs that are NaN; a dash would say that it is not known


def number(value: float | None) -> float | None:
    """Return the value if it is a finite number, else None."""
    return value if value is not None and math.isfinite(value) else None


def si(value: float | None) -> str:
    """Format a count with an SI prefix: 4.09 G."""
    scaled = number(value)
    if scaled is None:
        return "–"
    for unit in ("", " k", " M", " G", " T"):
        if abs(scaled) < 999.5 or unit == " T":
            break
        scaled /= 1000
    return f"{scaled:.3g}{unit}"


def size(value: float | None) -> str:
    """Format a number of bytes: 10.6 MB."""
    count = number(value)
    return "–" if count is None else f"{si(count)}{'' if abs(count) >= 999.5 else ' '}B"


def count(value: float | None) -> str:
    """Format a whole number with separated thousands: 4,096."""
    valid = number(value)
    return "–" if valid is None else f"{valid:,.0f}"


def counted(how_many: int, noun: str) -> str:
    """Format a number of things: 1 layer, 2 layers."""
    return f"{how_many} {noun}{'s' * (how_many != 1)}"


def exact(value: float | None) -> str:
    """Format an error: 3.1e-14, 0 for none; an empty text if it is unknown."""
    error = number(value)
    if error is None:
        return ""
    return f"{error:.1e}" if error else "0"


def times(ratio: float) -> str:
    """Format a ratio: 3.94×."""
    return f"{ratio:.3g}×" if ratio < 100 else f"{ratio:,.0f}×"


def against(ratio: float, better: str, worse: str) -> str:
    """Format a ratio in words: 3.94× faster, 1.1× slower."""
    return f"{times(ratio)} {better}" if ratio >= 1 or ratio <= 0 else f"{times(1 / ratio)} {worse}"


def off(predicted: float, measured: float) -> str:
    """Format the error of a prediction relative to the measured value: +12 %."""
    return f"{predicted / measured - 1:+.0%}".replace("-", "−").replace("%", "\u00a0%")


def percent(value: float | None) -> str:
    """Format a share with two digits after the point: 98.33 %."""
    share = number(value)
    return "–" if share is None else f"{100 * share:.2f}\u00a0%"


def round_percent(value: float) -> str:
    """Format a share on an axis of a plot, without trailing zeros: 98.5 %."""
    return f"{100 * value:.6g} %"


def plain_score(value: float | None) -> str:
    """Format a score that is not a share: 0.4213."""
    score = number(value)
    return "–" if score is None else f"{score:.4g}"


def score_format(*values: float | None, metric: str) -> Callable[[float | None], str]:
    """Return the format of the values of a metric: `percent` for an accuracy whose values are all between 0 and 1, else
    `plain_score`."""
    share = metric.endswith("accuracy") and all(0 <= value <= 1 for value in values if value is not None)
    return percent if share else plain_score


def tick_format(values: Iterable[float], metric: str) -> Callable[[float], str]:
    """Return the format of the values of a metric on an axis of a plot."""
    return round_percent if score_format(*values, metric=metric) is percent else plain_score


def milliseconds(value: float) -> str:
    """Format milliseconds with the unit: 4.25 ms."""
    return f"{value:.3g} ms"


def short_ms(value: float) -> str:
    """Format milliseconds without the unit: 4.25."""
    return f"{value:.3g}"


def seconds(value: float) -> str:
    """Format seconds: 12.3 s; below 0.1 s as milliseconds."""
    return milliseconds(1000 * value) if value < 0.1 else f"{value:.1f} s"


def change(texts: Iterable[str]) -> str:
    """Join texts before and after: "64 → 32", or a single text if they are equal."""
    return " → ".join(dict.fromkeys(texts))


def plain(value: Any) -> str:
    """Format any JSON value in one line, without quotes and brackets."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return str(value)


def sort_key(value: float) -> float:
    """Return the sort key of a number; numbers that are not finite come last."""
    return value if math.isfinite(value) else 1e300
