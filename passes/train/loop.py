"""The training loop of all passes that train: accelerate underneath, checkpoints, and the same result after a resume.

One process, `accelerate launch` and `torchrun` run the same code as plain data parallelism: the global batch is the
loader's batch size times the number of processes. Source: ours.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, set_seed
from torch import nn

from ...graph.compat import pytree
from ...graph.errors import BadInput, GraphcombError
from ...graph.program import Program
from ...graph.sparse import zeros
from ...graph.trainable import TrainableModule
from ..base import Context
from ..common.feed import Batch, Feed
from ..common.loaders import generators, length, shard
from ..common.losses import accuracy
from ..common.processes import accelerator, agreed, gathered, move, reduced
from ..common.repeat import code_of, rng_state, run_code, sample, seeded, set_rng_state
from ..common.scoring import bar, score
from .callbacks import Callback, HeldZeros, Kept
from .checkpoint import Checkpoint, data_differs
from .options import Training, learning_rate, make_optimizer
from .trainee import Parameters, Trainee, carry_state

Objective = Callable[[Any, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def fit(
    program: Program,
    objective: Objective,
    training: Training,
    context: Context,
    name: str,
    outputs: Callable[[Any], Any] = lambda raw: raw,
    callbacks: Sequence[Callback] = (),
    identity: Sequence[Any] = (),
) -> dict[str, Any]:
    """Train `program.module()` in place on `context.data` and leave it in eval mode. Returns the record: steps, one entry
    per epoch (mean loss and its parts, score on `context.val`), the loss over steps as `curve` (up to 200 pairs of a step
    and the mean loss since the pair before), and how many batches were skipped.

    objective: `(what the module returns, batch) -> (loss, {part: value})`. name: of the pass, in messages and file names.
    outputs: picks the model's own outputs from what the module returns, for the metric. callbacks: may replace the module;
    the program's module is then the new one. identity: whatever else decides the result. Training continues from a
    checkpoint if identity and everything that `run_code` sees are the same and the data begins alike; otherwise it starts
    anew, with a warning.

    The result depends on the seed, the data and the options only: every epoch starts from its own seed, and a run killed at
    any point and started again ends where the uninterrupted one does, bit by bit on a CPU.

    Raises BadInput for missing, empty or unfitting data, for options that do not fit the machine or the context, where
    nothing can be trained, and for a loss or weights that are not finite; GraphcombError where another process was lost.
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
        decides = [*identity, *((code_of(type(c)), c.identity) for c in callbacks)]
        options = (repr(training), acc.num_processes, sample(context.val, context.seed))
        code = agreed(lambda: run_code(module, context, *options, *decides))
        checkpoint = Checkpoint(Path(context.out) / f"{name.lower()}-{code}.ckpt", name)
    elif training.checkpoint_every:
        raise BadInput(f"{name}.checkpoint_every: needs a folder for the checkpoints; pass out=")
    loop = _Loop(program, objective, training, context, name, outputs, callbacks, acc, checkpoint)
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
    """How many batches each process takes; with the program's feed, how many it trains on, since a fixed batch size skips
    short batches. Raises BadInput for epochs of data without a length."""
    if training.steps is not None:
        return training.steps
    acc = accelerator()
    per_epoch = length(shard(data, acc.process_index, acc.num_processes))
    if per_epoch is None:
        raise BadInput(f"{name}.steps: give the number of steps, the data has no length to count epochs by")
    return training.epochs * (per_epoch - (feed is not None and feed.leaves(data)))


LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "ProcessGroup")  # in errors of lost collectives
PLAIN = ("epoch", "position", "step", "log", "curve", "recent")
SEEN = 16  # first batches whose hashes a checkpoint stores to recognise its data
CURVE = 200  # most points of the loss curve


