"""The tables of a program for a target, with the time of whole networks, and the plans made from them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from .. import runtime
from ..data import cache_folder
from ..graph.errors import BadInput, Contended
from ..graph.program import Program
from ..passes.base import Context
from ..passes.channels.importance.scores import IMPORTANCES
from ..passes.common.latency import needed_latency
from ..passes.common.scoring import evaluate
from ..passes.depth.budget import Predictor
from ..passes.joint.losses import NOT_FINITE, Losses
from ..passes.joint.ranges import overflows, ranges
from ..passes.joint.solver.problem import Choice, Problem
from ..passes.joint.space import SIZES, Space
from ..passes.joint.tables import Fixed, Tables
from ..passes.joint.times import Times
from ..passes.joint.tuning_rounds import NEAR, Built, Time, Tuner
from ..passes.joint.variants import (
    CHANGED,
    KINDS,
    Trial,
    find_variants,
    is_changed,
    no_sparse_kernels,
    only_precision,
    seconds_of_variants,
)
from ..passes.quantize.choose_layers import QUANTISED
from ..runtime.device_results import are_results
from ..runtime.devices.table import Target, get_target
from ..runtime.prediction.latency_table import LatencyTable, about
from ..runtime.prediction.roofline import Roofline
from .plan import BlockRow, Frozen, LayerRow, Plan, Repairing, Row, Tuned, code_of_model, load_plan

SECONDS, TRIAL = 20.0, 8.0  # for which a whole network is measured, and one with a region in INT8
RUNS = 10  # least number of undisturbed runs of each
Table = str | Path | LatencyTable | Roofline


class TuningTables:
    """The tables of a program for a target, with the time of whole networks, and the plans made from them.

    measured: whether times of whole networks are measured; if not, they are predicted layer by layer.
    """

    def __init__(self, tables: Tables, target: Target, precision: str, latency: Any, measured: bool, progress: bool):
        self.tables, self.target, self.precision, self.latency = tables, target, precision, latency
        self.measured = measured
        self._whole: Time | None = None
        self.labelled: Context | None = None  # the context with labelled data and the metric
        self.repair = Repairing()  # of the plans that are made
        self.recovery: dict[str, Any] | None = None
        self._scores: dict[int, tuple[Program, float]] = {}  # with the programs, so that their ids stay theirs
        self._predict = _predicted(tables, latency) if not measured else None
        self._progress = progress

    def say(self, text: str) -> None:
        """Write a line of progress to stderr."""
        from rich.console import Console

        Console(stderr=True, quiet=not self._progress, markup=False, emoji=False, soft_wrap=True).print(text)

    def time(self, program: Program) -> Time:
        """Return the time of a run of a program.

        Of a measured dense program the range is that of the middle half of its runs. Every other program runs in turns with
        the dense one, so that a machine which slows down slows both; its range is the 95 % confidence interval of the median
        ratio. Raises Contended if the machine is too busy to measure.
        """
        if self._predict is not None:
            return self._within_error(self._predict(program))
        dense = self.tables.space.program
        if self._whole is None:
            ms = in_turns([dense], ["dense"], self.target, SECONDS).timings[0].ms
            self._whole = Time(ms["median"] / 1e3, ms["p25"] / 1e3, ms["p75"] / 1e3, True)
        if program is dense:
            return self._whole
        ratio = faster(dense, program, self.target, SECONDS)
        whole, median = self._whole.seconds, ratio["median"]
        return Time(whole / median, whole / ratio.get("high", median), whole / ratio.get("low", median), True)

    def check_labels(self) -> None:
        """Raise BadInput without labelled data."""
        if self.labelled is None or self.labelled.val is None:
            raise BadInput('tune.loss: "points" need labelled data; pass val=')

    def points(self, program: Program) -> float:
        """Return how many points of the metric (hundredths) a program loses against the dense one, on the labelled data."""
        return 100 * (self._score(self.tables.space.program) - self._score(program))

    def _score(self, program: Program) -> float:
        assert self.labelled is not None
        if id(program) not in self._scores:
            score = evaluate(program, self.labelled.val or (), self.labelled.metric)
            self._scores[id(program)] = program, score
        return self._scores[id(program)][1]

    def _within_error(self, seconds: float) -> Time:
        """Return predicted seconds with the range that the latency model states."""
        error = getattr(self.latency, "error", None)
        factor = 1.0 if error is None else error.factor
        return Time(seconds, seconds / factor, seconds * factor)

    def plan(self, tuner: Tuner, built: Built, asked: float | None) -> Plan:
        """Return the plan of a network that was built. asked: the budget in seconds; None for a budget of loss."""
        space, problem, fixed = self.tables.space, self.tables.problem, self.tables.fixed
        scale, losses = 1e3 * tuner.correction.seconds, self.tables.losses
        met = asked is None or built.seconds <= (1 + NEAR) * asked
        predicted, time = self._within_error(built.predicted_seconds), built.time
        ms = {
            "dense": 1e3 * tuner.dense, "dense_low": 1e3 * tuner.whole.low, "dense_high": 1e3 * tuner.whole.high,
            "asked": None if asked is None else 1e3 * asked,
            "predicted": 1e3 * predicted.seconds, "predicted_low": 1e3 * predicted.low,
            "predicted_high": 1e3 * predicted.high,
            "achieved": 1e3 * time.seconds, "low": 1e3 * time.low, "high": 1e3 * time.high, "measured": time.measured,
        }  # fmt: skip
        loss = {
            "predicted": built.predicted_loss, "measured": built.loss, "images": losses.divergence.images,
            "held_out": losses.images.held_out,
        }  # fmt: skip
        if id(built.program) in self._scores:
            loss["points"] = self.points(built.program)
        gone = set(built.decided.blocks)
        blocks = []
        for b, block in enumerate(space.blocks):
            saves = problem.seconds(problem.whole()) - problem.seconds(without(problem, b))
            blocks.append(
                BlockRow(
                    name=block.name, goes=block.name in gone, proposed=block.name in gone,
                    fixed=block.name in fixed.blocks, kind=block.kind, saves_ms=_short(scale * saves),
                    loss=_short(losses.block(block)), why=losses.why(block),
                )
            )  # fmt: skip
        groups = []
        for i, (axis, group) in enumerate(zip(problem.axes, space.groups, strict=False)):
            keep = built.decided.widths.get(axis.name, group.size)
            k = axis.sizes.index(keep)
            saves = problem.seconds(problem.whole()) - problem.seconds(narrower(problem, i, k))
            inside = None if axis.block is None else space.blocks[axis.block].name
            lost = losses.at(group, axis.sizes)[k]  # those of the problem are finite
            groups.append(
                Row(
                    name=axis.name, keep=keep, size=group.size, proposed=keep, fixed=axis.fixed, kind=group.kind,
                    step=space.steps[axis.name], saves_ms=_short(scale * saves), loss=_short(lost),
                    inside=inside, why=_why(lost, "at this width"),
                )
            )  # fmt: skip
        known = {g.name: g for g in space.comb.groups}
        for name in sorted(fixed.widths.keys() - {r.name for r in groups}):  # whole, since there is no other size
            size = known[name].size
            groups.append(Row(name=name, keep=size, size=size, proposed=size, fixed=True, kind=known[name].kind))
        frozen = [
            Frozen(name=name, kind=known[name].kind, size=known[name].size, why=why)
            for name, why in space.refused.items()
            if name in known
        ]
        refused = [
            BlockRow(name=name, goes=False, fixed=name in fixed.blocks, why=why)
            for name, why in space.refused.items()
            if name not in known
        ]
        tuned = Tuned(
            model=code_of_model(space.program), target=self.target.name, precision=self.precision, by=str(self.latency),
            method=built.how, met=met, met_by="measured" if time.measured else "predicted", ms=_shortened(ms),
            loss=_shortened(loss),
        )  # fmt: skip
        return Plan(
            tuned=tuned, repair=self.repair, recovery=self.recovery, blocks=[*blocks, *refused], groups=groups,
            layers=self._layers(tuner, built), frozen=frozen,
        )  # fmt: skip

    def _layers(self, tuner: Tuner, built: Built) -> list[LayerRow]:
        """Return the rows of a plan for the precisions of layers, and for 2:4 sparse weights."""
        problem = self.tables.problem.saving(tuner.correction.saved)
        variants, whole = self.tables.times.variants, problem.whole()
        scale, fixed = 1e3 * tuner.correction.seconds, self.tables.fixed
        plain, rows = problem.seconds(whole), []

        def in_precision(name: str, **facts: Any) -> LayerRow:
            chosen: Any = built.decided.precisions.get(name, self._unquantised(name))
            return LayerRow(name=name, precision=chosen, proposed=chosen, fixed=name in fixed.precisions, **facts)

        def sparse(name: str, **facts: Any) -> LayerRow:
            chosen = name in built.decided.sparse
            return LayerRow(name=name, sparse=chosen, proposed_sparse=chosen, fixed=name in fixed.sparse, **facts)

        for i, variant in enumerate(variants.offered):
            place = len(problem.axes) - len(variants.offered) + i
            saves = _short(scale * (plain - problem.seconds(narrower(problem, place, CHANGED))))
            inside = None if variant.block is None else self.tables.space.blocks[variant.block].name
            figures: dict[str, Any] = {"saves_ms": saves, "loss": _short(variant.loss)}
            figures |= {"why": _why(variant.loss, f"with it in {variant.option.upper()}")}
            for name in variant.weights:
                row = in_precision if variant.option in QUANTISED else sparse
                rows.append(row(name, region=variant.weights[0], inside=inside, **figures))
                figures = {}  # those of a region are told once
        for what, why in variants.refused.items():
            option, _, name = what.partition(" ")
            text = why if option in QUANTISED else f"not 2:4: {why}"
            in_row = option in QUANTISED and name
            rows.append(in_precision(name, why=text) if in_row else LayerRow(name=name or "every layer", why=text))
        for name in sorted({*self.single, *fixed.precisions} - {row.name for row in rows if row.precision}):
            reason = None if name in fixed.precisions else "its values may leave the range of fp16"
            rows.append(in_precision(name, inside=self._inside(name), why=reason))
        for name in sorted(fixed.sparse.keys() - {row.name for row in rows if row.sparse is not None}):
            rows.append(sparse(name, inside=self._inside(name)))
        return rows

    def _inside(self, name: str) -> str | None:
        """Return the block that contains a layer, by the name of its weight."""
        block = self.tables.space.owner.get(name)
        return None if block is None else self.tables.space.blocks[block].name

    def _unquantised(self, name: str) -> str:
        """Return the precision of a layer that is not quantised, by the name of its weight."""
        by_hand = self.tables.fixed.precisions.get(name)
        if by_hand is not None and by_hand not in QUANTISED:
            return by_hand
        return "fp32" if name in self.single else self.precision

    @cached_property
    def single(self) -> set[str]:
        """The weights of layers that stay in fp32 where the precision is fp16: by hand, or since their values may leave the
        range of fp16."""
        if self.precision != "fp16":
            return set()
        by_hand = self.tables.fixed.precisions
        largest_of = ranges(self.tables.space.program, self.tables.losses.divergence)
        wide = {name for name, largest in largest_of.items() if overflows(largest)} - by_hand.keys()
        return wide | {name for name, precision in by_hand.items() if precision == "fp32"}


def prepare_tables(
    program: Program,
    data: Iterable[Any] | None,
    target: str | Target = "cpu",
    precision: str = "fp32",
    table: Table | None = None,
    measure: bool | None = None,
    plan: Plan | str | Path | None = None,
    samples: int | None = None,
    points: int = 1,
    sizes: int = SIZES,
    importance: str | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
    extra: Sequence[str] = (),
    **fields: Any,
) -> TuningTables:
    """Return the tables of times and losses of a program, measuring what is missing. `tune` describes the arguments and
    errors."""
    if not isinstance(program, Program):
        raise BadInput(f"tune: takes a Program, got {type(program).__name__}; graphcomb.capture makes one")
    program = program.on_cpu()
    if samples is not None:
        check_whole("samples", samples)
    check_whole("points", points, 2)
    check_whole("sizes", sizes)
    if isinstance(extra, str) or not set(extra) <= set(KINDS):
        raise BadInput(f"tune.extra: a list of {', '.join(KINDS)}, not {extra!r}")
    device = get_target(target) if isinstance(target, str) else target
    edited = load_plan(plan) if isinstance(plan, (str, Path)) else plan
    fixed = Fixed() if edited is None else _fixed(edited, program, device, precision)
    before = Repairing() if edited is None else edited.repair
    ranking, of = (before.importance, "plan.repair") if importance is None else (importance, "tune")
    if not isinstance(ranking, str) or ranking not in IMPORTANCES:
        raise BadInput(f"{of}.importance: one of {', '.join(IMPORTANCES)}, not {ranking!r}")
    repair = Repairing(importance=ranking, samples=samples or before.samples)
    by_layer = latency_model(table, device, precision)
    model = needed_latency(by_layer, "tune", program)
    context = Context(data=data, target=device, dtype=precision, latency=model, progress=progress).replaced(
        "tune", **fields
    )
    more = {name: [size] for name, size in fixed.widths.items()}
    space = Space(program, device.alignment(precision), sizes, more, context.seed, progress)
    if edited is not None:
        edited.check_sizes(space.comb)
    # Creating the losses checks the data, so it comes before the times, which may take long to measure.
    losses = Losses(space, context, repair.importance, repair.samples, points, Path(folder or cache_folder() / "tune"))
    wanted = {name: p for name, p in fixed.precisions.items() if p in QUANTISED}
    quantised = only_precision([*extra, *wanted.values()], "tune")
    changed = _quantised_latency(model, device, precision, quantised) if quantised else None
    sparse = _sparse_latency(model, device) if "2:4" in extra or any(fixed.sparse.values()) else None
    variants = find_variants(space, losses, changed, sparse, wanted, progress, quantised or "int8")
    variants.check([(p, n) for n, p in wanted.items()] + [("2:4", n) for n, asked in fixed.sparse.items() if asked])
    times = Times(space, model, progress, variants)
    tables = Tables(space, times, losses, fixed)
    losses.measure(progress)
    measured = isinstance(by_layer, LatencyTable) if measure is None else measure
    if measured and not isinstance(by_layer, LatencyTable) and not device.processor:
        raise BadInput(f"tune.measure: {device.name} is not at hand; leave it out")
    session = TuningTables(tables, device, precision, model, measured, progress)
    session.labelled, session.repair = context, repair
    session.recovery = None if edited is None else edited.recovery
    return session


def check_whole(name: str, value: Any, most: int | None = None) -> None:
    """Raise BadInput, which names the argument of `tune`, unless the value is a whole number from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most and value > most):
        raise BadInput(f"tune.{name}: a whole number from 1{f' to {most}' if most else ''}, not {value!r}")


