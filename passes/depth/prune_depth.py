"""Depth pruning: fewer, simpler layers, by the four stages of UPDP."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device

from ...graph.comb.solve import Comb
from ...graph.cost import require_counted
from ...graph.edit import copy_tensor, rebuild
from ...graph.errors import BadInput, GraphcombError, Refused, Unreachable
from ...graph.nodes import arguments, fetch, op_name, set_argument
from ...graph.program import Program
from ...graph.trainable import TrainableModule
from ...graph.verify.evaluate import Evaluator, double_weights, random_inputs, relative_error
from ...graph.workload.layer import rules_of, run_seconds
from ...graph.workload.layers import Layers
from ..base import Change, Context, Pass, PassResult, Refusal, check_field
from ..common.class_axis import class_axis
from ..common.feed import Batch, Feed
from ..common.latency_target import allowed_seconds, below, check_least, least_share, needed_latency
from ..common.losses import class_dim, logits_of, task_loss
from ..common.processes import accelerator, agreed, forwarded, gathered, placed
from ..common.repeat import Samples, code_of, run_code, says_anew, seeded
from ..common.scoring import bar, evaluate
from ..fuse.fuse import Fuse
from ..train.callbacks import Callback, Surgery
from ..train.distill import Distill, soft_kl
from ..train.loop import fit, total_steps
from ..train.options import SCHEDULES
from .blocks import Block, find_blocks
from .reach import Reach
from .relax import FOLDER, ORDER, SWITCHES, relax, require, set_switches, settle
from .start_norms import start_norms

CUT = "without all attention the outputs no longer depend on the inputs"
DRAWS = 100  # of random choices, before none is taken to be enough
NO_SUPERNET = "set PruneDepth's supernet_steps to 0 (then give metric=, and loss= with alpha: 0 in train)"
Bits = tuple[bool, ...]  # by prunable block: whether it is pruned


@dataclass(frozen=True)
class PruneDepth(Pass):
    """Prune whole blocks: their activations and normalisations fade while the network trains, then they are merged.

    The four stages are those of UPDP (arXiv 2401.06426). `supernet` trains all choices of blocks in one network, `search`
    looks for the blocks that are missed least, `progressive` trains the network without them, `merge` turns what is left
    of them into single layers. Which blocks there are, and what becomes of each, is found in the graph (`passes.blocks`,
    `passes.relax`, ours).

    blocks: how many to prune; or macs: what may remain, as a share of the dense program (at most 1) or a number; or
    latency: what a fused run may take as the context's latency model predicts it, a share or a time such as "3.5 ms" (what
    single blocks save is added up), with at least the share `least_macs` of the MACs left, as in `RemoveChannels`; or names:
    which ones, then neither supernet nor search. select: "search" or "random".
    supernet_steps: 0 searches with the weights as they are. Each step of the supernet runs the dense path, two random
    choices and the widest one, the dense path teaching the others (sandwich rule, Yu and Huang, arXiv 1903.05134).
    population, generations: of the evolutionary search; the fitness of a choice is the metric on up to `score_batches`
    batches of the context's val, or else data, after its batch statistics were taken anew from `calibrate` batches.
    progress: how `l` falls from 1 to 0 over the first `share` of training, "linear", "cosine" or "at once". tail: see
    `relax`. fitted: activations fade to the affine map that is nearest to them on `calibrate` batches, and new
    normalisations start as the nearest to what they replace (ours); else to the identity, as in UPDP. merged: do the
    last stage too. train: options of training, which is `Distill`'s; the teacher is the context's, or the program itself.

    Every stage keeps its result in the context's `out`, so that an interrupted run goes on; each is a method and can be
    called by itself. Several processes share the candidates of the search among them and choose what one process would;
    where they do not see the same batches, they share the batches of every candidate, as in `evaluate`.

    No choice leaves out all that connects the outputs with the inputs (`passes.reach`), such as every attention block of
    a network that answers from its class token.

    Raises BadInput for blocks that are not there, Unreachable for a target that no such choice meets, Refused for names
    that cut the outputs off. Refused, with the reason in the record: blocks that are no linear map even without their
    activations, that cost more merged, or with weights that Sparsify made sparse, whose zeros merging would fill up.
    """

    blocks: int | None = None
    macs: float | None = None
    latency: float | str | None = None
    least_macs: float | None = None
    names: tuple[str, ...] = ()
    select: Literal["search", "random"] = "search"
    supernet_steps: int = 200
    population: int = 16
    generations: int = 4
    score_batches: int = 8
    calibrate: int = 4
    progress: Literal["linear", "cosine", "at once"] = "linear"
    share: float = 0.25
    tail: bool = True
    fitted: bool = True
    merged: bool = True
    train: Distill | None = None

    def __post_init__(self) -> None:
        given = [k for k in ("blocks", "macs", "latency", "names") if getattr(self, k) not in (None, ())]
        if len(given) != 1:
            raise BadInput(
                "PruneDepth: give one of blocks, macs, latency and names"
                + (f", not {' and '.join(given)}" * bool(given))
            )
        check_field(self, "blocks", self.blocks is None or self.blocks >= 1, "at least 1")
        check_field(self, "macs", self.macs is None or self.macs > 0, "what may remain, a share or a number above 0")
        if self.latency is not None:
            allowed_seconds(self.latency, 1.0, "PruneDepth")
        check_least(self)
        check_field(self, "share", 0 < self.share <= 1, "a share of the training steps, above 0 to 1")
        for key in ("supernet_steps", "generations"):
            check_field(self, key, getattr(self, key) >= 0, "at least 0")
        for key in ("population", "score_batches", "calibrate"):
            check_field(self, key, getattr(self, key) >= 1, "at least 1")

    def run(self, program: Program, context: Context) -> PassResult:
        context = dataclasses.replace(context, teacher=context.teacher or program)
        found = find_blocks(program)
        record: dict[str, Any] = {"refused": [Refusal(b.name, b.why) for b in found if b.why is not None]}
        chosen, record["search"] = self.choose(program, found, context)
        pruned, record["train"] = self.progressive(program, chosen, context)
        result, merged = self.merge(pruned, context)
        # of the result against what was trained
        error = max(record["train"].get("error") or 0.0, merged.get("error", 0.0))
        record["merge"] = merged | {"error": error}
        record["changed"] = [
            Change(
                b.name,
                {"kind": b.kind, "form": "left out" if b.dropped else "merged"}
                | {"saves_macs": b.saves, "saves_kernels": b.kernels},
            )
            for b in chosen
        ]
        return PassResult(result, record)

    # ----------------------------------------------------------------------------------------------------- what to prune
    def choose(self, program: Program, found: Sequence[Block], context: Context) -> tuple[list[Block], dict[str, Any]]:
        """The blocks to prune, by the first two stages, and their record."""
        if self.names:
            chosen = require(found, self.names)
            if not Reach(program, chosen, context.seed)(range(len(chosen))):
                left_out = ", ".join(b.name for b in chosen if b.dropped)
                raise Refused(f"PruneDepth.names: {CUT}; keep one of {left_out}")
            return chosen, {}
        prunable = [b for b in found if b.prunable]
        try:
            budget = self.budget(program, prunable, context)
        except Unreachable as error:
            masked = next((b for b in found if b.why is not None and b.why.endswith(ORDER)), None)
            raise error if masked is None else Refused(f"{error}; {masked.name}: {masked.why}") from None
        if self.select == "random":
            bits = budget.draw(random.Random(context.seed))
            return [b for b, bit in zip(prunable, bits, strict=True) if bit], {}
        supernet, record = self.supernet(program, prunable, context, budget)
        bits, searched = self.search(supernet, budget, context)
        return [b for b, bit in zip(prunable, bits, strict=True) if bit], {"supernet": record, **searched}

    def budget(self, program: Program, blocks: Sequence[Block], context: Context) -> Budget:
        """The target in terms of what every block saves. Raises Unreachable when all of them together miss it, and when
        only choices meet it that cut the outputs off from the inputs."""
        reaches = Reach(program, blocks, context.seed)
        if self.blocks is not None:
            if self.blocks > len(blocks):
                raise Unreachable(
                    f"PruneDepth.blocks: {self.blocks} of {len(blocks)} prunable blocks; `graphcomb plan` lists them"
                )
            return self._met(Budget([1.0] * len(blocks), self.blocks, reaches), "blocks")
        macs, floor = [float(b.saves or 0) for b in blocks], 0.0
        if self.latency is None:
            assert self.macs is not None
            require_counted(program.graph_module, "PruneDepth.macs")
            dense, saves = float(program.macs), macs
            goal, name, form = (self.macs * dense if self.macs <= 1 else self.macs), "macs", "{:,.0f}"
        else:
            dense, *left = agreed(lambda: self._seconds(program, blocks, context))
            saves, floor = [dense - each for each in left], least_share(self.least_macs, context.latency)
            goal, name, form = allowed_seconds(self.latency, dense, "PruneDepth"), "latency", "{:.3g} s"
        least = dense - sum(s for s in saves if s > 0)
        if least > goal:
            numbers = [form.format(v) for v in (goal, dense, least)]
            raise Unreachable(
                f"PruneDepth.{name}: {numbers[0]} of {numbers[1]} cannot be reached; {numbers[2]} can, with all "
                f"{len(blocks)} prunable blocks"
            )
        free = self._met(Budget(saves, dense - goal, reaches), name)
        if not floor:
            return free
        assert context.latency is not None
        held = dataclasses.replace(free, macs=macs, spare=(1 - floor) * program.macs)
        try:
            return self._met(held, name)
        except Unreachable:
            taken = free.draw(random.Random(0))
            gone = [sum(s for s, bit in zip(each, taken, strict=True) if bit) for each in (saves, macs)]
            share = 1 - gone[1] / program.macs
            raise below("PruneDepth", context.latency, dense - gone[0], dense, share, floor) from None

    @staticmethod
    def _met(budget: Budget, name: str) -> Budget:
        try:
            budget.draw(random.Random(0))
        except Unreachable as error:
            raise Unreachable(f"PruneDepth.{name}: {error}") from None
        return budget

    def _seconds(self, program: Program, blocks: Sequence[Block], context: Context) -> list[float]:
        """What a run takes: dense, and without each of the blocks."""
        pruned = (relax(program, [b], settled=True, tail=self.tail, fitted=self.fitted) for b in blocks)
        dense = Fuse()(program).program
        seconds = _Predictor(context, dense)
        return [seconds(p) for p in (dense, *(Fuse()(p).program for p in pruned))]

    def supernet(
        self, program: Program, blocks: Sequence[Block], context: Context, budget: Budget
    ) -> tuple[Program, dict[str, Any]]:
        """Stage 1: the relaxed program of all blocks, trained so that every choice of them works, and the record."""
        supernet = relax(program, blocks, tail=self.tail, fitted=self.fitted)
        if not self.supernet_steps:
            return supernet, {}
        options = dataclasses.replace(self._training(), steps=self.supernet_steps)
        kept = _Kept("supernet", program, self, context)
        if state := kept.tensors():
            supernet.module().load_state_dict(state)
            return supernet, {"resumed": True}
        if context.data is None:
            raise BadInput("PruneDepth: the supernet needs data to train on; pass data=, or supernet_steps=0")
        self._start(supernet, context)
        known = options.class_dim, class_axis(program)
        objective = _Sandwich(supernet.module(), budget, options.temperature, context.loss, known)
        record = fit(supernet, objective, options, context, "PruneDepth.supernet", identity=[self.tail, self.fitted])
        kept.keep_tensors(supernet.module().state_dict())
        return supernet, record

    def search(self, supernet: Program, budget: Budget, context: Context) -> tuple[Bits, dict[str, Any]]:
        """Stage 2: the choice of blocks with the best score, and the record of the search (ours).

        The first generation holds what single blocks cost alone, added up, and random choices; the next ones are crossed
        and mutated from the better half.
        """
        if context.data is None:
            raise BadInput("PruneDepth: the search needs data; pass data=, or name the blocks")
        kept = _Kept("search", supernet, self, context)
        with seeded(context.seed, context.data, context.val):  # the same batches if the stage before is taken up
            judge = _Judge(supernet, context, self.calibrate, self.score_batches)
        scores = kept.values()
        total = budget.count + self.population * (self.generations + 1)
        with bar(context.progress, "search", total) as update:

            def score(choices: Iterable[Bits]) -> dict[Bits, float]:
                keys = {bits: "".join("01"[b] for b in bits) for bits in choices}
                new = [bits for bits, key in keys.items() if key not in scores]
                for start in range(0, len(new), judge.at_once):
                    some = new[start : start + judge.at_once]
                    scores.update(zip((keys[bits] for bits in some), judge(some), strict=True))
                    kept.keep_values(scores)
                    update(len(scores), "")
                return {bits: scores[key] for bits, key in keys.items()}

            count = budget.count
            alone = list(score(tuple(i == j for j in range(count)) for i in range(count)).values())
            generator = random.Random(context.seed)
            members = [budget.greedy(alone)]
            while len(members) < self.population:
                members.append(budget.draw(generator))
            for _ in range(self.generations):
                found = score(members)
                parents = sorted(found, key=found.__getitem__, reverse=True)[: max(2, self.population // 2)]
                members = parents + [
                    budget.child(generator.choice(parents), generator.choice(parents), generator)
                    for _ in range(self.population - len(parents))
                ]
            found = score(members)
            best = max(found, key=found.__getitem__)
        return best, {"score": found[best], "evaluated": len(scores), "alone": alone}

    # ------------------------------------------------------------------------------------------------- training, merging
    def progressive(
        self, program: Program, blocks: Sequence[Block], context: Context
    ) -> tuple[Program, dict[str, Any]]:
        """Stage 3: the program with the pruned forms of the blocks, trained, and the record of training; its `error`
        compares it in float64 with the relaxed program at `l = 0`, where one becomes the other."""
        kept = _Kept("pruned", program, self, context, [b.name for b in blocks])
        if state := kept.tensors():
            pruned = relax(program, blocks, settled=True, tail=self.tail, fitted=self.fitted)
            pruned.module().load_state_dict(state)
            return pruned, {"resumed": True}
        if context.data is None:
            raise BadInput("PruneDepth: needs data to train on; pass data=")
        trained = relax(program, blocks, tail=self.tail, fitted=self.fitted)
        self._start(trained, context)
        options = self._training()
        fading = _Fading(program, blocks, self, total_steps(options, context.data, "train"), context.seed)
        record = options.train(trained, dataclasses.replace(context, teacher=context.teacher or program), [fading])
        pruned = trained if fading.over else fading.settle(trained.module())
        kept.keep_tensors(pruned.module().state_dict())
        return pruned, record | {"error": fading.error}

    def merge(self, pruned: Program, context: Context) -> tuple[Program, dict[str, Any]]:
        """Stage 4: the pruned program, merged, and the record; `error` compares the two in float64."""
        if not self.merged:
            return pruned, {}
        result = Fuse()(pruned, seed=context.seed)
        return result.program, {k: result.record[k] for k in ("error", "changed", "refused", "gated")}

    def _start(self, relaxed: Program, context: Context) -> None:
        """Set what relaxation added by what the dense network makes of a few batches."""
        with seeded(context.seed, context.data):
            if self.fitted:
                start_norms(relaxed, islice(Feed(relaxed).batches(context.batches), self.calibrate))
            else:
                _Calibrator(relaxed, context, self.calibrate)(only=f"{FOLDER}.")

    def _training(self) -> Distill:
        return self.train or Distill()


class _Predictor:
    """Predicted seconds of a run of a program."""

    def __init__(self, context: Context, dense: Program):
        self.latency, self.progress = needed_latency(context.latency, "PruneDepth", dense), context.progress

    def __call__(self, program: Program) -> float:
        layers = Layers(Comb(program), rules=rules_of(self.latency))
        return run_seconds(self.latency, (layer for _, layer in layers.at({})), self.progress)


# -------------------------------------------------------------------------------------------------------------- choices
@dataclass(frozen=True)
class Budget:
    """Choices of blocks that save enough. saves: what each block saves; needed: what a choice has to save at least;
    reaches: whether the outputs depend on the inputs without the blocks of some indices; macs: the multiply-accumulates of
    each block that go with it; spare: how many of them may go."""

    saves: Sequence[float]
    needed: float
    reaches: Callable[[Sequence[int]], bool] = lambda taken: True
    macs: Sequence[float] = ()
    spare: float = math.inf

    @property
    def count(self) -> int:
        return len(self.saves)

    def complete(self, order: Iterable[int]) -> Bits:
        """The first blocks of an order that save enough; none that the others could do without, and none that would cut
        the outputs off or take more than is to spare. May save too little where the order comes upon such a block; `met`
        tells."""
        taken: list[int] = []
        for i in order:
            if self._saved(taken) >= self.needed:
                break
            if self.saves[i] > 0 and self._spares([*taken, i]) and self.reaches([*taken, i]):
                taken.append(i)
        for i in list(taken):
            rest = [j for j in taken if j != i]
            if self._saved(rest) >= self.needed:
                taken = rest
        return tuple(i in taken for i in range(self.count))

    def _saved(self, taken: Iterable[int]) -> float:
        return sum(self.saves[i] for i in taken)

    def _spares(self, taken: Sequence[int]) -> bool:
        return self.spare == math.inf or sum(self.macs[i] for i in taken) <= self.spare

    def met(self, bits: Bits) -> bool:
        return self._saved(i for i, bit in enumerate(bits) if bit) >= self.needed

    def widest(self) -> Bits:
        """As many blocks as may go together, whatever they save."""
        return Budget([1.0] * self.count, math.inf, self.reaches).complete(range(self.count))

    def draw(self, generator: random.Random) -> Bits:
        """A random choice. Raises Unreachable when none of many is enough."""
        for _ in range(DRAWS):
            bits = self.complete(generator.sample(range(self.count), self.count))
            if self.met(bits):
                return bits
        raise Unreachable(f"{CUT}, of every choice that meets the target")

    def greedy(self, alone: Sequence[float]) -> Bits:
        """The choice whose blocks score best alone: the best one if what they cost adds up."""
        bits = self.complete(sorted(range(self.count), key=lambda i: -alone[i]))
        return bits if self.met(bits) else self.draw(random.Random(0))

    def child(self, one: Bits, two: Bits, generator: random.Random) -> Bits:
        """What both parents prune, then what one of them does, then others, now and then something new first."""
        order = generator.sample(range(self.count), self.count)
        new = order[0] if generator.random() < 0.5 else None
        bits = self.complete(sorted(order, key=lambda i: (i != new, -(one[i] + two[i]))))
        return bits if self.met(bits) else one


class _Calibrator:
    """Takes the batch statistics of a program anew from a few batches, dropout off."""

    def __init__(self, program: Program, context: Context, count: int):
        self.program = program
        self.batches = list(islice(Feed(program).batches(context.batches), count))
        self.module = rebuild(program.module(), lambda name, value: value).eval()
        self.norms = [
            n
            for n in self.module.graph.nodes
            if op_name(n) == "batch_norm" and arguments(n)["running_mean"] is not None
        ]
        for node in self.norms:
            set_argument(node, "training", True)
            set_argument(node, "momentum", 1.0)  # leaves the statistics of the batch behind

    @torch.no_grad()
    def __call__(self, only: str = "") -> None:
        """only: of normalisations whose names start so; the others keep their statistics."""
        module, live = self.module, self.program.module()
        keys = {str(arguments(n)[k].target) for n in self.norms for k in ("running_mean", "running_var")}
        if SWITCHES in dict(live.named_buffers()):
            set_switches(module, fetch(live, SWITCHES).tolist())
        before = {k: fetch(module, k).clone() for k in keys}
        sums = {k: torch.zeros_like(v) for k, v in before.items()}
        device = accelerator().device
        with placed(module, device):
            for batch in self.batches:
                args, kwargs = send_to_device((batch.args, batch.kwargs), device)
                module(*args, **kwargs)
                for k in keys:
                    sums[k] += fetch(module, k).to(sums[k].device)
        for k in keys:
            new = sums[k] / max(len(self.batches), 1) if k.startswith(only) and self.batches else before[k]
            fetch(live, k).copy_(new)


class _Judge:
    """Scores choices of blocks in the supernet, `at_once` in a call: one in each process, as it would do alone. Processes
    that do not see the same batches score one choice together."""

    def __init__(self, supernet: Program, context: Context, calibrate: int, count: int):
        self.supernet, self.metric = supernet, context.metric
        self.calibrator = _Calibrator(supernet, context, calibrate)
        self.field = "data" if context.val is None else "val"
        self.batches = list(islice(context.batches if context.val is None else context.val, count))
        acc = accelerator()
        seen = {code_of([self.batches, [(b.args, b.kwargs) for b in self.calibrator.batches]])}
        self.index = acc.process_index
        self.at_once = acc.num_processes if len(seen.union(gathered(next(iter(seen))))) == 1 else 1

    def __call__(self, choices: Sequence[Bits]) -> list[float]:
        if self.at_once == 1:
            return [self._score(bits) for bits in choices]
        try:  # one that fails must not leave the others waiting
            own: Any = [self._score(bits, alone=True) for bits in choices[self.index : self.index + 1]]
        except Exception as error:
            own = forwarded(error)
        found = gathered(own)
        if failed := [f for f in found if isinstance(f, GraphcombError)]:
            raise failed[0]
        return [score for scores in found for score in scores]

    def _score(self, bits: Bits, alone: bool = False) -> float:
        set_switches(self.supernet.module(), [1.0 - b for b in bits])
        self.calibrator()
        return evaluate(self.supernet, self.batches, self.metric, field=self.field, alone=alone)


class _Sandwich:
    """Loss of a supernet's step: of the dense path on the labels, and of two random choices and the widest one against what
    the dense path says."""

    def __init__(
        self,
        module: TrainableModule,
        budget: Budget,
        temperature: float,
        loss: Callable[..., Any] | None,
        known: tuple[int | None, int | None],
    ):
        self.module, self.budget, self.temperature, self.loss = module, budget, temperature, loss
        self.known, self.widest = known, budget.widest()

    def __call__(self, raw: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        taught = logits_of(raw, NO_SUPERNET).detach()
        dim = class_dim(taught, batch.labels, *self.known, "set class_dim in PruneDepth's train")
        parts = {} if batch.labels is None else {"task": task_loss(self.loss, raw, batch.labels)}
        generator = random.Random(int(torch.randint(2**31, ())))
        choices = [self.budget.draw(generator), self.budget.draw(generator), self.widest]
        losses = []
        for bits in choices:
            set_switches(self.module, [1.0 - b for b in bits])
            scores = logits_of(self.module(*batch.args, **batch.kwargs))
            losses.append(soft_kl(scores, taught, self.temperature, dim))
        set_switches(self.module, [1.0] * self.budget.count)
        parts["kl"] = torch.stack(losses).mean()
        return torch.stack(list(parts.values())).sum(), parts


class _Fading(Callback):
    """Moves `l` of all blocks from 1 to 0; then the pruned forms alone go on training: the same, at less cost (ours).

    error: of the pruned forms against the relaxed ones whose place they take, in float64; of a network that a checkpoint
    held in its pruned form, None.
    """

    def __init__(self, program: Program, blocks: Sequence[Block], options: PruneDepth, total: int, seed: int):
        self.program, self.blocks, self.options, self.seed = program, blocks, options, seed
        self.steps = 0 if options.progress == "at once" else max(1, round(options.share * total))
        self.identity = ("fading", len(blocks), options.progress, self.steps)
        self.stays = options._training().features > 0  # features are taken at nodes that pruned forms may lack
        self.over = False
        self.error: float | None = None

    def begin(self, module: TrainableModule) -> Surgery | None:
        return self._move(module, 0)

    def after_step(self, step: int, module: TrainableModule) -> Surgery | None:
        return None if self.over else self._move(module, step + 1)

    def _move(self, module: TrainableModule, done: int) -> Surgery | None:
        left = SCHEDULES[self.options.progress](done / self.steps) if done < self.steps else 0.0
        set_switches(module, [left] * len(self.blocks))
        if left or self.stays:
            return None
        self.over, pruned = True, self.settle(module).module()
        before, after = module.state_dict(), pruned.state_dict()
        centre = {
            name: {d: torch.tensor([before[name].shape[d] // 2]) for d in range(2, value.dim())}
            for name, value in after.items()
            if value.shape != before[name].shape
        }
        return Surgery(pruned, centre, {})

    def settle(self, module: TrainableModule) -> Program:
        """The pruned program with the weights of the relaxed one."""
        set_switches(module, [0.0] * len(self.blocks))
        relaxed = self.program.derive(rebuild(module, copy_tensor))
        with placed(relaxed.module(), torch.device("cpu")):
            pruned = settle(self.program, self.blocks, relaxed, self.options.tail, self.options.fitted)
            inputs = random_inputs(self.program, torch.Generator().manual_seed(self.seed))
            expected, found = (Evaluator(p, double_weights(p)).run(inputs) for p in (relaxed, pruned))
        self.error = relative_error(found, expected)
        return pruned

    def state_dict(self) -> dict[str, Any]:
        return {"over": self.over}

    def load_state_dict(self, state: dict[str, Any]) -> TrainableModule | None:
        self.over = state["over"]
        if not self.over:
            return None
        return relax(self.program, self.blocks, True, self.options.tail, self.options.fitted).module()


class _Kept:
    """The result of a stage in a folder, under a name that stands for what it depends on, with a sample of the data. The
    main process decides whether there is one."""

    def __init__(self, stage: str, program: Program, options: PruneDepth, context: Context, *more: Any):
        self.path: Path | None = None
        self.stage, self.samples = stage, Samples(context)
        if context.out is not None:
            fields = [getattr(options, f.name) for f in dataclasses.fields(options) if f.name != "train"]
            parts = (fields, repr(options.train), accelerator().num_processes, more)
            code = agreed(lambda: run_code(program.module(), context, *parts))
            self.path = Path(context.out) / f"{stage}-{code}"

    def tensors(self) -> dict[str, torch.Tensor] | None:
        return self._read(lambda path: torch.load(path, map_location="cpu", weights_only=True))

    def keep_tensors(self, state: dict[str, torch.Tensor]) -> None:
        self._write(state, torch.save)

    def values(self) -> dict[str, float]:
        return self._read(lambda path: json.loads(path.read_text())) or {}

    def keep_values(self, values: dict[str, float]) -> None:
        self._write(values, lambda value, part: part.write_text(json.dumps(value)))

    def _read(self, read: Callable[[Path], Any]) -> Any:
        """What the main process finds of the same data, in every process."""
        return None if self.path is None else agreed(lambda: self._same(read))

    def _same(self, read: Callable[[Path], Any]) -> Any:
        assert self.path is not None
        if self.path.exists():
            try:
                stored = read(self.path)
                if not self.samples.differ(stored["data"]):
                    return stored["result"]
            except (OSError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
                raise BadInput(f"{self.path}: cannot be read ({error}); delete it to start this stage anew") from error
        if list(self.path.parent.glob(f"{self.stage}-*")):
            says_anew(self.path.parent, f"PruneDepth's {self.stage}")
        return None

    def _write(self, result: Any, write: Callable[[Any, Path], Any]) -> None:
        if self.path is None or not accelerator().is_main_process:
            return
        part = self.path.with_name(f".{self.path.name}.part")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write({"result": result, "data": self.samples.codes}, part)
        os.replace(part, self.path)
