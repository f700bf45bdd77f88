"""A roofline: how long layers take on a device, from its data sheet, or fitted to what a bench bundle measured there.

A layer takes the longer of its padded arithmetic and of moving its tensors once, and starting its kernel (Williams et al.,
CACM 2009); which nodes of a program are one kernel, the target's library decides (`graph.workload`). The device attains a
share of its peak arithmetic and a share of its bandwidth, and a kernel and a run cost seconds of their own: four numbers,
which an engineer can read, nominal or, calibrated, fitted to measurements by robust least squares (the rows are ours).
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

# What a data sheet lacks, nominally: attained shares of peak and bandwidth, seconds to start a kernel (inside a CUDA graph).
# On GPUs a compromise of two public figures: ResNet-50 in INT8 on an AGX Orin takes 0.64 ms (MLPerf Inference 3.1, single
# stream), where these say 0.76; a YOLOv8n in INT8 at 640 x 640 on an Orin Nano 3.49 ms, where these say 1.8.
GPU, CPU = (0.4, 0.6, 4e-6), (1.0, 1.0, 1e-6)
FEW = {"models": 4, "kernels": 12}  # with fewer of both, one factor is all that is fitted
ROBUST = 0.1  # log error from which on an outlier counts less than its square
PRIOR = 0.03  # how strongly the four numbers are held to the common factor: decides only what was not measured
BOUNDS = ("compute", "memory", "launch")


@dataclass(frozen=True)
class Estimate:
    """What a layer costs: multiply-accumulates, also as the kernel pads them, bytes that are moved, and seconds of each."""

    macs: int
    padded_macs: int
    bytes: float
    arithmetic: float
    traffic: float
    launch: float

    @property
    def seconds(self) -> float:
        return self.launch + max(self.arithmetic, self.traffic)

    @property
    def bound(self) -> str:
        """What takes longest: "compute", "memory" or "launch"."""
        parts = (self.arithmetic, self.traffic, self.launch)
        return BOUNDS[parts.index(max(parts))]


SHEET = {  # how far off a data sheet's predictions are, on a GPU or a CPU
    True: "nothing was measured, and public figures of two networks on Orin are 0.8 and 1.9 times it",
    False: "nothing was measured; nine in ten of 62 networks on one CPU were within that",
}


@dataclass(frozen=True)
class Roofline:
    """Predicts the seconds of layers on a target in one precision.

    - target, dtype: the device, and the precision ("fp16" and so on).
    - compute, memory: shares of the target's peak arithmetic and bandwidth that are attained, from 0 to 1.
    - launch: seconds to start a kernel. All three are nominal by default.
    - per_run: seconds of a run that belong to no layer.
    - calibration: how these were fitted (see `calibrated`); None for a plain data sheet, which ranks layers and
      predicts no benchmark.
    """

    target: Target
    dtype: str = "fp16"
    compute: float | None = None
    memory: float | None = None
    launch: float | None = None
    per_run: float = 0.0
    calibration: Mapping[str, Any] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        head = f"roofline of {self.target.board}, {self.dtype}"
        if self.calibration is None:
            return head
        compute, memory, start = self.rates
        fitted = f"{compute:.3g} of peak, {memory:.3g} of bandwidth"
        return f"{head}, calibrated: {fitted}, {1e6 * start:.3g} us a kernel, {1e6 * self.per_run:.3g} us a run"

    @property
    def rates(self) -> tuple[float, float, float]:
        """Attained shares of peak and bandwidth, and seconds to start a kernel."""
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
        """Whether anything was measured."""
        return self.calibration is not None

    @property
    def error(self) -> Uncertainty:
        """How far off its predictions are known to be."""
        if self.calibration is None:
            return Uncertainty(factor=2.0, source=SHEET[self.target.compute_capability is not None])
        left = self.calibration.get("left_out")
        spread = left or self.calibration.get("error") or {"worst": 1.0}
        what = "every model predicted from the others alone" if left else "over the models that it was fitted to"
        return Uncertainty(factor=1 + spread["worst"], source=f"the worst, {what}")

    def prepare(self, layers: Iterable[Layer], progress: bool = False) -> None:
        """Nothing to prepare."""

    def seconds(self, layer: Layer) -> float:
        return self.estimate(layer).seconds

    def estimate(self, layer: Layer) -> Estimate:
        """What the layer costs, part by part. Raises BadInput for a dtype the target lacks."""
        width = {"fp32": 4, "tf32": 4, "int8": 1, "fp8": 1, "fp4": 0.5}.get(self.dtype, 2)
        padded = layer.macs(self.target.alignment(self.dtype))
        moved = width * layer.entries()
        compute, memory, start = self.rates
        return Estimate(
            layer.macs(), padded, moved, 2 * padded / (compute * self.target.peak(self.dtype)),
            moved / (memory * self.target.bandwidth * 1e9), 0.0 if layer.joined else start,
        )  # fmt: skip

    @classmethod
    def calibrated(
        cls,
        results: str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]],
        target: str | Target | None = None,
        dtype: str | None = None,
    ) -> Roofline:
        """The roofline that fits what bench bundles measured.

        results: the JSON of one or more, as files or as read. target, dtype: checked against the results, and by default
        theirs. With few measurements only a common factor is fitted. `calibration` says what was fitted and from how many
        models and kernels, and the relative error that remains over the models: `error` (median, worst), and `left_out`,
        where each model is predicted from the others alone.

        Raises BadInput for results of another target, engine or precision, or without the layers of their models.
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


def _spread(errors: list[float]) -> dict[str, float] | None:
    return {"median": float(np.median(errors)), "worst": max(errors)} if errors else None


def _whole(roofline: Roofline, run: Measured) -> float:
    """Predicted seconds of a run."""
    return roofline.per_run + sum(map(roofline.seconds, run.layers))


def calibration_text(record: Mapping[str, Any]) -> str:
    """From what a roofline was calibrated, and how far off it still is."""
    text = f"calibrated with {record['models']} models and {record['kernels']} kernels measured by {record['engine']}"
    text += f" ({', '.join(record['fitted'])})"
    for key, name in (("error", "error"), ("left_out", "of models left out")):
        if record[key]:
            text += f"; {name} {record[key]['median']:.1%} in the median, {record[key]['worst']:.1%} at worst"
    return text


# -------------------------------------------------------------------------------------------------------------- the fit
def _fit(base: Roofline, runs: list[Measured]) -> tuple[Roofline, list[str]]:
    """The roofline closest to the runs, and the names of what was fitted."""
    rows = [(run.layers, len(run.layers), 1, run.seconds, 1.0) for run in runs]
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

    # Each row: seconds of the layers' arithmetic and traffic at full rate, launches, runs, measured seconds, and its
    # weight: 1 for a model, which its kernels share by their time. An error is that of the logarithm.
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

    from scipy.optimize import least_squares  # here, since it takes half a second to import and nothing else needs it

    start = np.log([*scaled.rates, scaled.start])
    fit = least_squares(errors, start, loss="soft_l1", f_scale=ROBUST, ftol=1e-12, xtol=1e-8)
    return _roofline(base, np.exp(fit.x)), ["compute_share", "memory_share", "launch_us", "run_us"]


def _roofline(base: Roofline, numbers: Iterable[float]) -> Roofline:
    compute, memory, launch, run = map(float, numbers)
    return dataclasses.replace(base, compute=compute, memory=memory, launch=launch, per_run=run)
