"""A latency table measures the time of layers on a device. For a device that is not at hand there is `roofline`.

A table measures every distinct layer at aligned sizes in the engine itself, and interpolates between these sizes. A model
with one copy of the layer and one with several run in turns (`runtime.bench`, guarded against a busy machine). Their
difference is the cost of a further copy: its kernel, the dispatch and cold weights, without the fixed cost of a run. The
outputs of copies of a convolution are added, as in a residual network, so that they keep the engine's own memory layout. How
layers slow each other down (caches, changes of layout) shows only in the whole program: `anchored` scales the sum of the
layers to its measured time. Source: ours.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from rich.console import Console
from rich.progress import Progress

from ...graph.comb.solve import Comb
from ...graph.errors import BadInput, Contended
from ...graph.files import write_json
from ...graph.program import Program
from ...graph.workload.layer import Layer, run_seconds
from ...graph.workload.layers import Layers
from ..devices.table import NAMES, Target, canonical, get_target
from ..engines.backends import BACKENDS
from ..engines.build import build_engine
from ..engines.ort import computes_half
from ..export.to_onnx import export_onnx
from ..measure.bench import bench
from ..measure.environment import environment
from ..summary import Uncertainty
from .micro_models import COPIES, TYPES, model

RUNS = (6, 12)  # smallest number of rounds that must count, and number after which a measurement ends
SECONDS, WHOLE = 4.0, 30.0  # time limits of measuring a layer and a whole program
PER_OCTAVE = 4  # largest number of sizes that are measured between n and 2 n
GRAIN = 4  # ONNX Runtime uses its blocked layout for a convolution only if the channels are multiples of this


class LatencyTable:
    """Measured seconds of layers for one device, engine and precision, kept in a JSON file.

    Missing entries are measured when they are needed, so a table grows with use and an interrupted measurement continues.

    - path: the file; it is created if it does not exist.
    - target: the device, which must be this machine: "cpu" for ONNX Runtime, "cpu-openvino", else the GPU with its library.
    - step: layers are measured at sizes that are multiples of it, and interpolated between them.
    - precision: "fp32" or "fp16", in which layers and whole programs are measured.

    The constructor raises BadInput for a file that is no latency table or one of another device, engine or precision, for a
    target that is not this machine, and for a precision in which the engine does not compute here. The methods that measure
    raise Contended if the machine is too busy.
    """

    def __init__(self, path: str | Path, target: str | Target = "cpu", step: int = 8, precision: str = "fp32"):
        self.path, self.step, self.precision = Path(path), step, precision
        self.target = get_target(target) if isinstance(target, str) else target
        self.about = about(self.target, precision)
        self.factor: float | None = None  # factor on all seconds of an `anchored` table
        self.entries: dict[str, float] = {}
        if self.path.is_file():
            try:
                stored = json.loads(self.path.read_text())
                self.entries = {str(k): float(v) for k, v in stored["seconds"].items()}
                described = stored["about"]
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise BadInput(f"{self.path}: not a latency table ({type(error).__name__})") from error
            if described != self.about:
                different = ", ".join(
                    f"{k} {described.get(k)}" for k in self.about if described.get(k) != self.about[k]
                )
                raise BadInput(
                    f"{self.path}: a latency table of another device, engine or precision ({different}); name another file"
                )

    def __str__(self) -> str:
        text = f"latency table of {self.about['engine']} on {self.about['device']}, {self.precision}"
        return text if self.factor is None else f"{text}, times {self.factor:.3g} as the whole program takes"

    @property
    def error(self) -> Uncertainty:
        """The uncertainty of sums over layers; for an anchored table, of programs that were made from the measured one."""
        if self.factor is None:
            return Uncertainty(
                factor=1.7, source="nine in ten of 62 networks in ONNX Runtime on one CPU were within that"
            )
        return Uncertainty(
            factor=1.3, source="nine in ten of 62 pruned networks in ONNX Runtime on one CPU were within that"
        )

    @property
    def per_run(self) -> float:
        """Seconds of a run that belong to no layer; measured if they are missing. Raises Contended."""
        if "run" not in self.entries:
            self._measure([None], progress=False)
        return (self.factor or 1.0) * self.entries["run"]

    def prepare(self, layers: Iterable[Layer], progress: bool = False) -> None:
        """Measure the missing entries that `seconds` of these layers needs. Raises Contended."""
        wanted = dict.fromkeys(corner for layer in layers for corner, _ in self._corners(layer))
        missing = [layer for layer in wanted if str(layer) not in self.entries]
        if missing:
            self._measure(missing, progress)

    def seconds(self, layer: Layer) -> float:
        """Return the seconds of one run of a layer, interpolated multilinearly between measured sizes. Raises Contended."""
        self.prepare([layer])
        interpolated = sum(share * self.entries[str(corner)] for corner, share in self._corners(layer))
        return (self.factor or 1.0) * interpolated

    def anchored(self, program: Program) -> LatencyTable:
        """Return a copy of the table with a factor on all seconds, so that the sum for a program is its measured latency.

        The program is measured as a whole at batch 1, and the table keeps the measurement like those of layers. Raises
        Contended if the machine is too busy.
        """
        anchored = copy.copy(self)
        anchored.factor = None
        layers = [layer for _, layer in Layers(Comb(program)).at({})]
        summed = run_seconds(anchored, layers)
        key = f"program {hashlib.sha256(str(layers).encode()).hexdigest()[:16]}"
        if key not in self.entries:
            self.entries[key] = self._whole(program)
            self._save()
        anchored.factor = self.entries[key] / summed
        return anchored

    def _corners(self, layer: Layer) -> Iterator[tuple[Layer, float]]:
        """Yield the layers of neighbouring measured sizes, with their weights in the interpolation."""
        sizes = dict(layer.sizes)
        if layer.op == "conv" and sizes["groups"] > 1:
            if sizes["groups"] == sizes["inputs"] == sizes["outputs"]:
                for n, share in self._around(sizes["groups"]):
                    yield layer.resized([n] * 3), share
            else:
                yield layer, 1.0
            return
        exact = ("groups", "batch", "heads")
        spans = [[(n, 1.0)] if name in exact else self._around(n) for name, n in layer.sizes]
        for corner in itertools.product(*spans):
            yield layer.resized(n for n, _ in corner), math.prod(share for _, share in corner)

    def _around(self, n: int) -> list[tuple[int, float]]:
        """Return the measured sizes next to a size n, with their weights in the interpolation.

        Sizes up to the step are measured themselves. So are those that are no multiple of GRAIN, since they may be several
        times slower than both neighbours.
        """
        if n <= self.step or n % GRAIN:
            return [(n, 1.0)]
        spacing = self.step * 2 ** max(0, int(math.log2(n / (PER_OCTAVE * self.step))))
        low = n // spacing * spacing
        return [(n, 1.0)] if low == n else [(low, 1 - (n - low) / spacing), (low + spacing, (n - low) / spacing)]

    # ------------------------------------------------------------------------------------------------------- measuring
    def _measure(self, layers: list[Layer] | list[None], progress: bool) -> None:
        """Measure layers (None: an empty run), and save what was measured even if an exception ends the measurement."""
        saved = time.monotonic()
        try:
            with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
                for layer in bar.track(layers, description="measuring layers"):
                    self.entries[str(layer) if layer else "run"] = self._time(layer)
                    if time.monotonic() - saved > 5:
                        self._save()
                        saved = time.monotonic()
        finally:
            self._save()

    def _time(self, layer: Layer | None) -> float:
        counts = (1,) if layer is None else (1, COPIES)
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / f"{count}.onnx" for count in counts]
            for count, file in zip(counts, files, strict=True):
                onnx.save(model(layer, count, self.precision), file)
            times = self._run(files, str(layer or "an empty run"), SECONDS)
        return times[0] if layer is None else max((times[1] - times[0]) / (COPIES - 1), 1e-9)

    def _whole(self, program: Program) -> float:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "whole.onnx"
            export_onnx(program, file, self.precision)
            return self._run([file], "the whole program", WHOLE)[0]

    def _run(self, files: list[Path], what: str, seconds: float) -> list[float]:
        """Return the median seconds of a run of each ONNX file. Raises Contended."""
        names = [f.stem for f in files]
        if not self.target.processor:
            files = [build_engine(f, self.target).path for f in files]
        engine = self.target.backend if self.target.processor else None
        result = bench(
            files, names=names, seconds=seconds, min_runs=RUNS[0], max_runs=RUNS[1], engine=engine, patient=True
        )
        if not all(t.ms for t in result.timings):
            raise Contended(
                f"latency table: the machine is too busy to measure ({what}); what was measured is kept in {self.path}, "
                "run it again"
            )
        times = [t.ms["median"] / 1e3 for t in result.timings]
        if len(times) == 2 and result.ratio:
            times[1] = times[0] / result.ratio  # the ratio of paired runs is the same on a machine that slows down
        return times

    def _save(self) -> None:
        write_json(self.path, {"about": self.about, "seconds": self.entries}, indent=0)


def about(target: Target, precision: str) -> dict[str, Any]:
    """Return what a table is valid for: target, device, engine, threads and precision.

    Raises BadInput if this machine is not the target, or cannot measure in the precision.
    """
    if precision not in TYPES:
        raise BadInput(f"latency table: layers are measured in {' or '.join(TYPES)}, not in {precision}; use roofline")
    target.alignment(precision)
    machine = environment()
    device = machine["cpu"] if target.processor else machine["gpu"]
    package = BACKENDS[target.backend].package
    version = machine["versions"].get(package)
    if device is None or version is None or (not target.processor and target.sm != _sm()):
        raise BadInput(f"latency table: {target.name} is not at hand ({package}, and its device); use roofline instead")
    if precision == "fp16" and target.processor and not (target.backend == "onnxruntime" and computes_half()):
        raise BadInput(
            f"latency table: {NAMES[target.backend]} has no fp16 kernels for this CPU and computes in fp32; measure in "
            "fp32, or use roofline"
        )
    return {"target": target.name, "device": device, "engine": f"{package} {version}", "threads": 1, "dtype": precision}


def _sm() -> str | None:
    """Return the compute capability of this machine's GPU in the form "SM86"; None without a GPU."""
    return "SM{}{}".format(*canonical(torch.cuda.get_device_capability())) if torch.cuda.is_available() else None
