"""Decide whether an exported file is good enough: run it, compare it with the program, and apply the limits stated here.

An fp32 file may differ by rounding only. An fp16 file is judged by its emulation, in which every operator rounds, because
a CPU without fp16 arithmetic hides overflows. A file with Q/DQ nodes is run node by node, because fused integer kernels
round differently; even then a value half-way between two steps may round either way and change the values computed from
it. Source: ours.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from ...graph.errors import BadInput, Refused
from ..engines import origins
from ..engines.ort import OrtEngine, inserted_casts
from .half_precision.emulation import emulate, float_tensors, with_tensors
from .half_precision.islands import widest, with_ranges
from .operators import MOVES
from .parity import Case, Check, compare, feeds

# Tolerances by (precision of the program, precision of the file). Rounding one value to fp16 changes it by up to 5e-4 of
# itself; the outputs of trained networks then differ by 1e-3 to 1e-2, those of deep ones with random weights by up to 0.08.
# bf16 has three bits less.
TOLERANCES = {
    ("fp32", "fp32"): 1e-4, ("fp16", "fp16"): 0.1, ("bf16", "bf16"): 0.4, ("int8", "fp32"): 1e-4, ("int8", "fp16"): 0.1,
}  # fmt: skip
# Limits for a quantised program exported in fp32: at least this share of the samples is within the tolerance, and every
# output has at least this cosine similarity. Both are loose, because networks with random weights amplify a value that
# rounds to the other step.
EXACT, NEAR = 0.2, 0.95
# In fp16, and in transformers, many values round to the other step. Then the file's distance to the network without
# quantisation may be this many times that of the quantised program; in fp32 the outputs must also be within LOOSE.
FURTHER = {"fp32": 1.2, "fp16": 1.5}
LOOSE = 0.1
EMULATED = ", every operator rounded to fp16"
LARGE = 1_900_000_000  # bytes of weights above which they go to a file of their own: protobuf is limited to 2 GiB
SIGMOID = 1e-6  # bound of the error of ONNX Runtime's approximate Sigmoid; the largest measured error is 1.3e-7
AT_ONCE = 16  # number of intermediate tensors that one run returns


@dataclass
class Verdict:
    """The result of comparing a file with the program.

    - checks: all comparisons.
    - wrong: what exceeds its limit, with the first node that does if it is known; empty if the file is good.
    - notes: warnings for the user.
    """

    checks: list[Check] = field(default_factory=list)
    wrong: str = ""
    notes: list[str] = field(default_factory=list)


def verdict(
    model: onnx.ModelProto,
    single: onnx.ModelProto | None,
    file: Path,
    known: Sequence[Case],
    tolerance: float,
    quantised: bool = False,
) -> Verdict:
    """Compare an exported model with the program's outputs.

    - model: the exported model, saved in `file`. single: the same model in fp32, if `model` is in fp16.
    - known: inputs and outputs of the program.
    - tolerance: largest error that is allowed (`Check.error`).
    - quantised: whether the program is quantised.

    Raises Refused if ONNX Runtime cannot run a file in fp32, or if outputs differ in number or shape.
    """
    result = Verdict()
    try:
        result.checks = _run(
            file, known, single is not None, quantised, result.notes, {} if single is not None else _steps(model)
        )
    except BadInput as error:
        if single is None:
            raise Refused(f"ONNX Runtime cannot run what was exported ({error})") from error
        result.notes.append(f"the file was not run: {error}")
    judged, emulated = result.checks, None
    if single is not None:
        emulated = emulate(model)
        with session(emulated) as engine:
            judged = [replace(c, inputs=c.inputs + EMULATED) for c in compare(known, engine)]
        result.checks = [*result.checks, *judged]
        result.notes += _vanishing(known)
    for checks in (judged, result.checks):  # the emulation's result has priority, since it can name the node
        result.wrong = result.wrong or _wrong(checks, tolerance, quantised, single is not None)
    if result.wrong and single is not None and emulated is not None:
        case = max(zip(judged, known, strict=True), key=lambda pair: pair[0].error)[1]
        if where := _first_node(single, emulated, case, tolerance):
            result.wrong += f"; {where}"
    return result


def ranges_of(model: onnx.ModelProto, known: Iterable[Case]) -> dict[str, tuple[float, float]]:
    """Return (smallest, largest) finite value of every fp32 tensor of a model over the inputs of all cases, by name."""
    watching, names = with_ranges(model)
    if not names:
        return {}
    with session(watching) as engine:
        return widest(names, (engine.run(feeds(engine, case.args, case.kwargs)) for case in known))


@contextmanager
def session(model: onnx.ModelProto) -> Iterator[OrtEngine]:
    """Yield an engine that runs the nodes of a model one by one, without fusing any."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        large = sum(len(t.raw_data) for t in model.graph.initializer) > LARGE
        onnx.save_model(model, str(path), save_as_external_data=large, location="model.data")
        engine = OrtEngine(path, plain=True)
        try:
            yield engine
        finally:
            engine.close()


