"""Choose the blocks to remove and the widths of groups for one budget, in milliseconds or in loss.

    plan = graphcomb.tune(program, data=images, latency=0.5, target="cpu")
    plan.save("plan.yaml")
    result = plan.run(program, data=images)

passes/joint has the tables and the optimisation. This file connects them with the runtime, which predicts the times of
layers and measures whole networks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from ..graph.errors import BadInput, Unreachable
from ..graph.program import Program
from ..passes.common.latency import allowed_seconds
from ..passes.joint.space import SIZES
from ..passes.joint.tuning_rounds import OVER, ROUNDS, Tuner, builder
from ..runtime.devices.table import Target
from .plan import Plan
from .tables import Table, TuningTables, check_whole, prepare_tables


def tune(
    program: Program,
    data: Iterable[Any] | None = None,
    latency: float | str | Sequence[float | str] | None = None,
    loss: float | str | Sequence[float | str] | None = None,
    target: str | Target = "cpu",
    precision: str = "fp32",
    table: Table | None = None,
    measure: bool | None = None,
    plan: Plan | str | Path | None = None,
    samples: int | None = None,
    points: int = 1,
    sizes: int = SIZES,
    importance: str | None = None,
    rounds: int = ROUNDS,
    folder: str | Path | None = None,
    progress: bool = False,
    extra: Sequence[str] = (),
    **fields: Any,
) -> Any:
    """Choose the blocks to remove and the width of every group for a budget.

    With a budget of latency the network with the smallest loss is chosen, with a budget of loss the fastest one. Returns a
    `Plan`, or a list of plans for several budgets, which share all tables and networks: none of them is worse in time and
    loss than another. Budgets in a list that cannot be reached are left out, with a warning for each.

    - data: batches of images; labels are not needed.
    - latency: largest time of a run, as a share of the dense program's time or as a time such as "3.5 ms". loss: instead of
      it, the largest divergence from the dense network in nats, or points of the metric such as "0.5 points" (hundredths of
      it), which need labelled data, `val=`. The networks that are built are scored on it. An output of shape (samples, k)
      counts as class scores, whose divergence does not see what is added to all k; for others, such as coordinates, give
      points of a metric.
    - target, precision: device and precision.
    - table: source of the times of layers: "roofline" (the target's data sheet), results of a bench bundle, which calibrate
      the roofline, or a file of measured layers, which is created and completed as needed. None uses a file in the cache
      folder if the target is this machine, else the data sheet.
    - measure: whether to measure whole networks here in ONNX Runtime; if not, their time is predicted layer by layer. None
      measures them if layers are measured.
    - plan: an earlier plan. Rows that were changed in it or are marked as fixed are kept, as are its recovery and repair;
      the others are chosen again.
    - samples: number of images for ranking and repair; as many others measure the loss. None takes those of the plan, or
      64 without one.
    - points: number of sizes at which the loss of a group's widths is measured, 1 or 2.
    - sizes: number of evenly spaced sizes that a group may have; above 1, the least possible one is tried as well.
    - importance: see `RemoveChannels`. None takes that of the plan, or "repair" without one.
    - rounds: how often the chosen network is built and the tables are corrected.
    - folder: folder that keeps measured losses; by default in the cache folder.
    - extra: what may change besides widths and blocks: "int8" or "fp8" (regions of layers in INT8, or in FP8 for targets
      that compute in it) and "2:4" (layers with 2:4 sparse weights, where the target has kernels for them). Where
      layers are measured, each region is tried out: the network with this region in INT8 runs in turns with the network
      without, in ONNX Runtime.
    - progress: whether to show progress. fields: fields of the passes' `Context`.

    Raises BadInput for invalid arguments and for data on which no losses can be measured; Unreachable if no budget can
    be reached (the message says what can be reached, and what freezes the rest); Contended if the machine is too
    busy to measure.
    """
    found = choose(
        program, read_budgets(latency, loss), rounds, data=data, target=target, precision=precision, table=table,
        measure=measure, plan=plan, samples=samples, points=points, sizes=sizes, importance=importance, folder=folder,
        progress=progress, extra=extra, **fields,
    )  # fmt: skip
    plans = [plan for plan in found if isinstance(plan, Plan)]
    missed = [error for error in found if isinstance(error, Unreachable)]
    if not plans:
        raise missed[0]
    for error in missed:
        warnings.warn(str(error), stacklevel=2)
    several = isinstance(latency if loss is None else loss, (list, tuple))
    return plans if several else plans[0]


def choose(
    program: Program, budgets: Sequence[Budget], rounds: int = ROUNDS, **options: Any
) -> list[Plan | Unreachable]:
    """Return for each budget a plan, or the error that says why it cannot be reached.

    Networks are built for all budgets before one is answered with the best of them, so that no plan is worse in time and
    loss than that of another budget. options: arguments of `prepare_tables`; `tune` describes them and the errors.
    """
    check_whole("rounds", rounds)
    session = prepare_tables(program, **options)
    if any(budget.in_points for budget in budgets):
        session.check_labels()
    build = builder(session.tables, session.repair.importance, session.repair.samples, session.tables.losses.context)
    tuner = Tuner(session.tables, build, session.time, rounds, session.say)
    errors = [_build(session, tuner, budget) for budget in budgets]
    return [_answer(session, tuner, budget, error) for budget, error in zip(budgets, errors, strict=True)]


@dataclass(frozen=True)
class Budget:
    """What a network may take, or lose, at most. kind: "latency" or "loss". most: as `tune` takes it."""

    kind: str
    most: float | str

    @property
    def in_points(self) -> bool:
        """Whether it is a loss in points of the metric."""
        return self.kind == "loss" and isinstance(self.most, str)

    def seconds(self, tuner: Tuner) -> float:
        """The seconds of a budget of latency."""
        return allowed_seconds(self.most, tuner.dense, "tune")

    def loss(self, session: TuningTables) -> tuple[float, Callable[[Program], float] | None]:
        """The arguments of `Tuner.losing` for a budget of loss."""
        return (_points(self.most), session.points) if isinstance(self.most, str) else (float(self.most), None)


def _build(session: TuningTables, tuner: Tuner, budget: Budget) -> Unreachable | None:
    """Build networks for a budget; returns why it cannot be reached, if so."""
    try:
        if budget.kind == "latency":
            tuner.within(budget.seconds(tuner))
        else:
            tuner.losing(*budget.loss(session))
    except Unreachable as error:
        return error
    return None


def _answer(session: TuningTables, tuner: Tuner, budget: Budget, error: Unreachable | None) -> Plan | Unreachable:
    """Return the plan of the best network that was built; the error where there is one and no network refutes it."""
    if budget.kind == "loss":
        built, asked = tuner.fastest(*budget.loss(session)), None
        fits = built is not None
    else:
        asked = budget.seconds(tuner)
        built = tuner.best(asked)
        fits = built is not None and built.seconds <= OVER * asked
    if error is not None and not fits:
        return error
    assert built is not None  # for a budget without an error something was built
    return session.plan(tuner, built, asked)


def read_budgets(latency: Any, loss: Any) -> list[Budget]:
    """Return the budgets that `tune` is given. Raises BadInput for what is none."""
    if (latency is None) == (loss is None):
        raise BadInput("tune: give one of latency and loss")
    kind, given = ("latency", latency) if loss is None else ("loss", loss)
    budgets = list(given) if isinstance(given, (list, tuple)) else [given]
    for budget in budgets:
        if kind == "latency":
            allowed_seconds(budget, 1.0, "tune")
        elif isinstance(budget, str):
            _points(budget)
        elif isinstance(budget, bool) or not isinstance(budget, Real) or not 0 < float(budget) < math.inf:
            raise BadInput(f'tune.loss: a divergence above 0 in nats, or such as "0.5 points", not {budget!r}')
    if not budgets:
        raise BadInput(f"tune.{kind}: no budget")
    return [Budget(kind, budget) for budget in budgets]


def _points(text: str) -> float:
    """Return the number of a text such as "0.5 points". Raises BadInput for any other text."""
    number, _, unit = text.partition(" ")
    try:
        if unit not in ("points", "point") or not 0 < (value := float(number)) < 100:
            raise ValueError
    except ValueError:
        raise BadInput(f'tune.loss: a divergence above 0 in nats, or such as "0.5 points", not {text!r}') from None
    return value
