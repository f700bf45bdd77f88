"""torch.onnx, told what engines fuse: some operators are rewritten before it translates, and its optimiser stays exact."""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import torch
from torch import fx
from torch.export import ExportedProgram

from ...graph.edit import infer
from ...graph.errors import Refused, reason
from ...graph.nodes import arguments, hint, op_name
from ...graph.program import Program
from ..engines import origins


def exportable(program: Program) -> Program:
    """A copy in eval mode, without what torch.onnx translates into shapes that no engine fuses; same arithmetic, plain
    operators."""
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
    """Pooling to 1x1 is a mean; on a channels-last tensor torch.onnx would make it a gather over the whole tensor."""
    a = arguments(node)
    if all(size == 1 for size in a["output_size"]):
        node.target = torch.ops.aten.mean.dim
        node.args, node.kwargs = (a["self"], list(range(-len(a["output_size"]), 0)), True), {}


def _attention(node: fx.Node) -> None:
    """softmax(q k^T s + mask) v; torch.onnx would transpose k by two reshapes, which hides attention from TensorRT."""
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
    """The exported program as ONNX, its nodes named after the modules that they come from.

    Raises Refused with torch.onnx's innermost reason where it cannot be translated.
    """
    try:
        with quiet(), _exact_rewrites():
            found = torch.onnx.export(exported, dynamo=True, opset_version=opset, verbose=False)
    except Exception as error:  # the exporter's errors carry the reason of the innermost one in their text
        raise Refused(f"torch.onnx cannot translate the program: {reason(error)}") from error
    assert found is not None
    model = found.model_proto
    names: set[str] = set()
    for node in model.graph.node:  # the module's path tells a reader of an engine's report where a kernel comes from
        module, _ = origins.scopes(node)
        name = "/".join([*([module] if module else []), node.name.removeprefix("node_")])
        node.name = name if name not in names else f"{name}_{len(names)}"
        names.add(node.name)
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No chatter of the exporter and of graphsurgeon: prints, warnings, log lines."""
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
    """The exporter's optimiser takes a number within 1e-8 of 0, or 1e-5 of 1, for it, and drops `x + 1e-12`, which keeps
    a norm from dividing by 0. Here only 0 is 0, and 1 is 1."""
    from onnxscript.rewriter import _matcher  # here, since it is private and another version may not have it

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
