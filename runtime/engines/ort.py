"""ONNX Runtime on the CPU, the default backend. graphcomb always installs it."""

import functools
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort

from ...graph.errors import BadInput
from ...graph.files import replacing
from ..devices.table import Target
from ..engine_summary import Kernel
from ..kit.ort import session_options
from ..onnx_file import FLOATS8, TensorSpec, precision, stored_tensors
from .base import EngineReport, HostEngine, unparsed
from .options import EngineOptions

TAKES = ("threads",)

# Messages for an operator without a kernel on the CPU, and for an unknown operator ("domain:Op(version)").
UNPARSED = re.compile(r"Could not find an implementation for (\w+)\(|(\w+)\(-?\d+\) is not a registered function/op")
REFORMATS = ("ReorderInput", "ReorderOutput")
INSERTED_CAST = "InsertedPrecisionFreeCast_"


class OrtEngine(HostEngine):
    """An ONNX file in an ONNX Runtime session. With one thread the calling thread does all the work.

    - threads: number of threads of one run, the calling thread included.
    - optimized: path to which ONNX Runtime writes the model that it has optimised.
    - plain: run every node as it is, without fusing or moving nodes. Fused integer kernels round differently from the
      graph, so references of quantised models need this.

    Raises BadInput for a file that ONNX Runtime refuses; UnparsedOp, a subclass, for an operator that it does not support.
    """

    def __init__(self, path: Path, threads: int = 1, optimized: Path | None = None, plain: bool = False):
        kinds = _kinds(path)
        options = session_options(threads, not plain and onnx.TensorProto.FLOAT16 in kinds, bool(kinds & FLOATS8))
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if plain:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no public base
            if unknown := UNPARSED.search(str(error)):
                raise unparsed(path, f"ONNX Runtime {ort.__version__}", [unknown[1] or unknown[2]]) from error
            raise BadInput(f"{path}: ONNX Runtime refuses it ({_line(error)})") from error
        self.inputs = [_spec(i) for i in self._session.get_inputs()]
        self.outputs = [_spec(o) for o in self._session.get_outputs()]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        self._check_count(inputs)
        try:
            return self._session.run(None, dict(zip(self.input_names, inputs, strict=True)))
        except ort.capi.onnxruntime_pybind11_state.InvalidArgument as error:
            raise BadInput(f"the inputs do not fit the engine: {_line(error)}") from error

    def close(self) -> None:
        del self._session


def load(path: Path, *, backend: str = "onnxruntime", threads: int = 1) -> OrtEngine:
    """Load an ONNX file. threads: number of threads of one run, the calling thread included."""
    return OrtEngine(path, threads)


def build(
    model: Path, target: Target, out: Path | None, options: EngineOptions, *, backend: str = "onnxruntime"
) -> EngineReport:
    """Optimise an ONNX file and report the kernels of the optimised model.

    out: path of the optimised model, which runs only on CPUs with the same vector width; None does not keep it.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            optimized = _optimize(model, Path(folder) / "model.onnx", options.threads)
    else:
        with replacing(out) as part:
            optimized = _optimize(model, part, options.threads)
    kernels = [Kernel(name=n.name, kind=n.op_type, padding=n.op_type in REFORMATS) for n in optimized.graph.node]
    warnings = ["ONNX Runtime has no fp16 kernels for this CPU and computes in fp32"] * bool(inserted_casts(optimized))
    memory = {"weights": sum(_size(t) for t in optimized.graph.initializer)}
    return EngineReport(ort.__version__, out or model, precision(optimized), kernels, memory, warnings)


def inserted_casts(optimized: onnx.ModelProto) -> int:
    """Return how many casts to fp32 and back ONNX Runtime added because this CPU has no fp16 kernels."""
    return sum(n.name.startswith(INSERTED_CAST) and n.op_type == "Cast" for n in optimized.graph.node)


@functools.cache
def computes_half() -> bool:
    """Return whether ONNX Runtime computes fp16 convolutions and matrix products in fp16 on this CPU.

    Without fp16 kernels it computes them in fp32, between casts.
    """
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["": 20]>
        half (float16[1,8,8,8] x, float16[8,8,1,1] w, float16[8,8] v) => (float16[1,8,8,8] y) {
            z = Conv(x, w)
            y = MatMul(z, v)
        }""")
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / "half.onnx")
        return inserted_casts(_optimize(Path(folder) / "half.onnx", Path(folder) / "optimized.onnx", 1)) == 0


def _optimize(model: Path, to: Path, threads: int) -> onnx.ModelProto:
    OrtEngine(model, threads, optimized=to).close()
    return onnx.load(str(to))


def _kinds(path: Path) -> set[int]:
    """Return the types of the constants and inputs of an ONNX file."""
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception:  # not an ONNX file: creating the session raises the error
        return set()
    return {t.data_type for t in stored_tensors(graph)} | {i.type.tensor_type.elem_type for i in graph.input}


def _size(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _spec(value: Any) -> TensorSpec:
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    dtype = {"float": "float32", "double": "float64"}.get(kind, kind)
    return TensorSpec(value.name, dtype, tuple(d if isinstance(d, int) else None for d in value.shape))


def _line(error: Exception) -> str:
    """Return the message in one line, without ONNX Runtime's prefix."""
    return " ".join(str(error).split(" : ", 3)[-1].split())[:200]
