#!/usr/bin/env python3
"""Measure the models of a graphcomb bench bundle on the device it lies on, and write one JSON file.

    python3 bench_device.py [--out results.json]

Needs Python 3.8, numpy and the device's own TensorRT (or TensorRT-RTX, or ONNX Runtime); graphcomb is not needed. Engines
are built here, from the ONNX files of the bundle, because an engine fits only the device and version that built it; they
stay beside the results, and a later run with the same models, options and versions takes them. The models run in turns,
with and without CUDA graphs; then each one runs alone while power, temperatures and clocks are read (jetson-stats,
tegrastats or nvidia-smi); then once more layer by layer. Results whose outputs are not finite, or differ from the reference
by more than the precision explains, are marked. A model that cannot be built or run is named, and the others are measured.
`graphcomb report` reads the file.

Exit codes: 0; 1 when some of the models failed; 2 when there are no results; 130 after Ctrl-C, with what was measured until
then.

Sources: trtexec's practice (CUDA graph, events around each inference, layers in a separate run).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy as np

from .cuda import Cuda
from .device_engines import GUARD, Damaged, Failure, OnnxRuntime, TensorRT
from .telemetry import Monitor, average, clock_notes, describe_device, over_current, throttling

FORMAT = "graphcomb-bench/1"
HERE = Path(__file__).resolve().parent
BLOCK, SETTLE = 20, 3  # runs of one model in a row, and how many of them only warm its caches
LIBRARIES = ("tensorrt", "tensorrt_rtx", "onnxruntime")
PERCENTILES = (("p5", 5), ("median", 50), ("p95", 95), ("p99", 99))
WIDE = 0.1  # width of a ratio's interval, relative to it, from which on there is no ratio
BUSY = 0.1  # share of a model's runs that may have met something else on the processor
TAKEN = 20  # percent of the GPU's time that something else may have had before the measurement
INTERRUPTED = 130

# How far outputs may be from the reference, relative to its largest value, before it is said that they differ.
TOLERANCES = {"fp32": 1e-3, "fp16": 5e-2, "int8": 0.3}


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            found.update(part)
    return found.hexdigest()


# ------------------------------------------------------------------------------------------------------------ measuring
def measure(
    engines: dict[str, Any], seconds: float, rounds: int, stopped: list[str] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Latencies by model and mode, and how many times faster each is than the first model.

    The models take turns in blocks of runs, in alternating order, so that a drift of clocks meets them alike; a ratio is
    of the blocks' medians in one round, and low and high are the interval of its median (`median_interval`). There is at
    least one round. stopped: is given a word after Ctrl-C, and what was measured until then is returned.
    """
    found: dict[str, Any] = {name: {} for name in engines}
    ratios: dict[str, Any] = {name: {} for name in list(engines)[1:]}
    modes = [mode for mode in ("stream", "graph") if all(mode in engine.modes for engine in engines.values())]
    for mode in modes:
        times: dict[str, list[Any]] = {name: [] for name in engines}
        start = time.monotonic()
        done = 0
        try:
            while not done or (done < rounds and time.monotonic() - start < seconds / len(modes)):
                order = list(engines) if done % 2 == 0 else list(engines)[::-1]
                block = {name: [engines[name].time(mode) for _ in range(BLOCK)][SETTLE:] for name in order}
                for name, runs in block.items():
                    times[name].append(runs)
                done += 1
        except KeyboardInterrupt:
            if stopped is None:
                raise
            stopped.append(mode)
        if not done:
            break
        for name, blocks in times.items():
            runs = [run for block in blocks for run in block]
            rows = {"host_ms": percentiles([host for _, host in runs])}
            on_device = [gpu for gpu, _ in runs if gpu is not None]
            found[name][mode] = dict(rows, runs=len(runs), **({"gpu_ms": percentiles(on_device)} if on_device else {}))
        first = _medians(times[next(iter(engines))])
        for name, row in ratios.items():
            paired = [a / b for a, b in zip(first, _medians(times[name]))]
            interval = median_interval(paired)
            row[mode] = percentiles(paired)
            if interval is not None:
                row[mode].update(low=round(interval[0], 6), high=round(interval[1], 6))
        if stopped:
            break
    return found, ratios