@dataclass
class _Loop:
    """One training run. Its whole state is in the attributes named by PLAIN and in the objects that it drives; a checkpoint
    has both."""

    program: Program
    objective: Objective
    training: Training
    context: Context
    name: str
    outputs: Callable[[Any], Any]
    callbacks: Sequence[Callback]
    acc: Accelerator
    checkpoint: Checkpoint | None

    def __post_init__(self) -> None:
        context, acc = self.context, self.acc
        module = self.program.module()
        self.trainee = Trainee(module, self.callbacks, self._adopt, self._carry_on)
        self.feed, self.val_feed = Feed(self.program), Feed(self.program, "val")
        self.data = shard(context.batches, acc.process_index, acc.num_processes)
        self.per_epoch = length(self.data)
        if acc.num_processes > 1 and self.feed.leaves(context.batches):
            raise BadInput(
                f"data: the last batch is short, the program is fixed to {self.feed.static} samples, and so only some "
                "processes would take a step; set drop_last=True"
            )
        if not any(p.requires_grad for p in module.parameters()):
            raise BadInput(f"{self.name}: nothing to train, all parameters are frozen (requires_grad is False)")
        if self.per_epoch == 0:
            raise BadInput("data: holds no batch (or fewer batches than there are processes)")
        self.total = total_steps(self.training, context.batches, self.name)
        self.epoch = self.position = self.step = 0
        self.curve: list[list[float]] = []
        self.recent = 0.0
        self.log: list[dict[str, Any]] = []
        self.sums: dict[str, float] = {}
        self.order: list[torch.Tensor] = []  # states of the data's generators at the start of the epoch
        self.seen: list[str] = []  # hashes of the first batches of the first epoch
        self.finite = _finite(module)
        self.rng: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        self.order = [g.get_state() for g in generators(self.context.data)]
        self.scaler = torch.amp.GradScaler(self.acc.device.type, enabled=self.training.precision == "fp16")
        home = next((t.device for t in self.module.state_dict().values()), torch.device("cpu"))
        try:
            self._train_on(self.module)
            return self._run()
        finally:
            self.trainee.leave()
            move(self.module.eval(), home)

    @property
    def module(self) -> TrainableModule:
        """The network that trains."""
        return self.trainee.module

    def _train_on(self, module: TrainableModule) -> None:
        """Make this the network that trains, with a new optimizer."""
        self.trainee.replace(module)
        self._prepare()

    def _adopt(self, module: TrainableModule) -> TrainableModule:
        self.finite &= set(module.state_dict())
        self.program.replace_module(module)
        move(module, self.acc.device)
        return module

    def _prepare(self) -> None:
        self.acc._models.clear()  # otherwise accelerate keeps every model that it was ever given
        self.model = self.acc.prepare_model(self.module)
        self.optimizer = make_optimizer(self.module, self.training)

    def _carry_on(self, old: Parameters, new: Parameters, kept: Kept) -> None:
        """Continue with a network that replaces another, and with the optimizer's state for it. The optimizer is a new one,
        so that its parameters have the order that they have after a resume."""
        state = self.optimizer.state
        self._prepare()
        self.module.train(batch_norm=self.training.batch_norm == "train")
        carry_state(state, self.optimizer, old, new, kept)

    def _run(self) -> dict[str, Any]:
        record: dict[str, Any] = {}
        if (state := self._stored()) is not None:
            self._load(state)
            record["resumed_at"] = self.step
        else:
            self.trainee.begin()
        with bar(self.context.progress and self.acc.is_main_process, self.name, self.total) as update:
            while self.done < self.total:
                self._epoch(update)
        if self.checkpoint is not None and self.acc.is_main_process:
            self.checkpoint.remove()
        record |= {"steps": self.step, "processes": self.acc.num_processes, "epochs": self.log, "curve": self.curve}
        if self.feed.skipped:
            record["skipped_batches"] = self.feed.skipped
        return record

    @property
    def done(self) -> int:
        """How many of the `total` batches are over. A short batch that a static program cannot take counts when its epoch
        ends."""
        return self.step if self.training.steps else self.epoch * (self.per_epoch or 0) + self.position

    def _epoch(self, update: Callable[[int, str], None]) -> None:
        every = self.training.checkpoint_every
        self.module.train(batch_norm=self.training.batch_norm == "train")
        for batch in self._batches():
            if self.checkpoint is not None and not self.epoch and len(self.seen) == self.position < SEEN:
                self.seen.append(_code(batch))
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
        """Yield the epoch's batches from `position` on. Every epoch starts from its own seed, the same in all processes
        until the first batch has fixed the order. A resumed epoch is replayed up to its position, then continues with the
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
        batch = batch.to(device)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(training.precision)
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            loss, parts = self.objective(self.model(*batch.args, **batch.kwargs), batch)
        values = torch.stack([v.detach().float() for v in (loss, *parts.values())]).tolist()
        self._require_finite(batch, values[0], rate)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.trainee.after_backward(self.step, self.scaler.get_scale())
        if training.clip:
            nn.utils.clip_grad_norm_(self.module.parameters(), training.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.trainee.after_step(self.step)
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
        if self.acc.num_processes > 1 and reduced([float(why is not None)], "sum", self.acc)[0]:
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
            broadcast(buffer)  # each process has batch-norm statistics of its own; those of the first one count
        if broken := self.finite - _finite(self.module):
            raise BadInput(f"{self.name}: {min(broken)} is not finite after epoch {self.epoch + 1}; try a lower lr")
        means = reduced([total / self.position for total in self.sums.values()], "mean", self.acc)
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
        return score(lambda *a, **k: self.outputs(self.module(*a, **k)), self.val_feed, data, metric, self.acc).mean

    # ---------------------------------------------------------------------------------------------------- checkpoints
    def _save(self) -> None:
        if self.checkpoint is None:
            return
        # One entry for each process.
        ranks = gather_object([{"rng": rng_state(), "sums": self.sums, "seen": self.seen}])
        if not self.acc.is_main_process:
            return
        state = {
            "module": self.module.state_dict(),
            "batches": self.module.meta.get("batches", 0),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "callbacks": [c.state_dict() for c in self.callbacks],
            "own": ranks,
            "order": self.order,
            "skipped": self.feed.skipped,
            **{key: getattr(self, key) for key in PLAIN},
        }
        self.checkpoint.write(state)

    def _stored(self) -> dict[str, Any] | None:
        """The state in this run's checkpoint, or None; the same in every process, whichever sees the file."""
        if self.checkpoint is None:
            return None
        state: dict[str, Any] | None = agreed(self.checkpoint.read)
        if state is not None:
            seen = state["own"][self.acc.process_index]["seen"]
            other = data_differs(seen, partial(self._first, len(seen)))
            state = None if reduced([float(other)], "sum", self.acc)[0] else state
        if state is None and self.acc.is_main_process:
            self.checkpoint.warn_of_others()
        return state

    def _first(self, count: int, draw: bool) -> list[str]:
        """Hashes of the first batches. draw: whether to draw other random numbers between batches."""
        codes: list[str] = []
        with seeded(self.context.seed, self.context.data):
            for batch in islice(self._batches(), count):
                codes.append(_code(batch))
                if draw:
                    set_seed(len(codes))
        self.feed.skipped = 0
        return codes

    def _load(self, state: dict[str, Any]) -> None:
        assert self.checkpoint is not None
        try:
            for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
                if (module := callback.load_state_dict(saved)) is not None:
                    self._train_on(module)
            self.module.load_state_dict(state["module"])
            self.module.meta["batches"] = state["batches"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            for generator, order in zip(generators(self.context.data), state["order"], strict=True):
                generator.set_state(order)
            self.order, rank = state["order"], state["own"][self.acc.process_index]
            self.rng, self.sums, self.seen = rank["rng"], rank["sums"], rank["seen"]
            self.feed.skipped = state["skipped"]
            for key in PLAIN:
                setattr(self, key, state[key])
        except Exception as error:
            raise self.checkpoint.unusable(error) from error


def _code(batch: Batch) -> str:
    return code_of((batch.args, batch.kwargs, batch.labels))


def _finite(module: nn.Module) -> set[str]:
    """Names of the tensors without NaN and infinity (a mask may contain infinities on purpose)."""
    return {name for name, t in module.state_dict().items() if not t.is_floating_point() or bool(t.isfinite().all())}
