"""Write the HTML page of `graphcomb sensitivity`: a sortable table of what each option saves and loses by itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from .template import fill
from .text import number, round_percent, short_ms, sort_key


def render(options: Sequence[Mapping[str, Any]], model: str, target: str) -> str:
    """Return the page as HTML text. options: rows with the fields of `graphcomb.sensitivity.Option`."""
    filters = {"ms": short_ms, "share": lambda v: round_percent(round(v, 4)), "figure": _figure, "key": sort_key}
    return fill("sensitivity.html.jinja", filters, options=options, model=model, target=target)


def _figure(value: float) -> str:
    """Format a loss or a price with few digits; a dash if it is not finite."""
    return "–" if number(value) is None else f"{value:.3g}"
