"""Write the HTML page of `graphcomb sensitivity`: a sortable table of what each option saves and loses by itself."""

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from .text import number, round_percent, short_ms


def render(options: Sequence[Mapping[str, Any]], model: str, target: str) -> str:
    """Return the page as HTML text. options: rows with the fields of `graphcomb.sensitivity.Option`."""
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
    """Format a loss or a price with few digits; a dash if it is not finite."""
    return "–" if number(value) is None else f"{value:.3g}"


def _key(value: float) -> float:
    """Return the sort key of a number; numbers that are not finite come last."""
    return value if math.isfinite(value) else 1e300