def _medians(blocks: list[Any]) -> list[float]:
    """The median run of every block, on the device where that is known."""
    return [statistics.median(host if gpu is None else gpu for gpu, host in runs) for runs in blocks]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {name: round(float(np.percentile(values, point)), 6) for name, point in PERCENTILES}


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The two of the values between which the median of what they were drawn from lies with a probability of at least
    95 %, whatever its distribution; None of fewer than six values, which cannot say that.

    The number of values below that median is binomial with probability 1/2 (order statistics).
    """
    ordered, count, tail, k = sorted(values), len(values), 0, 0
    while 40 * (tail + math.comb(count, k)) <= 2**count:  # at most 2.5 % at either end
        tail += math.comb(count, k)
        k += 1
    return (ordered[k - 1], ordered[count - k]) if k else None


def unsure(ratio: dict[str, float]) -> str:
    """Why a ratio is no figure to rely on, by its interval; empty when it is one."""
    if "low" in ratio and ratio["high"] - ratio["low"] > WIDE * ratio["median"]:
        return "it lies between {low:.2f} and {high:.2f} (95 %), which is too wide; measure longer".format(**ratio)
    return ""


def stolen() -> float:
    """Seconds that a hypervisor has taken from this virtual machine's processors; 0 where that is not known."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError), open("/proc/stat") as file:
        return int(file.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def check(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray], tolerance: float) -> dict[str, Any]:
    """Whether the outputs are finite, and max |found - wanted| / max |wanted| of the worst one. note: what is wrong with
    them, in words, where something is."""
    row: dict[str, Any] = {"finite": True, "error": None, "tolerance": tolerance}
    if not all(bool(np.isfinite(a).all()) for a in found if a.dtype.kind == "f"):
        return dict(row, finite=False, note="outputs that are not finite")
    if [a.shape for a in found] != [b.shape for b in wanted]:
        shapes = [list(a.shape) for a in found], [list(b.shape) for b in wanted]
        return dict(row, note="outputs of shapes {} instead of {}".format(*shapes))
    errors = [
        float(np.abs(a.astype(np.float64) - b).max(initial=0.0)) / (float(np.abs(b).max(initial=0.0)) or 1.0)
        for a, b in zip(found, wanted)
    ]
    row["error"] = max(errors) if errors else None
    if errors and not max(errors) <= tolerance:
        row["note"] = f"outputs that differ from the reference by {max(errors):.1e}, more than {tolerance:g}"
    return row


def watch(engine: Any, monitor: Monitor, seconds: float) -> dict[str, Any]:
    """What one model draws when it runs alone without a pause; energy in mJ of one run."""
    mode = engine.modes[-1]
    start, runs = time.monotonic(), 0
    while not runs or time.monotonic() - start < seconds:
        engine.time(mode)
        runs += 1
    elapsed = time.monotonic() - start
    samples = monitor.since(start + 0.2 * elapsed)  # the sensors average over some time themselves
    found = average(samples)
    if found.get("total_mw"):
        found["energy_mj"] = round(found["total_mw"] * elapsed / runs, 4)
    return found


# ----------------------------------------------------------------------------------------------------------------- main
@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Failure for a file of the bundle that is not as it was written."""
    try:
        yield
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror or error}") from error
    except (AttributeError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise Damaged(f"{path}: damaged ({type(error).__name__}: {error}); copy the bundle again") from error


def read_bundle() -> dict[str, Any]:
    """bundle.json, with what every model needs made sure of."""
    path = HERE / "bundle.json"
    with reading(path):
        found = json.loads(path.read_text())
        if found["format"] != FORMAT:
            raise Failure(f"{path}: of format {found['format']}, this script reads {FORMAT}; bundle the models again")
        if not found["models"]:
            raise ValueError("no models")
        for about in found["models"].values():
            about.setdefault("precision", found["precision"])
            about["file"], about["reference"], about["sha256"] = (
                str(about[k]) for k in ("file", "reference", "sha256")
            )
            TOLERANCES[about["precision"]]
    return found


def read_reference(about: dict[str, Any]) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Inputs by name, and outputs in order, of a model whose files are those that were bundled."""
    for name, wanted in {about["file"]: about["sha256"], **about.get("data", {})}.items():
        with reading(HERE / name):
            if digest(HERE / name) != wanted:
                raise Damaged(f"{Path(name).name}: not the file that was bundled; copy the bundle again")
    with reading(HERE / about["reference"]):
        with np.load(str(HERE / about["reference"])) as data:
            arrays = {key: data[key] for key in data.files}
        feeds = {key[6:]: value for key, value in arrays.items() if key.startswith("input:")}
        return feeds, [arrays[key] for key in sorted(arrays) if key.startswith("output:")]


