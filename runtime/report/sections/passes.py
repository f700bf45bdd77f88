"""The report's sections on the passes: a row for each, what they left unchanged and why, and kernels they added."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ...summary import Record, Scores
from ..text import NOT_FINITE, exact, number, plain, score_format

# A reason given by the comb: the node that froze the axis, the place in the source, and why.
REASON = re.compile(r"^(\S+)(?: \((.*)\))?: (.+)$", re.DOTALL)


@dataclass
class Refusal:
    """Everything that was left unchanged for the same reason. items: (what, the node and source line that cause it)."""

    why: str
    items: list[tuple[str, str]] = field(default_factory=list)


def pass_row(record: Record) -> dict[str, Any]:
    """Return the row of a pass for the template."""
    cost, scores = record.cost, record.accuracy or Scores(before=None, after=None)
    score = score_format(scores.before, scores.after, metric=scores.metric)
    return {
        "name": record.pass_,
        "options": [(k, plain(v)) for k, v in record.options.items() if v not in (None, [], (), {})],
        "macs": (cost.before.macs, cost.after.macs),
        "params": (cost.before.params, cost.after.params),
        "accuracy": "" if scores.after is None else NOT_FINITE if number(scores.after) is None else score(scores.after),
        "error": exact(record.verified.error) if record.verified else "",
        "seconds": record.seconds,
    }


def refusals(records: Iterable[Record]) -> list[Refusal]:
    """Group what was left unchanged by reason, the most frequent first."""
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
    """Return names and texts of facts on kernels: passes that increased their number, and nodes that compute only for a
    softmax with a single entry left."""
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
    """Shorten a source path to its last folder and file; the line number and its text remain."""
    return re.sub(r"^\S*/([^/\s]+/[^/\s]+:\d+)", r"\1", place or "")
