"""List what every option of every group and block saves and loses by itself, as CSV and as an HTML page."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..graph.files import replacing
from ..graph.program import Program
from ..passes.joint.ranges import MARGIN, overflows, ranges
from ..passes.joint.variants import CHANGED
from ..passes.quantize.choose_layers import QUANTISED
from ..runtime.report.sensitivity import render
from .tables import TuningTables, narrower, prepare_tables, without


@dataclass(frozen=True)
class Option:
    """A change of one group or block of the dense network.

    - what, kind: name and kind of the group or block; "layers" for a region of layers, "layer" for one.
    - option: the width that the group keeps, "gone" for a removed block, "int8", "fp8" or "2:4", or "fp16" for a layer
      whose values may leave the range of fp16.
    - saves_ms: predicted milliseconds of a run that the change saves. saves: their share of the dense network's time.
    - loss: divergence from the dense network in nats. measured: whether it was measured; else it is interpolated.
    - price: loss per saved millisecond.
    - note: why it cannot be changed; which layers a region has; why INT8 does not save time; how large values are.
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
    """Return all options of a program.

    Those with the lowest price come first, then those that save no time, then groups and blocks that cannot be changed, with
    the reason. options: arguments of `prepare_tables`; `tune` describes them and the errors.
    """
    session = prepare_tables(program, data, **options)
    problem, space, losses = session.tables.problem, session.tables.space, session.tables.losses
    whole = problem.seconds(problem.whole())
    scale = session.time(program).seconds / whole
    variants = session.tables.times.variants
    rows = []
    for i, (axis, group) in enumerate(zip(problem.axes, space.groups, strict=False)):
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
    rows += _of_layers(session, scale, whole)
    rows.sort(key=lambda o: (o.saves_ms <= 0, o.price if o.saves_ms > 0 else o.loss))
    kinds = {g.name: g.kind for g in space.comb.groups}
    refused = [
        Option(name or "every layer", "layer", option, 0.0, 0.0, 0.0, False, math.inf, why)
        for (option, _, name), why in ((what.partition(" "), why) for what, why in variants.refused.items())
    ]
    wide = [
        Option(name, "layer", "fp16", 0.0, 0.0, 0.0, True, math.inf,
               f"values up to {largest:.3g} on calibration data; {MARGIN:g} times that leaves the range of fp16: keep fp32")
        for name, largest in sorted(ranges(program, losses.divergence).items())
        if overflows(largest)
    ]  # fmt: skip
    return (
        rows
        + refused
        + wide
        + [
            Option(name, kinds.get(name, "block"), "none", 0.0, 0.0, 0.0, False, math.inf, why)
            for name, why in space.refused.items()
        ]
    )


def _of_layers(session: TuningTables, scale: float, whole: float) -> list[Option]:
    """Return the options of layers in INT8 or FP8, and with 2:4 sparse weights. A region that INT8 slows down says why."""
    problem, rows = session.tables.problem, []
    for i, variant in enumerate(session.tables.times.variants.offered):
        place = len(session.tables.space.groups) + i
        saved = scale * (whole - problem.seconds(narrower(problem, place, CHANGED)))
        converting = scale * session.tables.times.conversions(i)
        note = f"with {', '.join(variant.weights[1:])}" if len(variant.weights) > 1 else ""
        if variant.share is not None:
            note += f"{'; ' if note else ''}measured with its conversions"
        elif variant.option in QUANTISED and saved <= 0:
            alone = f"{1e3 * (saved + converting):.3g} ms saved by the layers"
            borders = len(variant.read) + len(variant.written)
            note += f"{'; ' if note else ''}{borders} conversions take {1e3 * converting:.3g} ms, {alone}"
        kind = "layers" if variant.option in QUANTISED else "layer"
        row = _row(variant.weights[0], kind, variant.option, saved, saved / (scale * whole), variant.loss, True)
        rows.append(replace(row, note=note))
    return rows


def _row(what: str, kind: str, option: str, saved: float, share: float, loss: float, measured: bool) -> Option:
    price = loss / (1e3 * saved) if saved > 0 else math.inf
    return Option(what, kind, option, 1e3 * saved, share, loss, measured, price)


def write_csv(options: Sequence[Option], path: Path) -> None:
    """Write the options as a CSV file with one row each."""
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Option)])
        writer.writeheader()
        writer.writerows(asdict(option) for option in options)


def write_page(options: Sequence[Option], path: Path, model: str, target: str) -> None:
    """Write the options as a self-contained HTML page with a sortable table."""
    text = render([asdict(option) for option in options], model, target)
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
