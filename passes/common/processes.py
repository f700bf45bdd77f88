"""One process or several: the device of each, and what they tell one another."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast, broadcast_object_list, gather_object, reduce

from ...graph.errors import BadInput, GraphcombError, first_line
from ...graph.program import Program, load
from ...graph.trainable import TrainableModule


def accelerator(find_unused: bool = False) -> Accelerator:
    """The process's accelerator; autocast is left to the loop, since it must not wrap a graph that recompiles.

    Processes that `torchrun` started without a GPU talk by gloo. Raises BadInput where processes were started and accelerate
    would run each by itself.
    """
    handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=True)] if find_unused else []
    started = os.environ.get("WORLD_SIZE", "1")
    several = started.isdigit() and int(started) > 1
    try:
        acc = Accelerator(mixed_precision="no", cpu=several and not _has_gpu(), kwargs_handlers=handlers)
    except ValueError as error:
        raise BadInput(f"accelerate: {error}") from None
    if several and acc.num_processes == 1:
        raise BadInput(
            f"accelerate: {started} processes were started (WORLD_SIZE) and each would run by itself; launch them with "
            "`accelerate launch`, or call graphcomb before anything else makes an Accelerator"
        )
    if acc.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise BadInput(f"accelerate: {acc.distributed_type.value} is not supported, launch plain data parallelism")
    return acc


def _has_gpu() -> bool:
    """Whether there is a device that several processes can share work on."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device is not None and device.type != "mps"


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
    """Move a module's tensors to a device, and the nodes that create tensors."""
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
    return values if accelerator().num_processes == 1 else reduce(values, "sum")


def gathered(value: Any) -> list[Any]:
    """The values of all processes."""
    return gather_object([value])


def agreed(make: Callable[[], Any]) -> Any:
    """What the main process makes, or its error, in every process: for what depends on measurements or on files. It must
    pickle. An error of graphcomb's is the same everywhere, of any other the other processes raise what it says."""
    acc = accelerator()
    if acc.num_processes == 1:
        return make()
    box: list[Any] = [None, None]
    failed: Exception | None = None
    if acc.is_main_process:
        try:
            box[0] = make()
        except Exception as error:
            failed, box[1] = error, forwarded(error)
    broadcast_object_list(box)
    if failed is not None:
        raise failed
    if box[1] is not None:
        raise box[1]
    return box[0]


def forwarded(error: Exception) -> GraphcombError:
    """An error as another process can be told of it."""
    if isinstance(error, GraphcombError):
        return error
    text = first_line(error) or "no message"
    return GraphcombError(f"another process failed ({type(error).__name__}: {text[:200]})")


def broadcast_all(tensors: Iterable[torch.Tensor]) -> None:
    """Give every process the tensors of the first one, in place, by way of the device on which processes talk."""
    acc = accelerator()
    if acc.num_processes == 1:
        return
    for tensor in tensors:
        tensor.data.copy_(broadcast(tensor.detach().to(acc.device)))


def stored_program(path: Path) -> Program | None:
    """The program of a file if the main process has it, in every process, wherever their folders are."""
    if accelerator().num_processes == 1:
        return load(path) if path.is_file() else None
    raw = agreed(lambda: path.read_bytes() if path.is_file() else None)
    if raw is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(raw)
        return load(copy)
