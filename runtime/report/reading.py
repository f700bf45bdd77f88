"""What several sections of the report read from a run's summary, and the command line too."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..summary import Summary
from .text import plain

SIDES = ("before", "after")
BOX = ("p5", "p25", "median", "p75", "p95")  # percentiles that show how single measurements spread


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
    return {row.name: row.ms for row in rows if row.ms.keys() >= set(BOX)}


def latency_place(summary: Summary) -> str:
    """What measured a run's latencies: library, precision, threads and processor, batch; as far as the summary says."""
    environment = summary.bench.environment if summary.bench else {}
    threads, library = environment.get("threads"), environment.get("versions", {}).get("onnxruntime")
    where = environment.get("cpu") or "the processor of the machine that ran the recipe"
    if threads is not None:
        where = f"{threads} thread{'s' * (threads != 1)} of {where}"
    parts = [f"ONNX Runtime {library}" if library else "ONNX Runtime", "fp32", where]
    if summary.inputs and summary.inputs[0]:
        parts.append(f"batch {summary.inputs[0][0]}")
    return ", ".join(parts)
