"""A roofline predicts the time of layers on a device, from its data sheet or fitted to measurements of bench bundles.

The time of a layer is the larger of two times, its padded arithmetic and moving each of its tensors once, plus the time to
start its kernel (Williams et al., CACM 2009). `graph.workload` knows which nodes the target's library computes in one
kernel. Four numbers describe a device: the attained shares of its peak arithmetic and of its bandwidth, the seconds to
start a kernel, and the seconds of a run that belong to no kernel. They are nominal, or calibrated: fitted to measurements
by robust least squares (what the rows of the fit are is ours).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...graph.workload.layer import Layer
from ...graph.workload.libraries import Rules, library
from ..devices.table import Target, get_target
from ..summary import Uncertainty
from .measured import Measured, read_measured

# Nominal values: attained shares of peak and bandwidth, and seconds to start a kernel (inside a CUDA graph). Those of GPUs
# are a compromise between two public figures: ResNet-50 in INT8 on an AGX Orin takes 0.64 ms (MLPerf Inference 3.1, single
# stream), predicted 0.76 ms; YOLOv8n in INT8 at 640 x 640 on an Orin Nano takes 3.49 ms, predicted 1.8 ms.
GPU, CPU = (0.4, 0.6, 4e-6), (1.0, 1.0, 1e-6)
FEW = {"models": 4, "kernels": 12}  # with fewer models and fewer kernels only a common factor is fitted
ROBUST = 0.1  # errors of the logarithm above this count less than their square
PRIOR = 0.03  # weight that pulls the four numbers to the common factor: it decides only what was not measured
BOUNDS = ("compute", "memory", "launch")


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a layer.

    macs: multiply-accumulates. padded_macs: those with channels padded to the target's alignment. bytes: bytes moved.
    arithmetic, traffic, launch: seconds of the arithmetic, of moving the bytes and of starting the kernel.
    """

    macs: int
    padded_macs: int
    bytes: float
    arithmetic: float
    traffic: float
    launch: float

    @property
    def seconds(self) -> float:
        """The predicted seconds of the layer."""
        return self.launch + max(self.arithmetic, self.traffic)

    @property
    def bound(self) -> str:
        """The largest part of the time: "compute", "memory" or "launch"."""
        parts = (self.arithmetic, self.traffic, self.launch)
        return BOUNDS[parts.index(max(parts))]


SHEET = {  # by whether the target is a GPU, where the uncertainty of a data sheet's predictions is known from
    True: "nothing was measured; two networks on Orin take 0.8 and 1.9 times as long as predicted, by public figures",
    False: "nothing was measured; nine in ten of 62 networks in ONNX Runtime on one CPU were within that",
}


