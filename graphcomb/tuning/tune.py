"""Choose the blocks to remove and the widths of groups for one budget, in milliseconds or in loss.

    plan = graphcomb.tune(program, data=images, latency=0.5, target="cpu")
    plan.save("plan.yaml")
    result = plan.run(program, data=images)

passes/joint has the tables and the optimisation. This file connects them with the runtime, which predicts the times of
layers and measures whole networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..graph.errors import BadInput
from ..graph.program import Program
from ..passes.common.latency import allowed_seconds
from ..passes.joint.space import SIZES
from ..passes.joint.tuning_rounds import ROUNDS, Tuner, builder
from ..runtime.devices.table import Target
from .plan import Plan
from .tables import Table, prepare_tables


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
    `Plan`, or a list of plans for several budgets, which share all tables.

    - data: batches of images; labels are not needed.
    - latency: largest time of a run, as a share of the dense program's time or as a time such as "3.5 ms". loss: instead of
      it, the largest divergence from the dense network in nats, or points of the metric such as "0.5 points" (hundredths of
      it), which need labelled data, `val=`. The networks that are built are scored on it.
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
        extra,
        **fields,
    )
    build = builder(session.tables, session.repair.importance, session.repair.samples, session.tables.losses.context)
    tuner = Tuner(session.tables, build, session.time, rounds, session.say)
    if any(kind == "loss" and isinstance(budget, str) for kind, budget in budgets):
        session.check_labels()
    plans = []
    for kind, budget in budgets:
        if kind == "latency":
            asked = allowed_seconds(budget, tuner.dense, "tune")
            built = tuner.within(asked)
        else:
            of_metric = isinstance(budget, str)
            number = _points(budget) if of_metric else float(budget)
            built, asked = tuner.losing(number, session.points if of_metric else None), None
        plans.append(session.plan(tuner, built, asked))
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
        elif isinstance(budget, str):
            _points(budget)
        elif isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
            raise BadInput(f'tune.loss: a divergence above 0 in nats, or such as "0.5 points", not {budget!r}')
    if not budgets:
        raise BadInput(f"tune.{kind}: no budget")
    return [(kind, budget) for budget in budgets]


def _points(text: str) -> float:
    """Return the number of a text such as "0.5 points". Raises BadInput for any other text."""
    number, _, unit = text.partition(" ")
    try:
        if unit not in ("points", "point") or not 0 < (value := float(number)) < 100:
            raise ValueError
    except ValueError:
        raise BadInput(f'tune.loss: a divergence above 0 in nats, or such as "0.5 points", not {text!r}') from None
    return value
