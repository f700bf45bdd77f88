"""The pass that sets weights to zero, unstructured or N:M, by CAP and other methods."""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from ...graph.edit import copy_tensor, rebuild
from ...graph.errors import BadInput, Refused
from ...graph.nodes import fetch
from ...graph.program import Program
from ...graph.sparse import implies, legal, read_pattern, sparse_weights, stronger
from ...graph.trainable import TrainableModule
from ..base import Context, Pass, PassResult, Refusal, check_field
from ..common.processes import accelerator, agreed, broadcast_all, stored_program
from ..common.repeat import Samples, run_code, sample, says_anew
from ..common.scoring import evaluate
from ..common.weights import WeightedLayer, check_included, layers, named_layers
from ..train.callbacks import Zeroing
from ..train.distill import Distill
from ..train.trainee import Work
from .permute import permuted
from .ranking import Pattern
from .solver import PROBE, Method, Solver
from .statistics.gradients import Gradients
from .statistics.unfold import check_again

GLOBAL = ("cap", "woodfisher", "magnitude")  # methods whose scores are losses or sizes that compare between layers
BY_GRADIENTS = ("cap", "fastcap", "woodfisher")
NO_GRADIENT = "no gradient of the loss reaches it; give a loss that reads what it computes"
SPARSE_CAPABILITY = (8, 0)  # the first compute capability with sparse tensor cores
SPARSE_CHANNELS = 256  # with fewer input or output channels a sparse kernel is hardly faster