def _fixed(plan: Plan, program: Program, target: Target, precision: str) -> Fixed:
    """Return the widths and blocks that were changed in a plan. Raises BadInput for a plan of another model, target or
    precision, and for a contradiction in the plan."""
    if plan.tuned is None:
        raise BadInput("plan: not written by `graphcomb tune`")
    if plan.tuned.model != code_of_model(program):
        raise BadInput("plan: of another model than this one; leave it out")
    if plan.tuned.target != target.name:
        raise BadInput(f"plan: for target {plan.tuned.target}, not {target.name}; leave it out")
    if plan.tuned.precision != precision:
        raise BadInput(f"plan: in {plan.tuned.precision}, not {precision}; leave it out")
    _ = plan.decided  # contradictions are errors
    return plan.fixed


def _predicted(tables: Tables, latency: Any) -> Callable[[Program], float]:
    """Return a function that predicts the seconds of programs layer by layer, quantised ones too."""
    plain = Predictor(Context(latency=latency), tables.space.program)
    variants = tables.times.variants
    if not variants.offered:
        return plain
    changed = partial(seconds_of_variants, variants=variants, latency=latency)
    return lambda program: changed(program) if is_changed(program) else plain(program)


def _quantised_latency(model: Any, target: Target, precision: str, quantised: str) -> Any:
    """Return what gives the time of layers in INT8 or FP8 on the same device: a latency model, or trials; or why there is
    none."""
    if quantised not in target.dtypes:
        return f"{target.name} has no {quantised.upper()} kernels"
    if isinstance(model, Roofline):  # where it is calibrated, with the attained shares of the measured precision
        return replace(model, dtype=quantised)
    if quantised != "int8":
        return "layers are measured in floating point alone; table: roofline predicts FP8"
    if not target.processor or precision != "fp32":
        return "regions in INT8 are tried out on a processor beside fp32 alone; table: roofline predicts INT8"
    return Trial(str(model), lambda plain, changed: faster(plain, changed, target, TRIAL)["median"], model)


