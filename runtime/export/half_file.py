"""A half-precision form of an ONNX file, for models of which there is no program: with the same islands in fp32, and judged
by the same limits, as what `export_onnx` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch

from ...graph.errors import Refused
from .compare import TOLERANCES, ranges_of, session, verdict
from .half import to_half
from .islands import islands
from .parity import Case


def half_file(source: Path, to: Path, inputs: Sequence[np.ndarray]) -> dict[str, str]:
    """Write an fp32 file in fp16; returns the nodes that stay in fp32, and why.

    inputs: to measure ranges and to compare on. Raises Refused for what fp16 spoils, with the first node that is off.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(str(source)))
    with session(model) as engine:
        outputs = [x.astype(np.float64) if x.dtype.kind == "f" else x for x in engine.run(inputs)]
    known = [Case("random", None, tuple(torch.from_numpy(np.ascontiguousarray(x)) for x in inputs), {}, outputs)]
    graph = gs.import_onnx(model)
    keep, io = islands(graph, ranges_of(model, known))
    float32, _ = to_half(graph, keep, io)
    half = gs.export_onnx(graph)
    onnx.helper.set_model_props(half, {p.key: p.value for p in model.metadata_props})
    onnx.save(half, str(to))
    result = verdict(half, model, to, known, TOLERANCES["fp16", "fp16"])
    if result.wrong:
        raise Refused(f"{source}: fp16 {result.wrong}; bundle it in fp32, or keep nodes in fp32 as `export_onnx` does")
    return float32
