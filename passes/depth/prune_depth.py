"""The pass that prunes depth: fewer, simpler layers, by the four stages of UPDP."""

import dataclasses
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

from ...graph.cost import require_counted
from ...graph.errors import BadInput, Refused, Unreachable
from ...graph.program import Program
from ...graph.trainable import TrainableModule
from ..base import Change, Context, Pass, PassResult, Refusal, check_field
from ..common.class_axis import class_axis
from ..common.feed import Feed
from ..common.latency import allowed_seconds, below, check_least, least_share
from ..common.processes import agreed
from ..common.repeat import functions_code, seeded
from ..fuse.fuse import Fuse
from ..repair.repair import Repair
from ..train.distill import Distill
from ..train.loop import fit, total_steps
from ..train.trainee import Work
from .blocks import Block
from .budget import CUT, Bits, Budget, Predictor
from .price import ORDER, find_blocks
from .reach import Reach
from .relax import FOLDER, relax, settle
from .search import Calibrator, Judge, search
from .start_norms import start_norms
from .stored import StoredStage
from .training import NO_SUPERNET, Fading, Sandwich


@dataclass(frozen=True)
class Ablation:
    """Parts of the method that a benchmark leaves out to measure what they are worth; no options of recipes.

    search: choose blocks by the search; otherwise at random, such that they meet the target. fading: let blocks fade;
    otherwise their pruned forms take over at the first step, UPDP's baseline. tail: end blocks that no activation follows
    with one, see `relax`. fitted: activations fade to the affine map nearest to them, and new normalisations start as the
    map nearest to what they replace (ours); otherwise activations fade to the identity, as in UPDP.
    """

    search: bool = True
    fading: bool = True
    tail: bool = True
    fitted: bool = True