def faster(plain: Program, changed: Program, target: Target, seconds: float) -> dict[str, float]:
    """Return how many times as fast as the first program the second one is on a processor: the median, and its interval as
    low and high if there are enough runs for one. Raises Contended."""
    return in_turns([plain, changed], ["plain", "changed"], target, seconds).ratios["changed"] or {}


def in_turns(programs: Sequence[Program], names: Sequence[str], target: Target, seconds: float) -> runtime.BenchResult:
    """Measure programs in turns on a processor, in about so many seconds, and for longer if the programs are slow. Raises
    Contended if the machine is too busy."""
    result = runtime.bench(programs, names=names, seconds=seconds, min_runs=RUNS, engine=target.backend, patient=True)
    if result.note:
        raise _busy()
    return result


def _sparse_latency(model: Any, target: Target) -> Any:
    """Return the latency model of the same device for layers with 2:4 sparse weights, or why there is none."""
    why = no_sparse_kernels(target.name, target.compute_capability)
    if why is not None:
        return why
    return (
        replace(model, sparse=True) if isinstance(model, Roofline) else "layers are measured with dense weights alone"
    )


def latency_model(table: Table | None, target: Target, precision: str) -> LatencyTable | Roofline:
    """Return what predicts the times of layers on a target; `tune` describes `table`.

    Raises BadInput for times of another device or precision, for a file of measured layers if this machine is not the
    target, and as `Roofline.calibrated` does.
    """
    if isinstance(table, (LatencyTable, Roofline)):
        theirs = table.dtype if isinstance(table, Roofline) else table.precision
        if (table.target.name, theirs) != (target.name, precision):
            raise BadInput(
                f"tune.table: the times are of {table.target.name} in {theirs}, not of {target.name} in {precision}"
            )
        return table
    if table is None:
        try:
            about(target, precision)
        except BadInput:
            return Roofline(target, precision)  # this machine is not the target
        suffix = "" if precision == "fp32" else f"-{precision}"
        return _kept_table(cache_folder() / f"latency-{target.name}{suffix}.json", target, precision)
    if not isinstance(table, (str, Path)):
        raise BadInput(f'tune.table: "roofline", a file, a LatencyTable or a Roofline, not {type(table).__name__}')
    if str(table) == "roofline":
        target.alignment(precision)
        return Roofline(target, precision)
    if are_results(str(table)):
        return Roofline.calibrated(str(table), target, precision)
    return LatencyTable(table, target, precision=precision)


