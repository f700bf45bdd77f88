"""The report's table of layers: channels and multiply-accumulates before and after, predicted and measured times."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..prediction.roofline import calibration_text
from ..summary import Predicted, PredictedLayer, Record, Summary
from .devices import compared
from .text import change, counted, size

IN_SIGHT = 20  # of longer tables, the most expensive rows stay in sight and the rest is folded


@dataclass
class LayerRow:
    """A layer's output channels (None where it has none), MACs and predicted milliseconds (None where nothing is
    predicted), dense and compressed. work: padded MACs and bytes, in words; bound: what bounds its time; verdict: why it
    will not profit from fewer channels; measured: of its kernel, in words."""

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
    """The layers over all passes: as the first pass that names one found it, and as the last one left it; then with what
    is predicted, in the order of the prediction. profiled: in words, by name."""
    recorded = _recorded(records)
    rows = [_predicted(row, recorded, profiled) for row in predicted]
    return [*rows, *recorded.values()]


def longest_bars(rows: Iterable[LayerRow]) -> dict[str, float]:
    """The largest value in each column of the table that has bars."""
    columns = {key: [pair for row in rows if (pair := getattr(row, key))] for key in ("channels", "macs", "ms")}
    return {key: max(map(max, pairs), default=0) or 1 for key, pairs in columns.items()}


def slowest(rows: list[LayerRow]) -> list[LayerRow]:
    """The rows that stay in sight: those that take longest, or compute most where nothing is predicted."""
    return sorted(rows, key=lambda row: (max(row.ms or (0.0,)), row.macs[0]), reverse=True)[:IN_SIGHT]


def _recorded(records: Iterable[Record]) -> dict[str, LayerRow]:
    """The layers that the passes' records list, by name."""
    rows: dict[str, LayerRow] = {}
    for layer in (layer for record in records for layer in record.layers):
        old, new = layer.channels.before[-1], layer.channels.after[-1]
        macs = layer.macs.before, layer.macs.after
        row = rows.setdefault(layer.name, LayerRow(layer.name, layer.kind, (old, new), macs))
        row.channels = (row.channels or (old,))[0], new
        row.macs = row.macs[0], layer.macs.after
    return rows


def _predicted(layer: PredictedLayer, recorded: dict[str, LayerRow], profiled: Mapping[str, str]) -> LayerRow:
    """The row of a layer that the prediction lists; it is taken out of the recorded ones where it is among them."""
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
    """How much the kernels' padding adds to the multiply-accumulates; empty where it adds nothing."""
    added = [side.padded_macs / side.macs - 1 for side in sides if side.macs and side.padded_macs]
    return f"padding adds {change(f'{100 * share:.0f}' for share in added)} %" if any(added) else ""


def prediction_facts(summary: Summary) -> list[tuple[str, str]]:
    """What predicts the time, how far off it is, and how much of it will not fall with the channels."""
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
