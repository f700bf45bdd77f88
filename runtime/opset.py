"""From ONNX opset 18 to 17, the last that TensorRT 8.6 parses; the converter that comes with ONNX lacks these steps.

Opset 18 moved the axes of reductions and the number of pieces of Split from attributes to inputs or back, and gave Pad
and Resize options that are left at their defaults here. Source: the version notes of each operator in the ONNX
specification.
"""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from ..graph.errors import Refused

AXES_TO_ATTRIBUTE = frozenset(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare".split()
)
RESIZE_DEFAULTS = {"antialias": 0, "keep_aspect_ratio_policy": "stretch", "axes": None}


def lower_to_17(graph: gs.Graph) -> None:
    """Rewrite a graph with folded constants from 18 in place. Raises Refused with the node where it cannot."""
    for node in graph.nodes:
        if node.domain:
            continue
        if node.op in AXES_TO_ATTRIBUTE:
            _reduction(node)
        elif node.op == "Split":
            _split(node)
        elif node.op == "Pad" and len(node.inputs) > 3:
            raise Refused(f"{node.name}: opset 17 has no Pad with axes")
        elif node.op == "Resize":
            for name, default in RESIZE_DEFAULTS.items():
                if node.attrs.pop(name, default) != default:
                    raise Refused(f"{node.name}: opset 17 has no Resize with {name}")
        elif node.op in ("ScatterElements", "ScatterND") and node.attrs.get("reduction") in ("min", "max"):
            raise Refused(f"{node.name}: opset 17 has no {node.op} with reduction {node.attrs['reduction']}")
        elif onnx.defs.get_schema(node.op, 18).since_version == 18 and not onnx.defs.has(node.op, 17):
            raise Refused(f"{node.name}: {node.op} came with opset 18")
    graph.opset = 17
    for domain in graph.import_domains or ():
        if not domain.domain:
            domain.version = 17


def _reduction(node: gs.Node) -> None:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    nothing = node.attrs.pop("noop_with_empty_axes", 0)
    if axes is None or axes.is_empty():
        if nothing:
            raise Refused(f"{node.name}: opset 17 has no {node.op} over no axes")
        node.inputs = [node.inputs[0]]
    elif isinstance(axes, gs.Constant):
        node.attrs["axes"] = [int(a) for a in axes.values]
        node.inputs = [node.inputs[0]]
    else:
        raise Refused(f"{node.name}: opset 17 has no {node.op} over computed axes")


def _split(node: gs.Node) -> None:
    pieces = node.attrs.pop("num_outputs", None)
    if pieces is None:
        return
    size = (node.inputs[0].shape or [])[node.attrs.get("axis", 0)]
    if not isinstance(size, int) or size % pieces:
        raise Refused(f"{node.name}: opset 17 splits only into equal pieces of a known size")
