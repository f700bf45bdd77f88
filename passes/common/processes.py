"""One process or several: the device of each, and what they tell one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object, reduce

from ...graph.errors import BadInput, GraphcombError
from ...graph.program import TrainableModule


def accelerator(find_unused: bool = False) -> Accelerator:
    """The process's accelerator; autocast is left to the loop, since it must not wrap a graph that recompiles."""
    handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=True)] if find_unused else []
    try:
        found = Accelerator(mixed_precision="no", kwargs_handlers=handlers)
    except ValueError as error:
        raise BadInput(f"accelerate: {error}") from None
    if found.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise BadInput(f"accelerate: {found.distributed_type.value} is not supported, launch plain data parallelism")
    return found


@contextmanager
def placed(module: TrainableModule, device: torch.device) -> Iterator[TrainableModule]:
    """The module on a device, nodes that create tensors included; put back afterwards."""
    home = next((t.device for t in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
    move(module, device)
    try:
        yield module
    finally:
        move(module, home)


def move(module: TrainableModule, device: torch.device) -> None:
    changed = False
    for node in module.graph.nodes:
        if node.op == "call_function" and node.kwargs.get("device") not in (None, device):
            node.update_kwarg("device", device)
            changed = True
    if changed:
        module.recompile()
    module.to(device)


def reduced(values: list[float], how: str, acc: Accelerator) -> list[float]:
    """The sum or mean of each value over all processes."""
    if acc.num_processes == 1:
        return values
    return reduce(torch.tensor(values, dtype=torch.float64, device=acc.device), how).tolist()


def averaged(values: np.ndarray) -> np.ndarray:
    """The mean over all processes, the same bits in each of them."""
    acc = accelerator()
    if acc.num_processes == 1:
        return values
    return reduce(torch.from_numpy(values).to(acc.device), "mean").cpu().numpy()


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, the same bits in each of them."""
    return values if accelerator().num_processes == 1 else reduce(values, "sum")  # type: ignore[return-value]


def gathered(value: Any) -> list[Any]:
    """The values of all processes."""
    return gather_object([value])


def agreed(make: Callable[[], Any]) -> Any:
    """What the main process makes, or its error, in every process: for what depends on measurements. It must pickle."""
    acc = accelerator()
    if acc.num_processes == 1:
        return make()
    box: list[Any] = [None, None]
    if acc.is_main_process:
        try:
            box[0] = make()
        except GraphcombError as error:
            box[1] = error
    broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]
