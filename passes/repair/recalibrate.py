"""The pass that measures the statistics of BatchNorm anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx

from ...graph.compat import exact_kernels
from ...graph.errors import BadInput
from ...graph.nodes import arguments, fetch, op_name
from ...graph.program import Program
from ..base import Context, Pass, PassResult, Refusal, check_field
from ..common.feed import check_inputs
from ..common.processes import accelerator, placed, summed
from ..common.repeat import seeded
from ..common.scoring import evaluating
from .images import Images, spread, take_images
from .repair import since
from .stepwise import Memory, Stepwise

FLAT = 1e-6  # a variance below this share of the layer's own is that of a constant


@dataclass(frozen=True)
class Recalibrate(Pass):
    """Measure the running statistics of BatchNorm anew, layer after layer, on unlabelled images.

    After a removal, the inputs of a BatchNorm may have another mean and variance than those that it was trained with. Each
    layer's statistics are measured with those of the layers before it already set. What they are compared with depends on
    `reference`:

    - "dense": with the dense network (the context's teacher) on the same images. With mu and s the mean and deviation of an
      input on these images, dense and now, and m and v the statistics of the dense layer, the new ones are
      v' = v (s_now / s_dense)^2 and m' = mu_now - (mu_dense - m) s_now / s_dense, so that what the layer writes has the
      dense mean and variance on these images, which need not be like those of the training. Least-squares weights have
      outputs with too little variance, and this gives it back.
    - "images": the statistics are those of the images, as if the layer had been trained on them.
    - "auto": "dense" if there is a teacher, else "images".

    Where images are few, the old statistics can keep a share: with n images, and a `prior` of as many images as the old
    statistics are to count for, the new share is n / (n + prior).

    samples: images to take from the data. statistics: "both", or "variance" to leave the means as they are. prior: number
    of images, see above. memory: gigabytes of activations in memory; the rest goes to temporary files.

    It does not help everywhere: compare before and after on held-out images. The record names each layer with the mean of
    the ratios of its new variances to the old. Left alone, with the reason: layers with inputs that are not finite,
    layers that share statistics, layers whose inputs do not vary (nor does a single channel that does not, with "images")
    and, with "dense", layers that the dense network does not have, or whose output is added to another (`Repair` fits them
    to the sum, not to the dense layer). Raises BadInput without data, and for "dense"
    without a teacher. Source: ours; "dense" after REPAIR (Jordan et al., arXiv 2211.08403).
    """

    samples: int = 256
    reference: Literal["auto", "dense", "images"] = "auto"
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
        dense = None if self.reference == "images" else context.teacher
        if dense is None and self.reference == "dense":
            raise BadInput("Recalibrate.reference: dense needs the dense program to compare with; pass teacher=")
        if dense is not None:
            check_inputs(dense, program)
        result = program.copy()
        changed: list[dict[str, Any]] = []
        refused: list[Refusal] = []
        with ExitStack() as stack:
            stack.enter_context(seeded(context.seed, context.data))
            for module in [p.graph_module for p in (result, dense) if p is not None]:
                stack.enter_context(evaluating(module))
                stack.enter_context(placed(module, accelerator().device))
            stack.enter_context(torch.no_grad())
            stack.enter_context(exact_kernels())
            images = take_images(result, context, self.samples)
            memory = Memory(self.memory * 1e9)
            module, run = result.module(), Stepwise(result.module(), images.inputs, memory)
            compared = None if dense is None else Compared(dense, program, images, memory)
            norms = [n for n in run.nodes if op_name(n) == "batch_norm" and arguments(n)["running_mean"] is not None]
            users = Counter(str(arguments(node)["running_mean"].target) for node in norms)
            for node in norms:
                a = arguments(node)
                name = str(a["running_mean"].target)
                if users[name] > 1:
                    refused.append(Refusal(name, "several layers share these statistics"))
                    continue
                if compared is not None and (why := compared.why_not(name, node)):
                    refused.append(Refusal(name, why))
                    continue
                run.run_before(node)
                new = self._new(module, name, a, run.values[a["input"]], images, compared)
                if isinstance(new, str):
                    refused.append(Refusal(name, new))
                else:
                    changed.append(self._write(module, a, new, images.count))
        return PassResult(result, {"samples": images.count, "changed": changed, "refused": refused})

    def _new(
        self, module: Any, name: str, a: dict[str, Any], values: list[Tensor], images: Images, compared: Compared | None
    ) -> tuple[Tensor, Tensor] | str:
        """The new mean and variance of a layer, or the reason why it keeps its own. a: its arguments. values: its inputs."""
        mean, variance = (fetch(module, str(a[key].target)).double() for key in ("running_mean", "running_var"))
        now = _statistics(values, images.halves)
        if now is None:
            return "its inputs are not finite numbers"
        flat = now[1] <= FLAT * (variance + a["eps"])  # of a single value, too
        if bool(flat.all()):
            return "its inputs do not vary over these images"
        if compared is not None:
            return compared.statistics(name, now, mean, variance + a["eps"], a["eps"])
        return torch.where(flat, mean, now[0]), torch.where(flat, variance, now[1])

    def _write(self, module: Any, a: dict[str, Any], moments: tuple[Tensor, Tensor], count: int) -> dict[str, Any]:
        share = count / (count + self.prior)
        mean, variance = (fetch(module, str(a[key].target)) for key in ("running_mean", "running_var"))
        ratio = float((moments[1] / variance.double().clamp(min=1e-12)).mean())
        if self.statistics == "both":
            mean.copy_((1 - share) * mean.double() + share * moments[0])
        variance.copy_((1 - share) * variance.double() + share * moments[1])
        return {"what": str(a["running_mean"].target), "variance": ratio}


class Compared:
    """The dense network, run over the same images. norms: its BatchNorms by the names of their means."""

    def __init__(self, dense: Program, program: Program, images: Images, memory: Memory):
        self.run, self.halves = Stepwise(dense.module(), images.inputs, memory), images.halves
        self.removed = since(dense, program)
        named = ((n, arguments(n)["running_mean"]) for n in self.run.nodes if op_name(n) == "batch_norm")
        self.norms = {str(mean.target): node for node, mean in named if mean is not None}
        for node in self.norms.values():  # the two networks may run their layers in another order
            self.run.hold(arguments(node)["input"])

    def why_not(self, name: str, node: fx.Node) -> str | None:
        """Why a layer cannot be compared, or None."""
        if name not in self.norms:
            return "the dense network has no such layer"
        if any(op_name(user) == "add" for user in node.users):
            return "it goes into a sum, where it makes up for what the other operand lacks"
        return None

    def statistics(
        self, name: str, now: tuple[Tensor, Tensor], mean: Tensor, variance: Tensor, eps: float
    ) -> tuple[Tensor, Tensor] | str:
        """The mean and variance with which a layer writes the dense mean and variance on the images, or the reason why there
        are none. now: those of its inputs. mean, variance: those that it has, the latter with eps."""
        source = arguments(self.norms[name])["input"]
        self.run.run_through(source)
        dense = _statistics(self.run.values[source], self.halves)
        self.run.release(source)
        if dense is None:
            return "the dense network's inputs are not finite numbers"
        left = np.delete(np.arange(len(dense[0])), list(self.removed.get(name, {}).get(0, ())))
        if len(left) != len(mean):
            return "what was removed from it is not known"
        (mean_dense, spread), (mean_now, spread_now) = (t[torch.from_numpy(left).to(t.device)] for t in dense), now
        flat = torch.minimum(spread, spread_now) <= FLAT * variance  # a constant channel has no scale to compare
        ratio = torch.where(flat, 1.0, spread_now / spread.clamp(min=1e-300))
        return mean_now - (mean_dense - mean) * ratio.sqrt(), (variance * ratio - eps).clamp(min=0)


def _statistics(values: list[Tensor], halves: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Mean and (unbiased) variance of every channel over all images and positions; None where they are not finite."""

    def total(of: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum over all images and positions of numbers of each, `(channels,)`. Channels come first in what `of` gets."""
        sums = torch.zeros(values[0].shape[1], dtype=torch.float64, device=values[0].device)
        for value, half in zip(values, halves, strict=True):
            counted = spread(half, len(value)).to(value.device) >= 0
            sums += of(value[counted].double().movedim(1, 0).flatten(1)).sum(1)
        return summed(sums)

    count = total(torch.ones_like)
    mean = total(lambda x: x) / count
    variance = total(lambda x: (x - mean[:, None]).square()) / (count - 1).clamp(min=1)
    return (mean, variance) if bool((mean + variance).isfinite().all()) else None
