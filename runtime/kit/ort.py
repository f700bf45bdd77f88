"""Measure models of a bench bundle with ONNX Runtime on the CPU: for a device without TensorRT, and to test a bundle."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from .contents import Failure, complete
from .measuring import GUARD, TRIES

KERNEL = "_kernel_time"  # suffix of a node's name in ONNX Runtime's profile


def session_options(threads: int, half: bool, fp8: bool = False) -> Any:
    """Return the options of a session that is to be measured. half, fp8: whether the model computes in fp16, or has Q/DQ
    nodes of FP8."""
    import onnxruntime  # imported here, since the device may not have it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Waiting threads must sleep: spinning ones use CPU time of other cores and disturb every measurement.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if half:
        # Seen with fp16 on CPUs: the extended optimisations crash the process (1.31), and with memory patterns
        # LayerNormalization is wrong from the second run on (onnxruntime issue 27768).
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.enable_mem_pattern = False
    if fp8:
        # The optimisations take FP8 for integers (1.31): they drop a ReLU before a QuantizeLinear, and make operators that
        # have no FP8.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


class OnnxRuntime:
    """A model of a bundle in a session of ONNX Runtime."""

    modes: tuple[str, ...] = ("stream",)

    def __init__(
        self, path: Path, arguments: argparse.Namespace, feeds: dict[str, np.ndarray], about: dict[str, Any]
    ) -> None:
        import onnxruntime  # imported here, since the device may not have it

        start = time.perf_counter()
        self._path, self._threads, self._precision = path, arguments.threads, about["precision"]
        try:
            self._session = self._open()
        except Exception as error:  # ONNX Runtime's exceptions share no public base
            raise Failure(f"{path.name}: ONNX Runtime refuses it: {error}") from error
        self.version = onnxruntime.__version__
        seconds = round(time.perf_counter() - start, 3)
        self.about: dict[str, Any] = {"build_seconds": seconds, "bytes": path.stat().st_size}
        kinds = {i.name: i.type for i in self._session.get_inputs()}
        complete(path, kinds, feeds)
        self._feeds = {k: v.astype(np.float16 if kinds[k] == "tensor(float16)" else v.dtype) for k, v in feeds.items()}
        loaded = time.perf_counter()
        self._session.run(None, self._feeds)
        first = round(1e3 * (time.perf_counter() - loaded), 3)
        self.about["cold_ms"] = {"load": round(1e3 * seconds, 3), "first_run": first}

    def _open(self, profile: str | None = None) -> Any:
        import onnxruntime  # as above

        options = session_options(self._threads, self._precision == "fp16", self._precision == "fp8")
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile
        return onnxruntime.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])

    def outputs(self, feeds: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Return the outputs by name. feeds: inputs by name, by default the reference inputs."""
        names = [output.name for output in self._session.get_outputs()]
        given = self._feeds if feeds is None else {k: v.astype(self._feeds[k].dtype) for k, v in feeds.items()}
        return dict(zip(names, self._session.run(names, given)))

    def throughput(self, streams: int, seconds: float) -> float:
        """Return the runs per second of `streams` threads that call the session at once, over `seconds`."""
        ends, counts = time.perf_counter() + seconds, [0] * streams

        def call(index: int) -> None:
            while not counts[index] or time.perf_counter() < ends:
                self._session.run(None, self._feeds)
                counts[index] += 1

        threads = [threading.Thread(target=call, args=(index,)) for index in range(streams)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts) / (time.perf_counter() - start)

    def time(self, mode: str) -> tuple[float | None, float]:
        """Run once and return (None, milliseconds on the host); None stands for the time on an accelerator.

        With one thread a run during which another process had the processor is repeated. After TRIES such runs the last one
        counts, and `about["contended"]` is increased.
        """
        for _ in range(TRIES):
            cpu, start = time.process_time(), time.perf_counter()
            self._session.run(None, self._feeds)
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
            if self._threads > 1 or cpu >= GUARD * wall:
                break
        else:
            self.about["contended"] = self.about.get("contended", 0) + 1
        return None, 1e3 * wall

    def layers(self, runs: int) -> list[dict[str, Any]]:
        """Return the median milliseconds of each layer over `runs` runs of a separate session that is profiled."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(str(Path(folder) / "profile"))
            for _ in range(runs + 1):  # the first run only warms up
                session.run(None, self._feeds)
            events = json.loads(Path(session.end_profiling()).read_text())
        times: dict[str, list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(KERNEL):
                times.setdefault(event["name"][: -len(KERNEL)], []).append(event["dur"] / 1e3)
        return [{"name": name, "ms": round(statistics.median(ms[1:]), 6)} for name, ms in times.items() if ms[1:]]

    def close(self) -> None:
        del self._session
