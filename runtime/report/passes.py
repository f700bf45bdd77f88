"""The report's account of the passes: a row each, what they left alone and why, and kernels they added."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .reading import SIDES, items, mapping
from .text import exact, number, plain, score_format

# A reason of the comb's: the node that froze the axis, where that is in the source, and why.
REASON = re.compile(r"^(\S+)(?: \((.*)\))?: (.+)$", re.DOTALL)


@dataclass
class PassRow:
    """A pass as the report shows it."""

    name: str
    options: list[tuple[str, str]]
    macs: tuple[float | None, float | None]
    params: tuple[float | None, float | None]
    accuracy: str
    error: str
    seconds: float | None


@dataclass
class Refusal:
    """All that was left alone for one reason: what, and where the reason lies."""

    why: str
    items: list[tuple[str, str]] = field(default_factory=list)


def pass_row(record: Mapping[str, Any]) -> PassRow:
    """The row of a pass record."""
    cost, accuracy = mapping(record.get("cost")), mapping(record.get("accuracy"))
    before, after = (mapping(cost.get(side)) for side in SIDES)
    scores = [number(accuracy.get(side)) for side in SIDES]
    score = score_format(*scores, metric=str(accuracy.get("metric") or "accuracy"))
    return PassRow(
        name=str(record.get("pass", "")),
        options=[(k, plain(v)) for k, v in mapping(record.get("options")).items() if v not in (None, [], (), {})],
        macs=(number(before.get("macs")), number(after.get("macs"))),
        params=(number(before.get("params")), number(after.get("params"))),
        accuracy=score(scores[1]) if scores[1] is not None else "",
        error=exact(mapping(record.get("verified")).get("error")),
        seconds=number(record.get("seconds")),
    )


def refusals(records: Iterable[Mapping[str, Any]]) -> list[Refusal]:
    """What was left alone, by reason, the most frequent first."""
    groups: dict[str, Refusal] = {}
    for record in records:
        for row in items(record.get("refused")):
            reason = REASON.match(str(row.get("why", "")))
            why = reason[3] if reason else str(row.get("why", "")) or "no reason given"
            place = f"{reason[1]} {_short(reason[2])}".strip() if reason else ""
            item = str(row.get("what", "")), place
            group = groups.setdefault(why, Refusal(why))
            if item not in group.items:
                group.items.append(item)
    return sorted(groups.values(), key=lambda group: -len(group.items))


def kernel_facts(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Where a pass left more kernels than there were, and what computes for a softmax that has nothing left to choose."""
    facts = []
    for record in records:
        kernels, name = mapping(record.get("kernels")), str(record.get("pass", ""))
        before, after = (number(kernels.get(side)) for side in SIDES)
        if before is not None and after is not None and after > before:
            nodes = ", ".join(map(_short, items(kernels.get("more"), str)))
            facts.append(("more kernels", f"{name}: {before:.0f} → {after:.0f} predicted; new: {nodes}"))
        for node, feeding in mapping(kernels.get("dead")).items():
            rest = ", ".join(items(feeding, str))
            facts.append(
                ("dead branch", f"{_short(node)} has a single entry left and decides nothing; only for it: {rest}")
            )
    return facts


def _short(place: str | None) -> str:
    """The end of a source path, with the line and its text."""
    return re.sub(r"^\S*/([^/\s]+/[^/\s]+:\d+)", r"\1", place or "")
