#!/usr/bin/env python3
"""Measure the models of a graphcomb bench bundle on the device it lies on, and write one JSON file.

    python3 bench_device.py [--out results.json]

Needs Python 3.8, numpy and the device's own TensorRT (or TensorRT-RTX, or ONNX Runtime); graphcomb is not needed. Engines
are built here, from the ONNX files of the bundle, because an engine fits only the device and version that built it. The
models run in turns, with and without CUDA graphs; then each one runs alone while power, temperatures and clocks are read
(jetson-stats, tegrastats or nvidia-smi); then once more layer by layer. Results whose outputs are not finite, or differ
from the reference by more than the precision explains, are marked. `graphcomb report` reads the file.

Sources: trtexec's practice (CUDA graph, events around each inference, layers in a separate run); NVIDIA's tegrastats
documentation; jetson-stats' Python interface.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Sequence

import numpy as np

if TYPE_CHECKING:
    import tensorrt as types

FORMAT = "graphcomb-bench/1"
HERE = Path(__file__).resolve().parent
BLOCK, SETTLE = 20, 3  # runs of one model in a row, and how many of them only warm its caches
LIBRARIES = ("tensorrt", "tensorrt_rtx", "onnxruntime")
GUARD, TRIES = 0.93, 20  # share of a run in which the processor must work for it, and how often it is repeated
KERNEL = "_kernel_time"  # what ONNX Runtime's profiler appends to the name of a node
PERCENTILES = (("p5", 5), ("median", 50), ("p95", 95), ("p99", 99))
# Rails that measure what goes into the board; without one, the total is the sum of the rails.
INPUT_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")


# How far outputs may be from the reference, relative to its largest value, before it is said that they differ.
TOLERANCES = {"fp32": 1e-3, "fp16": 5e-2, "int8": 0.3}


class Failure(Exception):
    """A message for the user, one line."""


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            found.update(part)
    return found.hexdigest()


# ---------------------------------------------------------------------------------------------------------- telemetry
# A sample is {"power_mw": {rail: n}, "temperatures_c": {zone: n}, "clocks_mhz": {unit: n}, "load_percent": {unit: n},
# "ram_mb": n}, each part as far as the tool tells.
POWER = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (-?\d+)(?:mW)?/-?\d+(?:mW)?(?:/-?\d+(?:mW)?)?(?!\S)")
TEMPERATURE = re.compile(r"(?<!\S)(\w+)@(-?\d+(?:\.\d+)?)C(?:/-?[\d.]+C)?(?!\S)")
ENGINE = re.compile(r"(?<!\S)(GR3D|EMC)(?:_FREQ)? (?:(\d+)%)?(?:@\[?(\d+)[\d,]*\]?)?(?!\S)")
CORES = re.compile(r"(?<!\S)(?:CPU|cpu) \[([^\]]*)\](?:@(\d+))?")
MEMORY = re.compile(r"(?<!\S)RAM (\d+)/\d+MB")
UNITS = {"GR3D": "gpu", "EMC": "memory"}


def parse_tegrastats(line: str) -> dict[str, Any]:
    """One line of tegrastats, of any Jetson from TX1 to Thor; an empty sample for anything else."""
    sample: dict[str, Any] = {"power_mw": {}, "temperatures_c": {}, "clocks_mhz": {}, "load_percent": {}}
    for rail, power in POWER.findall(line):
        sample["power_mw"][rail] = int(power)
    for zone, degrees in TEMPERATURE.findall(line):
        # The PMIC's is a constant 100, and a sensor that is off reads -256.
        if zone != "PMIC" and float(degrees) > -200:
            sample["temperatures_c"][zone] = float(degrees)
    for unit, load, clock in ENGINE.findall(line):
        if load:
            sample["load_percent"][UNITS[unit]] = int(load)
        if clock:
            sample["clocks_mhz"][UNITS[unit]] = int(clock)
    cores = CORES.search(line)
    if cores:
        on = [core for core in cores.group(1).split(",") if "%" in core]
        clocks = [int(core.split("@")[1]) for core in on if "@" in core] or (
            [int(cores.group(2))] if cores.group(2) else []
        )
        if on:
            sample["load_percent"]["cpu"] = round(sum(int(core.split("%")[0]) for core in on) / len(on), 1)
        if clocks:
            sample["clocks_mhz"]["cpu"] = max(clocks)
    memory = MEMORY.search(line)
    if memory:
        sample["ram_mb"] = int(memory.group(1))
    return sample


def read_jtop(power: Any, temperature: Any, gpu: Any, memory: Any = None) -> dict[str, Any]:
    """What the properties of jetson-stats' `jtop` hold, version 4 (and 3, whose power is a pair of total and rails).
    Which entries there are depends on the board and its software; what is missing is left out."""
    if isinstance(power, (tuple, list)):
        power = dict(zip(("tot", "rail"), power))
    power, gpu, memory = _table(power), _table(gpu), _table(memory)
    rails, total = dict(_table(power.get("rail"))), _table(power.get("tot"))
    if "name" in total:  # the rail that is the total was taken out of the others
        rails[total["name"]] = total
    units = [row for row in gpu.values() if "freq" in _table(row)]
    clock = _number(units[0]["freq"], "cur") if units else _number(gpu, "frq")
    load = _number(units[0].get("status"), "load") if units else _number(gpu, "val")
    emc, used = _number(memory.get("EMC"), "cur"), _number(memory.get("RAM"), "used")
    zones = {
        zone: _number(row if isinstance(row, dict) else {"temp": row}, "temp")
        for zone, row in _table(temperature).items()
        if zone != "PMIC" and _table(row).get("online", True)
    }
    found = {
        "power_mw": {rail: _number(row, "power", "cur") for rail, row in rails.items()},
        "temperatures_c": {zone: degrees for zone, degrees in zones.items() if degrees is not None and degrees > -200},
        "clocks_mhz": {"gpu": None if clock is None else clock // 1000, "memory": None if emc is None else emc // 1000},
        "load_percent": {"gpu": load},
    }
    sample: dict[str, Any] = {part: _known(row) for part, row in found.items()}
    return sample if used is None else dict(sample, ram_mb=used // 1024)


def _table(value: Any) -> dict[str, Any]:
    """A dict, also of jtop's own classes, which only behave like one; empty for anything else."""
    return dict(value.items()) if hasattr(value, "items") else {}


