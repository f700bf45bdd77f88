"""Apply a pass in the user's own training loop: `attach`, then two calls in every step, then `finish`.

With cut="end" the passes hold at zero what they will remove: `HeldPruner` in passes/channels/masked_module.py, `HeldZeros`
in passes/train/callbacks.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from ..graph.capture.export import CPU, beside, device_of, moved
from ..graph.compat import exact_kernels, is_unscaled
from ..graph.edit import tensor_at
from ..graph.errors import BadInput, GraphcombError
from ..graph.program import Program, capture
from ..graph.sparse import zeros
from ..graph.trainable import TrainableModule
from ..graph.verify.evaluate import relative_error
from ..passes.base import Context, Pass, PassResult
from ..passes.batch import split_batch
from ..passes.common.feed import Batch
from ..passes.common.scoring import evaluating
from ..passes.train.callbacks import HeldZeros, Kept
from ..passes.train.trainee import Parameters, Trainee, Work, carry
from .part import inputs_of, part_of
from .tensors import shared, trained

AGREES = 1e-3  # largest relative difference between the outputs of the module and those of the smaller program


def attach(
    model: nn.Module | Program,
    pass_: Pass,
    *,
    example: tuple[Any, ...] | None = None,
    steps: int,
    cut: Literal["end", "during"] = "end",
    dynamic_shapes: Any = "batch",
    kwargs: dict[str, Any] | None = None,
    submodule: str | None = None,
    **context: Any,
) -> Session:
    """Apply a pass to a model while your own loop trains it.

        session = graphcomb.attach(model, RemoveChannels(macs=0.4), example=(x,), steps=10_000)
        for x, y in loader:
            loss = my_loss(session.module(x), y)
            loss.backward(); session.before_step(optimizer); optimizer.step(); optimizer.zero_grad()
            session.after_step()
        result = session.finish()

    - model: the module; with cut="during" also a captured `Program`.
    - pass_: `RemoveChannels`, `PruneDepth`, a gradual `Sparsify` or `Distill`. The first needs no `train=` here.
    - example, kwargs, dynamic_shapes: arguments of `capture`; by default the batch is dynamic.
    - steps: number of optimizer steps of the loop. The pass distributes its work over them.
    - cut: with "end", `session.module` is the model itself. What will be removed is held at zero, so that the class, hooks,
      EMA and trainer remain unchanged, and `finish` removes it. With "during", `session.module` is the captured module. It
      shrinks during training, which makes later steps faster; when `after_step` returns True, create wrappers such as DDP
      again.
    - submodule: dotted path of the part of the model that the pass works on, such as an image backbone, while the loop
      trains the whole model. example and kwargs are those of the whole model, which is run once to find the arguments of the
      part. The outputs of the part keep their shapes, and `finish` returns the result for the part:
      `model.set_submodule("backbone", result.transplant(model.backbone))` puts the smaller part into the model.
    - context: fields of `Context`, such as `teacher`, `target`, `seed` or `data`.

    Raises BadInput for arguments that do not fit together and for a pass that does not train, CaptureError for a model that
    cannot be captured.
    """
    if not isinstance(pass_, Pass):
        raise BadInput(f"attach: takes a pass, such as RemoveChannels(macs=0.5), not {type(pass_).__name__}")
    if cut not in ("end", "during"):
        raise BadInput(f'attach: cut is "end" or "during", not {cut!r}')
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise BadInput(f"attach: steps is how many optimizer steps the loop takes, at least 1, not {steps!r}")
    whole: nn.Module | None = None
    if submodule is not None:
        if isinstance(model, Program) or cut != "end":
            raise BadInput(
                'attach: submodule: takes a module and cut="end"; for cut="during" attach to the submodule itself and put '
                "session.module in its place"
            )
        if example is None:
            raise BadInput("attach: give example=(x,), inputs as the whole model takes them")
        example, kwargs = beside(model, (tuple(example), kwargs))
        whole, model = model, part_of(model, submodule)
        example, kwargs = inputs_of(model, submodule, whole, tuple(example), kwargs or {})
    if isinstance(model, Program):
        program, own = model, None
        if cut == "end":
            raise BadInput('attach: a Program has no class to keep; give the model, or take cut="during"')
    else:
        if example is None:
            raise BadInput("attach: give example=(x,), inputs as the model takes them")
        program = capture(model, tuple(example), kwargs, dynamic_shapes)
        own = model if cut == "end" else None
    return Session(program, own, pass_, steps, Context().replaced("attach", **context), whole)


class Session:
    """A pass at work in the user's training loop; `attach` creates it.

    A step is an optimizer step; gradients may be accumulated over several batches before it.

    - module: the module that the loop trains; with `submodule` the whole model.
    - step: number of steps so far. steps: number of steps given to `attach`.
    - program: the captured model or submodule.
    """

    def __init__(
        self,
        program: Program,
        own: nn.Module | None,
        pass_: Pass,
        steps: int,
        context: Context,
        whole: nn.Module | None,
    ):
        context = context.replaced("attach", teacher=context.teacher or program)
        device, program = program.device, program.on_cpu()
        self.program, self.steps, self.step, self._own, self._pass = program, steps, 0, own, pass_
        inner = program.copy().module().train() if own is None else shared(program, own)
        in_loop: Callable[..., Work] | None = getattr(pass_, "in_loop", None)
        if in_loop is None:
            raise BadInput(f"attach: {type(pass_).__name__} does not train; apply it before or after")
        self._work = in_loop(program, context, steps, inner if own is not None else None)
        if self._work.start is not None:
            inner = self._work.start.module().train()
        if own is None:  # else its tensors are the user's, which stay where they are
            inner.to(device)
        if masks := zeros(program):
            self._work.callbacks.append(HeldZeros(masks))
        self.module: nn.Module = next(m for m in (whole, own, inner) if m is not None)
        self._trainee = Trainee(inner, self._work.callbacks, self._adopt, self._carry_on)
        self._optimizers: list[Optimizer] = []
        self._copies: list[tuple[nn.Module, nn.Module]] = []  # a followed copy, and its submodule with the parameters
        self._ready = self._finished = False
        self._trainee.enter()
        self._trainee.begin()

    def __repr__(self) -> str:
        return f"Session({type(self._pass).__name__}, step {self.step} of {self.steps})"

    # ------------------------------------------------------------------------------------------------------- the steps
    def before_step(self, optimizer: Optimizer, scaler: Any = None) -> None:
        """Read the gradients. Call it just before `optimizer.step()`, with several optimizers once for each.

        scaler: a `GradScaler`, with which the gradients are unscaled first, unless they are already. Raises BadInput after
        the last step, and for an optimizer that does not have the module's parameters.
        """
        self._require_running("before_step")
        if not any(optimizer is known for known in self._optimizers):
            self._require_ours(optimizer)
            self._optimizers.append(optimizer)
        if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            raise BadInput(
                "before_step: no parameter of the optimizer has a gradient; call it after backward() and before zero_grad()"
            )
        scale = 1.0
        if scaler is not None and scaler.is_enabled():
            scale = scaler.get_scale()
            if not is_unscaled(scaler, optimizer):
                scaler.unscale_(optimizer)
        if not self._ready:
            self._trainee.after_backward(self.step, scale)
        self._ready = True

    def after_step(self) -> bool:
        """Count the step, and prune if the pass has something to do now. Call it after `optimizer.step()`.

        Returns whether the parameters were replaced, which happens only with cut="during". The optimizers then have the new
        parameters, but a wrapper such as DDP must be created again. Raises BadInput without a call of `before_step`.
        """
        self._require_running("after_step")
        if not self._ready:
            raise BadInput("after_step: call before_step(optimizer) first, between backward() and optimizer.step()")
        self._ready = False
        replaced = self._trainee.after_step(self.step)
        self.step += 1
        return replaced

    @property
    def stepping(self) -> bool:
        """Whether `before_step` was called, and `after_step` was not called since."""
        return self._ready

    def follow(self, ema: nn.Module) -> None:
        """Prune a copy of the module, such as an exponential moving average, together with the module.

        Call it right after creating the copy: an `AveragedModel`, timm's `ModelEmaV3`, or a deep copy. Raises BadInput for a
        module that is no copy, and for a pass that a copy cannot follow.
        """
        self._require_running("follow")
        if any(not c.copies for c in self._trainee.callbacks):
            raise BadInput(f"follow: {type(self._pass).__name__} changes weights in ways that a copy cannot follow")
        names = {name for name, _ in self._trained.named_parameters()}
        kind = nn.Module if self._own is not None else TrainableModule
        for part in ema.modules():
            ours = part in (self.module, self._trained)
            if isinstance(part, kind) and not ours and names <= {n for n, _ in part.named_parameters()}:
                self._copies.append((ema, part))
                self._trainee.copies.append(part)
                return
        raise BadInput("follow: it has not the parameters of session.module; give a copy of session.module")

    def loss(self, outputs: Any, inputs: Any, labels: Any = None) -> torch.Tensor:
        """Return the loss of `Distill` for a batch. The pass is `Distill`, or has `train=Distill(...)`.

        outputs: the result of `session.module(*inputs)`. inputs: a tensor, a tuple of arguments, or a dict of keyword
        arguments. labels: labels for `Context.loss`, or None to learn from the teacher only. Raises BadInput for a pass
        without this loss.
        """
        if self._work.loss is None:
            raise BadInput(f"loss: {type(self._pass).__name__} has none; give it train=Distill(...)")
        args, kwargs, labels = split_batch((inputs, labels))
        return self._work.loss(outputs, Batch(args, kwargs, labels, 0))

    # --------------------------------------------------------------------------------------------------------- the end
    def finish(self, weights: nn.Module | None = None) -> PassResult:
        """End the session and return the result, whose program has been compared with the module.

        weights: a followed copy, whose weights are used instead of the module's. Raises BadInput if the pass still has work
        to do in later steps, and GraphcombError if the smaller program does not compute what the module computes.
        """
        if self._finished:
            raise BadInput("finish: the session is over; attach again")
        due = [step for callback in self._work.callbacks if (step := callback.due(self.step)) is not None]
        if due:
            raise BadInput(
                f"finish: after {self.step} of {self.steps} steps the pass has not done its work, which goes on until step "
                f"{max(due)}; go on training, or attach with fewer steps"
            )
        source = self._trained if weights is None else self._copy(weights)
        self._trainee.leave()
        self._finished = True
        if self._own is None:
            result = self._work.conclude(self.program.derive(self._trainee.around(source).eval()).on_cpu())
        else:
            result = self._work.conclude(trained(self.program, source))
            self._compare(source, result.program)
        if (device := device_of(source)) is not None:
            result.program = result.program.to(device)
        head = {"pass": type(self._pass).__name__, "options": self._pass.options()}
        result.record = head | result.record | {"steps": self.step}
        result.program.history = [*self.program.history, result.record]
        return result

    def _compare(self, source: nn.Module, program: Program) -> None:
        """Raise GraphcombError if the outputs of the module and of the smaller program differ for the example inputs."""
        args, kwargs = copy.deepcopy((program.args, program.kwargs))
        there = moved((args, kwargs), device_of(source) or CPU)
        with evaluating(source), torch.no_grad(), exact_kernels():
            wanted = moved(source(*there[0], **there[1]), CPU)
            error = relative_error(program.module().eval()(*args, **kwargs), wanted)
        if not error <= AGREES:
            raise GraphcombError(
                f"finish: the program that was cut differs from the module by {error:.1e}; was a weight changed after the "
                "last after_step, or is the module in a mode that the capture did not see?"
            )

    # --------------------------------------------------------------------------------------------------------- storing
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the session for a checkpoint, which also needs the states of module and optimizers. It
        consists of tensors and plain Python values."""
        return {
            "step": self.step,
            "steps": self.steps,
            "pass": repr(self._pass),
            "callbacks": [c.state_dict() for c in self._trainee.callbacks],
        }

    def load_state_dict(self, state: dict[str, Any], optimizers: Iterable[Optimizer] = ()) -> None:
        """Continue from a state of a session with the same pass and steps. Call it before loading the states of module and
        optimizers.

        optimizers: with cut="during", the optimizers of `session.module`; they get the parameters of the smaller module.
        Raises BadInput for a state of a session with another pass or number of steps.
        """
        for key, wanted in (("pass", repr(self._pass)), ("steps", self.steps)):
            if state.get(key) != wanted:
                raise BadInput(f"load_state_dict: the state is of a session with {key} {state.get(key)}, not {wanted}")
        old = dict(self.module.named_parameters())
        for callback, saved in zip(self._trainee.callbacks, state["callbacks"], strict=True):
            if (module := callback.load_state_dict(saved)) is not None:
                self._trainee.replace(module)
        for i, optimizer in enumerate(optimizers):
            optimizer.state.clear()
            carry(optimizer, old, dict(self.module.named_parameters()), {}, adds=i == 0)
        self.step = state["step"]

    # ---------------------------------------------------------------------------------------------------------- checks
    @property
    def _trained(self) -> nn.Module:
        """The module that the pass works on: `module`, or its submodule."""
        return self.module if self._own is None else self._own

    def _adopt(self, module: TrainableModule) -> TrainableModule:
        assert isinstance(self.module, TrainableModule)
        device = next((t.device for t in self.module.parameters()), None)
        training = {name: part.training for name, part in self.module.named_modules()}
        self.module.become(module if device is None else module.to(device))
        for name, part in self.module.named_modules():
            part.training = training.get(name, self.module.training)
        return self.module

    def _carry_on(self, old: Parameters, new: Parameters, kept: Kept) -> None:
        for i, optimizer in enumerate(self._optimizers):
            carry(optimizer, old, new, kept, adds=i == 0)

    def _require_running(self, what: str) -> None:
        if self._finished:
            raise BadInput(f"{what}: the session is over (finish was called)")
        if what != "follow" and self.step >= self.steps:
            raise BadInput(f"{what}: all {self.steps} steps that were announced are taken; call finish()")

    def _require_ours(self, optimizer: Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in self._trained.parameters()):
            raise BadInput(
                "before_step: the optimizer holds no parameter of session.module; make it of session.module.parameters()"
            )
        if self._own is None and isinstance(optimizer, torch.optim.LBFGS):
            raise BadInput(
                "before_step: LBFGS keeps one flat state of all parameters, which cannot lose what the module loses; attach "
                'with cut="end", or take another optimizer'
            )
        if self._own is not None:
            moved = [n for n, p in self._trainee.module.named_parameters() if tensor_at(self._own, n) is not p]
            if moved:
                raise BadInput(
                    f"before_step: {moved[0]} is another tensor than when the session was attached; attach after moving or "
                    "wrapping the model"
                )

    def _copy(self, weights: nn.Module) -> nn.Module:
        for theirs, part in self._copies:
            if weights is theirs or weights is part:
                return part
        raise BadInput("finish: weights is no copy that the session follows; call follow(ema) when it is made")
