"""Translate a program with torch.onnx. Some operators are rewritten before, so that engines can fuse them, and rewrites of
the exporter's optimiser that are not exact are switched off."""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import torch
from torch import fx
from torch.export import ExportedProgram

from ...graph import fp8
from ...graph.edit import infer
from ...graph.errors import Refused, reason
from ...graph.nodes import arguments, hint, op_name
from ...graph.program import Program
from ..engines import origins


def exportable(program: Program) -> Program:
    """Return a copy of a program in eval mode, in which operators that torch.onnx would translate to nodes that no engine
    fuses are replaced by equivalent ones."""
    program = program.copy()
    program.module().eval()
    module = program.graph_module
    for node in list(module.graph.nodes):
        if op_name(node) in ("adaptive_avg_pool2d", "adaptive_avg_pool3d"):
            _global_pool(node)
        elif op_name(node) == "scaled_dot_product_attention":
            _attention(node)
    module.recompile()
    return program


def _global_pool(node: fx.Node) -> None:
    """Replace pooling to 1x1 by a mean. For a channels-last tensor torch.onnx would emit a gather over the whole tensor."""
    a = arguments(node)
    if all(size == 1 for size in a["output_size"]):
        node.target = torch.ops.aten.mean.dim
        node.args, node.kwargs = (a["self"], list(range(-len(a["output_size"]), 0)), True), {}


def _attention(node: fx.Node) -> None:
    """Replace attention by softmax(q k^T s + mask) v. torch.onnx would transpose k by reshapes, and TensorRT would not
    recognise the attention then."""
    a, aten, graph = arguments(node), torch.ops.aten, node.graph
    mask, query = a["attn_mask"], a["query"].meta["val"]
    if (
        a["is_causal"]
        or a["enable_gqa"]
        or a["dropout_p"]
        or (mask is not None and mask.meta["val"].dtype == torch.bool)
    ):
        return
    scale = a["scale"] if a["scale"] is not None else hint(query.shape[-1]) ** -0.5
    with graph.inserting_before(node):
        value = graph.call_function(aten.mul.Scalar, (a["query"], scale))
        keys = graph.call_function(aten.transpose.int, (a["key"], -2, -1))
        value = graph.call_function(aten.matmul.default, (value, keys))
        if mask is not None:
            value = graph.call_function(aten.add.Tensor, (value, mask))
        value = graph.call_function(aten.softmax.int, (value, -1))
        value = graph.call_function(aten.matmul.default, (value, a["value"]))
    for new in value.graph.nodes:
        if "val" not in new.meta and new.op == "call_function":
            new.meta = {k: v for k, v in node.meta.items() if k != "val"}
            infer(new)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def translate(exported: ExportedProgram, opset: int) -> onnx.ModelProto:
    """Return the exported program as an ONNX model, whose nodes are named after the modules that they come from.

    Raises Refused with torch.onnx's innermost reason if it cannot translate the program.
    """
    try:
        with quiet(), _exact_rewrites():
            table = _fp8_table() if is_fp8(exported.graph) else None
            translated = torch.onnx.export(
                exported, dynamo=True, opset_version=opset, verbose=False, custom_translation_table=table
            )
    except Exception as error:  # the text of the exporter's errors contains the reason of the innermost one
        raise Refused(f"torch.onnx cannot translate the program: {reason(error)}") from error
    assert translated is not None
    model = translated.model_proto
    names: set[str] = set()
    for node in model.graph.node:  # with the module's path a reader of an engine's report can locate a kernel
        module, _ = origins.scopes(node)
        name = "/".join([*([module] if module else []), node.name.removeprefix("node_")])
        node.name = name if name not in names else f"{name}_{len(names)}"
        names.add(node.name)
    return model


def is_fp8(graph: fx.Graph) -> bool:
    """Return whether a graph has values that are quantised to FP8."""
    return any(node.target in (fp8.PER_TENSOR, fp8.PER_CHANNEL) for node in graph.nodes)


def _fp8_table() -> dict[Any, Any]:
    """Return translations of graphcomb's operators of FP8, as Q/DQ of ONNX's opset 19."""
    from onnxscript import opset19

    op: Any = opset19  # its operators are typed for scripts, which these functions are not

    def zeros(sizes: Sequence[int]) -> onnx.TensorProto:
        return onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT8E4M3FN, sizes, [0.0] * math.prod(sizes))

    def per_tensor(x: Any, scale: float) -> Any:
        step, zero = op.Constant(value_float=scale), op.Constant(value=zeros(()))
        return op.DequantizeLinear(op.QuantizeLinear(x, step, zero), step, zero)

    def per_channel(x: Any, scale: Any, axis: int) -> Any:
        zero = op.Constant(value=zeros([scale.shape[0]]))
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero, axis=axis), scale, zero, axis=axis)

    return {fp8.PER_TENSOR: per_tensor, fp8.PER_CHANNEL: per_channel}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress prints, warnings and log messages of the exporter and of onnx-graphsurgeon."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    surgeon = gs.logger.G_LOGGER
    severity, surgeon.severity = surgeon.severity, surgeon.ERROR
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        surgeon.severity = severity
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _exact_rewrites() -> Iterator[None]:
    """Make the exporter's optimiser treat only 0 as 0 and only 1 as 1.

    By default it treats numbers within 1e-8 of 0 and 1e-5 of 1 as equal to them, and so drops `x + 1e-12`, which prevents a
    norm from dividing by 0.
    """
    from onnxscript.rewriter import _matcher  # imported here: it is private, and another version may not have it

    def equal(a: float, b: float, **tolerances: float) -> bool:
        return a == b if {0, 1} & {a, b} else math.isclose(a, b, **tolerances)

    class Exact:
        def __getattr__(self, name: str) -> Any:
            return equal if name == "isclose" else getattr(math, name)

    before = getattr(_matcher, "math", None)
    if before is None:  # another version of onnxscript
        yield
        return
    _matcher.math = Exact()  # type: ignore[assignment]
    try:
        yield
    finally:
        _matcher.math = before
