"""Numbers as the report writes them: with units, few digits, and a dash where there is no number."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def number(value: float | None) -> float | None:
    """Return the value if it is a finite number."""
    return value if value is not None and math.isfinite(value) else None


def si(value: float | None) -> str:
    """A count in steps of a thousand: 4.09 G."""
    scaled = number(value)
    if scaled is None:
        return "–"
    for unit in ("", " k", " M", " G", " T"):
        if abs(scaled) < 999.5 or unit == " T":
            break
        scaled /= 1000
    return f"{scaled:.3g}{unit}"


def size(value: float | None) -> str:
    """Bytes: 10.6 MB."""
    count = number(value)
    return "–" if count is None else f"{si(count)}{'' if abs(count) >= 999.5 else ' '}B"


def count(value: float | None) -> str:
    """A whole number with thousands separated."""
    valid = number(value)
    return "–" if valid is None else f"{valid:,.0f}"


def counted(how_many: int, noun: str) -> str:
    """A number of things: 1 layer, 2 layers."""
    return f"{how_many} {noun}{'s' * (how_many != 1)}"


def exact(value: float | None) -> str:
    """A small error: 3.1e-14, and 0 for none at all."""
    error = number(value)
    if error is None:
        return ""
    return f"{error:.1e}" if error else "0"


def times(ratio: float) -> str:
    """A ratio: 3.94×."""
    return f"{ratio:.3g}×" if ratio < 100 else f"{ratio:,.0f}×"


def against(ratio: float, better: str, worse: str) -> str:
    """A ratio in words: 3.94× faster, 1.1× slower."""
    return f"{times(ratio)} {better}" if ratio >= 1 or ratio <= 0 else f"{times(1 / ratio)} {worse}"


def off(predicted: float, measured: float) -> str:
    """How far a prediction is off, relative to what was measured: +12 %."""
    return f"{predicted / measured - 1:+.0%}".replace("-", "−").replace("%", "\u00a0%")


def percent(value: float | None) -> str:
    """A share with two digits after the point: 98.33 %."""
    share = number(value)
    return "–" if share is None else f"{100 * share:.2f}\u00a0%"


def round_percent(value: float) -> str:
    """A share on an axis, with no more digits than the tick has."""
    return f"{100 * value:.6g} %"


def plain_score(value: float | None) -> str:
    """A figure of quality that is not a share."""
    score = number(value)
    return "–" if score is None else f"{score:.4g}"


def score_format(*values: float | None, metric: str) -> Callable[[float | None], str]:
    """How to write the values of a metric: in percent when it is an accuracy and all of them are shares."""
    share = metric.endswith("accuracy") and all(0 <= value <= 1 for value in values if value is not None)
    return percent if share else plain_score


def tick_format(values: Iterable[float], metric: str) -> Callable[[float], str]:
    """How to write a metric along an axis."""
    return round_percent if score_format(*values, metric=metric) is percent else plain_score


def milliseconds(value: float) -> str:
    """Milliseconds with their unit: 4.25 ms."""
    return f"{value:.3g} ms"


def short_ms(value: float) -> str:
    """Milliseconds without the unit."""
    return f"{value:.3g}"


def seconds(value: float) -> str:
    """Seconds, in milliseconds below a tenth of one."""
    return milliseconds(1000 * value) if value < 0.1 else f"{value:.1f} s"


def change(texts: Iterable[str]) -> str:
    """Before and after: "64 → 32", or once where they are the same."""
    return " → ".join(dict.fromkeys(texts))


def plain(value: Any) -> str:
    """Any JSON value on one line, without quotes and brackets."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return str(value)
