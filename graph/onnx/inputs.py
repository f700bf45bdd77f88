"""The inputs of an ONNX graph: their description in the file, and example values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from torch import Tensor

from ..errors import BadInput, Refused
from .dtypes import torch_dtype
from .table import Step

BATCH = 2  # batch size of example inputs if the file leaves it open


@dataclass(frozen=True)
class Input:
    """An input of the file. name: in the file. shape: its sizes, text or None for those that the file leaves open; None if
    the file gives no shape. most: random whole numbers must be below it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str | None, ...] | None
    most: int = 2

    @property
    def open_batch(self) -> bool:
        """Whether the file leaves the first size open."""
        return not self.shape or not isinstance(self.shape[0], int)

    def seen(self, steps: Sequence[Step], constants: Mapping[str, np.ndarray], read: bool) -> Input:
        """The input as the steps use it: whole numbers that index a table are below its length. Raises Refused if nothing
        reads it."""
        if not read:
            raise Refused(f"nothing reads the input {self.name}; remove it from the file")
        names = {self.name}
        for step in steps:
            if step.op in ("Cast", "Identity") and step.inputs[0] in names:
                names.add(step.outputs[0])
            if step.op == "Gather" and step.inputs[1] in names and step.inputs[0] in constants:
                return replace(self, most=constants[step.inputs[0]].shape[step.attributes.get("axis", 0)])
        return self

    def __str__(self) -> str:
        sizes = "unknown sizes" if self.shape is None else " x ".join(str(n or "?") for n in self.shape)
        return f"the input {self.name} ({sizes})"


def inputs_of(model: onnx.ModelProto) -> list[Input]:
    """The inputs that are not initializers. Raises Refused for inputs that are not tensors of numbers, and if there is
    none."""
    weights = {t.name for t in model.graph.initializer}
    result = []
    for value in model.graph.input:
        if value.name in weights:
            continue
        if not value.type.HasField("tensor_type"):
            raise Refused(f"the input {value.name} is a {value.type.WhichOneof('value')}, not a tensor")
        tensor = value.type.tensor_type
        shape = None
        if tensor.HasField("shape"):
            shape = tuple(d.dim_value if d.dim_value > 0 else d.dim_param or None for d in tensor.shape.dim)
        try:
            result.append(Input(value.name, torch_dtype(tensor.elem_type), shape))
        except Refused as error:
            raise Refused(f"the input {value.name}: {error}") from None
    if not result:
        raise Refused("the graph has no input")
    return result


def example(wanted: Input, shape: Sequence[int] | None, seed: int = 0) -> Tensor:
    """A random value: Gaussian floats, bytes, whole numbers within the table that they index, else ones. Raises BadInput if
    sizes are unknown."""
    if shape is None:
        rest = wanted.shape[1:] if wanted.shape is not None else (None,)
        if any(not isinstance(n, int) for n in rest):
            raise BadInput(f'{wanted}: give its sizes, as in shapes={{"{wanted.name}": (1, 3, 224, 224)}}')
        first = wanted.shape[:1] if wanted.shape else ()
        shape = [*(n if isinstance(n, int) else BATCH for n in first), *(n for n in rest if isinstance(n, int))]
    generator = torch.Generator().manual_seed(seed)
    sizes = [int(n) for n in shape]
    if wanted.dtype.is_floating_point:
        value = torch.randn(sizes, generator=generator).to(wanted.dtype)
    elif wanted.dtype == torch.uint8:
        value = torch.randint(0, 256, sizes, generator=generator).to(torch.uint8)
    elif wanted.most > 2:
        value = torch.randint(0, wanted.most, sizes, generator=generator).to(wanted.dtype)
    else:
        value = torch.ones(sizes, dtype=wanted.dtype)  # such as a mask that hides nothing
    fits(wanted, value)
    return value


def fits(wanted: Input, value: Tensor) -> None:
    """Raise BadInput for a value that the file does not take. Its batch size may differ from the file's."""
    if value.dtype != wanted.dtype:
        raise BadInput(f"{wanted} takes {wanted.dtype}, not {value.dtype}")
    if wanted.shape is None:
        return
    same = len(value.shape) == len(wanted.shape) and all(
        not isinstance(n, int) or n == m for n, m in list(zip(wanted.shape, value.shape, strict=True))[1:]
    )
    if not same:
        raise BadInput(f"{wanted} does not take {' x '.join(map(str, value.shape))}")