@dataclass(frozen=True)
class Roofline:
    """Predicts the seconds of layers on a target in one precision.

    - target, dtype: the device, and the precision, such as "fp16".
    - compute, memory: attained shares of the target's peak arithmetic and bandwidth, from 0 to 1; None: nominal values.
    - launch: seconds to start a kernel; None: the nominal value.
    - per_run: seconds of a run that belong to no layer.
    - calibration: how these numbers were fitted (see `calibrated`); None for a data sheet, whose predictions can rank
      layers but do not replace a benchmark.
    - sparse: whether weights are 2:4 sparse: half of the arithmetic (the peak rate of a data sheet), and of every four
      weights two values with two bits each for their places. Its error is not known from measurements.
    """

    target: Target
    dtype: str = "fp16"
    compute: float | None = None
    memory: float | None = None
    launch: float | None = None
    per_run: float = 0.0
    calibration: Mapping[str, Any] | None = field(default=None, compare=False)
    sparse: bool = False

    def __str__(self) -> str:
        head = f"roofline of {self.target.board}, {self.dtype}"
        if self.calibration is None:
            return head
        compute, memory, start = self.rates
        fitted = f"{compute:.3g} of peak, {memory:.3g} of bandwidth"
        return f"{head}, calibrated: {fitted}, {1e6 * start:.3g} us a kernel, {1e6 * self.per_run:.3g} us a run"

    @property
    def rates(self) -> tuple[float, float, float]:
        """(attained share of the peak, attained share of the bandwidth, seconds to start a kernel)."""
        nominal = GPU if self.target.compute_capability is not None else CPU
        chosen = (self.compute, self.memory, self.launch)
        return tuple(n if g is None else g for g, n in zip(chosen, nominal, strict=True))  # type: ignore[return-value]

    @property
    def start(self) -> float:
        """Seconds to start a kernel."""
        return self.rates[2]

    @property
    def rules(self) -> Rules:
        """Which nodes the target's library computes in one kernel."""
        return library(self.target.backend, self.dtype)

    @property
    def measured(self) -> bool:
        """Whether the roofline was fitted to measurements."""
        return self.calibration is not None

    @property
    def error(self) -> Uncertainty:
        """The uncertainty of its predictions."""
        if self.calibration is None:
            return Uncertainty(factor=2.0, source=SHEET[self.target.compute_capability is not None])
        left = self.calibration.get("left_out")
        spread = left or self.calibration.get("error") or {"worst": 1.0}
        what = "every model predicted from the others alone" if left else "over the models that it was fitted to"
        return Uncertainty(factor=1 + spread["worst"], source=f"the worst, {what}")

    def prepare(self, layers: Iterable[Layer], progress: bool = False) -> None:
        """Do nothing: a roofline measures nothing. The method is part of the protocol `Latency`."""

    def seconds(self, layer: Layer) -> float:
        """Return the predicted seconds of a layer. Raises BadInput as `estimate` does."""
        return self.estimate(layer).seconds

    def estimate(self, layer: Layer) -> Estimate:
        """Return the cost of a layer. Raises BadInput for a precision that the target does not compute in."""
        width = {"fp32": 4, "tf32": 4, "int8": 1, "fp8": 1, "fp4": 0.5}.get(self.dtype, 2)
        padded = layer.macs(self.target.alignment(self.dtype, self.sparse))
        moved = width * layer.entries()
        if self.sparse and layer.op in ("conv", "matmul"):
            # Half of the arithmetic, and of every four weights two values with two bits each for their places.
            padded //= 2
            moved -= _weights(layer) * (width / 2 - 1 / 8)
        compute, memory, start = self.rates
        return Estimate(
            layer.macs(), padded, moved, 2 * padded / (compute * self.target.peak(self.dtype)),
            moved / (memory * self.target.bandwidth * 1e9), layer.launches * start,
        )  # fmt: skip

    @classmethod
    def calibrated(
        cls,
        results: str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]],
        target: str | Target | None = None,
        dtype: str | None = None,
    ) -> Roofline:
        """Return the roofline that fits the measurements of bench bundles best.

        - results: results.json of one or more bundles, as paths or as their contents.
        - target, dtype: target and precision that the results must have; by default those of the first results.

        With few measurements only a common factor is fitted. `calibration` has what was fitted, the numbers of models and
        kernels, and the remaining relative error over the models (docs/formats.md, Calibration).

        Raises BadInput as `measured.read_measured` does, and for an unknown target.
        """
        many = [results] if isinstance(results, str | Path | Mapping) else list(results)
        device = get_target(target) if isinstance(target, str) else target
        runs, about = read_measured(many, device, dtype)
        base = cls(get_target(about["target"]), about["precision"])
        fit, fitted = _fit(base, runs)
        errors = [abs(_whole(fit, run) / run.seconds - 1) for run in runs]
        others = [(run, _fit(base, [r for r in runs if r is not run])[0]) for run in runs if len(runs) > 2]
        left = [abs(_whole(roofline, run) / run.seconds - 1) for run, roofline in others]
        record = about | {
            "models": len(runs), "kernels": sum(len(run.kernels) for run in runs), "fitted": fitted,
            "compute_share": fit.rates[0], "memory_share": fit.rates[1], "launch_us": 1e6 * fit.start,
            "run_us": 1e6 * fit.per_run, "error": _spread(errors), "left_out": _spread(left),
        }  # fmt: skip
        return dataclasses.replace(fit, calibration=record)


