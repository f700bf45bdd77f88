"""The largest values of layers on calibration data, and whether they leave the range of fp16 on others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from ...graph.program import Program
from ..common.divergence import Divergence
from ..common.observe import Observer
from ..common.processes import accelerator, placed
from .space import weight_of

LARGEST, MARGIN = 65504.0, 4.0  # of fp16; values on other inputs may be this many times as large


def ranges(program: Program, divergence: Divergence) -> dict[str, float]:
    """By weight, the largest magnitude among the inputs and outputs of its layer on the images that judge."""
    module = program.copy().module().eval()
    readers: dict[fx.Node, list[str]] = {}
    for node in module.graph.nodes:
        weight = weight_of(node)
        if weight is not None:
            for value in (node, node.args[0]):
                readers.setdefault(value, []).append(weight)
    largest: dict[str, float] = {}

    def see(node: fx.Node, value: torch.Tensor, values: Mapping[fx.Node, object]) -> None:
        for name in readers[node]:
            largest[name] = max(largest.get(name, 0.0), float(value.abs().max()))

    observer = Observer(module, readers, see)
    device = accelerator().device
    with torch.no_grad(), placed(module, device):
        for batch in divergence.batches:
            observer(batch.to(device))
    return largest


def overflows(largest: float) -> bool:
    """Whether a layer whose values are as large as this on calibration data may leave the range of fp16 on others."""
    return not MARGIN * largest <= LARGEST
