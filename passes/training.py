"""The training loop every trained pass shares: accelerate underneath, checkpoints, and the same result after a resume.

One process, `accelerate launch` and `torchrun` run the same code as plain data parallelism: the global batch is the
loader's batch size times the number of processes. Source: ours.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast,
    broadcast_object_list,
    gather_object,
    reduce,
    send_to_device,
    set_seed,
)
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils import _pytree as pytree

from ..graph.errors import BadInput, GraphcombError
from ..graph.program import Program, TrainableModule
from .base import Context
from .batches import Batch, Feed, generators, length, shard, split_batch
from .masks import zeros

Objective = Callable[[Any, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class Training:
    """How to train; the options that every trained pass has.

    epochs: passes over the data (ignored when `steps` is given). steps: optimizer steps. optimizer: "adamw" or "sgd"
    (momentum 0.9). lr: peak learning rate. weight_decay: not applied to biases and norm scales (tensors of fewer than
    two dimensions). schedule: of the learning rate after the warm-up, down to 0, or "constant". warmup: share of all
    steps, 0..1. clip: largest gradient norm, 0 for none. batch_norm: "train" normalises with batch statistics and
    updates the running ones, "frozen" uses the running ones as they are. precision: "no", "bf16" or "fp16" (autocast;
    fp16 needs a GPU). checkpoint_every: steps between checkpoints in the context's `out` folder, 0 for once an epoch.
    """

    epochs: int = 1
    steps: int | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    clip: float = 1.0
    batch_norm: Literal["train", "frozen"] = "train"
    precision: Literal["no", "bf16", "fp16"] = "no"
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        self._require("epochs", self.epochs >= 1, "at least 1")
        self._require("steps", self.steps is None or self.steps >= 1, "at least 1, or null")
        self._require("optimizer", self.optimizer in ("adamw", "sgd"), '"adamw" or "sgd"')
        self._require("lr", self.lr > 0, "greater than 0")
        self._require("weight_decay", self.weight_decay >= 0, "at least 0")
        self._require("schedule", self.schedule in SCHEDULES, "one of " + ", ".join(SCHEDULES))
        self._require("warmup", 0 <= self.warmup <= 1, "a share of the steps, 0 to 1")
        self._require("clip", self.clip >= 0, "at least 0")
        self._require("batch_norm", self.batch_norm in ("train", "frozen"), '"train" or "frozen"')
        self._require("precision", self.precision in ("no", "bf16", "fp16"), '"no", "bf16" or "fp16"')
        self._require("checkpoint_every", self.checkpoint_every >= 0, "at least 0")

    def _require(self, field: str, holds: bool, what: str) -> None:
        if not holds:
            raise BadInput(f"{type(self).__name__}.{field}: must be {what}, got {getattr(self, field)!r}")


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def learning_rate(training: Training, step: int, total: int) -> float:
    """Learning rate of the step (counted from 0): linear warm-up to `lr`, then the schedule."""
    warm = round(training.warmup * total)
    if step < warm:
        return training.lr * (step + 1) / warm
    return training.lr * SCHEDULES[training.schedule]((step - warm) / max(total - warm, 1))


Kept = dict[str, dict[int, torch.Tensor]]  # which indices stay, by name and dimension, in the numbering before


@dataclass
class Surgery:
    """A smaller network to train from now on, and the indices of the old one's entries that it keeps: of parameters and
    buffers (the optimizer's state is cut alike) and of the values of some nodes. What is not named stays whole."""

    module: TrainableModule
    tensors: Kept
    values: Kept


class Callback:
    """Hooks of a pass that changes the network while it trains (masks, adaptive pruning). Steps count from 0.

    identity: whatever decides the result besides the state, so that a checkpoint of another run is not taken up.
    """

    identity: Any = None

    def begin(self, module: TrainableModule) -> Surgery | None:
        """Before the first step; not called when a checkpoint is taken up."""
        return None

    def after_backward(self, step: int, module: TrainableModule) -> None:
        """Gradients are complete: averaged over all processes, unscaled, not clipped yet."""

    def after_step(self, step: int, module: TrainableModule) -> Surgery | None:
        """The optimizer has updated the parameters."""
        return None

    def after_surgery(self, surgery: Surgery) -> None:
        """Some callback has replaced the network."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python values that a checkpoint has to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> TrainableModule | None:
        """Take back what `state_dict` gave; returns the network that the state belongs to, where it is not the first."""
        return None


class HeldZeros(Callback):
    """Zeros of sparse weights stay zero: neither gradients nor the optimizer move them. masks: by parameter, True where
    the weight is zero for good (`passes.masks`)."""

    def __init__(self, masks: dict[str, torch.Tensor]):
        self.masks = masks

    def after_backward(self, step: int, module: TrainableModule) -> None:
        for name, mask in self.masks.items():
            gradient = module.get_parameter(name).grad
            if gradient is not None:
                gradient.masked_fill_(mask.to(gradient.device), 0)

    def after_step(self, step: int, module: TrainableModule) -> None:
        for name, mask in self.masks.items():
            weight = module.get_parameter(name).data
            weight.masked_fill_(mask.to(weight.device), 0)

    def after_surgery(self, surgery: Surgery) -> None:
        left = dict(surgery.module.named_parameters())
        self.masks = {k: taken(mask, surgery.tensors.get(k, {})) for k, mask in self.masks.items() if k in left}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.masks)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.masks = dict(state)


# ---------------------------------------------------------------------------------------------------- losses, metrics
def logits_of(outputs: Any) -> torch.Tensor:
    """The class scores `(N, C, ...)` among a model's outputs: the only floating-point tensor, or the entry "logits" or
    "out" of a mapping. Raises BadInput when there are several."""
    if isinstance(outputs, dict):
        for name in ("logits", "out"):
            if isinstance(outputs.get(name), torch.Tensor):
                return outputs[name]
    found = [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if len(found) != 1 or found[0].dim() < 2:
        shapes = ", ".join(str(tuple(t.shape)) for t in found) or "none"
        raise BadInput(f'outputs: no single tensor of class scores (found {shapes}); name it "logits" or "out"')
    return found[0]


def default_loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of class scores `(N, C, ...)` against class indices `(N, ...)`; label -100 is ignored."""
    return F.cross_entropy(logits_of(outputs).float(), labels)


def accuracy(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """1 where the highest score is the label's, else 0, for every sample or pixel whose label is not negative."""
    hits = (logits_of(outputs).argmax(1) == labels).float()
    return hits[labels >= 0]


# --------------------------------------------------------------------------------------------------------- the device
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
    _move(module, device)
    try:
        yield module
    finally:
        _move(module, home)


def _move(module: TrainableModule, device: torch.device) -> None:
    changed = False
    for node in module.graph.nodes:
        if node.op == "call_function" and node.kwargs.get("device") not in (None, device):
            node.update_kwarg("device", device)
            changed = True
    if changed:
        module.recompile()
    module.to(device)


@contextmanager
def seeded(seed: int, *data: Iterable[Any] | None) -> Iterator[None]:
    """Run under a seed (Python, NumPy, torch, and the generators of the data loaders given) and give the random states back
    afterwards."""
    state = rng_state()
    own = [(generator, generator.get_state()) for loader in data for generator in generators(loader)]
    set_seed(seed)
    for generator, _ in own:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        set_rng_state(state)
        for generator, before in own:
            generator.set_state(before)


def rng_state() -> dict[str, Any]:
    """State of the global random generators, as tensors and plain values."""
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": numpy | {"state": {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}},
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def bar(show: bool, title: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """A progress bar; yields `update(done, text)`, which does nothing when the bar is not shown."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[text]}"), disable=not show) as progress:
        task = progress.add_task(title, total=total, text="")

        def update(done: int, text: str) -> None:
            progress.update(task, completed=done, text=text)

        yield update


# ---------------------------------------------------------------------------------------------------------- evaluation
def evaluate(
    model: Program | nn.Module,
    data: Iterable[Any],
    metric: Callable[..., Any] | None = None,
    progress: bool = False,
    field: str = "val",
    alone: bool = False,
) -> float:
    """Mean of `metric(outputs, labels)` (scores per sample or pixel, default `accuracy`) over a data set, eval mode.

    A `Program` is checked against the batches, and one with a fixed batch size still sees every sample. Under several
    processes each scores its share and all return the mean of the whole, or with `alone` each scores all by itself.
    Train/eval flags and random states are restored.
    """
    acc = accelerator()
    feed = Feed(model, field) if isinstance(model, Program) else None
    module = model.module() if isinstance(model, Program) else model
    modes = {m: m.training for m in module.modules()}
    place = placed(module, acc.device) if isinstance(module, TrainableModule) else nullcontext()
    module.eval()
    try:
        with place:
            return _score(module, feed, data, metric or accuracy, acc, progress, field, alone)
    finally:
        module.train(modes[module])
        for m, mode in modes.items():
            m.training = mode


def _score(
    forward: Callable[..., Any],
    feed: Feed | None,
    data: Iterable[Any],
    metric: Callable[..., Any],
    acc: Accelerator,
    progress: bool = False,
    field: str = "val",
    alone: bool = False,
) -> float:
    total, count = 0.0, 0
    share = data if alone else shard(data, acc.process_index, acc.num_processes, even=False)
    batches = feed.batches(share, pad=True) if feed else (Batch(*split_batch(raw), size=0) for raw in share)
    with bar(progress and acc.is_main_process, field, length(share)) as update, torch.no_grad(), seeded(0, data):
        for done, batch in enumerate(batches, 1):
            if batch.labels is None:
                raise BadInput(f"{field}: the batches have no labels, and the metric needs them")
            args, kwargs, labels = send_to_device((batch.args, batch.kwargs, batch.labels), acc.device)
            outputs = forward(*args, **kwargs)
            if feed:
                outputs = feed.cut(outputs, batch)
            scores = torch.as_tensor(_applied("metric", metric, outputs, labels))
            total, count = total + scores.cpu().double().sum().item(), count + scores.numel()
            update(done, "")
    total, counted = (total, count) if alone else _reduced([total, count], "sum", acc)
    if not counted:
        raise BadInput(f"{field}: yields nothing to score")
    return total / counted


def _reduced(values: list[float], how: str, acc: Accelerator) -> list[float]:
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


# ------------------------------------------------------------------------------------------------------------ training
def fit(
    program: Program,
    objective: Objective,
    training: Training,
    context: Context,
    name: str,
    outputs: Callable[[Any], Any] = lambda raw: raw,
    callbacks: Sequence[Callback] = (),
    identity: Sequence[Any] = (),
    dress: Callable[[TrainableModule], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """Train `program.module()` in place on `context.data` and leave it in eval mode. Returns the record: steps, one
    entry per epoch (mean loss and its parts, score on `context.val`), the loss over steps as `curve`, up to 200 pairs of
    a step and the mean loss since the pair before, and what was skipped.

    objective: `(what the module returns, batch) -> (loss, {part: value})`. name: of the pass, in messages and file
    names. outputs: picks the model's own outputs from what the module returns, for the metric. identity: whatever else
    decides the result, so that a checkpoint of another run is not taken up. dress: a context in which a module trains;
    entered anew when a callback replaces the module, which then becomes the program's.

    The result depends on the seed, the data and the options only: every epoch starts from its own seed, and a run
    killed at any point and started again ends where the uninterrupted one does, bit by bit on a CPU.
    """
    if context.data is None:
        raise BadInput(f"{name}: needs data to train on; pass data=, a DataLoader or another re-iterable of batches")
    several = len(pytree.tree_leaves(next(n for n in program.graph.nodes if n.op == "output").args)) > 1
    acc = accelerator(find_unused=several)
    if training.precision == "fp16" and acc.device.type == "cpu":
        raise BadInput(f'{name}.precision: "fp16" needs a GPU; use "bf16" or "no"')
    module, checkpoint = program.module().eval(), None
    if masks := zeros(program):
        callbacks = [*callbacks, HeldZeros(masks)]
    if context.out is not None:
        decides = (*identity, *(c.identity for c in callbacks if c.identity is not None))
        code = fingerprint(module, repr(training), context.seed, length(context.data), acc.num_processes, *decides)
        checkpoint = Path(context.out) / f"{name.lower()}-{code}.ckpt"
    elif training.checkpoint_every:
        raise BadInput(f"{name}.checkpoint_every: needs a folder for the checkpoints; pass out=")
    loop = _Loop(program, objective, training, context, name, outputs, callbacks, acc, checkpoint, dress)
    with seeded(context.seed, context.data, context.val):
        try:
            return loop.run()
        except RuntimeError as error:
            if acc.num_processes > 1 and any(word in str(error) for word in LOST):
                raise GraphcombError(
                    f"{name}: process {acc.process_index} of {acc.num_processes} lost another one at step {loop.step + 1}"
                    f"; {'the run continues from its last checkpoint when started again' if checkpoint else 'start again'}"
                ) from error
            raise


def total_steps(training: Training, data: Iterable[Any], name: str, feed: Feed | None = None) -> int:
    """How many batches each process takes, or with the program's feed trains on: those that its fixed size can take."""
    if training.steps is not None:
        return training.steps
    acc = accelerator()
    per_epoch = length(shard(data, acc.process_index, acc.num_processes))
    if per_epoch is None:
        raise BadInput(f"{name}.steps: give the number of steps, the data has no length to count epochs by")
    return training.epochs * (per_epoch - (feed is not None and feed.leaves(data)))


def task_loss(loss: Callable[..., Any] | None, outputs: Any, labels: Any) -> torch.Tensor:
    """`loss(outputs, labels)`, by default `default_loss`: a scalar. BadInput when they do not fit together."""
    found = _applied("loss", loss or default_loss, outputs, labels)
    if not isinstance(found, torch.Tensor) or found.dim():
        raise BadInput(f"loss: must return a scalar tensor, got {type(found).__name__}")
    return found


def _applied(field: str, function: Callable[..., Any], outputs: Any, labels: Any) -> Any:
    try:
        return function(outputs, labels)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        shapes = [tuple(t.shape) for t in pytree.tree_leaves((outputs, labels)) if isinstance(t, torch.Tensor)]
        text = (str(error).splitlines() or ["no message"])[0]
        raise BadInput(f"{field}: does not take these outputs and labels (shapes {shapes}): {text[:200]}") from error


LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "ProcessGroup")  # in what collectives raise
PLAIN = ("epoch", "position", "step", "log", "curve", "recent")
CURVE = 200  # points of the loss curve, at most


class _Loop:
    """One training run; what decides how it goes on is in the attributes named by PLAIN and in the objects it drives,
    and all of that is in a checkpoint."""

    def __init__(
        self,
        program: Program,
        objective: Objective,
        training: Training,
        context: Context,
        name: str,
        outputs: Callable[[Any], Any],
        callbacks: Sequence[Callback],
        acc: Accelerator,
        checkpoint: Path | None,
        dress: Callable[[TrainableModule], AbstractContextManager[Any]],
    ):
        self.program, self.module, self.dress, self.worn = program, program.module(), dress, ExitStack()
        self.feed, self.val_feed = Feed(program), Feed(program, "val")
        self.objective, self.training, self.context, self.name = objective, training, context, name
        self.outputs, self.callbacks, self.acc, self.checkpoint = outputs, callbacks, acc, checkpoint
        self.data = shard(context.batches, acc.process_index, acc.num_processes)
        self.per_epoch = length(self.data)
        if acc.num_processes > 1 and self.feed.leaves(context.batches):
            raise BadInput(
                f"data: the last batch is short, the program is fixed to {self.feed.static} samples, and so only some "
                "processes would take a step; set drop_last=True"
            )
        if not any(p.requires_grad for p in self.module.parameters()):
            raise BadInput(f"{name}: nothing to train, all parameters are frozen (requires_grad is False)")
        if self.per_epoch == 0:
            raise BadInput("data: holds no batch (or fewer batches than there are processes)")
        self.total = total_steps(training, context.batches, name)
        self.epoch = self.position = self.step = 0
        self.curve: list[list[float]] = []
        self.recent = 0.0
        self.log: list[dict[str, Any]] = []
        self.sums: dict[str, float] = {}
        self.order: list[torch.Tensor] = []  # states of the data's generators at the start of the epoch
        self.finite = _finite(self.module)
        self.rng: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        self.order = [g.get_state() for g in generators(self.context.data)]
        self.scaler = torch.amp.GradScaler(self.acc.device.type, enabled=self.training.precision == "fp16")
        home = next((t.device for t in self.module.state_dict().values()), torch.device("cpu"))
        try:
            self._train_on(self.module)
            return self._run()
        finally:
            self.worn.close()
            _move(self.module.eval(), home)

    def _train_on(self, module: TrainableModule) -> None:
        """Make this the network that trains: on the device, dressed, with an optimizer of its own."""
        self.worn.close()
        self.module = module
        self.finite &= set(module.state_dict())
        self.program.replace_module(module)
        _move(module, self.acc.device)
        self.worn.enter_context(self.dress(module))
        self.acc._models.clear()  # accelerate keeps every model it was ever given
        self.model = self.acc.prepare_model(module)
        self.optimizer = _optimizer(module, self.training)

    def _operate(self, surgery: Surgery | None) -> None:
        """Go on with a smaller network; the optimizer's moments lose the same indices."""
        if surgery is None:
            return
        old, moments = dict(self.module.named_parameters()), self.optimizer.state
        surgery.module.meta |= {k: v for k, v in self.module.meta.items() if k == "batches"}
        self._train_on(surgery.module)
        self.module.train(batch_norm=self.training.batch_norm == "train")
        for name, parameter in self.module.named_parameters():
            self.optimizer.state[parameter] = {
                key: taken(value, surgery.tensors.get(name, {}))
                if isinstance(value, torch.Tensor) and value.shape == old[name].shape
                else value
                for key, value in moments.get(old[name], {}).items()
            }
        for callback in self.callbacks:
            callback.after_surgery(surgery)

    def _run(self) -> dict[str, Any]:
        record: dict[str, Any] = {}
        if self.checkpoint is not None and self.checkpoint.exists():
            self._load(self.checkpoint)
            record["resumed_at"] = self.step
        else:
            for callback in self.callbacks:
                self._operate(callback.begin(self.module))
        with bar(self.context.progress and self.acc.is_main_process, self.name, self.total) as update:
            while self.done < self.total:
                self._epoch(update)
        if self.checkpoint is not None and self.acc.is_main_process:
            self.checkpoint.unlink(missing_ok=True)
        record |= {"steps": self.step, "processes": self.acc.num_processes, "epochs": self.log, "curve": self.curve}
        if self.feed.skipped:
            record["skipped_batches"] = self.feed.skipped
        return record

    @property
    def done(self) -> int:
        """How much of `total` is over. A short batch that a static program cannot take counts when its epoch ends."""
        return self.step if self.training.steps else self.epoch * (self.per_epoch or 0) + self.position

    def _epoch(self, update: Callable[[int, str], None]) -> None:
        every = self.training.checkpoint_every
        self.module.train(batch_norm=self.training.batch_norm == "train")
        for batch in self._batches():
            self._step(batch)
            update(self.done, f"loss {self.sums['loss'] / self.position:.4g}")
            if self.done >= self.total:
                break
            if every and self.step % every == 0:
                self._save()
        if not self.position:
            raise BadInput(f"data: yields no batch in epoch {self.epoch + 1}; it must be iterable again")
        self._close_epoch()
        if not every and self.done < self.total:
            self._save()

    def _batches(self) -> Iterator[Batch]:
        """The epoch's batches from `position` on. Every epoch starts from its own seed, the same in all processes until
        the first batch has fixed the order; a resumed epoch is replayed up to its position, then goes on with the
        random state of the checkpoint."""
        set_seed(self._seed("order"))
        batches = self.feed.batches(self.data)
        if self.position:
            skipped = self.feed.skipped
            for _ in islice(batches, self.position):
                pass
            self.feed.skipped = skipped
            set_rng_state(self.rng)
        elif (first := next(batches, None)) is not None:
            set_seed(self._seed(f"process {self.acc.process_index}"))
            yield first
        yield from batches

    def _seed(self, purpose: str) -> int:
        text = f"{self.context.seed}/{self.epoch}/{purpose}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")

    def _step(self, batch: Batch) -> None:
        training, device = self.training, self.acc.device
        rate = learning_rate(training, self.done, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        args, kwargs, labels = send_to_device((batch.args, batch.kwargs, batch.labels), device)
        batch = Batch(args, kwargs, labels, batch.size)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(training.precision)
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            loss, parts = self.objective(self.model(*args, **kwargs), batch)
        values = torch.stack([v.detach().float() for v in (loss, *parts.values())]).tolist()
        self._require_finite(batch, values[0], rate)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        for callback in self.callbacks:
            callback.after_backward(self.step, self.module)
        if training.clip:
            nn.utils.clip_grad_norm_(self.module.parameters(), training.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        for callback in self.callbacks:
            self._operate(callback.after_step(self.step, self.module))
        self._note(values[0])
        for key, value in zip(("loss", *parts), values, strict=True):
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.position += 1
        self.step += 1

    def _note(self, loss: float) -> None:
        self.recent += loss
        every = math.ceil(self.total / CURVE)
        if (self.step + 1) % every == 0:
            self.curve.append([self.step + 1, self.recent / every])
            self.recent = 0.0

    def _require_finite(self, batch: Batch, value: float, rate: float) -> None:
        """Raise BadInput, in every process, when a loss is not finite in one of them."""
        why = None if math.isfinite(value) else self._diagnosis(batch, value, rate)
        if self.acc.num_processes > 1 and _reduced([float(why is not None)], "sum", self.acc)[0]:
            why = next(text for text in gathered(why) if text)
        if why:
            raise BadInput(why)

    def _diagnosis(self, batch: Batch, value: float, rate: float) -> str:
        where = f"{self.name}: the loss is {value} at step {self.step + 1} (epoch {self.epoch + 1})"
        inputs = [t for t in pytree.tree_leaves((batch.args, batch.kwargs)) if isinstance(t, torch.Tensor)]
        if not all(t.isfinite().all() for t in inputs):
            return f"{where}, and that batch of the data itself holds NaN or infinite values"
        return f"{where}, learning rate {rate:.3g}; try a lower lr, a clip, more warmup, or another precision"

    def _close_epoch(self) -> None:
        for buffer in self.module.buffers():
            broadcast(buffer)  # processes keep their own batch-norm statistics; those of the first one count
        if broken := self.finite - _finite(self.module):
            raise BadInput(f"{self.name}: {min(broken)} is not finite after epoch {self.epoch + 1}; try a lower lr")
        means = _reduced([total / self.position for total in self.sums.values()], "mean", self.acc)
        entry: dict[str, Any] = {"epoch": self.epoch + 1, "steps": self.step}
        entry |= dict(zip(self.sums, means, strict=True))
        if self.context.val is not None:
            self.module.eval()
            entry["val"] = self._validate(self.context.val)
        self.log.append(entry)
        self.epoch, self.position, self.sums = self.epoch + 1, 0, {}
        self.order = [g.get_state() for g in generators(self.context.data)]

    def _validate(self, data: Iterable[Any]) -> float:
        metric = self.context.metric or accuracy
        return _score(lambda *a, **k: self.outputs(self.module(*a, **k)), self.val_feed, data, metric, self.acc)

    # ---------------------------------------------------------------------------------------------------- checkpoints
    def _save(self) -> None:
        if self.checkpoint is None:
            return
        own = gather_object([{"rng": rng_state(), "sums": self.sums}])  # of every process
        if not self.acc.is_main_process:
            return
        state = {
            "module": self.module.state_dict(),
            "batches": self.module.meta.get("batches", 0),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "callbacks": [c.state_dict() for c in self.callbacks],
            "own": own,
            "order": self.order,
            "skipped": self.feed.skipped,
            **{key: getattr(self, key) for key in PLAIN},
        }
        part = self.checkpoint.with_name(f".{self.checkpoint.name}.part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, part)
            os.replace(part, self.checkpoint)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise BadInput(f"{self.checkpoint}: the checkpoint cannot be written ({error})") from None

    def _load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
                if (module := callback.load_state_dict(saved)) is not None:
                    self._train_on(module)
            self.module.load_state_dict(state["module"])
            self.module.meta["batches"] = state["batches"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            for generator, order in zip(generators(self.context.data), state["order"], strict=True):
                generator.set_state(order)
            self.order, own = state["order"], state["own"][self.acc.process_index]
            self.rng, self.sums = own["rng"], own["sums"]
            self.feed.skipped = state["skipped"]
            for key in PLAIN:
                setattr(self, key, state[key])
        except Exception as error:
            raise BadInput(f"{path}: no usable checkpoint ({error}); delete it to train from the start") from error


def _optimizer(module: nn.Module, training: Training) -> torch.optim.Optimizer:
    params = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=training.lr)


def taken(tensor: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The entries of a tensor at the kept indices of each dimension named."""
    for d, indices in kept.items():
        tensor = tensor.index_select(d, indices.to(tensor.device))
    return tensor


def _finite(module: nn.Module) -> set[str]:
    """Names of the tensors without NaN and infinity (a mask may hold infinities of its own)."""
    return {name for name, t in module.state_dict().items() if not t.is_floating_point() or bool(t.isfinite().all())}


def fingerprint(module: TrainableModule, *parts: Any) -> str:
    """A short code for a run: graph, initial weights and everything else that decides its result."""
    digest = hashlib.blake2b(repr((str(module.graph), parts)).encode(), digest_size=6)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
