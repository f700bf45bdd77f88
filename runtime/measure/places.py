"""What a measured figure is of, in words: a ratio of latencies says nothing without the machine it was measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def latency_place(summary: Mapping[str, Any]) -> str:
    """What measured a run's latencies: library, precision, threads and processor, batch; as far as the summary says."""
    bench = summary.get("bench")
    about = bench.get("environment") if isinstance(bench, Mapping) else None
    about = about if isinstance(about, Mapping) else {}
    versions, threads = about.get("versions"), about.get("threads")
    version = versions.get("onnxruntime") if isinstance(versions, Mapping) else None
    parts = [f"ONNX Runtime {version}" if version else "ONNX Runtime", "fp32"]
    where = str(about.get("cpu") or "the processor of the machine that ran the recipe")
    if isinstance(threads, int):
        where = f"{threads} thread{'s' * (threads != 1)} of {where}"
    shapes = summary.get("inputs")
    first = shapes[0] if isinstance(shapes, list) and shapes else None
    batch = first[0] if isinstance(first, list) and first else None
    return ", ".join([*parts, where, *([f"batch {batch}"] if isinstance(batch, int) else [])])
