"""The report's section on a tuned plan: what was asked for, predicted and measured, each with its error bar."""

from typing import Any

from ...summary import Planned, Summary
from ..reading import timings
from ..text import si

NEAR = 1.1  # a time of up to this multiple of the asked one meets it


def plan_section(summary: Summary) -> dict[str, Any] | None:
    """Return the section on the plan that a run carried out for the template; None without a plan."""
    plan = summary.plan
    if plan is None:
        return None
    return {"facts": _facts(plan, summary), "changes": plan.changes, "edited": plan.edited}


def _facts(plan: Planned, summary: Summary) -> list[tuple[str, str]]:
    ms, loss = plan.ms, plan.loss
    asked = ms.get("asked")
    facts = [
        ("asked", "" if asked is None else f"{si(asked)} ms on {plan.target}, {plan.precision}"),
        ("dense", _bar(ms, "dense", "dense_low", "dense_high")),
        ("predicted", f"{_bar(ms, 'predicted', 'predicted_low', 'predicted_high')}, by {plan.by}"),
    ]
    if plan.edited:
        return [(name, text) for name, text in facts[:2] if text]
    how = "measured when it was tuned" if plan.met_by == "measured" else "network built, then predicted layer by layer"
    facts += [(how, f"{_bar(ms, 'achieved', 'low', 'high')}{_verdict(asked, ms.get('achieved'), plan.met_by)}")]
    facts += _this_run(plan, summary, asked)
    facts += [("loss", f"{si(loss.get('measured'))} nats on calibration images, predicted {si(loss.get('predicted'))}")]
    return [(name, text) for name, text in facts if text]


def _this_run(plan: Planned, summary: Summary, asked: float | None) -> list[tuple[str, str]]:
    """What the run's own measurement says, if it is one on the plan's target in the plan's precision."""
    measured = next(iter(list(timings(summary).values())[1:]), None)  # the dense program is the first
    if measured is None or plan.target != "cpu" or plan.precision != "fp32":
        return []
    bar = {"ms": measured["median"], "low": measured["p25"], "high": measured["p75"]}
    return [("measured in this run", _bar(bar, "ms", "low", "high") + _verdict(asked, bar["ms"], "measured"))]


def _bar(values: Any, name: str, low: str, high: str) -> str:
    """Format a time with the range in which the true value mostly lies."""
    if values.get(name) is None:
        return ""
    text = f"{si(values[name])} ms"
    return text if values.get(low) is None else f"{text} ({si(values[low])} to {si(values[high])})"


def _verdict(asked: float | None, ms: float | None, by: str) -> str:
    if asked is None or ms is None:
        return ""
    return f": {'met' if ms <= NEAR * asked else 'missed'}{'' if by == 'measured' else ' as predicted, not measured'}"
