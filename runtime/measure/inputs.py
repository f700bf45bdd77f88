"""Inputs to measure an engine on: random ones, or the user's, cast to the engine's types."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...graph.errors import BadInput, nearest
from ..engines.base import Engine
from ..onnx_file import TensorSpec


def host_arrays(engine: Engine, inputs: Sequence[Any]) -> list[np.ndarray]:
    """Return arrays or tensors as contiguous numpy arrays of the types of the engine's inputs.

    Raises BadInput if their number is not that of the engine's inputs.
    """
    if len(inputs) != len(engine.inputs):
        raise BadInput(f"bench: an engine takes {len(engine.inputs)} inputs, {len(inputs)} were given")
    arrays = [x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in inputs]
    return [np.ascontiguousarray(x.astype(i.dtype)) for x, i in zip(arrays, engine.inputs, strict=True)]


def random_inputs(
    inputs: Sequence[TensorSpec], batch: int, shapes: Mapping[str, Sequence[int]] | None = None
) -> list[np.ndarray]:
    """Return one random array per input: normally distributed floats, and zeros for integers, since 0 is a valid index
    into any axis. The values are the same at every call.

    batch: size of dynamic dimensions. shapes: shapes by name, required for inputs with a dynamic dimension beyond the first.

    Raises BadInput for a shape that names no input or does not fit its input, and for a required shape that is missing.
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
