"""Inputs to measure an engine on: random ones that fit its specs, or given ones in its types."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...graph.errors import BadInput, nearest
from ..engines.base import Engine
from ..onnx_file import TensorSpec


def host_arrays(engine: Engine, inputs: Sequence[Any]) -> list[np.ndarray]:
    """The inputs, arrays or tensors, as contiguous arrays of the types that the engine takes.

    Raises BadInput for another number of them.
    """
    if len(inputs) != len(engine.inputs):
        raise BadInput(f"bench: an engine takes {len(engine.inputs)} inputs, {len(inputs)} were given")
    arrays = [x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in inputs]
    return [np.ascontiguousarray(x.astype(i.dtype)) for x, i in zip(arrays, engine.inputs, strict=True)]


def random_inputs(
    inputs: Sequence[TensorSpec], batch: int, shapes: Mapping[str, Sequence[int]] | None = None
) -> list[np.ndarray]:
    """Normal floats and zeros for integers, which are valid indices whatever they index. shapes: by name of an input,
    where more than its batch is dynamic.

    Raises BadInput for shapes of no input, that do not fit, or that are missing.
    """
    shapes, generator, arrays = shapes or {}, np.random.default_rng(0), []
    names = [spec.name for spec in inputs]
    for name in shapes:
        if name not in names:
            raise BadInput(f"shapes: no input {name}; {nearest(name, names)}")
    for spec in inputs:
        if spec.name not in shapes and None in spec.shape[1:]:
            example = "x".join(str(s) if s is not None else "N" for s in (batch, *spec.shape[1:]))
            raise BadInput(
                f"input {spec.name} has dynamic dimensions beyond the batch, {spec.shape}: give its shape "
                f"(--shape {spec.name}={example}; in Python inputs or shapes)"
            )
        shape = tuple(shapes.get(spec.name, [batch if s is None else s for s in spec.shape]))
        if (
            len(shape) != len(spec.shape)
            or any(b not in (None, a) for a, b in zip(shape, spec.shape, strict=True))
            or any(a < 1 for a in shape)
        ):
            raise BadInput(f"input {spec.name}: shape {shape} does not fit {spec.shape}")
        floating = spec.dtype.startswith(("float", "bfloat"))
        arrays.append(generator.standard_normal(shape, np.float32) if floating else np.zeros(shape, spec.dtype))
    return arrays
