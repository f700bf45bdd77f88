"""A gate for continuous integration: compare a build or a measurement with an earlier one (the baseline), and report what
got worse.

Kernels are matched by the ONNX nodes they compute, since their numbers change in every build. Source: ours.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from ...graph.errors import BadInput
from ...graph.files import read_json
from ..engine_summary import Origin, Pad
from ..formats import Format, read, says

GROWTH = 0.05  # largest relative growth of an engine or its memory: another choice of kernels may cause as much
NUMBER = re.compile(r"_myl\d+_\d+$")  # the numbers in the name of a generated kernel


class BuiltKernel(Format):
    """The fields of a kernel (`summary.Kernel`) that the gate reads."""

    name: str
    nodes: list[str] = says("ONNX nodes that it computes", default=[])
    padding: bool = False


class Build(Format):
    """The fields of an engine report (`summary.Engine`) that the gate reads; earlier versions have fewer of them."""

    target: str | None = None
    precision: str | None = None
    kernels: list[BuiltKernel]
    pads: list[Pad] = says("axes that the engine computes with a larger size than the model", default=[])
    origins: dict[str, Origin] = says("by name of the ONNX node, where it was exported from", default={})
    unread: list[str] = says("lines of the build log about kernels that graphcomb could not parse", default=[])
    bytes: int | None = says("size of the engine file in bytes", default=None)
    memory: dict[str, int] = says("memory in bytes by purpose", default={})


def read_baseline(path: Path, target: str) -> list[Build]:
    """Read the engine reports of a target from a file of `graphcomb build --json` or from a run's summary.json.

    Raises BadInput for a file that cannot be read, has no engine report, or none of this target.
    """
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
    try:
        return [read(Build, row, f"--gate {path}") for row in same]
    except BadInput as error:
        raise BadInput(f"{error}; make it anew with `graphcomb build --json`") from error


def choose(rows: list[Build], precision: str) -> Build:
    """Return the first report of a precision, else the first without a precision. Raises BadInput if there is neither."""
    for wanted in (precision, None):
        if match := next((row for row in rows if row.precision == wanted), None):
            return match
    has = ", ".join(sorted({str(row.precision) for row in rows}))
    raise BadInput(f"--gate: the baseline has no {precision} engine for {rows[0].target} (it has {has})")


def compare(build: Build, baseline: Build) -> list[str]:
    """Return one line for everything that is worse than in the baseline; empty if the build passes.

    These are worse: more kernels that only pad for the same nodes; a line of the build log about a kernel that could not be
    parsed and that the baseline does not have; more kernels that compute; and an engine file, weights, activations or
    scratch memory that grew by more than `GROWTH`.
    """
    before, now = _padding(baseline), _padding(build)
    worse = []
    for nodes, count in sorted((now - before).items()):
        pads = [pad for pad in build.pads if pad.how == "kernel" and tuple(sorted(pad.nodes)) == nodes]
        advice = [f"axis {pad.axis} {pad.before} -> {pad.after}, {_advice(pad)}" for pad in pads]
        origin = next((o for n in nodes if (o := build.origins.get(n))), None)
        changed = f" (changed by {', '.join(origin.passes)})" if origin and origin.passes else ""
        text = f"new padding kernel{f' ({count} times)' if count > 1 else ''} for {', '.join(nodes)}{changed}"
        worse.append(": ".join([text, *advice[:1]]))
    new = Counter(build.unread) - Counter(baseline.unread)
    worse += [f"a kernel that cannot be read: {line[:200]}" for line in new]
    kernels, known = (sum(not kernel.padding for kernel in b.kernels) for b in (build, baseline))
    if kernels > known:
        worse.append(f"{kernels} kernels that compute, the baseline has {known}")
    sizes, old = ({"engine": b.bytes or 0} | b.memory for b in (build, baseline))
    return worse + [
        f"{name}: {size:,} bytes, the baseline has {old[name]:,}"
        for name, size in sizes.items()
        if old.get(name) and size > old[name] * (1 + GROWTH)
    ]


# ------------------------------------------------------------------------------------------------------------- latency
Ratios = dict[str, dict[str, float]]


def read_ratios(path: Path) -> Ratios:
    """Read the measured ratios from a file of `graphcomb bench --out`, from results.json of a bundle or from summary.json.

    Returns the percentiles and the interval of each ratio by model, for a bundle by "model (mode)". A ratio says how many
    times faster than the reference the model is. Raises BadInput for a file without measured ratios.
    """
    try:
        stored = read_json(path)
    except BadInput as error:
        raise BadInput(f"--gate {error}; `graphcomb bench --out` makes one") from error
    read = ratios(stored)
    if not read:
        raise BadInput(f"--gate {path}: holds no measured ratio (`graphcomb bench --out` writes them)")
    return read


def ratios(stored: Any) -> Ratios:
    """Return the ratios with intervals, in the form of `read_ratios`, from the parsed JSON of one of its files."""
    if isinstance(stored, dict) and isinstance(stored.get("bench"), dict):
        stored = stored["bench"]
    rows = stored.get("ratios") if isinstance(stored, dict) else None
    by_way: Ratios = {}
    for name, row in rows.items() if isinstance(rows, dict) else ():
        ways = {name: row} if "timings" in stored else {f"{name} ({way})": r for way, r in (row or {}).items()}
        by_way |= {way: r for way, r in ways.items() if isinstance(r, dict) and {"median", "low", "high"} <= r.keys()}
    return by_way


def compare_ratios(now: Ratios, baseline: Ratios) -> list[str]:
    """Return one line for every model that is slower than in the baseline or has no ratio now.

    A ratio says how many times faster than the reference a model is, both measured in turns. A model is slower if the
    whole interval of its ratio is below the interval of the baseline.
    """
    worse = []
    for name, old in baseline.items():
        if (new := now.get(name)) is None:
            worse.append(f"{name}: no figure; the baseline has {_interval(old)} times faster")
        elif new["high"] < old["low"]:
            worse.append(f"{name}: {_interval(new)} times faster, the baseline {_interval(old)}")
    return worse


def _interval(ratio: dict[str, float]) -> str:
    return "{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio)


def _advice(pad: Pad) -> str:
    text = "no width avoids it" if pad.alignment is None else f"multiples of {pad.alignment} avoid it"
    return text + (f" ({pad.note})" if pad.note else "")


def _padding(build: Build) -> Counter[tuple[str, ...]]:
    """Count the kernels that only pad by the nodes they pad for, or by name if the library names no nodes."""
    kernels = [kernel for kernel in build.kernels if kernel.padding]
    return Counter(tuple(sorted(kernel.nodes or (NUMBER.sub("", kernel.name),))) for kernel in kernels)
