"""The page of options: what each saves and loses by itself, in a table whose columns sort."""

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from .text import number, round_percent, short_ms


def render(options: Sequence[Mapping[str, Any]], model: str, target: str) -> str:
    """The page as HTML text. options: with what, kind, option, saves_ms, saves, loss, measured, price and note."""
    source = resources.files(__package__).joinpath("sensitivity.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "ms": short_ms,
        "share": lambda v: round_percent(round(v, 4)),
        "figure": _figure,
        "key": _key,
    }
    return environment.from_string(source).render(options=options, model=model, target=target)


def _figure(value: float) -> str:
    """A loss or a price in few digits."""
    return "–" if number(value) is None else f"{value:.3g}"


def _key(value: float) -> float:
    """What a number sorts by; those that are none come last."""
    return value if math.isfinite(value) else 1e300
