#!/usr/bin/env python3
"""Measure the models of a graphcomb bench bundle on this device, and write one JSON file, which `graphcomb report` reads.

    python3 kit.pyz [--out results.json]

The script needs Python 3.8, numpy and the device's own TensorRT (or TensorRT-RTX, or ONNX Runtime), but not graphcomb. It
builds the engines from the ONNX files of the bundle, because an engine runs only on the device and with the version that it
was built with. Engines are kept beside the results, and a later run with the same models, options and versions reuses them.

First the models run in turns, with and without CUDA graphs. Then each one runs alone while power, temperatures and clocks
are read (tegrastats or nvidia-smi), and again under the library's profiler. A note marks a model whose outputs are not
finite, or differ from the reference by more than the precision explains. A model that cannot be built or run is reported,
and the others are measured. With --data the accuracy on a folder of images is measured as well (data.py). The results are
written after each stage, so a run that is cut off leaves those of the stages before. In a bundle this file is part of
kit.pyz, an archive of the files of this folder.

Exit codes: 0; 1 if some of the models failed; 2 without results; 130 after Ctrl-C, when the file has what was measured
before.

Sources: trtexec's practice (CUDA graph, events around each inference, layers in a separate run).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .build import build, build_apart, end_with_input, engine_path
from .contents import FORMAT, TOLERANCES, Damaged, Failure, read_bundle, read_reference, remove_parts, write_json
from .cuda import Cuda
from .data import IMAGENET, evaluate, find, load_metric
from .engines import TensorRT
from .measuring import BUSY, GUARD, check, measure, stolen, unsure, watch
from .options import OPTIONS, library, line, writable
from .ort import OnnxRuntime
from .telemetry import Monitor, average, clock_notes, describe_device, over_current, throttling
from .trt import load_plugins, new_logger

HERE = Path(__file__).resolve().parent  # the folder of the bundle; that of the archive if this file is in one
TAKEN = 20  # largest load of the GPU at rest, in percent, with which ratios are stated
INTERRUPTED = 130


def run(arguments: argparse.Namespace, say: Callable[[str], None], result: dict[str, Any]) -> None:
    """Build, compare and measure all models, and fill `result` with the content of the JSON file.

    After Ctrl-C `result` has what was measured before. say: shows a message. Raises Failure, RuntimeError or OSError if
    nothing can be measured.
    """
    bundle = read_bundle(arguments.folder)
    # All references are read first, so that a damaged one is reported at once.
    references = {name: read_reference(arguments.folder, about) for name, about in bundle["models"].items()}
    writable(arguments.out.parent)
    remove_parts(arguments.out.parent)
    arguments.images = find(arguments.data) if arguments.data is not None else []
    arguments.function = load_metric(arguments.metric) if arguments.metric else None
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
    arguments.plugins = {str(arguments.folder / name): sha256 for name, sha256 in bundle["plugins"].items()}
    arguments.build = functools.partial(_apart, arguments) if arguments.archive else build
    monitor = Monitor(archive=arguments.archive)
    engines: dict[str, Any] = {}
    arguments.feeds = {name: feeds for name, (feeds, _) in references.items()}
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
                result["failed"][name] = line(error)
                say(f"{name}: failed: {line(error)}")
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
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        result["host_peak_bytes"] = 1024 * kib
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
    engine: Any = make(arguments.folder / about["file"], arguments, feeds, about)
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
    if "trtexec" in engine.about:
        say("{}: the same with NVIDIA's tool: {}".format(name, engine.about["trtexec"]))
    dla = engine.about.get("dla")
    if dla:
        say("{}: {} of {} layers run on the GPU instead of the DLA".format(name, len(dla["gpu"]), dla["layers"]))
        for layer, kind in dla["gpu"]:
            say(f"    {kind:<16} {layer}")
    if "SPARSE_WEIGHTS" in engine.about.get("flags", ()):
        say(f"{name}: kernels for 2:4 sparse weights are allowed")
    lost = about["implicit"]["notes"] if "calibration" in engine.about else []
    result["notes"] += [f"{name}: {text}" for text in (about.get("note"), *lost, parity.get("note")) if text]
    return engine


def _measure(
    engines: dict[str, Any], monitor: Monitor, arguments: argparse.Namespace, result: dict[str, Any], say: Any
) -> None:
    """Measure latency, power and layers of the engines, and add them to `result`. Ratios that a busy machine or a wide
    interval makes unreliable are replaced by a note."""
    notes, models = result["notes"], result["models"]
    say("measuring ...")
    stopped: list[str] = []
    broken: dict[str, BaseException] = {}
    start, lost = time.monotonic(), stolen()
    times, ratios = measure(engines, arguments.seconds, arguments.rounds, stopped, broken)
    end, lost = time.monotonic(), stolen() - lost
    for name, latencies in times.items():
        models[name]["latency"] = latencies
    for name, error in broken.items():
        result["failed"][name] = line(error)
        say(f"{name}: failed: {line(error)}")
        engines.pop(name).close()
    if not engines:
        return
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
    save(arguments, result, whole=False)
    if stopped:
        raise KeyboardInterrupt

    def power(name: str) -> None:
        start = time.monotonic()
        models[name]["power"] = watch(engines[name], monitor, arguments.power_seconds)
        notes.extend(f"{name}: alone, {text}" for text in throttling(monitor.since(start), units))

    def throughput(name: str) -> None:
        rate = engines[name].throughput(arguments.streams, arguments.power_seconds)
        batch = result["bundle"]["models"][name].get("batch") or 1
        models[name]["throughput"] = {"streams": arguments.streams, "images_per_second": round(rate * batch, 3)}

    def accuracy(name: str) -> None:
        feeds = arguments.feeds[name]
        if len(feeds) != 1 or next(iter(feeds.values())).ndim != 4:
            raise Failure("--data: only for models with one input of images")
        ((key, example),) = feeds.items()
        how = dict(IMAGENET, **result["bundle"].get("preprocess", {}))
        scored = evaluate(engines[name], key, arguments.images, example.shape, how, arguments.function)
        models[name]["accuracy"] = scored
        say("{}: {metric} {value:.4f} on {images} images".format(name, **scored))

    def layers(name: str) -> None:
        models[name]["layers"] = engines[name].layers(20)

    # The layers come last, since the profiler cannot be detached and slows the engine down.
    stages = {"power and temperatures": power, "throughput": throughput, "accuracy": accuracy, "layers": layers}
    for title, stage in stages.items():
        for name in engines if title != "accuracy" or arguments.images else ():
            say(f"{name}: {title} ...")
            try:
                stage(name)
            except Exception as error:  # the other results of the model remain
                notes.append(f"{name}: {title}: not measured: {line(error)}")
        save(arguments, result, whole=False)


def _contended(engine: Any, times: dict[str, Any]) -> str:
    """Return a note if other processes had the processor in too many of an engine's runs, else an empty text."""
    busy, runs = engine.about.get("contended", 0), sum(row["runs"] for row in times.values())
    return f"the machine was busy in {busy} of {runs} runs" if busy > BUSY * runs else ""


