"""Values of a run's summary that several sections of the report, and the command line, need."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..devices.table import NAMES, TARGETS
from ..summary import Summary
from .text import number, plain

SIDES = ("before", "after")
BOX = ("p5", "p25", "median", "p75", "p95")  # percentiles that a plot of a distribution shows


def pairs(values: Mapping[str, Any], keys: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """Return (name, value as text) of all values, or those of `keys`, that are not empty."""
    chosen = values.keys() if keys is None else keys
    return [(str(key), plain(values[key])) for key in chosen if values.get(key) not in (None, "", [], {})]


def costs(summary: Summary, key: str) -> tuple[float | None, float | None, float | None]:
    """Return a cost before and after, and before divided by after. key: "macs" or "params". None is unknown."""
    cost, ratio = summary.cost, getattr(summary, f"{key}_ratio")
    return (None, None, ratio) if cost is None else (getattr(cost.before, key), getattr(cost.after, key), ratio)


def timings(summary: Summary) -> dict[str, dict[str, float]]:
    """Return the percentiles of the latency in milliseconds by model, for models with finite values of all of BOX."""
    rows = summary.bench.timings if summary.bench else []
    return {row.name: row.ms for row in rows if all(number(row.ms.get(key)) is not None for key in BOX)}


def latency_place(summary: Summary) -> str:
    """Return a text on how a run's latencies were measured: library, precision, threads, processor and batch."""
    environment = summary.bench.environment if summary.bench else {}
    target = TARGETS.get(summary.target)
    backend = target.backend if target is not None and target.processor else "onnxruntime"
    threads, version = environment.get("threads"), environment.get("versions", {}).get(backend)
    where = environment.get("cpu") or "the processor of the machine that ran the recipe"
    if threads is not None:
        where = f"{threads} thread{'s' * (threads != 1)} of {where}"
    parts = [f"{NAMES[backend]} {version}" if version else NAMES[backend], "fp32", where]
    if summary.inputs and summary.inputs[0]:
        parts.append(f"batch {summary.inputs[0][0]}")
    return ", ".join(parts)
