"""Measure latencies of models that run in turns, judge how reliable the ratios are, and compare outputs with references.

Sources: trtexec's practice (CUDA graph, events around each inference); the interval of a median by order statistics.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from .telemetry import Monitor, average

BLOCK, SETTLE = 20, 3  # runs of one model in a row, and how many of them only warm up caches and do not count
PERCENTILES = (("p5", 5), ("median", 50), ("p95", 95), ("p99", 99))
BUSY = 0.1  # largest share of a model's runs during which another process had the processor
GUARD, TRIES = 0.93, 20  # share of a run's wall time for which it must have the processor, and number of tries
WIDE = 0.1  # largest width of a ratio's interval, relative to the ratio, with which the ratio is stated


def measure(
    engines: dict[str, Any],
    seconds: float,
    rounds: int,
    stopped: list[str] | None = None,
    failed: dict[str, BaseException] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return latencies by model and mode, and by further model and mode how many times faster it is than the first.

    The models take turns in blocks of runs, in alternating order, so that a drift of clocks affects all of them equally. A
    ratio is that of the blocks' medians in one round; low and high are the interval of the median over the rounds
    (`median_interval`).

    - seconds: time limit for all modes; there is at least one round. rounds: number after which a mode ends.
    - stopped: a list to which the current mode is appended after Ctrl-C; then what was measured before is returned.
      Without it KeyboardInterrupt is raised.
    - failed: a dictionary to which an engine that does not run is added with its error; the others are measured on.
      Without it the error is raised.
    """
    engines = dict(engines)
    reference = next(iter(engines))
    latencies: dict[str, Any] = {name: {} for name in engines}
    ratios: dict[str, Any] = {name: {} for name in list(engines)[1:]}
    modes = [mode for mode in ("stream", "graph") if all(mode in engine.modes for engine in engines.values())]

    def block(name: str) -> list[Any]:
        """Return the runs of one model in a row that count; none if it fails."""
        try:
            return [engines[name].time(mode) for _ in range(BLOCK)][SETTLE:]
        except Exception as error:  # the libraries' errors have no common base
            if failed is None:
                raise
            failed[name] = error
            return []

    for mode in modes:
        times: dict[str, list[Any]] = {name: [] for name in engines}
        start = time.monotonic()
        done = 0
        try:
            while engines and (not done or (done < rounds and time.monotonic() - start < seconds / len(modes))):
                order = list(engines) if done % 2 == 0 else list(engines)[::-1]
                blocks = {name: block(name) for name in order}
                for name, runs in blocks.items():
                    if not runs:  # it has failed: whatever else was measured of it does not count
                        for rows in (engines, times, ratios, latencies):
                            rows.pop(name, None)
                        continue
                    times[name].append(runs)
                done += 1
        except KeyboardInterrupt:
            if stopped is None:
                raise
            stopped.append(mode)
        if not done:
            break
        for name, rows_of in times.items():
            runs = [run for part in rows_of for run in part]
            rows = {"host_ms": _latency([[host for _, host in part] for part in rows_of])}
            if all(gpu is not None for gpu, _ in runs):
                rows["gpu_ms"] = _latency([[gpu for gpu, _ in part] for part in rows_of])
            latencies[name][mode] = dict(rows, runs=len(runs))
        first = _medians(times.get(reference, []))
        for name, row in ratios.items() if first else ():
            paired = [a / b for a, b in zip(first, _medians(times[name]))]
            row[mode] = dict(percentiles(paired), **_bounds(paired))
        if stopped:
            break
    return latencies, ratios


def _medians(blocks: list[Any]) -> list[float]:
    """Return the median time of every block, on the GPU if it was measured, else on the host."""
    return [statistics.median(host if gpu is None else gpu for gpu, host in runs) for runs in blocks]