@dataclass(frozen=True)
class Sparsify(Pass):
    """Set those weights of linear layers and convolutions to zero that the loss misses least, and adapt the others.

    One target:
    sparsity: the share of zeros in the chosen weights together, above 0 and under 1; 0.5 if no target is given.
    pattern: "2:4" and the like: how many of every four (or `M`) input channels stay, for each output channel and kernel
        position. Sparse tensor cores use 2:4 alone.
    schedule: a gradual run as pairs `(epoch, sparsity)`: prune at that epoch, then train until the next pair's epoch.

    How:
    method: "cap" (arXiv 2210.09223: block Fisher matrices, greedy one-by-one elimination, closed-form update), "fastcap"
        (one Fisher matrix for all rows of a block of columns, relative damping, column sweep; one matrix for each block of
        columns is ours), "woodfisher" (arXiv 2004.14340: all scores at once, updates added up), "sparsegpt" (arXiv
        2301.00774), "wanda" (arXiv 2306.11695) or "magnitude".
    scope: "global" ranks all layers together, "uniform" each layer by itself; None is "global" for methods whose scores
        compare between layers (cap, woodfisher, magnitude).
    block: how many weights are correlated with one another, the papers' B.
    gradients: number of gradients, the papers' m; for methods without gradients, the number of samples. per: whether a
        gradient is of a "sample" or of a "batch". against: "labels", or "teacher" for labels drawn from the teacher's class
        probabilities.
    damping: λ of cap and woodfisher (1e-8 in the paper); None is 1e-2 of the gradients' mean square, whatever the scale of
        the loss. With images like those of its use, 1e-3 may lose a little less; with few or different images, 1e-1 does
        (ours). For fastcap and sparsegpt it is relative to the mean diagonal; None is 1e-2.
    finish_rows: for cap with a share of zeros: the share, from 0 to under 1, that is taken off the mean loss of an output's
        last weights; all of them go where the result is below the loss of other weights that go. Outputs that are emptied
        like this are removed by `Minimise`, at some cost (`benchmarks/finish_rows.py`). Not for layers of a residual trunk.
    recomputations: number of equal steps in which the target is reached, with new gradients in each; the paper's Nr.
    dtype: precision of the Fisher sums and the elimination, "fp32" or "fp64"; a block for which fp32 does not suffice is
        eliminated in fp64. memory: bytes for both, at least a million; more needs several passes over the data.
    permute: with a pattern, first reorder the input channels so that the pattern loses less, where the comb knows their
        axis whole and free; this changes no output (`passes.sparse.permute`). Not for a program that is sparse already.

    Which layers:
    where: "pays" sparsifies only the layers that the target then computes faster, "all" every layer; None is "pays" with a
        pattern and without `include`, else "all", since no engine here gains from unstructured zeros. Without `include`,
        the layers at the input and the output and depthwise ones stay dense.
    include, exclude: patterns over parameter names; any of the names of a tied weight may match. Methods that use gradients
        refuse weights that get none.

    A gradual run:
    train: a `Distill` whose epochs are those of the whole run; its learning rate starts anew after each pruning (CAP:
        linear down).
    snapshots: folder for the program after each stage, by default the context's `out`; an interrupted run continues from
        the last one, unless it is of other data, options, teacher, target, precision or number of processes.

    Weights that are zero already count, and stay zero. The record names each layer with its sparsity and whether the target
    will accelerate it; zeros stay zero in later passes (`graph.sparse`). Refused, and named in the record: layers whose
    input channels the pattern does not divide, computed and transposed weights. Raises BadInput for options that make no
    sense and for missing data, Refused where a Fisher matrix is too ill-conditioned for its damping.
    """

    sparsity: float | None = None
    pattern: str | None = None
    method: Literal["cap", "fastcap", "woodfisher", "sparsegpt", "wanda", "magnitude"] = "cap"
    scope: Literal["global", "uniform"] | None = None
    block: int = 192
    gradients: int = 1024
    per: Literal["sample", "batch"] = "sample"
    against: Literal["labels", "teacher"] = "labels"
    damping: float | None = None
    finish_rows: float = 0.0
    recomputations: int = 1
    dtype: Literal["fp32", "fp64"] = "fp32"
    memory: float = 4e9
    permute: bool = False
    where: Literal["pays", "all"] | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    schedule: tuple[tuple[int, float], ...] = ()
    train: Distill | None = None
    snapshots: str | None = None
    by_increments: ClassVar[bool] = True  # no option: benchmarks set it to False, see `Method`

    def __post_init__(self) -> None:
        require = functools.partial(check_field, self)
        targets = [k for k in ("sparsity", "pattern", "schedule") if getattr(self, k) not in (None, ())]
        if len(targets) > 1:
            raise BadInput(f"Sparsify: give one of sparsity, pattern and schedule, not {' and '.join(targets)}")
        if not targets:
            object.__setattr__(self, "sparsity", 0.5)
        require("sparsity", self.sparsity is None or 0 < self.sparsity < 1, "a share above 0 and under 1")
        for key in ("block", "gradients", "recomputations"):
            require(key, getattr(self, key) >= 1, "a whole number of at least 1")
        if self.pattern is not None:
            try:
                object.__setattr__(self, "pattern", "{}:{}".format(*read_pattern(self.pattern)))
            except ValueError:
                require("pattern", False, '"N:M" with N less than M, such as "2:4"')
            m = read_pattern(self.pattern)[1]
            require("block", self.block % m == 0, f"a multiple of the pattern's {m}")
            require("permute", m <= 4 or not self.permute, "false for groups of more than 4, which take too long")
        alone = self.method not in GLOBAL
        require("scope", not (alone and self.scope == "global"), f"uniform (scores of {self.method} do not compare)")
        require("permute", not self.permute or self.pattern is not None, "only with a pattern")
        require("damping", self.damping is None or self.damping > 0, "a number above 0")
        require("finish_rows", 0 <= self.finish_rows < 1, "a share from 0 to under 1")
        rows_free = self.method == "cap" and self.pattern is None
        require("finish_rows", rows_free or not self.finish_rows, "0 without method cap, or with a pattern")
        require("memory", self.memory >= 1e6, "bytes, at least a million")
        if self.schedule:
            starts, shares = zip(*self.schedule, strict=True)
            require("schedule", min(starts) >= 0, "whole epochs, from 0")
            require("schedule", list(starts) == sorted(set(starts)), "rising epochs")
            require("schedule", all(0 < share < 1 for share in shares), "shares above 0 and under 1")
            require("schedule", list(shares) == sorted(set(shares)), "rising sparsities")
            if self.train is None or self.train.steps is not None or self.train.epochs <= starts[-1]:
                raise BadInput(
                    f"Sparsify.train: a gradual run needs one with more than {starts[-1]} epochs (not steps)"
                )
        elif self.train is not None or self.snapshots is not None:
            raise BadInput("Sparsify.schedule: only a gradual run trains; put a Distill after this pass instead")

    def run(self, program: Program, context: Context) -> PassResult:
        new = program.copy()
        names, refused, probed = self._reached(new, context)
        stages: list[dict[str, Any]] = []
        moved: list[dict[str, Any]] = []
        if self.permute and self.pattern and sparse_weights(new):
            refused.append(Refusal("permute", "other weights are sparse already, whose zeros would move"))
        elif self.permute and self.pattern and names:
            new, moved = permuted(new, names, read_pattern(self.pattern), context.seed)
        if names and self.schedule:
            new = self._gradual(new, names, context, stages, probed)
        elif names:
            stages.append(self._prune(new, names, self.sparsity, context, probed))
        return self._result(new, names, context, {"refused": refused, "stages": stages, "permuted": moved})

    def in_loop(self, program: Program, context: Context, steps: int, own: TrainableModule | None) -> Work:
        """The pass's work in the user's training loop: before the first step, or at the schedule's epochs as shares of all
        steps, weights become zero, and stay so."""
        check_field(self, "permute", not self.permute, "false in a loop of your own")
        names, refused, probed = self._reached(program.copy(), context)
        events = {0: self.sparsity}
        if self.schedule:
            assert self.train is not None
            events = {round(steps * start / self.train.epochs): share for start, share in self.schedule}
        stages: list[dict[str, Any]] = []

        def prune(module: TrainableModule, share: float | None) -> dict[str, Tensor]:
            now = program.derive(rebuild(module, copy_tensor), stale=False)
            stages.append({"sparsity": share} | self._prune(now, names, share, context, probed))
            with torch.no_grad():
                for name in names:
                    fetch(module, name).copy_(fetch(now.module(), name))
            return {name: fetch(module, name).detach() == 0 for name in names}

        def conclude(trained: Program) -> PassResult:
            return self._result(trained, names, context, {"refused": refused, "stages": stages, "permuted": []})

        loss = None if self.train is None else self.train.loss_in_loop(program, context)
        return Work([Zeroing(events if names else {}, prune)], conclude, loss)

    def _result(self, program: Program, names: list[str], context: Context, record: dict[str, Any]) -> PassResult:
        """The result, of which every weight is proven to have the pattern."""
        for name in names:
            if self.pattern and not legal(fetch(program.module(), name), self.pattern):
                raise Refused(f"Sparsify: {self.method} left {name} without the pattern {self.pattern}; this is a bug")
        return PassResult(program, record | self._report(program, names, context))

    # -------------------------------------------------------------------------------------------------- which layers
    def choose(self, program: Program, context: Context) -> tuple[list[str], list[Refusal]]:
        """The names of the weights to sparsify, and refusals for the others. Raises BadInput for a pattern of `include`
        without a match."""
        known, refused = layers(program)
        check_included(self, self.include, known, refused)
        ends = _ends(program, known)
        where = self.where or ("pays" if self.pattern and not self.include else "all")
        chosen: list[str] = []
        for layer in known:
            if layer.matches(self.exclude):
                why: str | None = "excluded"
            elif self.include and not layer.matches(self.include):
                why = "not included"
            elif self.pattern and layer.shape[1] % read_pattern(self.pattern)[1]:
                why = f"{self.pattern} does not divide its {layer.shape[1]} input channels per group"
            elif not self.include and layer.name in ends:
                why = ends[layer.name]
            elif not self.include and layer.kind == "depthwise":
                why = "depthwise, too few weights each"
            else:
                why = not_accelerated(layer, self.pattern, context) if where == "pays" else None
            if why:
                refused.append(Refusal(layer.name, why))
            else:
                chosen.append(layer.name)
        return chosen, refused

    def _reached(self, program: Program, context: Context) -> tuple[list[str], list[Refusal], int]:
        """The result of `choose`, less weights that no gradient reaches if the method uses any, and the number probed."""
        names, refused = self.choose(program, context)
        if names and self.method != "magnitude" and isinstance(context.data, Iterator):
            raise BadInput("data: an iterator yields its batches once; it must be iterable again, such as a DataLoader")
        if not names or self.method not in BY_GRADIENTS:
            return names, refused, 0
        silent, probed = agreed(lambda: self._silent(program, names, context))
        left = [name for name in names if name not in silent]
        return left, [*refused, *(Refusal(name, NO_GRADIENT) for name in silent)], probed

    def _silent(self, program: Program, names: list[str], context: Context) -> tuple[list[str], int]:
        """The weights whose gradients are all zero (they would be the first to go), and the number of gradients in the
        first of two probes: a few gradients of all weights, then all gradients of the silent ones."""
        silent, seen = names, []
        for count in (min(PROBE, self.gradients), self.gradients):
            if silent:
                gradients = Gradients(count, self.per, self.against)
                squares, number = gradients.mean_squares(program, silent, context, int(self.memory / 32))
                silent = [name for name in silent if not squares[name]]
                seen.append(number)
        if silent == names:
            raise BadInput(f"Sparsify: all gradients of {', '.join(names[:3])}, … are zero; check the loss")
        return silent, seen[0]

    # ----------------------------------------------------------------------------------------------------- one target
    def _prune(
        self, program: Program, names: list[str], sparsity: float | None, context: Context, probed: int
    ) -> dict[str, Any]:
        """Prune in place, in `recomputations` steps; returns a record. probed: number of gradients that were seen before."""
        stage: dict[str, Any] = {"method": self.method, "steps": []}
        chosen = named_layers(program, names)
        gone = sum(int((fetch(program.module(), name) == 0).sum()) for name in names)
        start, seen = gone / sum(layer.size for layer in chosen), 0
        for step in range(1, self.recomputations + 1):
            share = step / self.recomputations
            if self.pattern:
                n, m = read_pattern(self.pattern)
                goal: float | Pattern = (m - round((m - n) * share), m)
                if round((m - n) * share) == round((m - n) * (share - 1 / self.recomputations)):
                    continue
            else:
                assert sparsity is not None
                goal = start + (sparsity - start) * share if sparsity > start else sparsity
            solver = Solver(self._method(goal), program, chosen, context, probed)
            row = {"goal": goal, "predicted_loss": solver.run(), "gradients": solver.seen}
            stage["steps"].append(row | {"damping": solver.damping or None})
            check_again(seen, solver.seen)
            seen = solver.seen
        broadcast_all(program.module().parameters())
        return stage

    def _method(self, goal: float | Pattern) -> Method:
        everywhere = (self.scope or "global") == "global" and self.method in GLOBAL
        gradients = Gradients(self.gradients, self.per, self.against)
        options = (everywhere, self.block, gradients, self.damping, self.dtype, self.memory, self.by_increments)
        return Method(self.method, goal, *options, finish_rows=self.finish_rows)

    # -------------------------------------------------------------------------------------------------------- gradual
    def _gradual(
        self, program: Program, names: list[str], context: Context, stages: list[dict[str, Any]], probed: int
    ) -> Program:
        """Prune and train by turns; a stage that has a snapshot is taken from it."""
        assert self.train is not None
        folder = Path(self.snapshots) if self.snapshots else None if context.out is None else Path(context.out)
        samples = Samples(context)
        run = agreed(lambda: self._run_code(program, context)) if folder else ""
        first, history = self.schedule[0][0], program.history
        ends = [*(start for start, _ in self.schedule[1:]), self.train.epochs]
        plan = [(share, end - start) for (start, share), end in zip(self.schedule, ends, strict=True)]
        for share, epochs in [(0.0, first), *plan] if first else plan:
            file = None if folder is None else folder / f"sparsity-{share:.4f}-{run}.pt2"
            if file is not None and (stored := self._snapshot(file, samples)) is not None:
                program = stored
                stages.append(program.history[-1]["stages"][-1])
                continue
            program.module().meta.pop("batches", None)  # plain averages of statistics start anew, as after a snapshot
            stage: dict[str, Any] = {"sparsity": share, "epochs": epochs}
            if share:
                stage |= self._prune(program, names, share, context, probed)
                program.history = [*history, {"sparse": dict.fromkeys(names)}]
                if context.val is not None:
                    stage["val_one_shot"] = evaluate(program, context.val, context.metric, context.progress)
            train = dataclasses.replace(self.train, epochs=epochs)
            stage["training"] = train.train(program, dataclasses.replace(context, out=folder))
            if context.val is not None:
                stage["val"] = evaluate(program, context.val, context.metric, context.progress)
            stages.append(stage)
            head = {"pass": type(self).__name__, "options": self.options(), "stages": [stage]}
            head |= {"data": agreed(lambda: samples.codes)} if file is not None else {}
            program.history = [*history, head | self._report(program, names, context)]
            if file is not None and accelerator().is_main_process:
                file.parent.mkdir(parents=True, exist_ok=True)
                program.save(file)
        program.history = history
        return program

    def _snapshot(self, file: Path, samples: Samples) -> Program | None:
        """The program of a snapshot; None where there is none, or where it was trained on other data."""
        program = stored_program(file)
        if program is not None and not agreed(lambda: samples.differ(program.history[-1].get("data", [[], []]))):
            return program
        if accelerator().is_main_process and list(file.parent.glob(f"{file.name.rpartition('-')[0]}-*.pt2")):
            says_anew(file.parent, f"Sparsify's stage {file.name.split('-')[1]}")
        return None

    def _run_code(self, program: Program, context: Context) -> str:
        """A hash of everything that decides what the snapshots hold, the first batch of the data included."""
        options = repr(dataclasses.replace(self, snapshots=None))
        first = sample(context.data, context.seed)[:1]
        return run_code(program.module(), context, options, self.by_increments, first, accelerator().num_processes)

    def _report(self, program: Program, names: list[str], context: Context) -> dict[str, Any]:
        """The record's rows for each layer, and the sparse weights with their patterns, which later passes keep."""
        rows, before = [], sparse_weights(program)
        patterns = {name: stronger(before.get(name), self.pattern) for name in names}
        for layer in named_layers(program, names):
            why = not_accelerated(layer, patterns[layer.name], context)
            zero = fetch(program.module(), layer.name) == 0
            row: dict[str, Any] = {"what": layer.name, "kind": layer.kind, "shape": list(layer.shape)}
            row |= {"sparsity": float(zero.float().mean()), "accelerated": why is None}
            rows.append(row | ({"why_not": why} if why else {}))
        return {"changed": rows, "sparse": patterns}


