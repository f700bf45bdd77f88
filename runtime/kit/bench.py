#!/usr/bin/env python3
"""Measure the models of a graphcomb bench bundle on this device, and write one JSON file, which `graphcomb report` reads.

    python3 bench_device.py [--out results.json]

The script needs Python 3.8, numpy and the device's own TensorRT (or TensorRT-RTX, or ONNX Runtime), but not graphcomb. It
builds the engines from the ONNX files of the bundle, because an engine runs only on the device and with the version that it
was built with. Engines are kept beside the results, and a later run with the same models, options and versions reuses them.

First the models run in turns, with and without CUDA graphs. Then each one runs alone while power, temperatures and clocks
are read (tegrastats or nvidia-smi), and again under the library's profiler. A note marks a model whose outputs are not
finite, or differ from the reference by more than the precision explains. A model that cannot be built or run is reported,
and the others are measured. In a bundle this file is bench_device.py, and the files that it imports begin with graphcomb_.

Exit codes: 0; 1 if some of the models failed; 2 without results; 130 after Ctrl-C, when the file has what was measured
before.

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
TAKEN = 20  # largest load of the GPU at rest, in percent, with which ratios are stated
INTERRUPTED = 130


def run(arguments: argparse.Namespace, say: Callable[[str], None], result: dict[str, Any]) -> None:
    """Build, compare and measure all models, and fill `result` with the content of the JSON file.

    After Ctrl-C `result` has what was measured before. say: shows a message. Raises Failure, RuntimeError or OSError if
    nothing can be measured.
    """
    bundle = read_bundle(HERE)
    # All references are read first, so that a damaged one is reported at once.
    references = {name: read_reference(HERE, about) for name, about in bundle["models"].items()}
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
        if monitor.source:  # at rest: before the first engine is built
            say("power and temperatures at rest ...")
            start = time.monotonic()
            time.sleep(arguments.idle_seconds)
            result["idle"] = average(monitor.since(start))
        for name, about in bundle["models"].items():
            try:
                engines[name] = _open(name, about, references[name], arguments, result, say)
            except Damaged:
                raise
            except Exception as error:  # the libraries' errors have no common base; the other models are measured
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
    """Open an engine, compare its outputs with the reference, and add the model to `result`."""
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
    """Measure latency, power and layers of the engines, and add them to `result`. Ratios that a busy machine or a wide
    interval makes unreliable are replaced by a note."""
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
    for name, engine in engines.items():  # last, since the profiler cannot be detached and slows the engine down
        try:
            models[name]["layers"] = engine.layers(20)
        except Exception as error:  # the other results of the model remain
            notes.append(f"{name}: the layers cannot be measured: {_line(error)}")


def _contended(engine: Any, times: dict[str, Any]) -> str:
    """Return a note if other processes had the processor in too many of an engine's runs, else an empty text."""
    busy, runs = engine.about.get("contended", 0), sum(row["runs"] for row in times.values())
    return f"the machine was busy in {busy} of {runs} runs" if busy > BUSY * runs else ""


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (Failure, RuntimeError, OSError)) and text else f"{type(error).__name__}: {text}"


def writable(folder: Path) -> None:
    """Raise Failure if results cannot be written to a folder. This is checked before the measurement, which takes long."""
    if not folder.is_dir():
        raise Failure(f"--out: there is no folder {folder}; make it first")
    if not os.access(str(folder), os.W_OK | os.X_OK):
        raise Failure(f"--out: no permission to write in {folder}")


def library(name: str, preferred: str | None = None) -> tuple[str, dict[str, str]]:
    """Return the library to measure with, and by name of each library that was tried before, why it cannot be used.

    name: a library, or "auto" for the first one that can run here, with `preferred` tried first. TensorRT can run here if it
    is installed and there is a GPU. Raises Failure if no library can be used.
    """
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
        except Exception as error:  # an installed library whose shared objects are missing raises various errors
            missing[candidate] = f"cannot be used: {_line(error)}"
    reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in missing.items())
    raise Failure("none of {} can run here ({})".format(", ".join(LIBRARIES), reasons) if name == "auto" else reasons)


def at_least(least: float, kind: type = float) -> Callable[[str], Any]:
    """Return an argparse type: a finite number of at least `least`."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: a number of at least {least}")
        return value

    convert.__name__ = kind.__name__
    return convert


# The options of the command line: by name, the arguments of argparse's add_argument.
OPTIONS: dict[str, dict[str, Any]] = {
    "engine": {
        "choices": ("auto", *LIBRARIES),
        "default": "auto",
        "help": "inference library; by default the bundle's if it can run here",
    },
    "seconds": {"type": at_least(0), "default": 20.0, "help": "time limit of the latency measurement"},
    "rounds": {"type": at_least(1, int), "default": 100, "help": "number of rounds after which the measurement ends"},
    "power-seconds": {"type": at_least(0), "default": 8.0, "help": "how long each model runs for power"},
    "idle-seconds": {
        "type": at_least(0),
        "default": 3.0,
        "help": "how long power at rest is read before the first build",
    },
    "rebuild": {"action": "store_true", "help": "build all engines, also those that an earlier run has kept"},
    "sparse": {"action": "store_true", "help": "allow kernels for 2:4 sparse weights for every model"},
    "dla": {"type": at_least(0, int), "metavar": "CORE", "help": "DLA core to run on; the GPU runs the other layers"},
    "no-graphs": {"dest": "graphs", "action": "store_false", "help": "measure without CUDA graphs"},
    "threads": {"type": at_least(1, int), "default": 1, "help": "number of threads of ONNX Runtime"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description="Measure a graphcomb bench bundle on this device.")
    parser.add_argument("--out", type=Path, default=HERE / "results.json", help="the JSON file to write")
    for name, options in OPTIONS.items():
        parser.add_argument(f"--{name}", **options)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--attached", action="store_true", help=argparse.SUPPRESS)  # stop when standard input ends
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out.resolve()
    if arguments.attached:
        _attach()
    result: dict[str, Any] = {}
    try:
        run(arguments, (lambda text: None) if arguments.quiet else lambda text: print(text, flush=True), result)
    except KeyboardInterrupt:  # nothing was measured yet
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
    """Act as after Ctrl-C when the standard input ends: the process that started this one has ended, or asks it to stop."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent process may have made this one ignore SIGINT

    def wait() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
