"""The steps of an ONNX graph: constants are folded, and steps that no output needs are dropped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from ..errors import BadInput, GraphcombError, Refused, in_a_line
from .dtypes import to_numpy, to_torch, torch_dtype
from .operators.shapes import on_host_alone
from .read import opset_of
from .table import HOST, OPERATORS, Call, Step, Value, is_static

RECURRENT = ("LSTM", "GRU", "RNN")  # not folded, since `weights` reorders their weights later
SCALARS = {"value_float": np.float32, "value_int": np.int64, "value_floats": np.float32, "value_ints": np.int64}


def steps_of(model: onnx.ModelProto) -> tuple[list[Step], dict[str, np.ndarray]]:
    """The nodes of a graph, and its constants by name. Raises Refused for constants that are not numbers."""
    constants = {t.name: _array(t) for t in model.graph.initializer}
    steps, opset = [], opset_of(model)
    for node in model.graph.node:
        attributes = {a.name: _attribute(a) for a in node.attribute}
        step = Step(node.op_type, list(node.input), list(node.output), attributes, node.name, opset)
        if node.op_type != "Constant":
            steps.append(step)
            continue
        (name, value), *_ = attributes.items()
        if name != "value" and name not in SCALARS:
            raise Refused(f"{step.title} holds {name.removeprefix('value_')}, not numbers")
        constants[step.outputs[0]] = value if name == "value" else np.asarray(value, SCALARS[name])
    return steps, constants


def _array(tensor: onnx.TensorProto) -> np.ndarray:
    try:
        torch_dtype(tensor.data_type)
        return numpy_helper.to_array(tensor)
    except Refused as error:
        raise Refused(f"the constant {tensor.name}: {error}") from None
    except Exception as error:
        raise Refused(f"the constant {tensor.name} cannot be read ({in_a_line(error)})") from None


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return _array(value)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return [v.decode(errors="replace") for v in value]
    return value


class _Constants:
    """The store of constants during folding, which keeps nothing."""

    training = False
    batch: int | None = None

    def constant(self, key: str, array: np.ndarray) -> Tensor:
        return to_torch(array)


def perform(call: Call) -> list[Value]:
    """The outputs of a step, computed on host arrays if all inputs are and the step can be, else on tensors."""
    result: Any = NotImplemented
    if call.step.op in HOST and on_host_alone(list(call.values)):
        result = HOST[call.step.op](call)
    if result is NotImplemented:
        result = OPERATORS[call.step.op](call)
    return [_settled(v) for v in result] if isinstance(result, (list, tuple)) else [_settled(result)]


def _settled(value: Value) -> Value:
    """A host array of sizes, in which none is symbolic any more, as numbers of their own type."""
    if not isinstance(value, np.ndarray) or value.dtype != object or not is_static(value.reshape(-1).tolist()):
        return value
    return np.asarray(value.tolist()) if value.size else value.astype(np.int64)


def attempt(call: Call, run: Any = perform) -> list[Value]:
    """The outputs of a step by `run`; refusals become a BadInput that names the node."""
    try:
        return run(call)
    except Refused as error:
        raise BadInput(f"{call.step.title}: {error}") from None
    except GraphcombError:
        raise
    except MemoryError:
        raise BadInput(f"{call.step.title}: not enough memory for its result") from None


def fold(steps: list[Step], constants: dict[str, np.ndarray]) -> list[Step]:
    """The steps that depend on inputs of the graph; the results of the others are added to `constants`."""
    left = []
    for step in steps:
        known = [constants.get(name) if name else None for name in step.inputs]
        if (
            step.op in RECURRENT
            or not step.inputs
            or any(v is None and name for v, name in zip(known, step.inputs, strict=True))
        ):
            left.append(step)
            continue
        if step.op == "DequantizeLinear":
            results: list[Value] = [_dequantised(step, known)]
        else:
            with torch.no_grad():
                try:
                    results = attempt(Call(step, known, _Constants()))
                except BadInput:
                    raise
                except Exception as error:
                    raise BadInput(f"{step.title}: {in_a_line(error)}") from error
        for name, value in zip(step.outputs, results, strict=False):
            constants[name] = to_numpy(value) if isinstance(value, Tensor) else np.asarray(value)
    return left


def _dequantised(step: Step, values: list[np.ndarray | None]) -> np.ndarray:
    """Weights that are stored in 8 bits, as floats. Raises BadInput for weights that are quantised in blocks."""
    x, scale = values[0], values[1]
    assert x is not None
    assert scale is not None
    zero = values[2] if len(values) > 2 and values[2] is not None else np.zeros_like(scale, x.dtype)
    if step.attributes.get("block_size", 0):
        raise BadInput(f"{step.title}: weights quantised in blocks; import the float network")
    if scale.ndim:
        shape = [1] * x.ndim
        shape[step.attributes.get("axis", 1)] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return ((x.astype(np.float32) - zero.astype(np.float32)) * scale).astype(scale.dtype)


def alive(steps: list[Step], outputs: Iterable[str]) -> list[Step]:
    """The steps that an output depends on, in place: results that nothing reads lose their names."""
    needed, kept = set(outputs), []
    for step in reversed(steps):
        if needed & set(step.outputs):
            step.outputs = [name if name in needed else "" for name in step.outputs]
            needed.update(name for name in step.inputs if name)
            kept.append(step)
    return kept[::-1]
