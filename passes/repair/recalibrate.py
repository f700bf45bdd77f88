"""The pass that measures the statistics of BatchNorm anew."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...graph.errors import BadInput
from ...graph.nodes import arguments, fetch, op_name
from ...graph.program import Program
from ..base import Context, Pass, PassResult, Refusal, check_field
from ..common.processes import accelerator, placed, summed
from ..common.repeat import seeded
from ..common.scoring import evaluating
from .images import take_images
from .stepwise import Memory, Stepwise


@dataclass(frozen=True)
class Recalibrate(Pass):
    """Measure the running statistics of BatchNorm anew, layer after layer, on unlabelled images.

    After a removal, the inputs of a BatchNorm may have another mean and variance than those that it was trained with. Each
    layer's statistics are measured with those of the layers before it already set. Where images are few, the old statistics
    can keep a share: with n images, and a `prior` of as many images as the old statistics are to count for, the new share
    is n / (n + prior).

    samples: images to take from the data. statistics: "both", or "variance" to leave the means as they are. prior: number
    of images, see above. memory: gigabytes of activations in memory; the rest goes to temporary files.

    It does not help everywhere: compare before and after on held-out images. The record names each layer with the mean of
    the ratios of its new variances to the old. Left alone, with the reason: layers with inputs that are not finite, and
    layers that share statistics. Raises BadInput without data.
    """

    samples: int = 256
    statistics: Literal["both", "variance"] = "both"
    prior: float = 0.0
    memory: float = 4.0

    def __post_init__(self) -> None:
        check_field(self, "samples", self.samples >= 1, "a whole number, at least 1")
        check_field(self, "prior", self.prior >= 0, "a number of images, at least 0")
        check_field(self, "memory", self.memory >= 0, "gigabytes, at least 0")

    def run(self, program: Program, context: Context) -> PassResult:
        if context.data is None:
            raise BadInput("Recalibrate: needs images (labels are not needed); pass data=")
        result = program.copy()
        module = result.module()
        changed: list[dict[str, Any]] = []
        refused: list[Refusal] = []
        with (
            seeded(context.seed, context.data), evaluating(module), placed(module, accelerator().device), torch.no_grad()
        ):  # fmt: skip
            images = take_images(result, context, self.samples)
            run = Stepwise(module, images.inputs, Memory(self.memory * 1e9))
            norms = [n for n in run.nodes if op_name(n) == "batch_norm" and arguments(n)["running_mean"] is not None]
            users = Counter(str(arguments(node)["running_mean"].target) for node in norms)
            for node in norms:
                a = arguments(node)
                name = str(a["running_mean"].target)
                if users[name] > 1:
                    refused.append(Refusal(name, "several layers share these statistics"))
                    continue
                run.run_before(node)
                statistics = _statistics(run.values[a["input"]], images.halves)
                if statistics is None:
                    refused.append(Refusal(name, "its inputs are not finite numbers"))
                else:
                    changed.append(self._write(module, a, statistics, images.count))
        return PassResult(result, {"samples": images.count, "changed": changed, "refused": refused})

    def _write(self, module: Any, a: dict[str, Any], moments: tuple[Tensor, Tensor], count: int) -> dict[str, Any]:
        share = count / (count + self.prior)
        mean, variance = (fetch(module, str(a[key].target)) for key in ("running_mean", "running_var"))
        ratio = float((moments[1] / variance.double().clamp(min=1e-12)).mean())
        if self.statistics == "both":
            mean.copy_((1 - share) * mean.double() + share * moments[0])
        variance.copy_((1 - share) * variance.double() + share * moments[1])
        return {"what": str(a["running_mean"].target), "variance": ratio}


def _statistics(values: list[Tensor], halves: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Mean and (unbiased) variance of every channel over all images and positions; None where they are not finite."""
    sums = torch.zeros(3, values[0].shape[1], dtype=torch.float64, device=values[0].device)
    for value, half in zip(values, halves, strict=True):
        x = value[half >= 0].double().movedim(1, 0).flatten(1)
        sums += torch.stack([torch.full_like(sums[0], x.shape[1]), x.sum(1), x.square().sum(1)])
    count, total, squares = summed(sums)
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0) * count / (count - 1).clamp(min=1)
    return (mean, variance) if bool((mean + variance).isfinite().all()) else None
