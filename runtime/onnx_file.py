"""What an ONNX file says of itself: whether it is valid, its inputs, opset and precision. Weights beside it are not read."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx

from ..graph.errors import BadInput


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: name, numpy dtype ("float16"; bfloat16 and fp8 as ml_dtypes spells them), and shape with
    None for dynamic dimensions."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


def check_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file (without its external weights) and run the ONNX checker. Raises BadInput with one line."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.graph.output:
            raise BadInput(f"{path}: not an ONNX file (it holds no graph)")
        onnx.checker.check_model(str(path))
    except BadInput:
        raise
    except Exception as error:  # protobuf, checker and I/O errors have no common base
        text = next((line for line in str(error).splitlines() if line.strip()), "no message")
        raise BadInput(f"{path}: not a valid ONNX file ({type(error).__name__}: {text[:200]})") from error
    return model


def input_specs(path: Path) -> list[TensorSpec] | None:
    """The inputs of an ONNX file, without its weights; None for another file."""
    if path.suffix != ".onnx":
        return None
    graph = check_model(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return tensor_specs(value for value in graph.input if value.name not in weights)


def tensor_specs(values: Iterable[onnx.ValueInfoProto]) -> list[TensorSpec]:
    """Name, numpy dtype and shape of inputs or outputs of a graph."""
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        if tensor.elem_type == onnx.TensorProto.BFLOAT16:
            dtype = "bfloat16"  # onnx says float32 or bfloat16, by its version
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
        specs.append(TensorSpec(value.name, dtype, shape))
    return specs


FLOATS: dict[int, str] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.DOUBLE: "fp64",
}


def precision(model: onnx.ModelProto) -> str:
    """The precision a strongly typed engine of this model computes in: "int8" or "fp8" with Q/DQ nodes, by the type they
    quantise to, else the float type that most weight elements have ("fp32" when there are none)."""
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return "fp8" if _quantises_to_floats(model) else "int8"
    counts: Counter[str] = Counter()
    for tensor in stored_tensors(model.graph):
        if tensor.data_type in FLOATS:
            counts[FLOATS[tensor.data_type]] += math.prod(tensor.dims)
    return max(counts, key=lambda k: counts[k]) if counts else "fp32"


def stored_tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """The initializers of a graph, and the values of its Constant nodes."""
    constants = [a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    return [*graph.initializer, *constants]


def _quantises_to_floats(model: onnx.ModelProto) -> bool:
    """Whether the first QuantizeLinear gives 8-bit floats: by its zero point, its attribute, or the inferred type."""
    node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    kinds |= {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    asked = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
    kinds |= {n.output[0]: n.attribute[0].t.data_type for n in model.graph.node if n.op_type == "Constant"}
    zero_point = kinds.get(node.input[2], 0) if len(node.input) > 2 else 0
    return (asked or kinds.get(node.output[0], 0) or zero_point) in FLOATS8


FLOATS8 = {
    onnx.TensorProto.FLOAT8E4M3FN,
    onnx.TensorProto.FLOAT8E4M3FNUZ,
    onnx.TensorProto.FLOAT8E5M2,
    onnx.TensorProto.FLOAT8E5M2FNUZ,
}


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a model asks for; 0 where it names none."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