def _steps(model: onnx.ModelProto) -> dict[str, float]:
    """Return the outputs that contain results of a Sigmoid, with the accuracy of ONNX Runtime's Sigmoid.

    If a detector sees nothing, all scores of a channel may be smaller than this accuracy.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    steps = {}
    for output in model.graph.output:
        names, seen = [output.name], set()
        while names:
            name = names.pop()
            node = makers.get(name)
            if node is None or name in seen:
                continue
            seen.add(name)
            if node.op_type == "Sigmoid":
                steps[output.name] = SIGMOID
            elif node.op_type in MOVES or node.op_type == "Cast":
                names += node.input
    return steps


def _run(
    file: Path, known: Sequence[Case], half: bool, quantised: bool, notes: list[str], steps: dict[str, float]
) -> list[Check]:
    """Compare the file itself as ONNX Runtime runs it here, a quantised one node by node."""
    optimized = file.with_name("optimized.onnx")
    small = file.stat().st_size < LARGE
    engine = OrtEngine(file, optimized=optimized if half and small else None, plain=quantised)
    try:
        return compare(known, engine, steps)
    finally:
        engine.close()
        if optimized.exists():
            if inserted_casts(onnx.load(str(optimized))):
                notes.append("ONNX Runtime has no fp16 kernels for this CPU: the file was run in fp32 arithmetic")
            optimized.unlink()


def _first(checks: Sequence[Check], tolerance: float) -> str:
    """Return in words the worst comparison that exceeds its limits; empty if none does."""
    for check in sorted(checks, key=lambda c: -c.error):
        if why := check.wrong(tolerance):
            return f"differs from the program {why} (limit {tolerance:g}; {_inputs(check)})"
    return ""


def _wrong(checks: Sequence[Check], tolerance: float, quantised: bool, half: bool) -> str:
    if not quantised:
        return _first(checks, tolerance)
    if half:
        return _first(checks, tolerance) and _further(checks, tolerance, FURTHER["fp16"])
    return _quantised(checks, tolerance) and (_first(checks, LOOSE) or _further(checks, LOOSE, FURTHER["fp32"]))


def _further(checks: Sequence[Check], tolerance: float, limit: float) -> str:
    """Return in words the first output that is too far from the network without quantisation; empty if none is.

    An output is too far if its distance to the network without quantisation exceeds `limit` times the quantised
    program's distance.
    """
    distances: dict[str, list[tuple[float, float]]] = {}
    for check in checks:
        for output in check.outputs:
            if not np.isfinite(output.error) or output.distances is None:
                return _first(checks, tolerance) or _first(checks, 0.0)
            distances.setdefault(output.name, []).append(output.distances)
    for name, rows in distances.items():
        ours, theirs = (float(np.sqrt(sum(row[i] for row in rows))) for i in (0, 1))
        if not ours <= limit * theirs:
            further = f"{ours / theirs:.2g} times" if theirs else "infinitely"
            why = _first(checks, tolerance) or "differs from the quantised program"
            return f"{why}; {name} is {further} as far from the network without quantisation (limit {limit})"
    return ""


def _quantised(checks: Sequence[Check], tolerance: float) -> str:
    """Return in words which output violates EXACT or NEAR; empty if none does. A wrong scale or axis changes all samples, a
    value that rounds to the other step only some."""
    errors: dict[str, list[float]] = {}
    for check in checks:
        for output in check.outputs:
            errors.setdefault(output.name, []).extend(output.samples)
            if not output.cosine >= NEAR:
                why = f"{output.name} has a cosine of {output.cosine:.3f} (limit {NEAR})"
                return f"differs from the quantised program: {why} ({_inputs(check)})"
    for name, values in errors.items():
        share = float(np.mean(np.asarray(values) <= tolerance))
        if share < EXACT:
            why = f"{name} is within {tolerance:g} for {share:.0%} of the samples only (limit {EXACT:.0%})"
            return f"differs from the quantised program: {why}"
    return ""


def _inputs(check: Check) -> str:
    return f"{check.inputs} inputs" + (f", batch {check.batch}" if check.batch is not None else "")


def _vanishing(known: Sequence[Case]) -> list[str]:
    """Return a note for each output whose values are too small for the normal range of fp16."""
    notes, normal = [], float(np.finfo(np.float16).smallest_normal)
    for i, output in enumerate(known[0].wanted if known else ()):
        largest = float(np.abs(output).max(initial=0.0)) if output.dtype.kind == "f" else 0.0
        if 0 < largest < normal:
            notes.append(f"output {i} reaches {largest:.2g} only, below the normal range of fp16 ({normal:.2g})")
    return notes


def _first_node(single: onnx.ModelProto, emulated: onnx.ModelProto, case: Case, tolerance: float) -> str:
    """Return in words the first node whose result exceeds the tolerance when every operator rounds, else the worst node."""
    there = {name for name, _ in float_tensors(emulated)}
    rows = [(name, node) for name, node in float_tensors(single) if name in there]
    worst, said = 0.0, ""
    for start in range(0, len(rows), AT_ONCE):
        names = [name for name, _ in rows[start : start + AT_ONCE]]
        runs = []
        for model in (single, emulated):
            with session(with_tensors(model, names)) as engine:
                runs.append(engine.run(feeds(engine, case.args, case.kwargs)))
        for (_, node), a, b in zip(rows[start:], runs[1], runs[0], strict=False):
            error = _rms_error(a, b)
            if error > worst:
                worst, said = error, _describe(node, single, a, b, error)
            if error > tolerance:
                return f"first off in fp16: {said}"
    return f"furthest off in fp16: {said}" if said else ""


def _rms_error(actual: np.ndarray, wanted: np.ndarray) -> float:
    """Return rms(actual - wanted) / rms(wanted) over the finite entries of `wanted`; infinite if `actual` is not finite
    there."""
    finite = np.isfinite(wanted)
    if not np.isfinite(actual[finite]).all():
        return float("inf")
    a, b = actual[finite].astype(np.float64), wanted[finite].astype(np.float64)
    scale = float(np.sqrt(np.mean(b * b))) if b.size else 0.0
    return float(np.sqrt(np.mean((a - b) ** 2))) / scale if scale else 0.0


def _describe(
    node: onnx.NodeProto, model: onnx.ModelProto, actual: np.ndarray, wanted: np.ndarray, error: float
) -> str:
    finite = wanted[np.isfinite(wanted)]
    largest = float(np.abs(finite).max(initial=0.0))
    place = origins.read(model).get(node.name)
    module = place.module if place is not None and place.module else node.name.rpartition("/")[0]
    where = f"{node.name} ({node.op_type}{f' in {module}' if module and module not in node.name else ''})"
    if error == float("inf"):
        return f"{where} overflows, it reaches {largest:.3g}"
    if not actual.any():
        return f"{where} vanishes, it reaches {largest:.3g} only"
    return f"{where} is off by {error:.2g} of its scale"
