"""The report's table of layers: channels and multiply-accumulates before and after, predicted and measured times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .devices import calibration_note, compared
from .reading import SIDES, items, mapping
from .text import change, counted, number, size

IN_SIGHT = 20  # of longer tables, the most expensive rows stay in sight and the rest is folded


@dataclass
class LayerRow:
    """A layer's output channels (None where it has none), MACs and predicted milliseconds (None where nothing is
    predicted), dense and compressed, and the lengths of their bars in percent. work: padded MACs and bytes, in words;
    bound: what bounds its time; verdict: why it will not profit from fewer channels; measured: of its kernel, in words."""

    name: str
    kind: str
    channels: tuple[float, float] | None
    macs: tuple[float, float]
    channel_bars: tuple[float, float] = (0.0, 0.0)
    mac_bars: tuple[float, float] = (0.0, 0.0)
    ms: tuple[float, float] | None = None
    ms_bars: tuple[float, float] = (0.0, 0.0)
    work: str = ""
    bound: str = ""
    verdict: str = ""
    measured: str = ""


def layer_rows(
    records: Iterable[Mapping[str, Any]], predicted: list[Mapping[str, Any]], profiled: Mapping[str, str]
) -> list[LayerRow]:
    """The layers over all passes: as the first pass that names one found it, and as the last one left it; then with what
    is predicted, in the order of the prediction. profiled: in words, by name."""
    recorded = _recorded(records)
    rows = [_predicted(row, recorded, profiled) for row in predicted]
    rows += recorded.values()
    widest = max((max(row.channels) for row in rows if row.channels), default=0) or 1
    heaviest = max((max(row.macs) for row in rows), default=0) or 1
    longest = max((max(row.ms) for row in rows if row.ms), default=0) or 1
    for row in rows:
        row.channel_bars = _bars(row.channels or (0.0, 0.0), widest)
        row.mac_bars = _bars(row.macs, heaviest)
        row.ms_bars = _bars(row.ms or (0.0, 0.0), longest)
    return rows


def slowest(rows: list[LayerRow]) -> list[LayerRow]:
    """The rows that stay in sight: those that take longest, or compute most where nothing is predicted."""
    return sorted(rows, key=lambda row: (max(row.ms or (0.0,)), row.macs[0]), reverse=True)[:IN_SIGHT]


def _recorded(records: Iterable[Mapping[str, Any]]) -> dict[str, LayerRow]:
    """The layers that the passes' records list, by name."""
    rows: dict[str, LayerRow] = {}
    for record in records:
        for layer in items(record.get("layers")):
            channels, macs = mapping(layer.get("channels")), mapping(layer.get("macs"))
            old, new = (_outputs(channels.get(side)) for side in SIDES)
            if old is None or new is None:
                continue
            work = number(macs.get("before")) or 0.0, number(macs.get("after")) or 0.0
            name = str(layer.get("name", ""))
            row = rows.setdefault(name, LayerRow(name, str(layer.get("kind", "")), (old, new), work))
            row.channels = (row.channels or (old,))[0], new
            row.macs = row.macs[0], work[1]
    return rows


def _predicted(layer: Mapping[str, Any], recorded: dict[str, LayerRow], profiled: Mapping[str, str]) -> LayerRow:
    """The row of a layer that the prediction lists; it is taken out of the recorded ones where it is among them."""
    name, before, after = str(layer.get("name", "")), mapping(layer.get("before")), mapping(layer.get("after"))
    sides = [before, after]
    row = recorded.pop(name, None)
    if row is None:
        widths = [number(mapping(side.get("sizes")).get("outputs")) for side in sides]
        channels = (widths[0] or 0.0, widths[1] or 0.0) if any(widths) else None
        macs = number(before.get("macs")) or 0.0, number(after.get("macs")) or 0.0
        row = LayerRow(name, str(layer.get("op", "")), channels, macs)
    present = [side for side in sides if side]
    row.ms = number(before.get("ms")) or 0.0, number(after.get("ms")) or 0.0
    row.work = ", ".join(filter(None, [_padding(sides), change(size(side.get("bytes")) for side in present)]))
    row.bound = change(str(side.get("bound", "")) for side in present)
    row.verdict = str((after or before).get("verdict", ""))
    row.measured = profiled.get(name, "")
    return row


def _padding(sides: Iterable[Mapping[str, Any]]) -> str:
    """How much the kernels' padding adds to the multiply-accumulates; empty where it adds nothing."""
    work = [(number(side.get("macs")), number(side.get("padded_macs"))) for side in sides]
    added = [padded / macs - 1 for macs, padded in work if macs and padded]
    return f"padding adds {change(f'{100 * share:.0f}' for share in added)} %" if any(added) else ""


def _outputs(channels: Any) -> float | None:
    """The output channels of a pair (input channels, output channels)."""
    if not isinstance(channels, list | tuple) or len(channels) != 2 or number(channels[0]) is None:
        return None
    return number(channels[1])


def _bars(pair: tuple[float, float], whole: float) -> tuple[float, float]:
    return round(100 * pair[0] / whole, 2), round(100 * pair[1] / whole, 2)


def prediction_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What predicts the time, how far off it is, and how much of it will not fall with the channels."""
    prediction = mapping(summary.get("prediction"))
    if not prediction:
        note = summary.get("prediction_note")
        return [("predicted time", f"none: {note}")] if note else []
    facts = [("predicted by", str(prediction.get("by", "")))]
    if (calibration := mapping(prediction.get("calibration"))) and (text := calibration_note(calibration)):
        facts.append(("calibration", text))
    doubt = mapping(prediction.get("uncertainty"))
    if (factor := number(doubt.get("factor"))) is not None:
        facts.append(("known error", f"off by up to {factor:.2g} times: {doubt.get('source', '')}"))
    facts += [("error", f"{where}: {text}") for where, _, text in compared(summary)]
    by_verdict: dict[str, list[float]] = {}
    for row in items(prediction.get("layers")):
        side = mapping(row.get("after")) or mapping(row.get("before"))
        by_verdict.setdefault(str(side.get("verdict", "")), []).append(number(side.get("ms")) or 0.0)
    whole = sum(map(sum, by_verdict.values())) or 1.0
    for verdict, ms in sorted(by_verdict.items(), key=lambda pair: -sum(pair[1])):
        if verdict:
            share = f"{counted(len(ms), 'layer')}, {100 * sum(ms) / whole:.0f}\u00a0% of the time"
            facts.append(("little to gain", f"{verdict}: {share}"))
    return facts
