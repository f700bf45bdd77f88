"""`from_onnx`: read a file, plan its layers, capture the module, and compare with ONNX Runtime."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor

from ..capture.functional import CaptureWarning
from ..errors import BadInput, CaptureError, GraphcombError, Refused, in_a_line, nearest, strict
from ..program import Program, capture
from . import operators  # noqa: F401  (fills the tables)
from .inputs import Input, example, fits, inputs_of
from .module import OnnxGraph, arguments, build, complete
from .parity import compare
from .read import opset_of, read
from .steps import alive, fold, steps_of
from .weights import plan

RECORD = "from_onnx"  # name of the record in a program's history


def from_onnx(
    path: str | os.PathLike[str],
    args: Any = None,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dynamic_shapes: Any = "auto",
    outputs: Sequence[str] | None = None,
    prove: bool = True,
) -> Program:
    """Import an ONNX file as a program that can be pruned, trained and exported again.

    Parameters have the names of the file's initializers if these are meaningful, else those of the nodes that read them.
    One output is a tensor, several are a dictionary by their names. Matrix products with constants are linear layers, and
    BatchNormalization uses the statistics of the batch in training.

    - args: example inputs in the order of the file (a tuple, or a single tensor); by default random ones.
    - shapes: sizes of inputs by name, if the file leaves more open than the batch.
    - dynamic_shapes: as for `capture`; "auto" is "batch" if the file leaves the first size of every input open. With
      "batch", a file with a fixed batch is imported for any batch size, and compared sample by sample.
    - outputs: the values that the program returns, by their names in the file, inner ones too, such as those before a
      post-processing that cannot be imported. By default the file's outputs.
    - prove: compare the program with ONNX Runtime in the file's precision, at several batch sizes if the batch is dynamic.
      The record is the first of `program.history`.

    Nothing in the file is run, and no file outside its folder is read. Raises BadInput with one line for a file that is
    damaged, quantised or keeps weights outside its folder, for unknown operators (all are named), for unsupported
    attributes of a node, and for arguments that do not fit; CaptureError if the capture fails, or with the first node that
    differs from ONNX Runtime.
    """
    path = Path(path)
    model = read(path, outputs)
    try:
        graph, inputs = _graph(model)
        values = _values(inputs, args, shapes or {}, graph)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph.module.eval()
            complete(graph, values)
    except Refused as error:
        raise BadInput(f"{path}: {error}") from error
    except GraphcombError as error:
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:
        if strict():
            raise
        raise BadInput(f"{path}: the graph cannot be read ({in_a_line(error)})") from error
    program = _captured(path, graph, inputs, values, dynamic_shapes)
    record: dict[str, Any] = {
        "pass": RECORD, "file": path.name, "opset": opset_of(model), "producer": model.producer_name,
        "inputs": graph.inputs, "outputs": graph.outputs,
        "operators": dict(sorted(Counter(node.op_type for node in model.graph.node).items())), "changed": [],
    }  # fmt: skip
    if prove:
        cases = _cases(program, inputs, graph.batch or 1)
        record["parity"] = compare(program.module().eval(), graph, model, str(path), cases)
    program.history = [record]
    return program


def _graph(model: onnx.ModelProto) -> tuple[OnnxGraph, list[Input]]:
    steps, constants = steps_of(model)
    outputs = [value.name for value in model.graph.output]
    inputs = inputs_of(model)
    for value in inputs:
        constants.pop(value.name, None)
    steps = alive(fold(alive(steps, outputs), constants), outputs)
    reads = {name for step in steps for name in step.inputs} | set(outputs)
    return build(plan(steps, constants, [i.name for i in inputs], outputs), [i.name for i in inputs], outputs), [
        i.seen(steps, constants, i.name in reads) for i in inputs
    ]


def _values(inputs: list[Input], args: Any, shapes: Mapping[str, Sequence[int]], graph: OnnxGraph) -> list[Tensor]:
    """Example inputs: `args`, or random ones."""
    names = [i.name for i in inputs]
    aliases = dict(zip(arguments(names), names, strict=True))
    known = {aliases.get(name, name): list(shape) for name, shape in shapes.items()}
    for name in known:
        if name not in names:
            raise BadInput(f"shapes: the file has no input {name}; {nearest(name, names)}")
    if args is None:
        return [example(i, known.get(i.name)) for i in inputs]
    values = [args] if isinstance(args, Tensor) else list(args)
    if len(values) != len(inputs) or not all(isinstance(v, Tensor) for v in values):
        raise BadInput(f"args: one tensor for each of the file's inputs: {', '.join(names)}")
    for value, wanted in zip(values, inputs, strict=True):
        fits(wanted, value)
    return values


def _captured(path: Path, graph: OnnxGraph, inputs: list[Input], values: list[Tensor], dynamic_shapes: Any) -> Program:
    auto = dynamic_shapes == "auto"
    if auto:
        dynamic_shapes = "batch" if all(i.open_batch for i in inputs) else None
    if dynamic_shapes == "batch":
        fixed = {i.shape[0] for i in inputs if i.shape and not i.open_batch}
        sizes = [n for n in fixed if isinstance(n, int)]
        if len(fixed) > 1 or len(sizes) < len(fixed):
            listed = ", ".join(sorted(map(str, fixed)))
            raise BadInput(f'{path}: dynamic_shapes="batch" needs one batch size for all inputs, not {listed}')
        graph.batch = sizes[0] if sizes else None
    try:
        return _quietly(graph, values, dynamic_shapes)
    except CaptureError as error:
        if not auto or dynamic_shapes is None:
            raise CaptureError(f"{path}: {error}") from error
        program = _quietly(graph, values, None)
        warnings.warn(
            f"{path}: the batch is fixed at {values[0].shape[0]}, the graph does not take others ({in_a_line(error)})",
            CaptureWarning,
            stacklevel=3,
        )
        return program
    except GraphcombError as error:
        raise type(error)(f"{path}: {error}") from error


def _quietly(graph: OnnxGraph, values: list[Tensor], dynamic_shapes: Any) -> Program:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="capture: not compared with the model", category=CaptureWarning)
        return capture(graph.module.eval(), tuple(values), dynamic_shapes=dynamic_shapes)


def _cases(program: Program, inputs: list[Input], unit: int) -> list[list[Tensor]]:
    """The example inputs, and other random ones, of other sizes if the batch is dynamic. unit: the batch size that the file
    fixes, or 1."""
    first = [x for x in program.args if isinstance(x, Tensor)]
    cases = [first]
    dynamic = program.dynamic_shapes is not None
    for seed, batch in ((1, 3 * unit), (2, unit)) if dynamic else ((1, None),):
        shapes = [list(x.shape) for x in first]
        if batch is not None:
            wide = [s for s in shapes if s]
            if any(s[0] != wide[0][0] for s in wide):
                continue
            shapes = [[batch, *s[1:]] if s else s for s in shapes]
        cases.append([example(i, shape, seed) for i, shape in zip(inputs, shapes, strict=True)])
    return cases