def run(arguments: argparse.Namespace, say: Callable[[str], None], result: dict[str, Any]) -> None:
    """Everything; `result` becomes what the JSON file holds. After Ctrl-C it has what was measured until then."""
    bundle = read_bundle()
    references = {name: read_reference(about) for name, about in bundle["models"].items()}  # fails early
    writable(arguments.out.parent)
    notes: list[str] = []
    wanted = bundle.get("engine")
    arguments.engine, missing = library(arguments.engine, wanted)
    result.update(format=FORMAT, bundle=bundle, engine=arguments.engine, version="", notes=notes)
    result.update(device=describe_device(), models={}, failed={}, ratios={}, idle={})
    result["date"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    if wanted and wanted != arguments.engine:
        why = f" ({missing[wanted]})" if wanted in missing else ""
        notes.append("measured with {}; the target {} runs {}{}".format(
            arguments.engine, bundle.get("target"), wanted, why
        ))  # fmt: skip
    arguments.device = result["device"]["model"]
    monitor = Monitor()
    engines: dict[str, Any] = {}
    events = over_current()
    try:
        if monitor.source:  # before anything else works
            say("power and temperatures at rest ...")
            start = time.monotonic()
            time.sleep(arguments.idle_seconds)
            result["idle"] = average(monitor.since(start))
        for name, about in bundle["models"].items():
            try:
                engines[name] = _open(name, about, references[name], arguments, result, say)
            except Damaged:
                raise
            except Exception as error:  # the libraries' errors share no base; the other models are measured
                result["failed"][name] = _line(error)
                say(f"{name}: failed: {_line(error)}")
        if engines:
            _measure(engines, monitor, arguments, result, say)
    except KeyboardInterrupt:
        result["interrupted"] = True
    finally:
        monitor.close()
        for engine in engines.values():
            engine.close()
    for name in [name for name, row in result["models"].items() if not row["latency"]]:
        del result["models"][name]
        result["failed"].setdefault(name, "interrupted before it was measured")
    result["monitor"] = monitor.source
    notes += [f"{name}: failed: {reason}" for name, reason in result["failed"].items()]
    notes += ["interrupted: what was measured until then"] if result.get("interrupted") else []
    more = {name: count - events.get(name, 0) for name, count in over_current().items()}
    notes += [f"slowed down {n} times for drawing too much current ({name})" for name, n in more.items() if n > 0]
    notes += [*clock_notes(result["device"]), *monitor.notes()]


def _open(
    name: str, about: dict[str, Any], data: Any, arguments: argparse.Namespace, result: dict[str, Any], say: Any
) -> Any:
    """An engine whose outputs were compared with the reference."""
    feeds, reference = data
    say(f"{name}: building with {arguments.engine} ...")
    make = OnnxRuntime if arguments.engine == "onnxruntime" else TensorRT
    engine: Any = make(HERE / about["file"], arguments, feeds, about)
    try:
        outputs, order = engine.outputs(), about.get("outputs", ())
        found = [outputs[key] for key in order] if outputs.keys() == set(order) else list(outputs.values())
        parity = check(found, reference, TOLERANCES[about["precision"]])
    except BaseException:
        engine.close()
        raise
    row = {"file": about["file"], "engine": engine.about, "parity": parity, "latency": {}, "power": {}, "layers": []}
    result["models"][name], result["version"] = row, engine.version
    seconds = engine.about["build_seconds"]
    built = "the engine of an earlier run" if seconds is None else f"built in {seconds} s"
    say("{}: {}, error {}".format(name, built, parity["error"]))
    if "SPARSE_WEIGHTS" in engine.about.get("flags", ()):
        say(f"{name}: kernels for 2:4 sparse weights are allowed")
    result["notes"] += [f"{name}: {text}" for text in (about.get("note"), parity.get("note")) if text]
    return engine


def _measure(
    engines: dict[str, Any], monitor: Monitor, arguments: argparse.Namespace, result: dict[str, Any], say: Any
) -> None:
    """Latency, power and layers of the engines, and ratios as far as they can be relied on."""
    notes, models = result["notes"], result["models"]
    say("measuring ...")
    stopped: list[str] = []
    start, taken = time.monotonic(), stolen()
    times, ratios = measure(engines, arguments.seconds, arguments.rounds, stopped)
    end, taken = time.monotonic(), stolen() - taken
    for name, found in times.items():
        models[name]["latency"] = found
    units = ("cpu",) if arguments.engine == "onnxruntime" else ("gpu", "memory")
    notes += [f"while measuring, {text}" for text in throttling(monitor.since(start, end), units)]
    doubts = {name: _contended(engine, times[name]) for name, engine in engines.items()}
    notes += [f"{name}: {text}" for name, text in doubts.items() if text]
    everywhere = ""
    load = result["idle"].get("load_percent", {}).get("gpu", 0) if arguments.engine != "onnxruntime" else 0
    if load > TAKEN:
        everywhere = f"something else had the GPU for {load:.0f} % of the time before"
    elif taken > 0.1 and taken > (1 - GUARD) * (end - start):
        everywhere = f"the hypervisor took the processor for {taken:.1f} s of {end - start:.1f} s"
    reference = next(iter(result["bundle"]["models"]))
    for name, row in ratios.items() if reference in engines else ():
        for mode in list(row):
            busy = doubts[reference] or doubts[name]
            why = everywhere or ("the machine was busy" if busy else "") or unsure(row[mode])
            if why:
                del row[mode]
                notes.append(f"{name} ({mode}): no ratio: {why}")
            elif "low" not in row[mode]:
                notes.append(f"{name} ({mode}): too few rounds for an interval of the ratio")
    result["ratios"] = ratios if reference in engines else {}
    if stopped:
        raise KeyboardInterrupt
    for name, engine in engines.items():
        say(f"{name}: power and temperatures ...")
        start = time.monotonic()
        models[name]["power"] = watch(engine, monitor, arguments.power_seconds)
        notes += [f"{name}: alone, {text}" for text in throttling(monitor.since(start), units)]
    for name, engine in engines.items():  # last: the profiler stays attached
        try:
            models[name]["layers"] = engine.layers(20)
        except Exception as error:  # what was measured before stands
            notes.append(f"{name}: the layers cannot be measured: {_line(error)}")


def _contended(engine: Any, times: dict[str, Any]) -> str:
    """That something else had the processor in too many of an engine's runs; empty otherwise."""
    busy, runs = engine.about.get("contended", 0), sum(row["runs"] for row in times.values())
    return f"the machine was busy in {busy} of {runs} runs" if busy > BUSY * runs else ""


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (Failure, RuntimeError, OSError)) and text else f"{type(error).__name__}: {text}"


