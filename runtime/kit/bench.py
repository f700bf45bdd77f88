#!/usr/bin/env python3
"""Measure the models of a graphcomb bench bundle on the device it lies on, and write one JSON file.

    python3 bench_device.py [--out results.json]

Needs Python 3.8, numpy and the device's own TensorRT (or TensorRT-RTX, or ONNX Runtime); graphcomb is not needed. Engines
are built here, from the ONNX files of the bundle, because an engine fits only the device and version that built it; they
stay beside the results, and a later run with the same models, options and versions takes them. The models run in turns,
with and without CUDA graphs; then each one runs alone while power, temperatures and clocks are read (tegrastats or
nvidia-smi); then once more layer by layer. Results whose outputs are not finite, or differ from the reference by more than
the precision explains, are marked. A model that cannot be built or run is named, and the others are measured. `graphcomb
report` reads the file. In a bundle this file is bench_device.py, and those that it imports begin with graphcomb_.

Exit codes: 0; 1 when some of the models failed; 2 when there are no results; 130 after Ctrl-C, with what was measured until
then.

Sources: trtexec's practice (CUDA graph, events around each inference, layers in a separate run).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .contents import FORMAT, TOLERANCES, Damaged, Failure, read_bundle, read_reference
from .cuda import Cuda
from .measuring import BUSY, GUARD, check, measure, stolen, unsure, watch
from .ort import OnnxRuntime
from .telemetry import Monitor, average, clock_notes, describe_device, over_current, throttling
from .trt import TensorRT

HERE = Path(__file__).resolve().parent
LIBRARIES = ("tensorrt", "tensorrt_rtx", "onnxruntime")
TAKEN = 20  # percent of the GPU's time that something else may have had before the measurement
INTERRUPTED = 130


def run(arguments: argparse.Namespace, say: Callable[[str], None], result: dict[str, Any]) -> None:
    """Build, compare and measure all models; `result` becomes what the JSON file holds, after Ctrl-C with what was measured
    until then.

    Raises Failure, RuntimeError or OSError where nothing can be measured.
    """
    bundle = read_bundle(HERE)
    references = {name: read_reference(HERE, about) for name, about in bundle["models"].items()}  # fails early
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
    arguments.plugins = {str(HERE / name): sha256 for name, sha256 in bundle["plugins"].items()}
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
        results = [outputs[key] for key in order] if outputs.keys() == set(order) else list(outputs.values())
        parity = check(results, reference, TOLERANCES[about["precision"]])
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
    start, lost = time.monotonic(), stolen()
    times, ratios = measure(engines, arguments.seconds, arguments.rounds, stopped)
    end, lost = time.monotonic(), stolen() - lost
    for name, latencies in times.items():
        models[name]["latency"] = latencies
    units = ("cpu",) if arguments.engine == "onnxruntime" else ("gpu", "memory")
    notes += [f"while measuring, {text}" for text in throttling(monitor.since(start, end), units)]
    doubts = {name: _contended(engine, times[name]) for name, engine in engines.items()}
    notes += [f"{name}: {text}" for name, text in doubts.items() if text]
    everywhere = ""
    load = result["idle"].get("load_percent", {}).get("gpu", 0) if arguments.engine != "onnxruntime" else 0
    if load > TAKEN:
        everywhere = f"something else had the GPU for {load:.0f} % of the time before"
    elif lost > 0.1 and lost > (1 - GUARD) * (end - start):
        everywhere = f"the hypervisor took the processor for {lost:.1f} s of {end - start:.1f} s"
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
            module = importlib.import_module(candidate)
            if candidate != "onnxruntime" and not hasattr(module, "Builder"):
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
