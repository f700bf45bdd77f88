"""Compares an imported program with ONNX Runtime, which shares no code with the import.

Both compute in the file's precision on random inputs. A difference beyond the tolerance is accepted if rounding alone
explains it, which the same graph in float64 shows; for any other one the import fails, and the message names the first node
that differs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from ..errors import BadInput, CaptureError, in_a_line
from .dtypes import to_numpy
from .module import OnnxGraph

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
NOISE = 10.0  # a difference counts if it is more than this many times the effect of rounding
CHAOS = 0.05  # an effect of rounding above this explains nothing
MOVES = {"Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten", "Slice", "Gather", "Split"}
AT_ONCE = 64  # intermediate results that are compared in one run


def session(model: onnx.ModelProto, path: str) -> ort.InferenceSession:
    """The file in ONNX Runtime, without optimisation. Raises BadInput if ONNX Runtime refuses the file."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    source = model.SerializeToString() if model.ByteSize() < 2**31 - 1 else path
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no public base
        raise BadInput(
            f"{path}: ONNX Runtime refuses it ({in_a_line(error)}); prove=False imports it unproven"
        ) from error


def run(
    engine: ort.InferenceSession, names: list[str] | None, feeds: dict[str, np.ndarray], batch: int | None
) -> list[Any]:
    """Outputs of ONNX Runtime. For a file with a fixed batch, parts of that size are run one after the other and
    concatenated."""
    if batch is None:
        return engine.run(names, feeds)
    count = next(iter(feeds.values())).shape[0] // batch
    parts = [engine.run(names, {k: v[i * batch : (i + 1) * batch] for k, v in feeds.items()}) for i in range(count)]
    return [np.concatenate(rows) if rows[0].ndim else rows[0] for rows in zip(*parts, strict=True)]


def compare(
    program: nn.Module, graph: OnnxGraph, model: onnx.ModelProto, path: str, cases: Sequence[Sequence[Tensor]]
) -> dict[str, Any]:
    """Worst relative error of each output over the cases, each a set of inputs. Raises CaptureError that names the first
    node that differs, BadInput if ONNX Runtime cannot run the file."""
    engine, errors = session(model, path), dict.fromkeys(graph.outputs, 0.0)
    makers, rounding = origins(graph), False
    for inputs in cases:
        feeds = {name: to_numpy(x) for name, x in zip(graph.inputs, inputs, strict=True)}
        try:
            wanted = run(engine, graph.outputs, feeds, graph.batch)
        except Exception as error:
            raise BadInput(f"{path}: ONNX Runtime cannot run it ({in_a_line(error)})") from error
        ours = outputs(program, inputs)
        for name, value, reference in zip(graph.outputs, ours, wanted, strict=True):
            if value.shape != reference.shape:
                raise CaptureError(
                    f"{path}: the output {name} is {value.shape}, in ONNX Runtime {reference.shape}; "
                    f"{first_difference(graph, model, inputs)}"
                )
            off = distance(value, reference, makers.get(name, ""))
            if off > tolerance(reference):
                if not _explained(graph, inputs, name, value, reference):
                    raise CaptureError(
                        f"{path}: the output {name} is off by {off:.1e} of its largest value in ONNX Runtime (limit "
                        f"{tolerance(reference):g}); {first_difference(graph, model, inputs)}"
                    )
                rounding = True
            errors[name] = max(errors[name], off)
    return {"error": max(errors.values(), default=0.0), "outputs": errors, "cases": len(cases), "rounding": rounding}


def origins(graph: OnnxGraph) -> dict[str, str]:
    """For each value, the operator that computed it, ignoring operators that only move entries."""
    makers: dict[str, str] = {}
    for step in graph.steps:
        op = makers.get(step.inputs[0], step.op) if step.op in MOVES else step.op
        makers.update(dict.fromkeys(step.outputs, op))
    return makers


@torch.no_grad()
def outputs(program: nn.Module, inputs: Sequence[Tensor]) -> list[np.ndarray]:
    """The outputs of a program, in order."""
    result = program(*inputs)
    return [to_numpy(t) for t in (result.values() if isinstance(result, dict) else [result])]


def tolerance(reference: np.ndarray) -> float:
    """The tolerance for a value of this precision; for whole numbers, the share that may differ."""
    names = {"float64": torch.float64, "float16": torch.float16}
    return TOLERANCE[names.get(reference.dtype.name, torch.float32)]


def distance(actual: np.ndarray, wanted: np.ndarray, op: str = "") -> float:
    """max |a - b| / max |b| where both are finite, infinite where only one is; for whole numbers the share that differs.

    op: the operator that computed the value. Results of Sigmoid are compared as log(p + 1e-3) if that is closer: if all of
    them are small, rounding in its arguments, and ONNX Runtime's approximation (to 1e-7), are large relative to the
    largest.
    """
    if not wanted.size:
        return 0.0
    if wanted.dtype.kind != "f":
        return float(np.mean(actual != wanted))
    a, b = actual.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return float("inf")
    scale = float(np.abs(b[finite]).max(initial=0.0))
    error = float(np.abs(a[finite] - b[finite]).max(initial=0.0))
    error = error / scale if scale else float(error > 0)
    if op != "Sigmoid" or error < TOLERANCE[torch.float64]:
        return error
    return min(error, distance(np.log(a + 1e-3), np.log(b + 1e-3)))


@torch.no_grad()
def _explained(
    graph: OnnxGraph, inputs: Sequence[Tensor], name: str, actual: np.ndarray, reference: np.ndarray
) -> bool:
    """Whether ONNX Runtime is about as far from the graph in float64 as the graph in its own precision is."""
    exact = copy.deepcopy(graph)
    exact.module.double()
    try:
        value = exact.run([x.double() if x.is_floating_point() else x for x in inputs])[name]
    except Exception:  # such as a cast in the graph, which keeps its precision
        return False
    if not isinstance(value, Tensor):
        return False
    exactly = to_numpy(value)
    ours, theirs = distance(actual, exactly), distance(reference, exactly)
    return ours < CHAOS and theirs <= NOISE * ours


@torch.no_grad()
def first_difference(graph: OnnxGraph, model: onnx.ModelProto, inputs: Sequence[Tensor]) -> str:
    """A message about the first step whose result differs."""
    steps, makers = {name: step for step in graph.steps for name in step.outputs if name}, origins(graph)
    known = [name for node in model.graph.node for name in node.output if name in steps]
    inputs = [x[: graph.batch] for x in inputs] if graph.batch else inputs
    feeds = {name: to_numpy(x) for name, x in zip(graph.inputs, inputs, strict=True)}
    for start in range(0, len(known), AT_ONCE):
        names = known[start : start + AT_ONCE]
        watching = onnx.ModelProto()
        watching.CopyFrom(model)
        del watching.graph.output[:]
        watching.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        try:
            wanted = session(watching, "the file").run(names, feeds)
            values = graph.run(inputs, names)
        except Exception as error:
            return f"the first node that differs cannot be found ({in_a_line(error)})"
        for name, reference in zip(names, wanted, strict=True):
            value = values[name]
            ours = to_numpy(value) if isinstance(value, Tensor) else np.asarray(value)
            if ours.shape != reference.shape:
                return f"first at {steps[name].title}: {ours.shape} instead of {reference.shape}"
            off = distance(ours, reference, makers[name])
            if off > tolerance(reference):
                return f"first at {steps[name].title}, off by {off:.1e}"
    return "no single node differs: the errors add up"
