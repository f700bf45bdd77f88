"""What several sections of the report read from a run's summary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..summary import Summary
from . import charts
from .text import plain

SIDES = ("before", "after")


def pairs(values: Mapping[str, Any], keys: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """Names and values as text, without those that are empty."""
    chosen = values.keys() if keys is None else keys
    return [(str(key), plain(values[key])) for key in chosen if values.get(key) not in (None, "", [], {})]


def costs(summary: Summary, key: str) -> tuple[float | None, float | None, float | None]:
    """A cost ("macs" or "params") before and after, and how many times fewer."""
    cost, ratio = summary.cost, getattr(summary, f"{key}_ratio")
    return (None, None, ratio) if cost is None else (getattr(cost.before, key), getattr(cost.after, key), ratio)


def timings(summary: Summary) -> dict[str, dict[str, float]]:
    """Percentiles of the latency in ms by model, of the models that have them all."""
    rows = summary.bench.timings if summary.bench else []
    return {row.name: row.ms for row in rows if row.ms.keys() >= set(charts.BOX)}
