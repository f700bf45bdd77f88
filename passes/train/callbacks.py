"""Hooks that take part in training besides the loss: they change the network, or hold zeros."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ...graph.trainable import TrainableModule

Kept = dict[str, dict[int, torch.Tensor]]  # by name and dimension, the indices that stay, in the numbering before


@dataclass
class Surgery:
    """A smaller network to train from now on, and the indices that it keeps of the old one. tensors: of parameters and
    buffers (the optimizer's state is cut alike). values: of the values of nodes. Names and dimensions that are missing stay
    whole."""

    module: TrainableModule
    tensors: Kept
    values: Kept


class Callback:
    """Hooks of a pass that changes the network while it trains (masks, adaptive pruning). Steps count from 0.

    identity: everything besides the state that decides the result, so that the checkpoint of another run is not used.
    loss_scale: the factor by which the loss is multiplied before the backward pass, against underflow in half precision.
    copies: whether a copy of the network with other weights, such as a moving average, can undergo the same changes.
    """

    identity: Any = None
    loss_scale: float = 1.0
    copies: bool = True

    def training_context(self, module: TrainableModule) -> AbstractContextManager[Any]:
        """A context in which the module trains; entered again when a callback replaces the network."""
        return nullcontext()

    def begin(self, module: TrainableModule) -> Surgery | None:
        """Called before the first step, but not when training continues from a checkpoint."""
        return None

    def after_backward(self, step: int, module: TrainableModule) -> None:
        """Called when gradients are complete: averaged over all processes, unscaled, not yet clipped."""

    def after_step(self, step: int, module: TrainableModule) -> Surgery | None:
        """Called after the optimizer has updated the parameters; returns the surgery to do, if any."""
        return None

    def after_surgery(self, surgery: Surgery) -> None:
        """Called after a callback has replaced the network."""

    def due(self, done: int) -> int | None:
        """The number of steps after which the callback's work will be over, or None if it is over. done: steps taken."""
        return None

    def hold(self, module: torch.nn.Module) -> None:
        """Set to zero what this callback holds at zero, in the network or in a copy of it."""

    def state_dict(self) -> dict[str, Any]:
        """The callback's state for a checkpoint: tensors and plain Python values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> TrainableModule | None:
        """Restore what `state_dict` returned; returns the network that the state belongs to, if a callback had
        replaced it."""
        return None


@dataclass
class HeldZeros(Callback):
    """Keeps the zeros of sparse weights: neither gradients nor the optimizer move them. masks: for each parameter, bool,
    True where the weight stays zero (`graph.sparse`)."""

    masks: dict[str, torch.Tensor]

    def after_backward(self, step: int, module: TrainableModule) -> None:
        for name, mask in self.masks.items():
            gradient = module.get_parameter(name).grad
            if gradient is not None:
                gradient.masked_fill_(mask.to(gradient.device), 0)

    def after_step(self, step: int, module: TrainableModule) -> Surgery | None:
        self.hold(module)
        return None

    def hold(self, module: torch.nn.Module) -> None:
        for name, mask in self.masks.items():
            weight = module.get_parameter(name).data
            weight.masked_fill_(mask.to(weight.device), 0)

    def after_surgery(self, surgery: Surgery) -> None:
        left = dict(surgery.module.named_parameters())
        self.masks = {k: select_kept(mask, surgery.tensors.get(k, {})) for k, mask in self.masks.items() if k in left}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.masks)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.masks = dict(state)


class Zeroing(HeldZeros):
    """Sets weights to zero after given numbers of steps, and holds them there. events: by number of steps, the share of
    zeros to reach. prune: `prune(module, share)` sets them to zero in place and returns the masks."""

    def __init__(
        self, events: Mapping[int, float | None], prune: Callable[[TrainableModule, Any], dict[str, torch.Tensor]]
    ):
        super().__init__({})
        self.events, self.prune, self.done = events, prune, 0

    def begin(self, module: TrainableModule) -> Surgery | None:
        self._prune(0, module)
        return None

    def after_step(self, step: int, module: TrainableModule) -> Surgery | None:
        super().after_step(step, module)
        self._prune(step + 1, module)
        return None

    def due(self, done: int) -> int | None:
        return max(self.events) if self.done < len(self.events) else None

    def state_dict(self) -> dict[str, Any]:
        return {"masks": dict(self.masks), "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.masks, self.done = dict(state["masks"]), state["done"]

    def _prune(self, done: int, module: TrainableModule) -> None:
        if done in self.events:
            self.masks = self.prune(module, self.events[done])
            self.done += 1


def select_kept(tensor: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The entries of a tensor at the kept indices of each dimension in `kept`."""
    for d, indices in kept.items():
        tensor = tensor.index_select(d, indices.to(tensor.device))
    return tensor
