"""The report's table of layers: channels and multiply-accumulates before and after, predicted and measured times."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...prediction.roofline import calibration_text
from ...summary import Predicted, PredictedLayer, Record, Summary
from ..text import change, count, counted, milliseconds, number, si, size
from .devices import compared

IN_SIGHT = 20  # number of the most expensive rows that a longer table shows; the others are folded


@dataclass
class LayerRow:
    """One row of the table of layers; a pair is (dense, compressed).

    - name, kind: name of the layer's weight or node, and its kind.
    - channels: output channels; None for a layer without channels.
    - macs: multiply-accumulates. ms: predicted milliseconds; None without a prediction.
    - work: text on padding and bytes. bound: what bounds its time.
    - verdict: why it gains nothing from fewer channels.
    - measured: text on the measured time of its kernel.
    """

    name: str
    kind: str
    channels: tuple[float, float] | None
    macs: tuple[float, float]
    ms: tuple[float, float] | None = None
    work: str = ""
    bound: str = ""
    verdict: str = ""
    measured: str = ""


def layer_rows(
    records: Iterable[Record], predicted: list[PredictedLayer], profiled: Mapping[str, str]
) -> list[LayerRow]:
    """Return the rows of all layers that the passes' records or the prediction list.

    Values before are those of the first record with the layer, values after those of the last. Layers with a prediction come
    first, in its order. profiled: texts on measured times by name of the layer.
    """
    recorded = _recorded(records)
    rows = [_predicted(row, recorded, profiled) for row in predicted]
    return [*rows, *recorded.values()]


def longest_bars(rows: Iterable[LayerRow]) -> dict[str, float]:
    """Return the largest value of each column with bars: channels, macs and ms."""
    columns = {key: [pair for row in rows if (pair := getattr(row, key))] for key in ("channels", "macs", "ms")}
    finite = {key: [v for pair in pairs for v in pair if number(v) is not None] for key, pairs in columns.items()}
    return {key: max(values, default=0) or 1 for key, values in finite.items()}


def slowest(rows: list[LayerRow]) -> list[LayerRow]:
    """Return the IN_SIGHT rows with the longest predicted time, or the most multiply-accumulates without a prediction."""
    return sorted(rows, key=lambda row: (max(row.ms or (0.0,)), row.macs[0]), reverse=True)[:IN_SIGHT]


def largest_savings(rows: list[LayerRow]) -> list[tuple[str, str]]:
    """Return the name and the saving in words of the three layers that save most: predicted time if there is a prediction,
    else multiply-accumulates, with the share of all savings."""
    timed = any(row.ms for row in rows)
    saved = {i: difference for i, row in enumerate(rows) if (difference := _saved(row, timed)) > 0}
    whole = sum(saved.values())
    savings = []
    for i in sorted(saved, key=lambda i: -saved[i])[:3]:
        row = rows[i]
        parts = [f"{milliseconds(saved[i])} predicted" if timed else f"{si(saved[i])} multiply-accumulates"]
        parts.append(f"{100 * saved[i] / whole:.0f}\u00a0% of what was saved")
        if row.channels and row.channels[0] != row.channels[1]:
            parts.append(f"{count(row.channels[0])} → {count(row.channels[1])} channels")
        savings.append((row.name, ", ".join(parts)))
    return savings


def _saved(row: LayerRow, timed: bool) -> float:
    """Return the milliseconds or multiply-accumulates that a layer saves; 0 if they are not known."""
    before, after = (row.ms or (0.0, 0.0)) if timed else row.macs
    return number(before - after) or 0.0


def _recorded(records: Iterable[Record]) -> dict[str, LayerRow]:
    """Return the rows of the layers in the passes' records, by name."""
    rows: dict[str, LayerRow] = {}
    for layer in (layer for record in records for layer in record.layers):
        old, new = layer.channels.before[-1], layer.channels.after[-1]
        macs = layer.macs.before, layer.macs.after
        row = rows.setdefault(layer.name, LayerRow(layer.name, layer.kind, (old, new), macs))
        row.channels = (row.channels or (old,))[0], new
        row.macs = row.macs[0], layer.macs.after
    return rows


def _predicted(layer: PredictedLayer, recorded: dict[str, LayerRow], profiled: Mapping[str, str]) -> LayerRow:
    """Return the row of a layer in the prediction: its row in `recorded`, which is removed there, or a new one."""
    sides = [layer.before, layer.after]
    present = [side for side in sides if side]
    row = recorded.pop(layer.name, None)
    if row is None:
        old, new = (side.sizes.get("outputs", 0) if side else 0 for side in sides)
        macs = [side.macs if side else 0 for side in sides]
        row = LayerRow(layer.name, layer.op, (old, new) if old or new else None, (macs[0], macs[1]))
    old_ms, new_ms = (side.ms if side else 0.0 for side in sides)
    row.ms = old_ms, new_ms
    row.work = ", ".join(filter(None, [_padding(present), change(size(side.bytes) for side in present)]))
    row.bound = change(side.bound for side in present)
    row.verdict = present[-1].verdict if present else ""
    row.measured = profiled.get(layer.name, "")
    return row


def _padding(sides: Iterable[Predicted]) -> str:
    """Return a text on the share of multiply-accumulates that padding adds; empty if it adds none."""
    added = [side.padded_macs / side.macs - 1 for side in sides if side.macs and side.padded_macs]
    return f"padding adds {change(f'{100 * share:.0f}' for share in added)} %" if any(added) else ""


def prediction_facts(summary: Summary) -> list[tuple[str, str]]:
    """Return names and texts of facts on the prediction: its source, its errors, and the share of the time that fewer
    channels do not reduce."""
    prediction = summary.prediction
    if prediction is None:
        return [("predicted time", f"none: {summary.prediction_note}")] if summary.prediction_note else []
    facts = [("predicted by", prediction.by)]
    if prediction.calibration:
        facts.append(("calibration", calibration_text(prediction.calibration.to_dict())))
    if doubt := prediction.uncertainty:
        facts.append(("known error", str(doubt)))
    facts += [("error", f"{where}: {text}") for where, _, text in compared(summary)]
    by_verdict: dict[str, list[float]] = {}
    for side in filter(None, (row.after or row.before for row in prediction.layers)):
        by_verdict.setdefault(side.verdict, []).append(side.ms)
    whole = sum(map(sum, by_verdict.values())) or 1.0
    for verdict, ms in sorted(by_verdict.items(), key=lambda pair: -sum(pair[1])):
        if verdict:
            share = f"{counted(len(ms), 'layer')}, {100 * sum(ms) / whole:.0f}\u00a0% of the time"
            facts.append(("little to gain", f"{verdict}: {share}"))
    return facts
