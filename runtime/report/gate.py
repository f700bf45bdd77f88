"""The gate for CI: a build is compared with an earlier one, and what got worse is named.

Kernels are matched by the ONNX nodes they compute, since libraries number them anew in every build. Source: ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...graph.errors import BadInput
from ...graph.files import read_json

NUMBER = re.compile(r"_myl\d+_\d+$")  # of a generated kernel


def read_baseline(path: Path, target: str) -> list[dict[str, Any]]:
    """The engine reports for a target to compare with: a file of `graphcomb build --json`, or a run's summary.json, which
    may have several. Raises BadInput for anything else."""
    try:
        stored = read_json(path)
    except BadInput as error:
        raise BadInput(f"--gate {error}; `graphcomb build --json` makes one") from error
    rows = stored.get("engines", [stored]) if isinstance(stored, dict) else []
    rows = [row for row in rows if isinstance(row, dict) and "kernels" in row] if isinstance(rows, list) else []
    if not rows:
        raise BadInput(f"--gate {path}: holds no engine report (of `graphcomb build --json` or `graphcomb run`)")
    same = [row for row in rows if row.get("target") == target]
    if not same:
        has = ", ".join(sorted({str(row.get("target")) for row in rows}))
        raise BadInput(f"--gate {path}: has no engine for {target} (it has {has})")
    for row in same:
        if wrong := _wrong(row):
            raise BadInput(f"--gate {path}: {wrong}; make it anew with `graphcomb build --json`")
    return same


def choose(rows: list[dict[str, Any]], precision: str) -> dict[str, Any]:
    """The report of a precision, or one that says none. Raises BadInput where all are of others."""
    for wanted in (precision, None):
        if match := next((row for row in rows if row.get("precision") == wanted), None):
            return match
    has = ", ".join(sorted({str(row["precision"]) for row in rows}))
    raise BadInput(f"--gate: the baseline has no {precision} engine for {rows[0]['target']} (it has {has})")


def _wrong(row: Mapping[str, Any]) -> str | None:
    """What of a report cannot be compared with, if anything."""
    if not isinstance(row["kernels"], list):
        return "kernels is not a list"
    for i, kernel in enumerate(row["kernels"]):
        if not isinstance(kernel, dict) or not isinstance(kernel.get("name"), str):
            return f"kernels[{i}] is not a kernel with a name"
        if not _texts(kernel.get("nodes", [])):
            return f"kernels[{i}].nodes is not a list of names"
    return None if _texts(row.get("unread", [])) else "unread is not a list of texts"


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def compare(report: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    """What is worse than in the baseline, a line each; empty when the build passes. Both are `EngineReport.to_dict()`.

    Worse is a kernel that only pads where the baseline has none for these nodes, and a kernel whose description in the
    build log cannot be read.
    """
    before, now = _padding(baseline), _padding(report)
    worse = []
    for nodes, count in sorted((now - before).items()):
        pads = [p for p in report.get("pads", ()) if p["how"] == "kernel" and tuple(sorted(p["nodes"])) == nodes]
        advice = [f"axis {p['axis']} {p['before']} -> {p['after']}, {_advice(p)}" for p in pads]
        origin = next((o for n in nodes if (o := report.get("origins", {}).get(n))), None)
        changed = f" (changed by {', '.join(origin['passes'])})" if origin and origin["passes"] else ""
        text = f"new padding kernel{f' ({count} times)' if count > 1 else ''} for {', '.join(nodes)}{changed}"
        worse.append(": ".join([text, *advice[:1]]))
    known = Counter(baseline.get("unread", ()))
    worse += [f"a kernel that cannot be read: {line[:200]}" for line in Counter(report.get("unread", ())) - known]
    return worse


def _advice(pad: Mapping[str, Any]) -> str:
    text = "no width avoids it" if pad["alignment"] is None else f"multiples of {pad['alignment']} avoid it"
    return text + (f" ({pad['note']})" if pad.get("note") else "")


def _padding(report: Mapping[str, Any]) -> Counter[tuple[str, ...]]:
    """How many kernels only pad, by the nodes they pad for (by name where the library names no nodes)."""
    kernels = [k for k in report["kernels"] if k.get("padding")]
    return Counter(tuple(sorted(k.get("nodes") or (NUMBER.sub("", k["name"]),))) for k in kernels)