def main(argv: Sequence[str] | None = None, archive: Path | None = None) -> int:
    """Run the command line and return the exit code. archive: the archive that this module is part of, beside a bundle."""
    folder = HERE if archive is None else archive.parent
    parser = argparse.ArgumentParser(description="Measure a graphcomb bench bundle on this device.")
    parser.add_argument("--out", type=Path, default=folder / "results.json", help="the JSON file to write")
    for name, options in OPTIONS.items():
        parser.add_argument(f"--{name}", **options)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--attached", action="store_true", help=argparse.SUPPRESS)  # stop when standard input ends
    parser.add_argument("--build", help=argparse.SUPPRESS)  # build one model and end, as `_apart` asks
    arguments = parser.parse_args(argv)
    arguments.out, arguments.archive, arguments.folder = arguments.out.resolve(), archive, folder
    if arguments.build is not None:
        return _build_one(arguments)
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
    save(arguments, result)
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


def save(arguments: argparse.Namespace, result: dict[str, Any], whole: bool = True) -> None:
    """Write the results. whole: whether the measurement has ended; otherwise the file says that it was interrupted, and
    leaves out models without a latency."""
    if not whole:
        models = {name: row for name, row in result["models"].items() if row["latency"]}
        if not models:
            return
        result = dict(result, models=models, interrupted=True, monitor=None)
    write_json(arguments.out, result)


def _apart(
    outer: argparse.Namespace, model: Path, engine: Path, arguments: Any, feeds: Any, about: dict[str, Any]
) -> None:
    """Build one model in a process of its own, with the options of this one."""
    command = [sys.executable, str(outer.archive), "--build", model.parent.name, "--engine", outer.engine]
    command += ["--out", str(outer.out), *(["--sparse"] if outer.sparse else [])]
    command += ["--dla", str(outer.dla)] if outer.dla is not None else []
    build_apart(command, outer.build_seconds)
    if not engine.is_file():
        raise Failure(f"{model.name}: the build wrote no {engine.name}")


def _build_one(arguments: argparse.Namespace) -> int:
    """Build the engine of one model, and return the exit code. This is the process that `_apart` starts."""
    threading.Thread(target=end_with_input, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the measuring process, which ends this one
    try:
        bundle = read_bundle(arguments.folder)
        about = bundle["models"][arguments.build]
        arguments.plugins = {str(arguments.folder / name): sha256 for name, sha256 in bundle["plugins"].items()}
        arguments.device = describe_device()["model"]
        feeds, _ = read_reference(arguments.folder, about)
        trt = importlib.import_module(arguments.engine)
        load_plugins(trt, new_logger(trt), arguments.plugins)
        engine = engine_path(trt, arguments, feeds, about, Cuda().compute_capability)
        build(arguments.folder / about["file"], engine, arguments, feeds, about)
    except Exception as error:  # the libraries' errors have no common base
        print(f"error: {line(error)}", file=sys.stderr)
        return 2
    return 0


def _attach() -> None:
    """Act as after Ctrl-C when the standard input ends: the process that started this one has ended, or asks it to stop."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent process may have made this one ignore SIGINT

    def wait() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
