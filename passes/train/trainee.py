"""A network that callbacks change while it trains, in our training loop (`loop`) or in the user's (a session)."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from ...graph.compat import pytree
from ...graph.edit import like, rebuild
from ...graph.nodes import fetch
from ...graph.program import Program
from ...graph.trainable import TrainableModule
from ..base import PassResult
from ..common.feed import Batch
from .callbacks import Callback, Kept, Surgery, select_kept

Parameters = Mapping[str, torch.nn.Parameter]


@dataclass
class Work:
    """A pass's part in the user's own training loop.

    callbacks: the hooks that the loop has to call. conclude: from the trained program, makes the pass's result. loss: of
    `(outputs, batch)`, if the pass has a loss. start: the program that is trained, if it is not the pass's input.
    """

    callbacks: list[Callback]
    conclude: Callable[[Program], PassResult]
    loss: Callable[[Any, Batch], torch.Tensor] | None = None
    start: Program | None = None


class Trainee:
    """The network that trains, and the callbacks that look at its gradients and replace it.

    adopt: `adopt(module)` makes another module the one that trains, and returns the module that then stands for it (perhaps
    the old one, which has taken over the contents). carry_on: `carry_on(old, new, kept)` makes the optimizers continue with
    new parameters (see `carry`). Callbacks keep their taps in the module from `enter` to `leave`.
    """

    def __init__(
        self,
        module: TrainableModule,
        callbacks: Sequence[Callback],
        adopt: Callable[[TrainableModule], TrainableModule],
        carry_on: Callable[[Parameters, Parameters, Kept], None],
    ):
        self.module, self.callbacks, self._adopt, self._carry_on = module, list(callbacks), adopt, carry_on
        self.copies: list[torch.nn.Module] = []  # such as moving averages of the module: they lose what it loses
        self._contexts = ExitStack()

    def enter(self) -> None:
        """Enter the callbacks' training contexts."""
        for callback in self.callbacks:
            self._contexts.enter_context(callback.training_context(self.module))

    def leave(self) -> None:
        """Leave the callbacks' training contexts."""
        self._contexts.close()

    def begin(self) -> bool:
        """To be called before the first step. Returns whether the network was replaced."""
        done = [self._operate(callback.begin(self.module)) for callback in self.callbacks]
        return any(done)

    def after_backward(self, step: int, scale: float = 1.0) -> None:
        """To be called when gradients are complete and unscaled. scale: the factor by which the loss was multiplied."""
        for callback in self.callbacks:
            callback.loss_scale = scale
            callback.after_backward(step, self.module)

    def after_step(self, step: int) -> bool:
        """To be called after the optimizers' step. Returns whether the network was replaced."""
        done = [self._operate(callback.after_step(step, self.module)) for callback in self.callbacks]
        for callback in self.callbacks:
            for copy in self.copies:
                callback.hold(copy)
        return any(done)

    def replace(self, module: TrainableModule) -> None:
        """Continue with another network, which no optimizer knows yet."""
        self.leave()
        self.module = self._adopt(module)
        self.enter()

    def around(self, copy: torch.nn.Module, surgery: Surgery | None = None) -> TrainableModule:
        """The present network (or the one that a surgery leaves) with the tensors of `copy`, a copy of the network
        before."""
        kept = {} if surgery is None else surgery.tensors

        def take(name: str, value: Any) -> Any:
            return like(value, select_kept(fetch(copy, name).detach(), kept.get(name, {})).clone())

        return rebuild(self.module if surgery is None else surgery.module, take).train(copy.training)

    def _operate(self, surgery: Surgery | None) -> bool:
        if surgery is None:
            return False
        old = dict(self.module.named_parameters())
        surgery.module.meta |= {k: v for k, v in self.module.meta.items() if k == "batches"}
        for copy in self.copies:
            assert isinstance(copy, TrainableModule)
            copy.become(self.around(copy, surgery))
        self.replace(surgery.module)
        self._carry_on(old, dict(self.module.named_parameters()), surgery.tensors)
        for callback in self.callbacks:
            callback.after_surgery(surgery)
        return True


def carry(optimizer: Optimizer, old: Parameters, new: Parameters, kept: Kept, adds: bool = False) -> None:
    """Make an optimizer continue with the parameters that replace its own, in place: parameter groups, schedulers and
    everything else that refers to the optimizer stay.

    old, new: parameters by name. kept: indices that stayed, by name. State is carried over as in `carry_state`. Parameters
    that are gone leave their group; with `adds`, parameters of new names join the first group that holds parameters of
    their kind (vectors, or tensors of more dimensions).
    """
    names = {id(parameter): name for name, parameter in old.items()}
    fresh = [p for name, p in new.items() if name not in old and p.requires_grad] if adds else []
    for group in optimizer.param_groups:
        held = [(p, names.get(id(p))) for p in group["params"]]
        kinds = {p.dim() > 1 for p, _ in held}
        # The list stays the same object, since some optimizers keep another reference to it.
        group["params"][:] = [p if name is None else new[name] for p, name in held if name is None or name in new]
        group["params"] += [p for p in fresh if (p.dim() > 1) in kinds]
        fresh = [p for p in fresh if (p.dim() > 1) not in kinds]
    state, optimizer.state = optimizer.state, defaultdict(dict)
    carry_state(state, optimizer, old, new, kept)


def carry_state(
    state: Mapping[Any, dict[str, Any]], optimizer: Optimizer, old: Parameters, new: Parameters, kept: Kept
) -> None:
    """Give an optimizer of new parameters the state that another one had of the old ones.

    An entry of a parameter's own shape, such as a moment, keeps the same indices as the parameter. An entry that has
    another shape than its parameter somewhere cannot be cut for any parameter (Adafactor's factors; a preconditioner, which
    has a square weight's shape by accident, but not that of the bias beside it), nor can a list of tensors (the
    preconditioners of Kron): cut parameters with such an entry start anew, with a warning.
    """
    anew, named = [], {id(p): name for name, p in old.items()}
    entries = [(p, key, v) for p, values in state.items() for key, v in values.items() if isinstance(v, torch.Tensor)]
    factors = {key for p, key, v in entries if v.dim() and v.shape != p.shape}
    factors |= {
        key
        for values in state.values()
        for key, v in values.items()
        if not isinstance(v, torch.Tensor)
        and any(isinstance(t, torch.Tensor) and t.dim() for t in pytree.tree_leaves(v))
    }
    for parameter, values in state.items():
        name = named.get(id(parameter))
        if name is None:
            optimizer.state[parameter] = values
        elif name in new:
            dims, shape = kept.get(name, {}), parameter.shape
            if dims and any(
                key in factors and (not isinstance(v, torch.Tensor) or v.dim()) for key, v in values.items()
            ):
                anew.append(name)
                continue
            optimizer.state[new[name]] = {
                key: select_kept(v, dims) if isinstance(v, torch.Tensor) and v.shape == shape else v
                for key, v in values.items()
            }
    if anew:
        warnings.warn(
            f"{type(optimizer).__name__}: its state of {anew[0]} and {len(anew) - 1} others is not of their shape, so it "
            "starts anew for them",
            stacklevel=2,
        )
