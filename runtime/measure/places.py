"""What a measured figure is of, in words: a ratio of latencies says nothing without the machine it was measured on."""

from __future__ import annotations

from ..summary import Summary


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
