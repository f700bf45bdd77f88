"""Choose the blocks to remove and the widths of groups for one budget, in milliseconds or in loss.

    plan = graphcomb.tune(program, data=images, latency=0.5, target="cpu")
    plan.save("plan.yaml")
    result = plan.run(program, data=images)

passes/joint has the tables and the optimisation. This file connects them with the runtime, which predicts the times of
layers and measures whole networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import runtime
from .data import cache_folder
from .graph.errors import BadInput, Contended
from .graph.program import Program
from .passes.base import Context
from .passes.common.latency import allowed_seconds, needed_latency
from .passes.depth.budget import Predictor
from .passes.joint.losses import Losses
from .passes.joint.problem import Choice, Problem
from .passes.joint.rounds import NEAR, Built, Time, Tuner, builder
from .passes.joint.space import SIZES, Space
from .passes.joint.tables import Fixed, Tables
from .passes.joint.times import Times
from .plan import BlockRow, Frozen, Plan, Repairing, Row, Tuned, code_of_model, load_plan
from .runtime.devices.table import Target, get_target
from .runtime.prediction.latency_table import LatencyTable
from .runtime.prediction.roofline import Roofline

SECONDS = 20.0  # time limit of measuring a whole network
Table = str | Path | LatencyTable | Roofline


def tune(
    program: Program,
    data: Iterable[Any] | None = None,
    latency: float | str | Sequence[float | str] | None = None,
    loss: float | Sequence[float] | None = None,
    target: str | Target = "cpu",
    precision: str = "fp32",
    table: Table | None = None,
    measure: bool | None = None,
    plan: Plan | str | Path | None = None,
    samples: int = 64,
    points: int = 1,
    sizes: int = SIZES,
    importance: str = "repair",
    rounds: int = 2,
    folder: str | Path | None = None,
    progress: bool = False,
    **fields: Any,
) -> Any:
    """Choose the blocks to remove and the width of every group for a budget.

    With a budget of latency the network with the smallest loss is chosen, with a budget of loss the fastest one. Returns a
    `Plan`, or a list of plans for several budgets, which share all tables.

    - data: batches of images; labels are not needed.
    - latency: largest time of a run, as a share of the dense program's time or as a time such as "3.5 ms". loss: instead of
      it, the largest divergence from the dense network in nats.
    - target, precision: device and precision.
    - table: source of the times of layers: "roofline" (the target's data sheet), results of a bench bundle, which calibrate
      the roofline, or a file of measured layers, which is created and completed as needed. None uses a file in the cache
      folder if the target is this machine, else the data sheet.
    - measure: whether to measure whole networks here in ONNX Runtime; if not, their time is predicted layer by layer. None
      measures them if layers are measured.
    - plan: an earlier plan. Rows that were changed in it are kept, and the others are chosen again.
    - samples: number of images for ranking and repair; as many others measure the loss.
    - points: number of sizes at which the loss of a group's widths is measured, 1 or 2.
    - sizes: largest number of sizes that a group may have.
    - importance: see `RemoveChannels`.
    - rounds: how often the chosen network is built and the tables are corrected.
    - folder: folder that keeps measured losses; by default in the cache folder.
    - progress: whether to show progress. fields: fields of the passes' `Context`.

    Raises BadInput for invalid arguments and for data on which no losses can be measured; Unreachable for a budget that
    cannot be reached (the message says what can be reached, and what freezes the rest); Contended if the machine is too
    busy to measure.
    """
    budgets = _budgets(latency, loss)
    session = prepare_tables(
        program,
        data,
        target,
        precision,
        table,
        measure,
        plan,
        samples,
        points,
        sizes,
        importance,
        folder,
        progress,
        **fields,
    )
    build = builder(session.tables, importance, samples, session.tables.losses.context)
    tuner = Tuner(session.tables, build, session.time, rounds, session.say)
    plans = []
    for kind, budget in budgets:
        if kind == "latency":
            asked = allowed_seconds(budget, tuner.dense, "tune")
            found = tuner.within(asked)
        else:
            found, asked = tuner.losing(float(budget)), None
        plans.append(session.plan(tuner, found, asked, importance))
    several = isinstance(latency if loss is None else loss, (list, tuple))
    return plans if several else plans[0]


def _budgets(latency: Any, loss: Any) -> list[tuple[str, Any]]:
    if (latency is None) == (loss is None):
        raise BadInput("tune: give one of latency and loss")
    kind, given = ("latency", latency) if loss is None else ("loss", loss)
    budgets = list(given) if isinstance(given, (list, tuple)) else [given]
    for budget in budgets:
        if kind == "latency":
            allowed_seconds(budget, 1.0, "tune")
        elif isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
            raise BadInput(f"tune.loss: a divergence above 0 in nats, not {budget!r}")
    if not budgets:
        raise BadInput(f"tune.{kind}: no budget")
    return [(kind, budget) for budget in budgets]


class TuningTables:
    """The tables of a program for a target, with the time of whole networks, and the plans made from them.

    measured: whether times of whole networks are measured; if not, they are predicted layer by layer.
    """

    def __init__(self, tables: Tables, target: Target, precision: str, latency: Any, measured: bool, progress: bool):
        self.tables, self.target, self.precision, self.latency = tables, target, precision, latency
        self.measured = measured
        self._whole: Time | None = None
        self._predict = Predictor(Context(latency=latency), tables.space.program) if not measured else None
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
            ms = self._bench([dense], ["dense"]).timings[0].ms
            if not ms:
                raise _busy()
            self._whole = Time(*(ms[name] / 1e3 for name in ("median", "p25", "p75")), True)
        if program is dense:
            return self._whole
        ratio = self._bench([dense, program], ["dense", "network"]).ratios.get("network")
        if ratio is None:
            raise _busy()
        faster = (ratio["median"], ratio.get("high", ratio["median"]), ratio.get("low", ratio["median"]))
        return Time(*(self._whole.seconds / value for value in faster), True)

    def _bench(self, programs: list[Program], names: list[str]) -> Any:
        return runtime.bench(programs, names=names, seconds=SECONDS)

    def _within_error(self, seconds: float) -> Time:
        """Return predicted seconds with the range that the latency model states."""
        error = getattr(self.latency, "error", None)
        factor = 1.0 if error is None else error.factor
        return Time(seconds, seconds / factor, seconds * factor)

    def plan(self, tuner: Tuner, found: Built, asked: float | None, importance: str) -> Plan:
        """Return the plan of a network that was built. asked: the budget in seconds; None for a budget of loss."""
        space, problem = self.tables.space, self.tables.problem
        scale, losses = 1e3 * tuner.correction.seconds, self.tables.losses
        met = asked is None or found.seconds <= (1 + NEAR) * asked
        predicted, time = self._within_error(found.predicted_seconds), found.time
        ms = {
            "dense": 1e3 * tuner.dense, "dense_low": 1e3 * tuner.whole.low, "dense_high": 1e3 * tuner.whole.high,
            "asked": None if asked is None else 1e3 * asked,
            "predicted": 1e3 * predicted.seconds, "predicted_low": 1e3 * predicted.low,
            "predicted_high": 1e3 * predicted.high,
            "achieved": 1e3 * time.seconds, "low": 1e3 * time.low, "high": 1e3 * time.high, "measured": time.measured,
        }  # fmt: skip
        loss = {
            "predicted": found.predicted_loss, "measured": found.loss, "images": losses.samples,
            "held_out": losses.images.held_out,
        }  # fmt: skip
        gone = set(found.decided.blocks)
        blocks = []
        for b, block in enumerate(space.blocks):
            saves = problem.seconds(problem.whole()) - problem.seconds(without(problem, b))
            blocks.append(
                BlockRow(
                    name=block.name, goes=block.name in gone, proposed=block.name in gone, kind=block.kind,
                    saves_ms=_short(scale * saves), loss=_short(problem.blocks[b].loss),
                )
            )  # fmt: skip
        groups = []
        for i, (axis, group) in enumerate(zip(problem.axes, space.groups, strict=True)):
            keep = found.decided.widths.get(axis.name, group.size)
            k = axis.sizes.index(keep)
            saves = problem.seconds(problem.whole()) - problem.seconds(narrower(problem, i, k))
            inside = None if axis.block is None else space.blocks[axis.block].name
            groups.append(
                Row(
                    name=axis.name, keep=keep, size=group.size, proposed=keep, kind=group.kind,
                    step=space.steps[axis.name], saves_ms=_short(scale * saves), loss=_short(axis.losses[k]),
                    inside=inside,
                )
            )  # fmt: skip
        known = {g.name: g for g in space.comb.groups}
        frozen = [
            Frozen(name=name, kind=known[name].kind, size=known[name].size, why=why)
            for name, why in space.refused.items()
            if name in known
        ]
        refused = [BlockRow(name=name, goes=False, why=why) for name, why in space.refused.items() if name not in known]
        tuned = Tuned(
            model=code_of_model(space.program), target=self.target.name, precision=self.precision, by=str(self.latency),
            method=found.how, met=met, met_by="measured" if time.measured else "predicted", ms=_shortened(ms),
            loss=_shortened(loss),
        )  # fmt: skip
        repair = Repairing(importance=importance, samples=losses.samples)
        return Plan(tuned=tuned, repair=repair, blocks=[*blocks, *refused], groups=groups, frozen=frozen)


def prepare_tables(
    program: Program,
    data: Iterable[Any] | None,
    target: str | Target = "cpu",
    precision: str = "fp32",
    table: Table | None = None,
    measure: bool | None = None,
    plan: Plan | str | Path | None = None,
    samples: int = 64,
    points: int = 1,
    sizes: int = SIZES,
    importance: str = "repair",
    folder: str | Path | None = None,
    progress: bool = False,
    **fields: Any,
) -> TuningTables:
    """Return the tables of times and losses of a program, measuring what is missing. `tune` describes the arguments and
    errors."""
    for name, value, most in (("samples", samples, None), ("points", points, 2), ("sizes", sizes, None)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most and value > most):
            raise BadInput(f"tune.{name}: a whole number from 1{f' to {most}' if most else ''}, not {value!r}")
    device = get_target(target) if isinstance(target, str) else target
    edited = load_plan(plan) if isinstance(plan, (str, Path)) else plan
    fixed = Fixed() if edited is None else _fixed(edited, program, device)
    by_layer = latency_model(table, device, precision)
    model = needed_latency(by_layer, "tune", program)
    context = Context(data=data, target=device, dtype=precision, latency=model, progress=progress).replaced(
        "tune", **fields
    )
    more = {name: [size] for name, size in fixed.widths.items()}
    space = Space(program, device.alignment(precision), sizes, more, context.seed, progress)
    # Creating the losses checks the data, so it comes before the times, which may take long to measure.
    losses = Losses(space, context, importance, samples, points, Path(folder or cache_folder() / "tune"))
    times = Times(space, model, progress)
    tables = Tables(space, times, losses, fixed)
    losses.measure(progress)
    measured = isinstance(by_layer, LatencyTable) if measure is None else measure
    if measured and not isinstance(by_layer, LatencyTable) and device.backend != "onnxruntime":
        raise BadInput(f"tune.measure: {device.name} is not at hand; leave it out")
    return TuningTables(tables, device, precision, model, measured, progress)


def _fixed(plan: Plan, program: Program, target: Target) -> Fixed:
    """Return the widths and blocks that were changed in a plan. Raises BadInput for a plan of another model or target, and
    for a contradiction in the plan."""
    if plan.tuned is None:
        raise BadInput("plan: not written by `graphcomb tune`")
    if plan.tuned.model != code_of_model(program):
        raise BadInput("plan: of another model than this one; leave it out")
    if plan.tuned.target != target.name:
        raise BadInput(f"plan: for target {plan.tuned.target}, not {target.name}; leave it out")
    _ = plan.decided  # contradictions are errors
    return plan.fixed


def latency_model(table: Table | None, target: Target, precision: str) -> LatencyTable | Roofline:
    """Return what predicts the times of layers on a target; `tune` describes `table`.

    Raises BadInput for a file of measured layers if this machine is not the target, and as `Roofline.calibrated` does.
    """
    if isinstance(table, (LatencyTable, Roofline)):
        return table
    if table is None:
        suffix = "" if precision == "fp32" else f"-{precision}"
        try:
            return LatencyTable(cache_folder() / f"latency-{target.name}{suffix}.json", target, precision=precision)
        except BadInput:
            return Roofline(target, precision)  # this machine is not the target
    if str(table) == "roofline":
        target.alignment(precision)
        return Roofline(target, precision)
    from .runtime.device_results import are_results

    if are_results(str(table)):
        return Roofline.calibrated(str(table), target, precision)
    return LatencyTable(table, target, precision=precision)


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


def _short(value: float) -> float:
    """Round a value to four significant digits."""
    return float(f"{value:.4g}")
