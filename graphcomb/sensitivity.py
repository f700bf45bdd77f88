"""Sensitivity: what every option of every group and block saves and loses by itself, as a table for a person."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .graph.files import replacing
from .graph.program import Program
from .runtime.report.sensitivity import render
from .tuning import narrower, prepare_tables, without


@dataclass(frozen=True)
class Option:
    """One thing that may be replaced in the dense network.

    what: the group or block; kind: of either; option: the width that stays, or "gone". saves_ms: predicted, of a run.
    saves: as a share of the dense program's time. loss: divergence from the dense network; measured: whether it was, else
    the curve between what was. price: loss per millisecond. note: why it is no option.
    """

    what: str
    kind: str
    option: str
    saves_ms: float
    saves: float
    loss: float
    measured: bool
    price: float
    note: str = ""


def measure(program: Program, data: Iterable[Any] | None, **options: Any) -> list[Option]:
    """All options of a program, those that lose least per millisecond first, then those that save nothing, then what cannot
    shrink or go with the reason. options: see `tune`."""
    session = prepare_tables(program, data, **options)
    problem, space, losses = session.tables.problem, session.tables.space, session.tables.losses
    whole = problem.seconds(problem.whole())
    scale = session.seconds(program) / whole
    rows = []
    for i, (axis, group) in enumerate(zip(problem.axes, space.groups, strict=True)):
        measured = losses.curve(group).measured
        for k, size in enumerate(axis.sizes[:-1]):
            saved = scale * (whole - problem.seconds(narrower(problem, i, k)))
            known = k in axis.choices
            rows.append(
                _row(axis.name, group.kind, f"{size} of {group.size}", saved, saved / (scale * whole),
                     axis.losses[k] if known else math.inf, size in measured)
            )  # fmt: skip
    for b, block in enumerate(space.blocks):
        saved = scale * (whole - problem.seconds(without(problem, b)))
        form = "gone" if block.dropped else "gone, or merged into one layer"
        rows.append(_row(block.name, block.kind, form, saved, saved / (scale * whole), losses.block(block), True))
    rows.sort(key=lambda o: (o.saves_ms <= 0, o.price if o.saves_ms > 0 else o.loss))
    kinds = {g.name: g.kind for g in space.comb.groups}
    return rows + [
        Option(name, kinds.get(name, "block"), "none", 0.0, 0.0, 0.0, False, math.inf, why)
        for name, why in space.refused.items()
    ]


def _row(what: str, kind: str, option: str, saved: float, share: float, loss: float, measured: bool) -> Option:
    price = loss / (1e3 * saved) if saved > 0 else math.inf
    return Option(what, kind, option, 1e3 * saved, share, loss, measured, price)


def write_csv(options: Sequence[Option], path: Path) -> None:
    """Write the options as CSV, a row each, with full figures."""
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Option)])
        writer.writeheader()
        writer.writerows(asdict(option) for option in options)


def write_page(options: Sequence[Option], path: Path, model: str, target: str) -> None:
    """Write the options as a self-contained HTML page whose columns sort."""
    text = render([asdict(option) for option in options], model, target)
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
