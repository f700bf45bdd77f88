"""Choose the ONNX opset of a file, and convert a graph from opset 18 to 17, which ONNX's own converter cannot.

TensorRT 8.6 parses opsets up to 17. Opset 18 changed the axes of reductions from attributes to inputs, requires Split to
state the number of pieces, and gave Pad and Resize new options, which must have their defaults here. Source: the version
notes of each operator in the ONNX specification.
"""

import onnx
import onnx_graphsurgeon as gs

from ...graph.errors import BadInput, Refused
from ...graph.facts import FAKE_QUANTISATION
from ...graph.nodes import op_name
from ...graph.program import Program
from ..devices.table import Target
from .translate import is_fp8

LOWEST = 17  # the lowest opset that can be written; it introduced LayerNormalization
DEFAULT = 18  # torch's exporter writes it without converting, and TensorRT parses it from 10.0 on
FLOAT8 = 19  # Q/DQ nodes support FP8 from opset 19 on
QUANTISED = 20  # Q/DQ nodes support fp16 from opset 19 on; the casts that older ones need prevent fusing them
BFLOAT = 22  # Conv and pooling support bf16 from opset 22 on
SINCE = {"torchvision::deform_conv2d": 19}  # the opset that an operator (`op_name`) needs

AXES_TO_ATTRIBUTE = frozenset(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare".split()
)
RESIZE_DEFAULTS = {"antialias": 0, "keep_aspect_ratio_policy": "stretch", "axes": None}


def choose_opset(
    program: Program, target: Target | None = None, asked: int | None = None, precision: str = "fp32"
) -> int:
    """Return the opset to export a program with.

    It is `asked` if that is given. Otherwise it is DEFAULT, QUANTISED for a quantised program, BFLOAT for bf16, or the
    higher one that an operator of the program needs, but no higher than the target parses.

    Raises BadInput for an opset that cannot be written or that the target does not parse, for a program quantised for a CPU
    if the target is TensorRT's, and for one in FP8 if the target has none; Refused for an operator or a precision that needs
    a higher opset, and for a quantised program in bf16.
    """
    limit = target.opset if target is not None else None
    if target is not None and target.backend.startswith("tensorrt") and _has_uint8(program):
        raise BadInput(
            f'target {target.name}: has no UINT8, which Quantize(placement="cpu") made; quantise for the target'
        )
    if asked is not None and asked < LOWEST:
        raise BadInput(f"opset {asked}: {LOWEST} is the lowest that can be written (LayerNormalization came with it)")
    if asked is not None and limit is not None and asked > limit:
        raise BadInput(f"opset {asked}: target {target.name if target else ''} parses up to {limit}")
    names = {op_name(node): node.name for node in program.graph.nodes}
    needed = {name: since for name, since in SINCE.items() if name in names}
    for name, since in needed.items():
        most = asked if asked is not None else limit
        if most is not None and most < since:
            cure = f"export it with opset={since}" if asked is not None else f"the target parses up to {limit}"
            raise Refused(f"{names[name]} ({name}): it came with opset {since}; {cure}")
    if is_fp8(program.graph):
        if target is not None:
            target.alignment("fp8")
        if asked is not None and asked < FLOAT8:
            raise Refused(f"FP8: it came with opset {FLOAT8}, not {asked}; export it with opset={FLOAT8}")
    if precision == "bf16":
        if is_quantised(program):
            raise Refused("bf16: it cannot hold the scales of a quantised program; export it in fp16")
        needed["bf16"] = BFLOAT
        for most, who in ((asked, f"opset {asked}"), (limit, f"target {target.name if target else ''}")):
            if most is not None and most < BFLOAT:
                raise Refused(f"bf16: {who} has no bf16 convolutions, which came with opset {BFLOAT}; export fp16")
    best = max([QUANTISED if is_quantised(program) else DEFAULT, *needed.values()])
    return asked or min(best, limit or best)


def is_quantised(program: Program) -> bool:
    """Return whether a program contains fake-quantised values."""
    return any(op_name(node) in FAKE_QUANTISATION for node in program.graph.nodes)


def _has_uint8(program: Program) -> bool:
    nodes = program.graph.nodes
    return any(op_name(node) == "fake_quantize_per_tensor_affine" and node.args[3] == 0 for node in nodes)


def lower_to_17(graph: gs.Graph) -> None:
    """Rewrite a graph with folded constants from opset 18 to 17 in place.

    Raises Refused, which names the node, for what opset 17 cannot express.
    """
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
        elif not onnx.defs.has(node.op, 17):
            raise Refused(f"{node.name}: opset 17 has no {node.op}")
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