def writable(folder: Path) -> None:
    """Failure where results cannot be written, which is better known before an hour of work."""
    if not folder.is_dir():
        raise Failure(f"--out: there is no folder {folder}; make it first")
    if not os.access(str(folder), os.W_OK | os.X_OK):
        raise Failure(f"--out: no permission to write in {folder}")


def library(name: str, preferred: str | None = None) -> tuple[str, dict[str, str]]:
    """The library to measure with: the one that is named; else the preferred one, if it can run here, or the first that
    can. A TensorRT that is installed can do so where there is a GPU. Also why those before it cannot."""
    missing: dict[str, str] = {}
    for candidate in sorted(LIBRARIES, key=lambda c: c != preferred) if name == "auto" else (name,):
        try:
            found = importlib.import_module(candidate)
            if candidate != "onnxruntime" and not hasattr(found, "Builder"):
                raise ImportError("installed without its libraries")
            if candidate != "onnxruntime" and name == "auto":
                Cuda().close()
            return candidate, missing
        except ModuleNotFoundError as error:
            missing[candidate] = "not installed" if error.name == candidate else f"cannot be imported: {_line(error)}"
        except Exception as error:  # an installed library without its shared objects fails in many ways
            missing[candidate] = f"cannot be used: {_line(error)}"
    reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in missing.items())
    raise Failure("none of {} can run here ({})".format(", ".join(LIBRARIES), reasons) if name == "auto" else reasons)


