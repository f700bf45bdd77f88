"""OpenVINO on the CPU: a second engine for processors without an accelerator.

Kernels are read from the runtime graph of the compiled model, whose nodes name the original layers that they compute.
Source: OpenVINO documentation, "Runtime model" and "CPU device".
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ...graph.errors import BadInput
from ...graph.files import replacing
from ..devices.table import Target
from ..engine_summary import Kernel
from ..onnx_file import TensorSpec, precision
from .base import EngineReport, HostEngine, UnparsedOp, unparsed
from .options import EngineOptions

TAKES = ("threads",)
TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64", "boolean": "bool"}
TYPES |= {f"{sign}{bits}": f"{'u' * (sign == 'u')}int{bits}" for sign in "iu" for bits in (8, 16, 32, 64)}
UNPARSED = re.compile(r"No conversion rule found for operations: (.+)")


class OpenVinoEngine(HostEngine):
    """A model compiled for the CPU, which computes in fp32 unless it is quantised.

    OpenVINO's own default is bfloat16 on processors that support it, which is faster but less exact.

    Raises BadInput for a file that OpenVINO refuses; UnparsedOp, a subclass, for an operator that it does not support.
    """

    def __init__(self, path: Path, threads: int = 1):
        ov = _library()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        try:
            self.compiled = ov.Core().compile_model(str(path), "CPU", settings)
        except Exception as error:  # the exceptions of OpenVINO's frontends and runtime have no common base
            raise _unparsed(path, error) or BadInput(f"{path}: OpenVINO refuses it ({_line(error)})") from error
        self.inputs = [_spec(port) for port in self.compiled.inputs]
        self.outputs = [_spec(port) for port in self.compiled.outputs]
        self._request = self.compiled.create_infer_request()

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        self._check_count(inputs)
        for spec, array in zip(self.inputs, inputs, strict=True):
            self._check_dtype(spec, array)
        try:
            results = self._request.infer(dict(enumerate(inputs)), share_inputs=True)
        except RuntimeError as error:
            raise BadInput(f"the inputs do not fit the engine: {_line(error)}") from error
        return [np.array(results[i]) for i in range(len(self.outputs))]

    def close(self) -> None:
        del self._request, self.compiled


def load(path: Path, *, backend: str = "openvino", threads: int = 1) -> OpenVinoEngine:
    """Compile an ONNX file or a file of OpenVINO's own format (.xml). threads: number of threads of one run."""
    return OpenVinoEngine(path, threads)


def build(
    model: Path, target: Target, out: Path | None, options: EngineOptions, *, backend: str = "openvino"
) -> EngineReport:
    """Convert an ONNX file to OpenVINO's format, an .xml file and a .bin file with its weights, and report the kernels
    that OpenVINO compiles it to on this machine."""
    ov = _library()
    out = out or model.with_suffix(".xml")
    try:
        converted = ov.convert_model(str(model))
    except Exception as error:  # no common base, as above
        raise _unparsed(model, error) or BadInput(f"{model}: OpenVINO cannot convert it ({_line(error)})") from error
    with replacing(out.with_suffix(".bin")) as weights, replacing(out) as part:
        # OpenVINO derives the name of the weights from that of the .xml file, both when it writes and when it reads.
        ov.save_model(converted, str(part), compress_to_fp16=False)
        part.with_suffix(".bin").replace(weights)
    compiled = OpenVinoEngine(out, options.threads).compiled
    kernels = [_kernel(op) for op in compiled.get_runtime_model().get_ordered_ops()]
    size = out.with_suffix(".bin").stat().st_size
    return EngineReport(
        version=ov.__version__.split("-")[0],
        path=out,
        precision=precision(onnx.load(str(model), load_external_data=False)),
        kernels=[kernel for kernel in kernels if kernel.kind not in ("Input", "Output", "Const")],
        memory={"weights": size},
        bytes=out.stat().st_size + size,
    )


def _kernel(op: Any) -> Kernel:
    about = {name: str(value.astype(str)) for name, value in op.get_rt_info().items() if hasattr(value, "astype")}
    kind = about.get("layerType", op.get_type_name())
    nodes = tuple(name for name in about.get("originalLayersNames", "").split(",") if name)
    types = about.get("outputPrecisions", "").split(",")
    shapes = [
        f"{t}[{port.partial_shape.to_string().strip('[]')}]" for t, port in zip(types, op.outputs(), strict=False)
    ]
    name, outputs = op.get_friendly_name(), tuple(shapes)
    return Kernel(name=name, kind=kind, nodes=nodes, outputs=outputs, padding=kind == "Reorder")


def _library() -> Any:
    import openvino  # here, since it need not be installed

    return openvino


def _spec(port: Any) -> TensorSpec:
    kind = port.element_type.get_type_name()
    shape = tuple(d.get_length() if d.is_static else None for d in port.partial_shape)
    return TensorSpec(port.any_name, TYPES.get(kind, kind), shape)


def _unparsed(path: Path, error: Exception) -> UnparsedOp | None:
    """Return the error for unsupported operators if the exception is one; OpenVINO names an operator with its version
    ("Det-18") or domain ("my.Op")."""
    unknown = UNPARSED.search(str(error))
    return unknown and unparsed(path, "OpenVINO", [op.split("-")[0].split(".")[-1] for op in unknown[1].split(", ")])


def _line(error: Exception) -> str:
    lines = [
        line.strip()
        for line in str(error).splitlines()
        if line.strip() and not line.startswith(("Exception from", "Check"))
    ]
    return (lines or [type(error).__name__])[-1][:200]
