"""ONNX's own node tests: small graphs with inputs and the outputs that the specification demands, for every operator."""

import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import torch

from graphcomb.graph.errors import BadInput, Refused
from graphcomb.graph.onnx.dtypes import to_numpy, to_torch
from graphcomb.graph.onnx.module import build, complete
from graphcomb.graph.onnx.operators import layers  # noqa: F401  (fills the tables)
from graphcomb.graph.onnx.steps import alive, fold, steps_of
from graphcomb.graph.onnx.table import OPERATORS
from graphcomb.graph.onnx.weights import plan

MODES = ("all", "first", "none")  # which inputs stay inputs of the graph; the others become constants
LOW = {"bfloat16": 1e-2, "float16": 2e-3}  # half precision rounds with every operator, in one order or another


def cases(load: bool = True) -> dict:
    """Node tests by name, of operators that are in the tables alone. load: all, instead of those whose modules are
    imported already."""
    from onnx.backend.test.case import node
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_model_tests(kind="node") if load else node._NodeTestCases
    known = {*OPERATORS, "Constant"}
    return {c.name: c for c in found if all(not n.domain and n.op_type in known for n in c.model.graph.node)}


def outcome(case, mode: str) -> str:
    """ "passed", "refused: ..." or "wrong: ..."."""
    try:
        for inputs, wanted in case.data_sets:
            for name, ours, reference in zip(
                (o.name for o in case.model.graph.output), _run(case.model, inputs, mode), wanted, strict=True
            ):
                if problem := _differs(ours, np.asarray(reference), case.rtol, case.atol):
                    return f"wrong: {name} {problem}"
    except (BadInput, Refused) as error:
        return f"refused: {error}"
    return "passed"


def _run(model: onnx.ModelProto, inputs: list, mode: str) -> Iterator[np.ndarray]:
    names = [i.name for i in model.graph.input]
    inputs = [np.asarray(v) if isinstance(v, np.generic) else v for v in inputs]
    if not all(isinstance(v, np.ndarray) for v in inputs):
        raise Refused("inputs that are no tensors")
    steps, constants = steps_of(model)
    outputs = [o.name for o in model.graph.output]
    live = {"all": len(names), "first": 1, "none": 0}[mode]
    constants |= dict(zip(names[live:], inputs[live:], strict=True))
    feeds = [_tensor(v) for v in inputs[:live]]
    steps = alive(fold(steps, constants), outputs)
    graph = build(plan(steps, constants, names[:live], outputs), names[:live], outputs)
    graph.module.eval()
    complete(graph, feeds)
    with torch.no_grad():
        values = graph.run(feeds)
    for name in outputs:
        value = values[name]
        yield to_numpy(value) if isinstance(value, torch.Tensor) else np.asarray(value)


def _tensor(array: np.ndarray) -> torch.Tensor:
    try:
        return to_torch(array)
    except TypeError as error:
        raise Refused(str(error)) from None


def _differs(ours: np.ndarray, wanted: np.ndarray, rtol: float, atol: float) -> str:
    if ours.shape != wanted.shape:
        return f"has the shape {ours.shape}, not {wanted.shape}"
    name = wanted.dtype.name
    if name == "bfloat16":
        wanted = wanted.astype(np.float32)
    if ours.dtype != wanted.dtype:
        return f"is {ours.dtype}, not {wanted.dtype}"
    rtol, atol = max(rtol, LOW.get(name, 0)), max(atol, 1e-6, LOW.get(name, 0))
    if np.allclose(ours, wanted, rtol=rtol, atol=atol, equal_nan=True):
        return ""
    return f"is off by {np.abs(ours.astype(np.float64) - wanted.astype(np.float64)).max():.2g}"