def at_least(least: float, kind: type = float) -> Callable[[str], Any]:
    """A type of the parser's: a finite number that is not less."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: a number of at least {least}")
        return value

    convert.__name__ = kind.__name__
    return convert


# What may be set, by name on the command line, as the parser takes it.
OPTIONS: dict[str, dict[str, Any]] = {
    "engine": {
        "choices": ("auto", *LIBRARIES),
        "default": "auto",
        "help": "by default the bundle's, if it can run here",
    },
    "seconds": {"type": at_least(0), "default": 20.0, "help": "time limit of the latency measurement"},
    "rounds": {"type": at_least(1, int), "default": 100, "help": "blocks of every model that are enough"},
    "power-seconds": {"type": at_least(0), "default": 8.0, "help": "how long each model runs for power"},
    "idle-seconds": {
        "type": at_least(0),
        "default": 3.0,
        "help": "how long power at rest is read, before anything else",
    },
    "rebuild": {"action": "store_true", "help": "build engines again that an earlier run has kept"},
    "sparse": {"action": "store_true", "help": "allow kernels for 2:4 sparse weights also where the bundle names none"},
    "dla": {"type": at_least(0, int), "metavar": "CORE", "help": "run on a DLA core, the rest on the GPU"},
    "no-graphs": {"dest": "graphs", "action": "store_false", "help": "without CUDA graphs"},
    "threads": {"type": at_least(1, int), "default": 1, "help": "of ONNX Runtime"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure a graphcomb bench bundle on this device.")
    parser.add_argument("--out", type=Path, default=HERE / "results.json", help="the JSON file to write")
    for name, options in OPTIONS.items():
        parser.add_argument(f"--{name}", **options)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--attached", action="store_true", help=argparse.SUPPRESS)  # stop when the input ends
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out.resolve()
    if arguments.attached:
        _attach()
    result: dict[str, Any] = {}
    try:
        run(arguments, (lambda text: None) if arguments.quiet else lambda text: print(text, flush=True), result)
    except KeyboardInterrupt:  # before there was anything
        result["interrupted"] = True
    except (Failure, RuntimeError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    for name, reason in result.get("failed", {}).items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    if result.get("interrupted"):
        print("error: interrupted", file=sys.stderr)
    if not result.get("models"):
        return INTERRUPTED if result.get("interrupted") else 2
    part = arguments.out.with_name(f".{arguments.out.name}.{os.getpid()}.part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(arguments.out)
    bad = [name for name, row in result["models"].items() if "note" in row["parity"]]
    for name, row in result["ratios"].items():
        wrong = " and ".join(n for n in (next(iter(result["models"])), name) if n in bad)
        for mode, ratio in row.items():
            between = " ({low:.2f} to {high:.2f})".format(**ratio) if "low" in ratio else ""
            text = f"; no figure to rely on, the outputs of {wrong} are wrong" if wrong else ""
            print("{} ({}): {:.2f} times faster{}{}".format(name, mode, ratio["median"], text, between))
    for note in result["notes"]:
        print(f"note: {note}")
    print(f"written: {arguments.out}")
    return INTERRUPTED if result.get("interrupted") else 1 if result["failed"] else 0


def _attach() -> None:
    """Stop as after Ctrl-C when the standard input ends: whoever started this over the net has gone, or asks for it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored, so that the input decides

    def wait() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