@dataclass(frozen=True)
class PruneDepth(Pass):
    """Prune whole blocks: their activations and normalisations fade while the network trains, then they are merged.

    The four stages are those of UPDP (arXiv 2401.06426). `supernet` trains all choices of blocks in one network, `search`
    looks for the blocks that are missed least, `progressive` trains the network without them, `merge` turns what is left of
    them into single layers. The blocks, and what each can become, are found in the graph (`passes.depth.blocks`,
    `passes.depth.relax`, ours).

    One target:
    blocks: how many blocks to prune.
    macs: the multiply-accumulates (MACs) that may remain, as a share of the dense program's (at most 1) or a number.
    latency: the time that a fused run may take as the context's latency model predicts it, as a share of the dense
        program's or a time such as "3.5 ms"; the savings of single blocks are added up. least_macs: the share of the MACs
        that a latency target has to leave, as in `RemoveChannels`.
    names: the blocks themselves; then there is neither supernet nor search.

    The search:
    supernet_steps: training steps of the supernet; 0 searches with the weights as they are. Each step runs the dense path,
        two random choices and the widest choice; the dense path teaches the others (sandwich rule, Yu and Huang, arXiv
        1903.05134).
    population, generations: of the evolutionary search. score_batches: a choice's score is its metric on at most this many
        batches of the context's val, or else data. calibrate: number of batches from which batch statistics are taken anew
        before scoring, and to which activations are fitted.

    Training:
    progress: how a block's parameter `l` falls from 1 (dense) to 0 (pruned), "linear" or "cosine", over the first `share`
        of the training steps.
    train: a `Distill` with the options of training; the teacher is the context's, or the program itself.
    merged: whether to do the last stage; otherwise `Fuse` can do it later.

    repair: do not train, neither a supernet nor what is left; labels are not needed. The search takes the choice whose
    outputs stay nearest to those of the dense network (`common.divergence`) on `score_batches` of the data. The blocks go at
    once, activations in them become the nearest affine map, and the layers that read what has changed, or stand for a merged
    block, get their least-squares weights from images of the data, as from `Repair` with its defaults. (Blocks that fade in
    training lose nothing at once that a repair could bring back.)

    Every stage keeps its result in the context's `out`, so that an interrupted run continues; each is a method and can be
    called by itself. Several processes divide the candidates of the search and choose what one process would; where they do
    not see the same batches, they divide the batches of every candidate, as in `evaluate`.

    No choice leaves out all that connects the outputs with the inputs (`passes.depth.reach`), such as every attention block
    of a network that answers from its class token.

    Raises BadInput for blocks that are not there and for missing data, Unreachable for a target that no such choice meets,
    Refused for names that cut the outputs off. Refused, with the reason in the record: blocks that are not linear even
    without their activations, that would cost more when merged, or with weights that Sparsify made sparse, whose zeros
    merging would fill.
    """

    blocks: int | None = None
    macs: float | None = None
    latency: float | str | None = None
    least_macs: float | None = None
    names: tuple[str, ...] = ()
    supernet_steps: int = 200
    population: int = 16
    generations: int = 4
    score_batches: int = 8
    calibrate: int = 4
    progress: Literal["linear", "cosine"] = "linear"
    share: float = 0.25
    merged: bool = True
    train: Distill | None = None
    repair: bool = False
    ablation: ClassVar[Ablation] = Ablation()

    def __post_init__(self) -> None:
        targets = [k for k in ("blocks", "macs", "latency", "names") if getattr(self, k) not in (None, ())]
        if len(targets) != 1:
            raise BadInput(
                "PruneDepth: give one of blocks, macs, latency and names"
                + (f", not {' and '.join(targets)}" * bool(targets))
            )
        check_field(self, "blocks", self.blocks is None or self.blocks >= 1, "at least 1")
        check_field(self, "macs", self.macs is None or self.macs > 0, "what may remain, a share or a number above 0")
        if self.latency is not None:
            allowed_seconds(self.latency, 1.0, "PruneDepth")
        check_least(self)
        says = "false with `train`, in which blocks fade; train what comes out with Distill"
        check_field(self, "repair", not self.repair or self.train is None, says)
        check_field(self, "share", 0 < self.share <= 1, "a share of the training steps, above 0 to 1")
        for key in ("supernet_steps", "generations"):
            check_field(self, key, getattr(self, key) >= 0, "at least 0")
        for key in ("population", "score_batches", "calibrate"):
            check_field(self, key, getattr(self, key) >= 1, "at least 1")

    def run(self, program: Program, context: Context) -> PassResult:
        context = dataclasses.replace(context, teacher=context.teacher or program)
        chosen, record = self._chosen(program, context)
        if self.repair:
            pruned, record["train"] = self._at_once(program, chosen, context), {}
        else:
            pruned, record["train"] = self.progressive(program, chosen, context)
        result = self._merged(program, pruned, chosen, record, context)
        if self.repair:
            result.record["repair"] = Repair().apply(program, result.program, {}, context)
        return result

    def in_loop(self, program: Program, context: Context, steps: int, own: TrainableModule | None) -> Work:
        """The pass's work in the user's own training loop: blocks are chosen now, fade while it trains, and are merged at
        the end."""
        if own is not None:
            raise BadInput('PruneDepth: fading blocks are no part of your own module; attach with cut="during"')
        check_field(self, "repair", not self.repair, "false in a loop of your own, which trains instead")
        chosen, record = self._chosen(program, context)
        relaxed = self._relaxed(program, chosen)
        self._start(relaxed, context)
        fading = self._fading(program, chosen, steps, context.seed)

        def conclude(trained: Program) -> PassResult:
            pruned = trained if fading.over else fading.settle(trained.module())
            record["train"] = {"error": fading.error}
            return self._merged(program, pruned, chosen, record, context)

        return Work([fading], conclude, self._training().loss_in_loop(program, context), relaxed)

    def _merged(
        self, program: Program, pruned: Program, chosen: Sequence[Block], record: dict[str, Any], context: Context
    ) -> PassResult:
        """Stage 4, and the result."""
        result, merged = self.merge(pruned, context)
        # The error is the result's, against what was trained.
        error = max(record["train"].get("error") or 0.0, merged.get("error", 0.0))
        record["merge"] = merged | {"error": error}
        record["changed"] = []
        for b in chosen:
            forms = {"kind": b.kind, "form": "left out" if b.dropped else "merged"}
            record["changed"].append(Change(b.name, forms | {"saves_macs": b.saves, "saves_kernels": b.kernels}))
        return PassResult(result, record)

    # ----------------------------------------------------------------------------------------------------- what to prune
    def _chosen(self, program: Program, context: Context) -> tuple[list[Block], dict[str, Any]]:
        """The blocks to prune, and the record of the refused blocks and of the search."""
        blocks = find_blocks(program)
        chosen, search_record = self.choose(program, blocks, context)
        refused = [Refusal(b.name, b.why) for b in blocks if b.why is not None]
        return chosen, {"refused": refused, "search": search_record}

    def choose(self, program: Program, blocks: Sequence[Block], context: Context) -> tuple[list[Block], dict[str, Any]]:
        """The blocks to prune, by the first two stages, and their record. Raises as the class says."""
        if self.names:
            chosen = self._named(blocks)
            if not Reach(program, chosen, context.seed)(range(len(chosen))):
                left_out = ", ".join(b.name for b in chosen if b.dropped)
                raise Refused(f"PruneDepth.names: {CUT}; keep one of {left_out}")
            return chosen, {}
        prunable = [b for b in blocks if b.prunable]
        try:
            budget = self.budget(program, prunable, context)
        except Unreachable as error:
            masked = next((b for b in blocks if b.why is not None and b.why.endswith(ORDER)), None)
            raise error if masked is None else Refused(f"{error}; {masked.name}: {masked.why}") from None
        if not self.ablation.search:
            bits = budget.draw(random.Random(context.seed))
            return [b for b, bit in zip(prunable, bits, strict=True) if bit], {}
        supernet, record = self.supernet(program, prunable, context, budget)
        bits, searched = self.search(supernet, budget, context)
        return [b for b, bit in zip(prunable, bits, strict=True) if bit], {"supernet": record, **searched}

    def _named(self, blocks: Sequence[Block]) -> list[Block]:
        """The blocks of `names`. Raises BadInput for a name that no block has, or whose block cannot be pruned."""
        known = {b.name: b for b in blocks}
        for name in self.names:
            if name not in known:
                raise BadInput(f"PruneDepth.names: no block {name!r}; there are {', '.join(known) or 'none'}")
            if known[name].why is not None:
                raise BadInput(f"PruneDepth.names: {name} cannot be pruned: {known[name].why}")
        return [known[name] for name in self.names]

    def budget(self, program: Program, blocks: Sequence[Block], context: Context) -> Budget:
        """The target, and what every block saves of it. Raises Unreachable if all blocks together miss the target, or if
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
            saves, floor = [dense - seconds for seconds in left], least_share(self.least_macs, context.latency)
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
            bits = free.draw(random.Random(0))
            gone = [sum(s for s, bit in zip(unit, bits, strict=True) if bit) for unit in (saves, macs)]
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
        """Predicted seconds of a run: of the dense program, then without each single block."""
        pruned = (self._relaxed(program, [b], settled=True) for b in blocks)
        dense = Fuse()(program).program
        seconds = Predictor(context, dense)
        return [seconds(p) for p in (dense, *(Fuse()(p).program for p in pruned))]

    def supernet(
        self, program: Program, blocks: Sequence[Block], context: Context, budget: Budget
    ) -> tuple[Program, dict[str, Any]]:
        """Stage 1: the relaxed program of all blocks, trained so that every choice of them works, and the record."""
        supernet = self._relaxed(program, blocks)
        if self.repair:
            self._start(supernet, context)
            return supernet, {}
        if not self.supernet_steps:
            return supernet, {}
        options = dataclasses.replace(self._training(), steps=self.supernet_steps)
        stored = self._stored("supernet", program, context)
        if state := stored.read():
            supernet.module().load_state_dict(state)
            return supernet, {"resumed": True}
        if context.data is None:
            raise BadInput("PruneDepth: the supernet needs data to train on; pass data=, or supernet_steps=0")
        self._start(supernet, context)
        lesson = functools.partial(options.lesson, of_graph=class_axis(program), instead=NO_SUPERNET)
        objective = Sandwich(supernet.module(), budget, context.loss, lesson)
        identity = [self.ablation.tail, self.ablation.fitted, functions_code(options)]
        record = fit(supernet, objective, options, context, "PruneDepth.supernet", identity=identity)
        stored.write(supernet.module().state_dict())
        return supernet, record

    def search(self, supernet: Program, budget: Budget, context: Context) -> tuple[Bits, dict[str, Any]]:
        """Stage 2: the choice of blocks with the best score, and the record of the search."""
        if context.data is None:
            raise BadInput("PruneDepth: the search needs data; pass data=, or name the blocks")
        stored = self._stored("search", supernet, context)
        with seeded(context.seed, context.data, context.val):  # the same batches if stage 1 was read from its file
            dense = context.teacher if self.repair else None
            judge = Judge(supernet, context, self.calibrate, self.score_batches, dense)
        size = self.population, self.generations
        return search(judge, budget, *size, context, stored.read() or {}, stored.write)

    # ------------------------------------------------------------------------------------------------- training, merging
    def progressive(
        self, program: Program, blocks: Sequence[Block], context: Context
    ) -> tuple[Program, dict[str, Any]]:
        """Stage 3: the program with the pruned forms of the blocks, trained, and the record of training. Its `error`
        compares, in float64, the pruned program with the relaxed one at `l = 0` when the former replaces the latter."""
        stored = self._stored("pruned", program, context, [b.name for b in blocks])
        if state := stored.read():
            pruned = self._relaxed(program, blocks, settled=True)
            pruned.module().load_state_dict(state)
            return pruned, {"resumed": True}
        if context.data is None:
            raise BadInput("PruneDepth: needs data to train on; pass data=")
        trained = self._relaxed(program, blocks)
        self._start(trained, context)
        options = self._training()
        fading = self._fading(program, blocks, total_steps(options, context.data, "train"), context.seed)
        record = options.train(trained, dataclasses.replace(context, teacher=context.teacher or program), [fading])
        pruned = trained if fading.over else fading.settle(trained.module())
        stored.write(pruned.module().state_dict())
        return pruned, record | {"error": fading.error}

    def _at_once(self, program: Program, blocks: Sequence[Block], context: Context) -> Program:
        """The program with the pruned forms of the blocks, whose affine maps are fitted to what they replace."""
        relaxed = self._relaxed(program, blocks)
        self._start(relaxed, context)
        return settle(self._relaxed(program, blocks, settled=True), relaxed)

    def merge(self, pruned: Program, context: Context) -> tuple[Program, dict[str, Any]]:
        """Stage 4: the pruned program, merged, and the record; its `error` compares the two programs in float64."""
        if not self.merged:
            return pruned, {}
        result = Fuse()(pruned, seed=context.seed)
        return result.program, {k: result.record[k] for k in ("error", "changed", "refused", "gated")}

    def _start(self, relaxed: Program, context: Context) -> None:
        """Initialise what relaxation added from the dense network's values for a few batches."""
        if self.repair and context.data is None:
            raise BadInput("PruneDepth.repair: needs images (labels are not needed); pass data=")
        with seeded(context.seed, context.data):
            if self.ablation.fitted:
                start_norms(relaxed, islice(Feed(relaxed).batches(context.batches), self.calibrate))
            else:
                Calibrator(relaxed, context, self.calibrate)(only=f"{FOLDER}.")

    def _fading(self, program: Program, blocks: Sequence[Block], total: int, seed: int) -> Fading:
        """The callback that fades the blocks in a training run of this many steps."""
        steps = max(1, round(self.share * total)) if self.ablation.fading else 0
        pruned, stays = self._relaxed(program, blocks, settled=True), self._training().features > 0
        return Fading(program, pruned, len(blocks), self.progress, steps, stays, seed)

    def _relaxed(self, program: Program, blocks: Sequence[Block], settled: bool = False) -> Program:
        return relax(program, blocks, settled, self._tail, self.ablation.fitted)

    @property
    def _tail(self) -> bool:
        """Whether blocks that no activation follows get one; without training a new activation could not learn anything."""
        return self.ablation.tail and not self.repair

    def _stored(self, stage: str, program: Program, context: Context, *identity: Any) -> StoredStage:
        fields = [getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "train"]
        return StoredStage(stage, program, context, fields, self.ablation, repr(self.train), *identity)

    def _training(self) -> Distill:
        return self.train or Distill()


def ablated(**parts: bool) -> type[PruneDepth]:
    """The pass without parts of the method (see `Ablation`), as in `ablated(fading=False)(blocks=2)`."""

    class Ablated(PruneDepth):
        ablation = Ablation(**parts)

    Ablated.__name__ = PruneDepth.__name__  # in records
    return Ablated