# ----------------------------------------------------------------------------------------------------------- the layers
def not_accelerated(layer: WeightedLayer, pattern: str | None, context: Context) -> str | None:
    """Why the context's target will not compute a layer faster for its zeros; None where it probably will (nothing is
    measured; sparse kernels win from about 256 channels on, never in grouped convolutions)."""
    target, out = context.target, layer.shape[0]
    if not implies(pattern, "2:4") or layer.shape[1] % 4:
        return "no engine here gains from zeros outside the 2:4 pattern"
    if target is not None:
        if target.compute_capability is None or tuple(target.compute_capability) < SPARSE_CAPABILITY:
            return f"target {target.name} has no sparse tensor cores"
        if context.dtype == "fp32":
            return "sparse tensor cores compute in fp16, bf16, int8 or tf32, not in fp32"
    if layer.groups > 1:
        return "sparse kernels do not take grouped convolutions"
    if min(layer.shape[1], out) < SPARSE_CHANNELS:
        return f"{layer.shape[1]} -> {out} channels; sparse kernels win from about {SPARSE_CHANNELS} on"
    return None


def _ends(program: Program, known: list[WeightedLayer]) -> dict[str, str]:
    """The first and the last layers, by name: those before which, or after which, there is no other layer."""
    named = {node: layer.name for layer in known for node in layer.nodes}
    result = {}
    for what, nodes, way in (
        ("the last layer", reversed(program.graph.nodes), lambda n: n.users),
        ("the first layer", program.graph.nodes, lambda n: n.all_input_nodes),
    ):
        beyond: dict[fx.Node, bool] = {}  # whether there is a layer that way; nodes of sizes are not followed
        for node in nodes:
            near = [n for n in way(node) if isinstance(n.meta.get("val"), (Tensor, tuple, list))]
            beyond[node] = any(beyond[n] or n in named for n in near)
            if node in named and not beyond[node]:
                result[named[node]] = what
    return result
