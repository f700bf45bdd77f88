"""Training for depth: the loss of a supernet, and blocks that fade while the network trains."""

import random
from collections.abc import Callable
from typing import Any

import torch

from ...graph.compat import pytree
from ...graph.edit import copy_tensor, rebuild
from ...graph.program import Program
from ...graph.trainable import TrainableModule
from ...graph.verify.evaluate import Evaluator, double_weights, random_inputs, relative_error
from ..common.feed import Batch
from ..common.losses import task_loss
from ..common.processes import placed
from ..train.callbacks import Callback, Surgery
from ..train.options import SCHEDULES
from .budget import Budget
from .relax import set_switches, settle

NO_SUPERNET = "set PruneDepth's supernet_steps to 0 (then give metric=, and loss= with alpha: 0 in train)"


class Sandwich:
    """Loss of a training step of a supernet: that of the dense path on the labels, and that of two random choices and the
    widest choice against the outputs of the dense path.

    lesson: `lesson(outputs, outputs of the dense path, labels)`, the loss of the former against the latter.
    """

    def __init__(
        self,
        module: TrainableModule,
        budget: Budget,
        loss: Callable[..., Any] | None,
        lesson: Callable[[Any, Any, Any], torch.Tensor],
    ):
        self.module, self.budget, self.loss, self.lesson, self.widest = module, budget, loss, lesson, budget.widest()

    def __call__(self, raw: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        dense = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, raw)
        parts = {} if batch.labels is None else {"task": task_loss(self.loss, raw, batch.labels)}
        generator = random.Random(int(torch.randint(2**31, ())))
        choices = [self.budget.draw(generator), self.budget.draw(generator), self.widest]
        losses = []
        for bits in choices:
            set_switches(self.module, [1.0 - b for b in bits])
            losses.append(self.lesson(self.module(*batch.args, **batch.kwargs), dense, batch.labels))
        set_switches(self.module, [1.0] * self.budget.count)
        parts["kl"] = torch.stack(losses).mean()
        return torch.stack(list(parts.values())).sum(), parts


class Fading(Callback):
    """Moves `l` of all blocks from 1 to 0; then the pruned forms alone are trained, which compute the same at less cost
    (ours).

    pruned: the pruned forms of all `count` blocks, untrained. progress: "linear" or "cosine", over this many `steps`. stays:
    whether the relaxed network is trained to the end, since features are taken at nodes that pruned forms may lack. error:
    of the pruned forms against the relaxed ones that they replace, in float64; None before that, and for a network whose
    checkpoint held the pruned forms.
    """

    def __init__(
        self, program: Program, pruned: Program, count: int, progress: str, steps: int, stays: bool, seed: int
    ):
        self.program, self.pruned, self.count, self.progress = program, pruned, count, progress
        self.steps, self.stays, self.seed = steps, stays, seed
        self.identity = ("fading", count, progress, steps)
        self.over = False
        self.copies = False  # pruned forms of averaged weights are not averages of pruned forms
        self.error: float | None = None

    def begin(self, module: TrainableModule) -> Surgery | None:
        return self._move(module, 0)

    def after_step(self, step: int, module: TrainableModule) -> Surgery | None:
        return None if self.over else self._move(module, step + 1)

    def due(self, done: int) -> int | None:
        return None if self.over or (self.stays and done >= self.steps) else self.steps

    def _move(self, module: TrainableModule, done: int) -> Surgery | None:
        left = SCHEDULES[self.progress](done / self.steps) if done < self.steps else 0.0
        set_switches(module, [left] * self.count)
        if left or self.stays:
            return None
        self.over, pruned = True, self.settle(module).module()
        before, after = module.state_dict(), pruned.state_dict()
        sizes = {name: before[name].shape for name, value in after.items() if value.shape != before[name].shape}
        centre = {name: {d: torch.tensor([size[d] // 2]) for d in range(2, len(size))} for name, size in sizes.items()}
        return Surgery(pruned, centre, {})

    def settle(self, module: TrainableModule) -> Program:
        """The pruned program with the weights of the relaxed module."""
        set_switches(module, [0.0] * self.count)
        relaxed = self.program.derive(rebuild(module, copy_tensor))
        with placed(relaxed.module(), torch.device("cpu")):
            pruned = settle(self.pruned, relaxed)
            inputs = random_inputs(self.program, torch.Generator().manual_seed(self.seed))
            expected, outputs = (Evaluator(p, double_weights(p)).run(inputs) for p in (relaxed, pruned))
        self.error = relative_error(outputs, expected)
        return pruned

    def state_dict(self) -> dict[str, Any]:
        return {"over": self.over}

    def load_state_dict(self, state: dict[str, Any]) -> TrainableModule | None:
        self.over = state["over"]
        return self.pruned.copy().module() if self.over else None