def _kept_table(path: Path, target: Target, precision: str) -> LatencyTable:
    """Return the table in the cache folder. One that is broken, or of another version of the library, is set aside, and a
    new one is begun."""
    try:
        return LatencyTable(path, target, precision=precision)
    except BadInput as error:
        aside = path.with_suffix(".json.old")
        path.replace(aside)
        warnings.warn(f"{error}; it is now {aside.name}, and layers are measured anew", stacklevel=2)
        return LatencyTable(path, target, precision=precision)


def _busy() -> Contended:
    return Contended(
        "tune: the machine is too busy to measure; the tables are kept, run it again (table: roofline predicts)"
    )


def without(problem: Problem, block: int) -> Choice:
    """Return the choice that removes only one block."""
    whole = problem.whole()
    sizes = tuple(-1 if axis.block == block else k for axis, k in zip(problem.axes, whole.sizes, strict=True))
    return replace(whole, sizes=sizes, gone=tuple(b == block for b in range(len(problem.blocks))))


def narrower(problem: Problem, axis: int, place: int) -> Choice:
    """Return the choice that gives one group another of its sizes, and changes nothing else."""
    whole = problem.whole()
    return replace(whole, sizes=(*whole.sizes[:axis], place, *whole.sizes[axis + 1 :]))


def _shortened(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _short(value) if isinstance(value, float) else value for name, value in values.items()}


def _short(value: float) -> float | None:
    """Round a value to four significant digits; None for one that is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _why(loss: float, where: str) -> str | None:
    """Say why a loss is infinite; None for one that is not."""
    return None if math.isfinite(loss) else f"{NOT_FINITE} {where}"
