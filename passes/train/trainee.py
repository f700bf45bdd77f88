"""A network that callbacks change while it trains, whoever runs the loop: ours (`loop`) or the user's (a session)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from ...graph.edit import like, rebuild
from ...graph.nodes import fetch
from ...graph.program import Program
from ...graph.trainable import TrainableModule
from ..base import PassResult
from ..common.feed import Batch
from .callbacks import Callback, Kept, Surgery, select_kept


@dataclass
class Work:
    """What a pass does while somebody else's loop trains a program.

    callbacks: the hooks that the loop has to call. conclude(trained): the pass's result, from the program as it came out of
    training. loss(outputs, batch): of a batch, where the pass has one.
    """

    callbacks: list[Callback]
    conclude: Callable[[Program], PassResult]
    loss: Callable[[Any, Batch], torch.Tensor] | None = None


class Trainee:
    """The network that trains, and the callbacks that look at its gradients and replace it.

    adopt(module): makes another module the one that trains and returns what then stands for it, which may be a module that
    took its contents over. Callbacks keep their taps in the module from `enter` to `leave`.
    """

    def __init__(
        self,
        module: TrainableModule,
        callbacks: Sequence[Callback],
        adopt: Callable[[TrainableModule], TrainableModule] = lambda module: module,
    ):
        self.module, self.callbacks, self._adopt = module, list(callbacks), adopt
        self.copies: list[torch.nn.Module] = []  # of the module, such as moving averages: they lose what it loses
        self._contexts = ExitStack()

    def enter(self) -> None:
        """Let the callbacks put into the network what they need to see of it."""
        for callback in self.callbacks:
            self._contexts.enter_context(callback.training_context(self.module))

    def leave(self) -> None:
        """Take that out again."""
        self._contexts.close()

    def begin(self, optimizers: Iterable[Optimizer] = ()) -> bool:
        """Before the first step. Returns whether the network was replaced."""
        done = [self._operate(callback.begin(self.module), optimizers) for callback in self.callbacks]
        return any(done)

    def after_backward(self, step: int, scale: float = 1.0) -> None:
        """Gradients are complete and unscaled. scale: by how much the loss was multiplied."""
        for callback in self.callbacks:
            callback.loss_scale = scale
            callback.after_backward(step, self.module)

    def after_step(self, step: int, optimizers: Iterable[Optimizer]) -> bool:
        """The optimizers have stepped. Returns whether the network was replaced; they then hold the new parameters."""
        done = [self._operate(callback.after_step(step, self.module), optimizers) for callback in self.callbacks]
        for callback in self.callbacks:
            for copy in self.copies:
                callback.hold(copy)
        return any(done)

    def replace(self, module: TrainableModule) -> None:
        """Go on with another network, of which no optimizer knows yet."""
        self.leave()
        self.module = self._adopt(module)
        self.enter()

    def like(self, copy: torch.nn.Module, surgery: Surgery | None = None) -> TrainableModule:
        """The network as it is, or as a surgery leaves it, with the tensors of a copy of what it was before."""
        kept = {} if surgery is None else surgery.tensors

        def take(name: str, value: Any) -> Any:
            return like(value, select_kept(fetch(copy, name).detach(), kept.get(name, {})).clone())

        return rebuild(self.module if surgery is None else surgery.module, take).train(copy.training)

    def _operate(self, surgery: Surgery | None, optimizers: Iterable[Optimizer]) -> bool:
        if surgery is None:
            return False
        old = dict(self.module.named_parameters())
        surgery.module.meta |= {k: v for k, v in self.module.meta.items() if k == "batches"}
        for copy in self.copies:
            assert isinstance(copy, TrainableModule)
            copy.become(self.like(copy, surgery))
        self.replace(surgery.module)
        new = dict(self.module.named_parameters())
        for optimizer in optimizers:
            carry(optimizer, old, new, surgery.tensors)
        for callback in self.callbacks:
            callback.after_surgery(surgery)
        return True


def carry(optimizer: Optimizer, old: Mapping[str, Any], new: Mapping[str, Any], kept: Kept) -> None:
    """Let an optimizer go on with the parameters that replace its own, in place: parameter groups, schedulers and whoever
    else holds the optimizer stay as they are.

    old, new: parameters by name. kept: indices that stayed, by name. State of a parameter's own shape, such as moments,
    keeps the same indices; where some state has another shape (Adafactor's factors), that parameter's state starts anew, and
    a warning says so. Parameters that are gone leave their group; those the optimizer never held are not added.
    """
    names = {id(parameter): name for name, parameter in old.items()}
    anew = []
    for group in optimizer.param_groups:
        held = [(p, names.get(id(p))) for p in group["params"]]
        group["params"] = [p if name is None else new[name] for p, name in held if name is None or name in new]
        for parameter, name in held:
            if name is None or parameter not in optimizer.state:
                continue
            state = optimizer.state.pop(parameter)
            if name not in new:
                continue
            shape, dims = parameter.shape, kept.get(name, {})
            tensors = [v for v in state.values() if isinstance(v, torch.Tensor) and v.dim()]
            if dims and any(t.shape != shape for t in tensors):
                anew.append(name)
                continue
            optimizer.state[new[name]] = {
                key: select_kept(v, dims) if isinstance(v, torch.Tensor) and v.shape == shape else v
                for key, v in state.items()
            }
    if anew:
        warnings.warn(
            f"{type(optimizer).__name__}: its state of {anew[0]} and {len(anew) - 1} others is not of their shape, so it "
            "starts anew for them",
            stacklevel=2,
        )
