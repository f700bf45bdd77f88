"""The report's account of the passes: a row each, what they left alone and why, and kernels they added."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..summary import Record, Scores
from .text import exact, number, plain, score_format

# A reason of the comb's: the node that froze the axis, where that is in the source, and why.
REASON = re.compile(r"^(\S+)(?: \((.*)\))?: (.+)$", re.DOTALL)


@dataclass
class Refusal:
    """All that was left alone for one reason: what, and where the reason lies."""

    why: str
    items: list[tuple[str, str]] = field(default_factory=list)


def pass_row(record: Record) -> dict[str, Any]:
    """A pass as the report shows it."""
    cost, scores = record.cost, record.accuracy or Scores(before=None, after=None)
    score = score_format(scores.before, scores.after, metric=scores.metric)
    return {
        "name": record.pass_,
        "options": [(k, plain(v)) for k, v in record.options.items() if v not in (None, [], (), {})],
        "macs": (cost.before.macs, cost.after.macs),
        "params": (cost.before.params, cost.after.params),
        "accuracy": score(scores.after) if number(scores.after) is not None else "",
        "error": exact(record.verified.error) if record.verified else "",
        "seconds": record.seconds,
    }


def refusals(records: Iterable[Record]) -> list[Refusal]:
    """What was left alone, by reason, the most frequent first."""
    groups: dict[str, Refusal] = {}
    for refused in (row for record in records for row in record.refused):
        reason = REASON.match(refused.why)
        why = reason[3] if reason else refused.why or "no reason given"
        place = f"{reason[1]} {_short(reason[2])}".strip() if reason else ""
        group = groups.setdefault(why, Refusal(why))
        if (refused.what, place) not in group.items:
            group.items.append((refused.what, place))
    return sorted(groups.values(), key=lambda group: -len(group.items))


def kernel_facts(records: Iterable[Record]) -> list[tuple[str, str]]:
    """Where a pass left more kernels than there were, and what computes for a softmax that has nothing left to choose."""
    facts = []
    for record in records:
        kernels = record.kernels
        if kernels is None:
            continue
        if kernels.after > kernels.before:
            new = ", ".join(map(_short, kernels.more))
            facts.append(("more kernels", f"{record.pass_}: {kernels.before} → {kernels.after} predicted; new: {new}"))
        for node, feeding in kernels.dead.items():
            only = ", ".join(feeding)
            facts.append(
                ("dead branch", f"{_short(node)} has a single entry left and decides nothing; only for it: {only}")
            )
    return facts


def _short(place: str | None) -> str:
    """The end of a source path, with the line and its text."""
    return re.sub(r"^\S*/([^/\s]+/[^/\s]+:\d+)", r"\1", place or "")