def _weights(layer: Layer) -> int:
    """Return the number of a layer's weights; 0 for a product of two computed tensors."""
    if layer.op == "conv":
        return int(layer["inputs"] * layer["outputs"] // max(layer["groups"], 1) * math.prod(layer["kernel"]))
    return int(layer["inputs"] * layer["outputs"]) if layer.op == "matmul" and layer["shared"] else 0


def _spread(errors: list[float]) -> dict[str, float] | None:
    return {"median": float(np.median(errors)), "worst": max(errors)} if errors else None


def _whole(roofline: Roofline, run: Measured) -> float:
    """Return the predicted seconds of one run of a measured model."""
    return roofline.per_run + sum(map(roofline.seconds, run.layers))


def calibration_text(record: Mapping[str, Any]) -> str:
    """Return a sentence about a calibration: what it was fitted to, and the remaining error."""
    text = f"calibrated with {record['models']} models and {record['kernels']} kernels measured by {record['engine']}"
    text += f" ({', '.join(record['fitted'])})"
    for key, name in (("error", "error"), ("left_out", "of models left out")):
        if record[key]:
            text += f"; {name} {record[key]['median']:.1%} in the median, {record[key]['worst']:.1%} at worst"
    return text


# -------------------------------------------------------------------------------------------------------------- the fit
def _fit(base: Roofline, runs: list[Measured]) -> tuple[Roofline, list[str]]:
    """Return the roofline that fits the measured models best, and the names of what was fitted."""
    rows = [(run.layers, sum(layer.launches for layer in run.layers), 1, run.seconds, 1.0) for run in runs]
    kernels = [
        ([run.layers[i] for i in which], count, 0, seconds, seconds / run.seconds)
        for run in runs
        for which, count, seconds in run.kernels
    ]
    factor = math.exp(float(np.median([math.log(run.seconds / _whole(base, run)) for run in runs])))
    compute, memory, begin = base.rates
    scaled = _roofline(base, (compute / factor, memory / factor, begin * factor, 0.0))
    if len(rows) < FEW["models"] and len(kernels) < FEW["kernels"]:
        return scaled, ["common factor"]

    # One row of the fit per model and per kernel: its layers, number of launches, number of runs (1 for a model, 0 for a
    # kernel), measured seconds, and weight: 1 for a model, and its share of the run for a kernel. The error of a row is the
    # logarithm of predicted by measured seconds.
    full = dataclasses.replace(base, compute=1.0, memory=1.0)
    sheet = [full.estimate(layer) for layers, *_ in (*rows, *kernels) for layer in layers]
    arithmetic, traffic = np.array([(e.arithmetic, e.traffic) for e in sheet]).T
    begins = np.cumsum([0, *(len(layers) for layers, *_ in (*rows, *kernels))])[:-1]
    launches, whole, measured, weight = np.array([row[1:] for row in (*rows, *kernels)], dtype=float).T

    def errors(numbers: np.ndarray) -> np.ndarray:
        compute, memory, launch, run = np.exp(numbers)
        work = np.add.reduceat(np.maximum(arithmetic / compute, traffic / memory), begins)
        logs = np.log((work + launch * launches + run * whole) / measured)
        return np.concatenate([np.sqrt(weight) * logs, PRIOR * (numbers - start)])

    from scipy.optimize import least_squares  # imported here, since the import takes half a second

    start = np.log([*scaled.rates, scaled.start])
    fit = least_squares(errors, start, loss="soft_l1", f_scale=ROBUST, ftol=1e-12, xtol=1e-8)
    return _roofline(base, np.exp(fit.x)), ["compute_share", "memory_share", "launch_us", "run_us"]


def _roofline(base: Roofline, numbers: Iterable[float]) -> Roofline:
    compute, memory, launch, run = map(float, numbers)
    return dataclasses.replace(base, compute=compute, memory=memory, launch=launch, per_run=run)
