"""Compare latencies on a shared machine: the result is a ratio that can be trusted, or a note why there is none.

The items run in turns, A B, B A, A B, so that a drift of clocks or load affects all of them equally. A run counts only if
the process had the processor meanwhile: its CPU time must be at least 93 % of threads x wall time, and, in a virtual
machine, the hypervisor must not have taken the processor away. A round counts if the runs of all items do, and if the
processor's clock was the same for all of them, within 7 %. The ratio is the median over these rounds, with its 95 %
confidence interval (order statistics); with too few rounds no ratio is stated. Nor is one if other processes had the
accelerator for more than 7 % of the time, as far as NVML knows.
Source: the method of paired, interleaved measurement; the guard is ours.
"""

import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from ...graph.compat import pytree
from ...graph.errors import BadInput
from ...graph.program import Program
from ..devices.table import TARGETS
from ..engines.backends import BACKENDS, backend_module
from ..engines.base import Engine
from ..engines.build import open_engine
from ..export.to_onnx import export_onnx
from ..formats import says
from ..kit.measuring import GUARD, median_interval, stolen
from ..kit.trt import collector_off
from ..onnx_file import input_specs
from ..summary import Bench, Timing
from .conditions import OtherProcesses, processor_mhz
from .environment import environment
from .inputs import host_arrays, random_inputs

