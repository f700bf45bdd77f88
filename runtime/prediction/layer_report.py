"""Report the predicted latency of programs, layer by layer, and which layers gain nothing from fewer channels.

The prediction itself is a roofline's or a latency table's. Source: ours.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...graph.comb.solve import Comb
from ...graph.errors import BadInput
from ...graph.program import Program
from ...graph.workload.layer import Latency, rules_of
from ...graph.workload.layers import Layers
from ..devices.table import Target
from .layers import describe_one
from .roofline import Estimate, Roofline

LITTLE = 0.1  # a layer that saves less than this share of its time at half its width is reported


def predict(
    programs: Mapping[str, Program], target: Target, dtype: str, latency: Latency | None = None, batch: int = 1
) -> dict[str, Any]:
    """Predict the latency of versions of a program, and of their layers side by side.

    - programs: the versions by name, as in {"before": ..., "after": ...}. Layers are matched by the name of their weight.
    - dtype: the precision in which they are to run on the target, such as "fp16".
    - latency: predicts the seconds of a layer: a `LatencyTable` or a `Roofline`, by default the roofline of the target's
      data sheet. `bound`, `half` and `verdict` are always a roofline's, with a latency table the data sheet's.
    - batch: size of a dynamic batch.

    Returns JSON-able values (docs/formats.md, Prediction): among them `ms`, the milliseconds of a run by program; `layers`,
    a row for each layer with its multiply-accumulates, bytes, milliseconds and bound in every program; and `uncertainty`.

    Raises BadInput for a precision that the target does not compute in and a batch below 1; Contended if a latency table
    has to measure and the machine is too busy.
    """
    if batch < 1:
        raise BadInput(f"batch: 1 or more, not {batch}")
    roofline = latency if isinstance(latency, Roofline) else Roofline(target, dtype)
    latency = latency or roofline
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    total = {}
    for which, program in programs.items():
        layers = _layers(program, roofline, latency, target.alignment(dtype), batch)
        total[which] = 1e3 * latency.per_run + sum(row["ms"] for row in layers)
        seen: Counter[str] = Counter()  # several layers may share a weight
        for row in layers:
            name = row.pop("name")
            key = name, seen[name]
            seen[name] += 1
            rows.setdefault(key, {"name": name, "op": row["op"], **dict.fromkeys(programs)})[which] = row
    doubt = getattr(latency, "error", None)
    return {
        "by": str(latency), "target": target.name, "precision": dtype, "batch": batch, "ms": total,
        "uncertainty": doubt.to_dict() if doubt else None, "run_ms": 1e3 * latency.per_run,
        "calibration": getattr(latency, "calibration", None), "layers": list(rows.values()),
    }  # fmt: skip


def _layers(program: Program, roofline: Roofline, latency: Latency, alignment: int, batch: int) -> list[dict[str, Any]]:
    """Return the rows of `layers.describe` for one program, with the fields of `Predicted` from macs on."""
    comb = Comb(program)
    layers = Layers(comb, batch, rules_of(latency))
    half = {g.atom: _half(g.size, max(g.least, alignment)) for g in comb.groups if g.frozen is None}
    whole, halved = layers.sizer({}), layers.sizer(half)
    numbered = [(i, node, layers.numbered(i, whole)) for i, node in enumerate(layers.nodes)]
    latency.prepare(dict.fromkeys(layer for _, _, layer in numbered if layer is not None))
    rows = []
    for i, node, layer in numbered:
        if layer is None:
            continue
        narrow = layers.numbered(i, halved) or layer
        estimate, smaller = roofline.estimate(layer), roofline.estimate(narrow)
        rows.append(
            describe_one(node, layer)
            | {
                "macs": estimate.macs, "padded_macs": estimate.padded_macs, "bytes": estimate.bytes,
                "ms": 1e3 * latency.seconds(layer), "bound": estimate.bound,
                "half": smaller.seconds / max(estimate.seconds, 1e-12),
                "verdict": verdict(estimate, smaller, any(a in half for a in layers.atoms(i))),
            }
        )  # fmt: skip
    return rows


def _half(size: int, step: int) -> int:
    """Return half the size, rounded up to a multiple of the step, but at most the size."""
    return min(size, -(-size // (2 * step)) * step)


def verdict(estimate: Estimate, half: Estimate, prunable: bool) -> str:
    """Return why fewer channels would save a layer no time, or less than the share of MACs that they save; else "".

    estimate: the layer now. half: the layer with every prunable group at half its size. prunable: whether any of its groups
    is.
    """
    if not prunable:
        return "none of its channels can go"
    if 1 - half.seconds / max(estimate.seconds, 1e-12) < LITTLE:
        if estimate.bound == "launch":
            return "starting its kernel takes longer than its work"
        return "its kernel cannot be narrower"
    return "time falls with its bytes, not with its MACs" if estimate.bound == "memory" else ""
