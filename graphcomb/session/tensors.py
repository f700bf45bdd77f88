"""Find the tensors of a user's module by their names in its program."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..graph.edit import copy_tensor, like, rebuild, tensor_at
from ..graph.errors import BadInput
from ..graph.program import Program
from ..graph.trainable import TrainableModule


def shared(program: Program, model: nn.Module) -> TrainableModule:
    """Return the program's graph as a module with the model's own parameters and buffers; constants are the program's.

    Raises BadInput if the model has no parameter of the same name and values for a parameter of the program.
    """
    return rebuild(program.module(), lambda name, value: _own(model, name, value))


def trained(program: Program, model: nn.Module) -> Program:
    """Return the program with the current values of the model's parameters and buffers."""

    def take(name: str, value: Any) -> Any:
        tensor = tensor_at(model, name)
        if tensor is None or not isinstance(value, torch.Tensor) or tensor.shape != value.shape:
            return copy_tensor(name, value)
        return like(tensor, tensor.detach().to(value.device, copy=True))

    return program.derive(rebuild(program.module(), take), stale=False)


def _own(model: nn.Module, name: str, value: Any) -> Any:
    tensor = tensor_at(model, name)
    if isinstance(value, nn.Parameter):
        if tensor is None or tensor.shape != value.shape or not torch.equal(tensor.detach(), value.detach().to(tensor)):
            raise BadInput(
                f'attach: the parameter {name} of the captured program is not the model\'s own; take cut="during", which '
                "trains the captured module"
            )
        return tensor
    return value if tensor is None or tensor.shape != getattr(value, "shape", None) else tensor