def _latency(blocks: list[list[float]]) -> dict[str, float]:
    """Return the percentiles of all runs, and the interval of the blocks' medians, since runs of one block are alike."""
    runs = [ms for block in blocks for ms in block]
    return dict(percentiles(runs), **_bounds([statistics.median(block) for block in blocks]))


def _bounds(values: list[float]) -> dict[str, float]:
    interval = median_interval(values)
    return {} if interval is None else {"low": round(interval[0], 6), "high": round(interval[1], 6)}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {name: round(float(np.percentile(values, point)), 6) for name, point in PERCENTILES}


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the confidence interval of a distribution's median from values drawn from it, at a level of at least 95 %.

    Both ends are values of the sample. The number of values below the true median is binomial with probability 1/2,
    whatever the distribution (order statistics). Returns None for fewer than six values, which have no such interval.
    """
    ordered, count, tail, k = sorted(values), len(values), 0, 0
    while 40 * (tail + math.comb(count, k)) <= 2**count:  # at most 2.5 % at either end
        tail += math.comb(count, k)
        k += 1
    return (ordered[k - 1], ordered[count - k]) if k else None


def unsure(ratio: dict[str, float]) -> str:
    """Return why a ratio's interval is too wide to state the ratio; empty if it is not, or if there is no interval."""
    if "low" in ratio and ratio["high"] - ratio["low"] > WIDE * ratio["median"]:
        return "it lies between {low:.2f} and {high:.2f} (95 %), which is too wide; measure longer".format(**ratio)
    return ""


def check(actual: Sequence[np.ndarray], wanted: Sequence[np.ndarray], tolerance: float) -> dict[str, Any]:
    """Compare outputs with the reference and return a row `parity` of results.json (docs/formats.md, DeviceParity).

    error is the largest max |actual - wanted| / max |wanted| of an output.
    """
    row: dict[str, Any] = {"finite": True, "error": None, "tolerance": tolerance}
    if not all(bool(np.isfinite(a).all()) for a in actual if a.dtype.kind == "f"):
        return dict(row, finite=False, note="outputs that are not finite")
    if not wanted:  # the host could not run the model
        return row
    if [a.shape for a in actual] != [b.shape for b in wanted]:
        shapes = [list(a.shape) for a in actual], [list(b.shape) for b in wanted]
        return dict(row, note="outputs of shapes {} instead of {}".format(*shapes))
    errors = [
        float(np.abs(a.astype(np.float64) - b).max(initial=0.0)) / (float(np.abs(b).max(initial=0.0)) or 1.0)
        for a, b in zip(actual, wanted)
    ]
    row["error"] = max(errors) if errors else None
    if errors and not max(errors) <= tolerance:
        row["note"] = f"outputs that differ from the reference by {max(errors):.1e}, more than {tolerance:g}"
    return row


def watch(engine: Any, monitor: Monitor, seconds: float) -> dict[str, Any]:
    """Run one model alone without a pause, and return the mean power, temperatures and clocks, and the energy of one run in
    millijoules (docs/formats.md, Power)."""
    mode = engine.modes[-1]
    start, runs = time.monotonic(), 0
    while not runs or time.monotonic() - start < seconds:
        engine.time(mode)
        runs += 1
    elapsed = time.monotonic() - start
    samples = monitor.since(start + 0.2 * elapsed)  # the sensors average over time, so the first samples are left out
    means = average(samples)
    if means.get("total_mw"):
        means["energy_mj"] = round(means["total_mw"] * elapsed / runs, 4)
    return means


def waited() -> float:
    """Return the seconds for which this thread was ready to run and waited for a processor; 0 if the system does not
    report it."""
    try:
        with open("/proc/thread-self/schedstat") as file:
            return int(file.read().split()[1]) * 1e-9
    except (OSError, ValueError, IndexError):
        return 0.0


def stolen() -> float:
    """Return the seconds that a hypervisor has taken from this virtual machine's processors; 0 if that is unknown."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError), open("/proc/stat") as file:
        return int(file.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0
