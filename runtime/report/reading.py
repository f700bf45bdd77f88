"""Reading a run's summary, any part of which may be missing or of another type: it is then left out of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from . import charts
from .text import number, plain

SIDES = ("before", "after")


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, otherwise an empty one."""
    return value if isinstance(value, Mapping) else {}


def items(value: Any, kinds: type | tuple[type, ...] = Mapping) -> list[Any]:
    """The items of a list that are of the types, otherwise none."""
    return [item for item in value if isinstance(item, kinds)] if isinstance(value, list | tuple) else []


def pairs(values: Mapping[str, Any], keys: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """Names and values as text, without those that are empty."""
    chosen = values.keys() if keys is None else keys
    return [(str(key), plain(values[key])) for key in chosen if values.get(key) not in (None, "", [], {})]


def metric_name(summary: Mapping[str, Any]) -> str:
    """What the run's figure of quality is called."""
    return str(summary.get("metric") or "accuracy")


def costs(summary: Mapping[str, Any], key: str) -> tuple[float | None, float | None, float | None]:
    """A cost ("macs" or "params") before and after, and how many times fewer."""
    cost = mapping(summary.get("cost"))
    before, after = (number(mapping(cost.get(side)).get(key)) for side in SIDES)
    return before, after, number(summary.get(f"{key}_ratio"))


def timings(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Percentiles of the latency in ms by item, of the items that have them all."""
    found = {}
    for timing in items(mapping(summary.get("bench")).get("timings")):
        percentiles = {k: x for k, v in mapping(timing.get("ms")).items() if (x := number(v)) is not None}
        if percentiles.keys() >= set(charts.BOX):
            found[str(timing.get("name", ""))] = percentiles
    return found
