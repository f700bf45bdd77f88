"""Read from an ONNX file whether it is valid, its inputs, opset and precision. External weights are not loaded."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx

from ..graph.errors import BadInput


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model.

    dtype: name of the numpy dtype ("float16"), or of the ml_dtypes one for bfloat16 and fp8. shape: None stands for a
    dynamic dimension.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


def check_model(path: Path) -> onnx.ModelProto:
    """Load an ONNX file without its external weights, run the ONNX checker on it and return the model.

    Raises BadInput for a file that does not exist, is no ONNX file or does not pass the checker.
    """
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
    """Return the inputs of an ONNX file other than its weights, or None if the suffix is not .onnx.

    Raises BadInput as `check_model` does.
    """
    if path.suffix != ".onnx":
        return None
    graph = check_model(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return tensor_specs(value for value in graph.input if value.name not in weights)


def tensor_specs(values: Iterable[onnx.ValueInfoProto]) -> list[TensorSpec]:
    """Return the name, dtype and shape of each input or output of a graph."""
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        if tensor.elem_type == onnx.TensorProto.BFLOAT16:
            dtype = "bfloat16"  # some versions of onnx return float32 here
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
    """Return the precision in which a strongly typed engine of this model computes.

    With Q/DQ nodes it is "int8" or "fp8", by the type of the first QuantizeLinear; else the floating-point type of most
    weight elements, "fp32" without weights.
    """
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return "fp8" if _quantises_to_floats(model) else "int8"
    counts: Counter[str] = Counter()
    for tensor in stored_tensors(model.graph):
        if tensor.data_type in FLOATS:
            counts[FLOATS[tensor.data_type]] += math.prod(tensor.dims)
    return max(counts, key=lambda k: counts[k]) if counts else "fp32"


def stored_tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Return the initializers of a graph and the values of its Constant nodes."""
    constants = [a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    return [*graph.initializer, *constants]


def _quantises_to_floats(model: onnx.ModelProto) -> bool:
    """Return whether the first QuantizeLinear gives 8-bit floats, which its attribute, the inferred type of its output or
    its zero point tells."""
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
    """Return the opset version of the standard ONNX operators that a model imports; 0 if it imports none."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
