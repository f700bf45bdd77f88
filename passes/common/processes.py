"""Data parallelism: the device of each process, and what the processes exchange."""

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
    """The process's accelerator. It does not autocast: the training loop does, since accelerate's wrapper does not
    survive a graph's recompilation.

    Processes that `torchrun` started without a GPU communicate by gloo. Raises BadInput for settings that accelerate
    refuses, for more than plain data parallelism, and where several processes were started but each would run by
    itself.
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
    """Whether there is an accelerator for which several processes can share the work; MPS is not."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device is not None and device.type != "mps"


@contextmanager
def placed(module: TrainableModule, device: torch.device) -> Iterator[TrainableModule]:
    """A context in which the module is on a device, as are the tensors that its nodes create; both are moved back
    afterwards.
    """
    home = next((t.device for t in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
    move(module, device)
    try:
        yield module
    finally:
        move(module, home)


def move(module: TrainableModule, device: torch.device) -> None:
    """Move a module's tensors to a device, in place, and let the nodes that create tensors create them there."""
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
    """The mean over all processes, bitwise the same in each."""
    acc = accelerator()
    if acc.num_processes == 1:
        return values
    return reduce(torch.from_numpy(values).to(acc.device), "mean").cpu().numpy()


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, bitwise the same in each."""
    return values if accelerator().num_processes == 1 else reduce(values, "sum")


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    return gather_object([value])


def agreed(make: Callable[[], Any]) -> Any:
    """What `make` returns in the main process, in every process; it must pickle. For what depends on measurements or on
    files.

    An error of `make` is raised in every process: in the main process as it is, in the others as `forwarded` gives it.
    """
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
    """The error to raise in other processes: a GraphcombError as it is, any other as a GraphcombError with its first
    line.
    """
    if isinstance(error, GraphcombError):
        return error
    text = first_line(error) or "no message"
    return GraphcombError(f"another process failed ({type(error).__name__}: {text[:200]})")


def broadcast_all(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite the tensors in every process with those of the first process, in place."""
    acc = accelerator()
    if acc.num_processes == 1:
        return
    for tensor in tensors:
        tensor.data.copy_(broadcast(tensor.detach().to(acc.device)))


def stored_program(path: Path) -> Program | None:
    """The program in a file, in every process, if the main process has the file; else None.

    Processes may have different folders: the main process reads the file and sends it.
    """
    if accelerator().num_processes == 1:
        return load(path) if path.is_file() else None
    raw = agreed(lambda: path.read_bytes() if path.is_file() else None)
    if raw is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(raw)
        return load(copy)