SLOW = 1.0  # seconds of one call from which on it is not repeated to find out how long it takes
PATIENCE = 4
SAMPLE = 2e-3  # seconds: shorter runs are repeated within one sample, so that clocks and scheduling ticks do not matter
ESTIMATOR = "median; low and high by order statistics at 95 % or more, if rounds do not depend on each other"
PERCENTILES = {"p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95, "p99": 99}


class BenchResult(Bench):
    """The result of a measurement; `summary.Bench` describes the inherited fields.

    low and high of a ratio (its 95 % confidence interval) are missing below six rounds.
    """

    rejected: int = says("number of rounds that did not count")
    seconds: float = says("duration of the measurement in seconds")


def bench(
    items: Sequence[Any],
    inputs: Sequence[Any] | None = None,
    threads: int = 1,
    seconds: float = 10.0,
    min_runs: int = 20,
    max_runs: int = 500,
    names: Sequence[str] | None = None,
    batch: int = 1,
    progress: bool = False,
    engine: str | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    patient: bool = False,
) -> BenchResult:
    """Measure the latency of several items in turns, and how many times faster each is than the first.

    - items: paths of ONNX or engine files, engines, programs (exported to a temporary file and run in ONNX Runtime), or
      callables, which are called with `inputs` unchanged.
    - inputs: arrays or tensors in the order of the engines' inputs; they are cast to each engine's types. The default is
      the example inputs of the first program among the items, else random inputs. Engines that are built here are
      optimised for the shapes of the inputs.
    - threads: number of threads of engines on the CPU, which the guard expects to be busy.
    - seconds: time limit. min_runs: smallest number of counted rounds for which a ratio is stated. max_runs: number of
      counted rounds after which the measurement ends.
    - names: names of the items; by default those of their files, classes or functions.
    - batch: batch size of random inputs with a dynamic batch. shapes: shapes of random inputs by name, needed for inputs
      with further dynamic dimensions.
    - progress: whether to show a progress bar on stderr.
    - engine: backend that runs programs and ONNX files; by default ONNX Runtime.
    - patient: whether to go on until `min_runs` rounds count, for up to PATIENCE times as many seconds or rounds: items
      may be slow, and a machine busy for a moment.

    A round runs every item once, in alternating order. A run counts only if the process had the processor (see the
    module). An engine with several threads may leave some of them idle, so such a run counts unless its threads waited
    for a processor more than 7 % of the time (Linux). All runs on an accelerator count, unless others had it as well.

    Returns latencies as percentiles in milliseconds, and ratios, both with the 95 % confidence interval of their median.
    Without a ratio `note` says why. The environment has what was seen during the measurement: stolen_seconds,
    cpu_mhz (lowest and highest clock; None if unknown) and gpu_others_percent (None if unknown or without an accelerator).

    Raises BadInput for items, inputs or options that do not fit, MissingBackend if the library of `engine` is not
    installed, and what building or loading an engine raises.
    """
    if not items:
        raise BadInput("bench: nothing to measure")
    if threads < 1 or min_runs < 1 or max_runs < min_runs or seconds <= 0:
        raise BadInput("bench: threads and min_runs are at least 1, max_runs at least min_runs, seconds positive")
    if batch < 1:
        raise BadInput(f"batch: 1 or more, not {batch}")
    if engine is not None:
        backend_module(engine)
    titles = _names(items, names)
    with contextlib.ExitStack() as stack:
        calls, guarded = _calls(items, inputs, threads, batch, shapes or {}, engine, stack)
        repeats = [_repeats(call) for call in calls]
        others = None if all(guarded) else OtherProcesses()
        rounds: list[list[tuple[float, bool, float | None]]] = []
        paired = 0
        with collector_off(), _bar(progress, seconds) as advance:
            start, lost = time.perf_counter(), stolen()
            while paired < max_runs and (
                time.perf_counter() - start < seconds
                or (patient and paired < min_runs and len(rounds) < PATIENCE * min_runs)
                or (patient and paired < min_runs and time.perf_counter() - start < PATIENCE * seconds)
            ):
                order = range(len(calls)) if len(rounds) % 2 == 0 else reversed(range(len(calls)))
                samples = {i: _sample(calls[i], repeats[i], threads if guarded[i] else 0) for i in order}
                rounds.append([samples[i] for i in range(len(calls))])
                paired += all(counts for _, counts, _ in rounds[-1]) and _steady(rounds[-1])
                advance(max((time.perf_counter() - start) / seconds, paired / max_runs))
        elapsed, lost = time.perf_counter() - start, stolen() - lost
    busy = others.percent() if others else None
    measured = np.array([[sample for sample, _, _ in row] for row in rounds]).reshape(
        -1, len(calls)
    )  # by round and item
    counts = np.array([[count for _, count, _ in row] for row in rounds], bool).reshape(measured.shape)
    steady = np.array([_steady(row) for row in rounds], bool)
    clocks = [mhz for row in rounds for _, _, mhz in row if mhz is not None]
    timings = []
    for i, name in enumerate(titles):
        good = 1e3 * measured[counts[:, i], i]
        ms = _estimate(good) if len(good) >= min_runs else {}
        rejected = len(rounds) - len(good)
        timings.append(Timing(name=name, runs=len(good), rejected=rejected, repeats=repeats[i], ms=ms))
    pairs = measured[counts.all(axis=1) & steady]
    # The hypervisor may take the processor between two samples, too; then no single sample shows it.
    preempted = lost > (1 - GUARD) * threads * elapsed
    shared = busy is not None and busy > 100 * (1 - GUARD)
    enough = paired >= min_runs and not preempted and not shared
    ratios = {name: _estimate(pairs[:, 0] / pairs[:, i]) if enough else None for i, name in enumerate(titles) if i}
    slow = not preempted and not shared and len(rounds) < min_runs and 2 * paired >= len(rounds)
    note = ""
    if shared:
        note = f"no figure: other processes had the GPU for {busy:.0f} % of the time; measure again"
    elif not enough:
        changed = int((counts.all(axis=1) & ~steady).sum())
        note = _no_figure(
            len(rounds), paired, min_runs, elapsed, threads, lost if preempted else 0.0, slow, changed, clocks
        )
    first = next(iter(ratios.values()), None)
    return BenchResult(
        timings=timings, ratios=ratios, ratio=first["median"] if first else None, rounds=paired,
        rejected=len(rounds) - paired, seconds=elapsed, note=note, contended=not enough and not slow,
        estimator=ESTIMATOR,
        environment={
            **environment(threads), "stolen_seconds": round(lost, 2), "gpu_others_percent": busy,
            "cpu_mhz": [round(min(clocks)), round(max(clocks))] if clocks else None,
        },
    )  # fmt: skip


def _no_figure(
    rounds: int,
    paired: int,
    min_runs: int,
    seconds: float,
    threads: int,
    lost: float,
    slow: bool,
    changed: int,
    clocks: Sequence[float],
) -> str:
    """Return the reason why no ratio is stated: the hypervisor (lost > 0 seconds), slow models, a clock that changed within
    most of the rounds that do not count, or a busy machine."""
    if lost:
        return f"no figure: the hypervisor took the processors for {lost:.1f} s of {seconds:.0f} s; measure again"
    if slow:
        needed = max(1, int(np.ceil(1.2 * seconds / max(rounds, 1) * min_runs)))
        return (
            f"no figure: only {rounds} rounds fit into {seconds:.0f} s ({min_runs} needed), the models are slow; "
            f"give it {needed} seconds"
        )
    if 2 * changed > rounds - paired:
        return (
            f"no figure: the processor's clock, {min(clocks):.0f} to {max(clocks):.0f} MHz, changed within {changed} of "
            f"{rounds} rounds; fix it: {TARGETS['cpu'].clocks[0]}"
        )
    return (
        f"no figure: only {paired} of {rounds} rounds ran undisturbed in {seconds:.0f} s ({min_runs} "
        f"needed); the machine is contended, or an item waits or uses other than {threads} threads"
    )


def _estimate(values: np.ndarray) -> dict[str, float]:
    """Return percentiles, and the interval of the median as low and high if there are enough values for one."""
    interval = median_interval(values.tolist())
    return _percentiles(values) | (dict(zip(("low", "high"), interval, strict=True)) if interval else {})


def _percentiles(values: np.ndarray) -> dict[str, float]:
    points = np.percentile(values, list(PERCENTILES.values()))
    percentiles = {name: float(p) for name, p in zip(PERCENTILES, points, strict=True)}
    return percentiles | {"iqr": percentiles["p75"] - percentiles["p25"]}


# ----------------------------------------------------------------------------------------------------------- measuring
def _sample(call: Callable[[], Any], repeats: int, threads: int) -> tuple[float, bool, float | None]:
    """Return the mean seconds of `repeats` calls, whether the sample counts, and the processor's clock in MHz after it.

    threads: number of threads that should be busy; 0 for an engine on an accelerator, whose samples always count.
    """
    waited, lost = _waited() if threads > 1 else 0.0, stolen() if threads else 0.0
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if threads > 1:
        counts = (_waited() - waited) / (threads * wall) <= 1 - GUARD and cpu / (threads * wall) <= 1 / GUARD
    else:
        counts = not threads or GUARD <= cpu / wall <= 1 / GUARD
    if threads and stolen() > lost:  # CPU time in a virtual machine may include time that the hypervisor took
        counts = False
    return wall / repeats, counts, processor_mhz() if threads else None


def _steady(samples: Sequence[tuple[float, bool, float | None]]) -> bool:
    """Return whether the samples of one round ran at one clock: it did not change, and no sample ran on a slower core."""
    clocks = [mhz for _, _, mhz in samples if mhz is not None]
    return not clocks or min(clocks) >= GUARD * max(clocks)


def _waited() -> float:
    """Return the seconds for which threads of this process were ready to run and waited for a processor."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            total += int(task.read_text().split()[1])
    return total * 1e-9


def _repeats(call: Callable[[], Any]) -> int:
    """Warm up, and return how many calls make one sample of at least SAMPLE seconds."""
    call()
    fastest = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
        if fastest > SLOW:
            break
    return max(1, int(np.ceil(SAMPLE / max(fastest, 1e-7))))


@contextlib.contextmanager
def _bar(progress: bool, seconds: float) -> Iterator[Callable[[float], None]]:
    if not progress:
        yield lambda share: None
        return
    # The bar is drawn between the runs, never during one.
    with Progress(console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        task, drawn = bar.add_task("measuring", total=1.0), [0.0]

        def advance(share: float) -> None:
            if time.perf_counter() - drawn[0] > 0.2:
                bar.update(task, completed=min(share, 1.0), refresh=True)
                drawn[0] = time.perf_counter()

        yield advance


# --------------------------------------------------------------------------------------------------------------- items
def _names(items: Sequence[Any], names: Sequence[str] | None) -> list[str]:
    if names is not None and (len(names) != len(items) or len(set(names)) != len(items)):
        raise BadInput(f"bench: names must be {len(items)} different ones")
    if names is not None:
        return list(names)
    titles: list[str] = []
    for i, item in enumerate(items):
        kind = type(item).__name__
        title = Path(item).stem if isinstance(item, (str, os.PathLike)) else getattr(item, "__name__", kind)
        titles.append(title if title not in titles else f"{title} {i}")
    return titles


def _calls(
    items: Sequence[Any],
    inputs: Sequence[Any] | None,
    threads: int,
    batch: int,
    shapes: Mapping[str, Sequence[int]],
    engine: str | None,
    stack: contextlib.ExitStack,
) -> tuple[list[Callable[[], Any]], list[bool]]:
    program = next((i for i in items if isinstance(i, Program)), None)
    if inputs is None and program is not None:
        inputs = [t for t in pytree.tree_leaves((program.args, program.kwargs)) if isinstance(t, torch.Tensor)]
    calls: list[Callable[[], Any]] = []
    guarded = []
    for item in items:
        if isinstance(item, Program) and not (engine and BACKENDS[engine].source == ".pt2"):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            item = export_onnx(item, Path(folder) / "program.onnx").path
        if isinstance(item, (str, os.PathLike, Program)):
            wanted = None if isinstance(item, Program) else input_specs(Path(item))
            if inputs is None and wanted is not None:
                inputs = random_inputs(wanted, batch, shapes)
            given = None if inputs is None else [tuple(np.shape(x)) for x in inputs]
            item = open_engine(item, engine, threads, given or [(batch,)])
            stack.callback(item.close)
        if isinstance(item, Engine):
            if inputs is None:
                inputs = random_inputs(item.inputs, batch, shapes)
            arrays = host_arrays(item, inputs)
            # An accelerator's engine is measured with its inputs on the device.
            calls.append(item.prepared(arrays) if hasattr(item, "prepared") else functools.partial(item.run, arrays))
        elif callable(item):
            calls.append(functools.partial(item, *(inputs or ())))
        else:
            raise BadInput(
                f"bench: cannot run a {type(item).__name__}; give a path, an engine, a program or a callable"
            )
        guarded.append(not getattr(item, "on_device", False))
    return calls, guarded