def _number(row: Any, *keys: str) -> Any:
    """The first of a dict's entries that is a number; None without one."""
    values = [_table(row).get(key) for key in keys]
    return next((v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)), None)


def _known(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


SMI = "power.draw,temperature.gpu,clocks.sm,clocks.mem,utilization.gpu"


def parse_smi(line: str) -> dict[str, Any]:
    """A line of `nvidia-smi --query-gpu=<SMI> --format=csv,noheader,nounits`."""
    fields = [field.strip() for field in line.split(",")]
    numbers = [float(field) if re.match(r"^[\d.]+$", field) else None for field in fields]
    if len(numbers) != 5:
        return {}
    power, degrees, clock, memory, load = numbers
    found = {
        "power_mw": {"GPU": None if power is None else power * 1000},
        "temperatures_c": {"gpu": degrees},
        "clocks_mhz": {"gpu": clock, "memory": memory},
        "load_percent": {"gpu": load},
    }
    return {part: _known(row) for part, row in found.items()}


def total_power(rails: dict[str, float]) -> float | None:
    """mW into the board: of the rail that measures it, else the sum of all; None without rails."""
    named = [rails[rail] for rail in INPUT_RAILS if rail in rails]
    return named[0] if named else sum(rails.values()) if rails else None


def average(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of the samples, part by part, with the total power; {} of none."""
    found: dict[str, Any] = {}
    for part in ("power_mw", "temperatures_c", "clocks_mhz", "load_percent"):
        values: dict[str, list[float]] = {}
        for sample in samples:
            for name, value in _known(sample.get(part, {})).items():
                values.setdefault(name, []).append(value)
        if values:
            found[part] = {name: round(statistics.mean(row), 2) for name, row in values.items()}
    if "power_mw" in found:
        found["total_mw"] = total_power(found["power_mw"])
    if samples:
        found["samples"] = len(samples)
    return found


class Monitor:
    """Reads power, temperatures and clocks in the background, ten times a second.

    source: "jtop", "tegrastats" or "nvidia-smi"; None where there is none of them. Where jtop fails, tegrastats goes on.
    """

    def __init__(self, source: str | None = None) -> None:
        self.samples: list[tuple[float, dict[str, Any]]] = []
        self._stop = threading.Event()
        self._process: subprocess.Popen | None = None
        self._failure = ""
        self.source = source if source is not None else self._find()
        if self.source:
            threading.Thread(target=self._jtop if self.source == "jtop" else self._read, daemon=True).start()

    def since(self, start: float) -> list[dict[str, Any]]:
        """The samples taken after a time of `time.monotonic()`."""
        return [sample for when, sample in list(self.samples) if when >= start]

    def notes(self) -> list[str]:
        """What a reader of the results should know."""
        if not self.source:
            return ["no jtop, tegrastats or nvidia-smi here: power, temperatures and clocks are not known"]
        found = [self._failure] if self._failure else []
        return found if self.samples else [*found, f"{self.source} gave no samples: power and clocks are not known"]

    def close(self) -> None:
        self._stop.set()
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    @staticmethod
    def _find() -> str | None:
        # jetson-stats may be installed with its service off, or of another version.
        with contextlib.suppress(Exception), importlib.import_module("jtop").jtop() as jetson:
            if jetson.ok():
                return "jtop"
        return next((tool for tool in ("tegrastats", "nvidia-smi") if shutil.which(tool)), None)

    def _read(self) -> None:
        parse = parse_tegrastats if self.source == "tegrastats" else parse_smi
        query = ["nvidia-smi", "--query-gpu=" + SMI, "--format=csv,noheader,nounits", "-lms", "100", "-i", "0"]
        command = ["tegrastats", "--interval", "100"] if self.source == "tegrastats" else query
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if self._stop.is_set():
            self._process.terminate()
        for line in self._process.stdout or ():
            self._keep(parse(line))

    def _jtop(self) -> None:
        try:
            with importlib.import_module("jtop").jtop(interval=0.1) as jetson:
                while jetson.ok() and not self._stop.is_set():
                    self._keep(read_jtop(jetson.power, jetson.temperature, jetson.gpu, jetson.memory))
            reason = "its service ended"
        except Exception as error:  # whatever the service of another version sends
            reason = f"{type(error).__name__}: {error}"
        if not self._stop.is_set():
            self._failure = f"jtop failed ({reason})"
            if shutil.which("tegrastats"):
                self.source = "tegrastats"
                self._read()

    def _keep(self, sample: dict[str, Any]) -> None:
        if any(sample.values()):
            self.samples.append((time.monotonic(), sample))


def describe_device() -> dict[str, Any]:
    """Model, software, power mode and clock settings, as far as the system tells without root."""
    mode = _say(["nvpmodel", "-q"])
    named = re.search(r"Power Mode: *(.+)", mode or "")
    return {
        "model": _cat("/proc/device-tree/model") or _say(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]),
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "l4t": _cat("/etc/nv_tegra_release"),
        "power_mode": named.group(1).strip() if named else mode,
        "clocks": _say(["jetson_clocks", "--show"]),
    }


def _say(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cat(path: str) -> str | None:
    try:
        return Path(path).read_text().strip().strip("\0") or None
    except OSError:
        return None


# -------------------------------------------------------------------------------------------------------------- engines
def complete(path: Path, names: Iterable[str], feeds: dict[str, np.ndarray]) -> None:
    """Failure where the reference does not have exactly the inputs that a model takes."""
    if set(names) != feeds.keys():
        texts = ", ".join(sorted(names)), ", ".join(sorted(feeds))
        raise Failure("{}: takes {}, and the reference has {}; bundle it again".format(path.name, *texts))


class OnnxRuntime:
    """ONNX Runtime on the CPU: for a device without TensorRT, and to try a bundle out anywhere."""

    modes: tuple[str, ...] = ("stream",)

    def __init__(
        self, path: Path, arguments: argparse.Namespace, feeds: dict[str, np.ndarray], about: dict[str, Any]
    ) -> None:
        import onnxruntime

        start = time.perf_counter()
        self._path, self._threads, self._half = path, arguments.threads, about["precision"] == "fp16"
        try:
            self._session = self._open()
        except Exception as error:  # ONNX Runtime's exceptions share no public base
            raise Failure(f"{path.name}: ONNX Runtime refuses it: {error}") from error
        self.version = onnxruntime.__version__
        self.about: dict[str, Any] = {
            "build_seconds": round(time.perf_counter() - start, 3),
            "bytes": path.stat().st_size,
        }
        kinds = {i.name: i.type for i in self._session.get_inputs()}
        complete(path, kinds, feeds)
        self._feeds = {k: v.astype(np.float16 if kinds[k] == "tensor(float16)" else v.dtype) for k, v in feeds.items()}

    def _open(self, profile: str | None = None) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self._half:  # else some of its optimisations crash the process or compute something else on CPUs
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.enable_mem_pattern = False
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile
        return onnxruntime.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs for the reference inputs, by name."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, self._feeds)))

    def time(self, mode: str) -> tuple[float | None, float]:
        """Milliseconds of one run: on the accelerator (None without one), and as the caller sees it. A run during which
        something else had the processor is repeated; one that never was alone is counted."""
        for _ in range(TRIES):
            cpu, start = time.process_time(), time.perf_counter()
            self._session.run(None, self._feeds)
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
            if self._threads > 1 or cpu >= GUARD * wall:
                return None, 1e3 * wall
        self.about["contended"] = self.about.get("contended", 0) + 1
        return None, 1e3 * wall

    def layers(self, runs: int) -> list[dict[str, Any]]:
        """Median milliseconds of each layer, from the library's profiler, in a session of its own."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(str(Path(folder) / "profile"))
            for _ in range(runs + 1):  # the first only warms up
                session.run(None, self._feeds)
            events = json.loads(Path(session.end_profiling()).read_text())
        times: dict[str, list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(KERNEL):
                times.setdefault(event["name"][: -len(KERNEL)], []).append(event["dur"] / 1e3)
        return [{"name": name, "ms": round(statistics.median(ms[1:]), 6)} for name, ms in times.items() if ms[1:]]

    def close(self) -> None:
        del self._session


class TensorRT:
    """An engine of TensorRT (8.6 to 11) or TensorRT-RTX, built here from the ONNX file."""

    modes: tuple[str, ...] = ("stream", "graph")

    def __init__(
        self, path: Path, arguments: argparse.Namespace, feeds: dict[str, np.ndarray], about: dict[str, Any]
    ) -> None:
        from graphcomb_cuda import Cuda

        self.trt = trt = importlib.import_module(arguments.engine)
        self.version = trt.__version__
        self._logger = trt.Logger(trt.Logger.WARNING)
        start = time.perf_counter()
        self.about: dict[str, Any] = {}
        plan = self._build(path, arguments, feeds, about)
        self.about.update(build_seconds=round(time.perf_counter() - start, 3), bytes=len(plan))
        self._cuda = Cuda()
        self._runtime: types.Runtime = trt.Runtime(self._logger)
        self._engine: types.ICudaEngine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise Failure(f"{path.name}: the engine that was built cannot be loaded")
        self._context: types.IExecutionContext = self._engine.create_execution_context()
        self._inspect()
        self._addresses: list[int] = []
        self._results: dict[str, tuple[int, np.ndarray]] = {}
        self._bind(feeds)
        self._events = self._cuda.event(), self._cuda.event()
        self._graph = 0
        self._enqueue()  # buffers are made in the first run, which therefore cannot be captured
        self._cuda.synchronize()
        if arguments.graphs:
            self._capture()
        else:
            self.modes = ("stream",)

    def _build(
        self, path: Path, arguments: argparse.Namespace, feeds: dict[str, np.ndarray], about: dict[str, Any]
    ) -> bytes:
        trt = self.trt
        flags = trt.NetworkDefinitionCreationFlag
        strong = getattr(flags, "STRONGLY_TYPED", None)
        builder: types.Builder = trt.Builder(self._logger)
        network = builder.create_network(1 << int(flags.EXPLICIT_BATCH if strong is None else strong))
        parser: types.OnnxParser = trt.OnnxParser(network, self._logger)
        if not parser.parse_from_file(str(path)):
            reason = parser.get_error(0).desc() if parser.num_errors else "no reason given"
            raise Failure(f"{path.name}: {arguments.engine} {self.version} cannot parse it: {reason}")
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        wanted = ["SPARSE_WEIGHTS"] if arguments.sparse or about.get("sparse") else []
        if strong is None:  # without strong typing the precision is a permission
            wanted += ["FP16"] if about["precision"] != "fp32" else []
            wanted += ["INT8"] if about["precision"] == "int8" else []
        if arguments.dla is not None:
            config.default_device_type = trt.DeviceType.DLA
            config.DLA_core = arguments.dla
            wanted.append("GPU_FALLBACK")
        for name in wanted:
            if not hasattr(trt.BuilderFlag, name):
                raise Failure(f"{arguments.engine} {self.version} has no builder flag {name}")
            config.set_flag(getattr(trt.BuilderFlag, name))
        self.about["flags"] = wanted
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        complete(path, [tensor.name for tensor in inputs], feeds)
        if any(-1 in tuple(tensor.shape) for tensor in inputs):
            profile = builder.create_optimization_profile()
            for tensor in inputs:
                shape = feeds[tensor.name].shape
                profile.set_shape(tensor.name, shape, shape, shape)
            config.add_optimization_profile(profile)
        cache = self._timing_cache(config, arguments)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise Failure(f"{path.name}: {arguments.engine} {self.version} builds no engine")
        if cache is not None:
            cache.write_bytes(bytes(config.get_timing_cache().serialize()))
        return bytes(plan)

    def _timing_cache(self, config: Any, arguments: argparse.Namespace) -> Path | None:
        """Attach the cache of earlier builds; a rebuild of the same network then chooses the same kernels."""
        if arguments.engine != "tensorrt":  # TensorRT-RTX times no kernels
            return None
        path = arguments.out.with_name(f"timing-{self.version}.cache")
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        return path if config.set_timing_cache(cache, False) else None

    def _inspect(self) -> None:
        """What the engine is made of, as the library's inspector says, and the memory that a run takes."""
        size = getattr(self._engine, "device_memory_size_v2", None) or getattr(self._engine, "device_memory_size", None)
        if size is not None:
            self.about["scratch_bytes"] = int(size)
        if hasattr(self._engine, "create_engine_inspector"):
            inspector = self._engine.create_engine_inspector()
            text = inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
            with contextlib.suppress(ValueError):
                self.about["inspector"] = json.loads(text).get("Layers", [])

    def _bind(self, feeds: dict[str, np.ndarray]) -> None:
        trt = self.trt
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        for name in sorted(names, key=lambda n: self._engine.get_tensor_mode(n) != trt.TensorIOMode.INPUT):
            kind = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
            if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                array = np.ascontiguousarray(feeds[name].astype(kind))
                if not self._context.set_input_shape(name, array.shape):
                    raise Failure(f"input {name}: the engine does not take shape {array.shape}")
            else:
                array = np.empty(tuple(self._context.get_tensor_shape(name)), kind)
            address = self._cuda.allocate(max(array.nbytes, 1))
            self._addresses.append(address)
            self._context.set_tensor_address(name, address)
            if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                self._cuda.to_device(address, array)
                self._cuda.synchronize()
            else:
                self._results[name] = address, array

    def _capture(self) -> None:
        try:
            self._cuda.begin_capture()
            self._enqueue()
            self._graph = self._cuda.end_capture()
        except RuntimeError as error:  # some layers cannot be captured
            self.modes, self.about["no_graph"] = ("stream",), str(error)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise Failure("the engine did not run")

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs for the reference inputs by name, of the last way of running that there is."""
        self._cuda.launch(self._graph) if self._graph else self._enqueue()
        for address, array in self._results.values():
            self._cuda.to_host(array, address)
        self._cuda.synchronize()
        return {name: array for name, (_, array) in self._results.items()}

    def time(self, mode: str) -> tuple[float | None, float]:
        """Milliseconds of one run: on the GPU, and as the caller sees it. Inputs stay on the device."""
        start = time.perf_counter()
        self._cuda.record(self._events[0])
        self._cuda.launch(self._graph) if mode == "graph" else self._enqueue()
        self._cuda.record(self._events[1])
        self._cuda.synchronize()
        host = 1e3 * (time.perf_counter() - start)
        return self._cuda.elapsed(*self._events), host

    def layers(self, runs: int) -> list[dict[str, Any]]:
        """Mean milliseconds of each layer, from the library's profiler, which slows the whole down."""
        base: Any = self.trt.IProfiler
        times: dict[str, list[float]] = {}

        class Profiler(base):
            def __init__(self) -> None:
                base.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times.setdefault(layer_name, []).append(ms)

        self._context.profiler = profiler = Profiler()
        for _ in range(runs):
            self._enqueue()
            self._cuda.synchronize()
        del profiler
        return [{"name": name, "ms": round(sum(ms) / runs, 6)} for name, ms in times.items()]

    def close(self) -> None:
        for address in self._addresses:
            self._cuda.free(address)
        for event in self._events:
            self._cuda.destroy_event(event)
        if self._graph:
            self._cuda.destroy_graph(self._graph)
        del self._context, self._engine
        self._cuda.close()


# ------------------------------------------------------------------------------------------------------------ measuring
def measure(engines: dict[str, Any], seconds: float, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Latencies by model and mode, and how many times faster each is than the first model.

    The models take turns in blocks of runs, in alternating order, so that a drift of clocks meets them alike; a ratio is
    of the blocks' medians in one round. There is at least one round.
    """
    found: dict[str, Any] = {name: {} for name in engines}
    ratios: dict[str, Any] = {name: {} for name in list(engines)[1:]}
    modes = [mode for mode in ("stream", "graph") if all(mode in engine.modes for engine in engines.values())]
    for mode in modes:
        times: dict[str, list[tuple[float | None, float]]] = {name: [] for name in engines}
        blocks: dict[str, list[float]] = {name: [] for name in engines}
        start = time.monotonic()
        done = 0
        while not done or (done < rounds and time.monotonic() - start < seconds / len(modes)):
            order = list(engines) if done % 2 == 0 else list(engines)[::-1]
            done += 1
            for name in order:
                runs = [engines[name].time(mode) for _ in range(BLOCK)][SETTLE:]
                times[name] += runs
                blocks[name].append(statistics.median(host if gpu is None else gpu for gpu, host in runs))
        for name, runs in times.items():
            rows = {"host_ms": percentiles([host for _, host in runs])}
            on_device = [gpu for gpu, _ in runs if gpu is not None]
            found[name][mode] = dict(rows, runs=len(runs), **({"gpu_ms": percentiles(on_device)} if on_device else {}))
        first = blocks[next(iter(engines))]
        for name, row in ratios.items():
            row[mode] = percentiles([a / b for a, b in zip(first, blocks[name])])
    return found, ratios


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {name: round(float(np.percentile(values, point)), 6) for name, point in PERCENTILES}


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
        raise Failure(f"{path}: {error.strerror or error}") from error
    except (AttributeError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise Failure(f"{path}: damaged ({type(error).__name__}: {error}); copy the bundle again") from error


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
                raise Failure(f"{Path(name).name}: not the file that was bundled; copy the bundle again")
    with reading(HERE / about["reference"]):
        with np.load(str(HERE / about["reference"])) as data:
            arrays = {key: data[key] for key in data.files}
        feeds = {key[6:]: value for key, value in arrays.items() if key.startswith("input:")}
        return feeds, [arrays[key] for key in sorted(arrays) if key.startswith("output:")]


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything; the result is what the JSON file holds."""
    bundle = read_bundle()
    wanted = bundle.get("engine")
    arguments.engine = library(arguments.engine, wanted)
    make = OnnxRuntime if arguments.engine == "onnxruntime" else TensorRT
    result: dict[str, Any] = {"format": FORMAT, "bundle": bundle, "engine": arguments.engine, "notes": []}
    result["device"], result["models"] = describe_device(), {}
    result["date"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    notes: list[str] = result["notes"]
    if wanted and wanted != arguments.engine:
        notes.append("measured with {}; the target {} runs {}".format(arguments.engine, bundle.get("target"), wanted))
    monitor = Monitor()
    engines: dict[str, Any] = {}
    try:
        start = time.monotonic()
        for name, about in bundle["models"].items():
            feeds, reference = read_reference(about)
            say(f"{name}: building with {arguments.engine} ...")
            engines[name] = engine = make(HERE / about["file"], arguments, feeds, about)
            outputs, order = engine.outputs(), about.get("outputs", ())
            found = [outputs[key] for key in order] if outputs.keys() == set(order) else list(outputs.values())
            parity = check(found, reference, TOLERANCES[about["precision"]])
            result["models"][name] = {"file": about["file"], "engine": engine.about, "parity": parity}
            result["version"] = engine.version
            say("{}: built in {} s, error {}".format(name, engine.about["build_seconds"], parity["error"]))
            if "SPARSE_WEIGHTS" in engine.about.get("flags", ()):
                say(f"{name}: kernels for 2:4 sparse weights are allowed")
            notes += [f"{name}: {text}" for text in (about.get("note"), parity.get("note")) if text]
        result["idle"] = average(monitor.since(start))
        say("measuring ...")
        times, result["ratios"] = measure(engines, arguments.seconds, arguments.rounds)
        for name, engine in engines.items():
            result["models"][name]["latency"] = times[name]
            if engine.about.get("contended"):
                notes.append(f"{name}: the machine was busy in {engine.about['contended']} runs")
            say(f"{name}: power and temperatures ...")
            result["models"][name]["power"] = watch(engine, monitor, arguments.power_seconds)
        for name, engine in engines.items():  # last: the profiler stays attached
            result["models"][name]["layers"] = engine.layers(20)
        result["monitor"] = monitor.source
    finally:
        monitor.close()
        for engine in engines.values():
            engine.close()
    notes += monitor.notes()
    return result


def library(name: str, preferred: str | None = None) -> str:
    """The library to measure with: the one that is named; else the preferred one, if it can run here, or the first that
    can. A TensorRT that is installed can do so where there is a GPU."""
    for candidate in sorted(LIBRARIES, key=lambda c: c != preferred) if name == "auto" else (name,):
        with contextlib.suppress(Exception):  # an installed library without its shared objects fails in many ways
            found = importlib.import_module(candidate)
            if candidate != "onnxruntime" and name == "auto":
                importlib.import_module("graphcomb_cuda").Cuda()
            if candidate == "onnxruntime" or hasattr(found, "Builder"):
                return candidate
    raise Failure(
        "{} can run here".format("none of " + ", ".join(LIBRARIES)) if name == "auto" else f"{name} not found here"
    )


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
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out.resolve()
    try:
        result = run(arguments, (lambda text: None) if arguments.quiet else lambda text: print(text, flush=True))
    except (Failure, RuntimeError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    part = arguments.out.with_name(f".{arguments.out.name}.{os.getpid()}.part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(arguments.out)
    bad = [name for name, row in result["models"].items() if "note" in row["parity"]]
    for name, row in result["ratios"].items():
        wrong = " and ".join(n for n in (next(iter(result["models"])), name) if n in bad)
        for mode, ratio in row.items():
            text = f"; no figure to rely on, the outputs of {wrong} are wrong" if wrong else ""
            print("{} ({}): {:.2f} times faster{}".format(name, mode, ratio["median"], text))
    for note in result["notes"]:
        print(f"note: {note}")
    print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
