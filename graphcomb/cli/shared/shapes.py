"""Parse shapes of inputs on the command line, NAME=1x3x480x640, and capture programs for such shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...graph.compat import pytree
from ...graph.errors import BadInput, nearest
from ...graph.program import Program, capture
from ...job import DEFAULT_SHAPE, prepare
from ...recipe import parse_recipe
from ...runtime.engines.torch.base import specs


def read_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each input by name from texts NAME=SIZES. Raises BadInput for other texts."""
    ranges = read_ranges(texts)
    for name, rows in ranges.items():
        if len(set(rows)) != 1:
            raise BadInput(f"--shape {name}: one shape, as in {name}=1x3x480x640, not a range")
    return {name: rows[0] for name, rows in ranges.items()}


def read_ranges(texts: Sequence[str]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return three shapes (smallest, the one to optimise for, largest) of each input by name.

    texts: NAME=MIN,BEST,MAX, or NAME=SIZES for three equal shapes. Raises BadInput for other texts.
    """
    ranges: dict[str, tuple[tuple[int, ...], ...]] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")  # the name of an input may contain "="
        try:
            rows = tuple(tuple(int(size) for size in part.split("x")) for part in value.split(","))
        except ValueError:
            rows = ()
        if not equals or not name or len(rows) not in (1, 3) or any(size < 1 for row in rows for size in row):
            raise BadInput(f"--shape {text}: expected NAME=SIZES, as in x=1x3x480x640")
        if name in ranges:
            raise BadInput(f"--shape {text}: {name} has a shape already")
        ranges[name] = rows if len(rows) == 3 else rows * 3
    return ranges


def with_batch(shapes: Sequence[Sequence[int]], batch: int | None) -> list[list[int]]:
    """Return shapes of inputs with the given batch size; None keeps the shapes. Without shapes it is one image.

    The batch replaces the first size of every shape whose first size is that of the first shape. Raises BadInput if that
    size is neither 1 nor the batch.
    """
    rows = [list(shape) for shape in shapes] or [list(DEFAULT_SHAPE)]
    first = rows[0][0] if rows[0] else None
    if batch is None or first is None:
        return rows
    if first not in (1, batch):
        raise BadInput(f"--batch {batch}: the shapes have a batch of {first}; leave one of the two out")
    return [[batch, *row[1:]] if row and row[0] == first else row for row in rows]


def example_batch(program: Program) -> int | None:
    """Return the batch size of a program without dynamic dimensions; None for a program with dynamic dimensions."""
    inputs = specs(program)[0]
    fixed = all(None not in spec.shape for spec in inputs)
    return inputs[0].shape[0] if fixed and inputs and inputs[0].shape else None


def check_names(program: Program, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise BadInput for a shape whose name is that of no input of the program."""
    names = [spec.name for spec in specs(program)[0]]
    for name in shapes:
        if name not in names:
            raise BadInput(f"--shape {name}: the model has no such input; {nearest(name, names)}")


def captured(model: str, arguments: dict[str, Any], shapes: Sequence[Sequence[int]] = ()) -> Program:
    """Return the program of `package.module:callable`, called with the arguments, or of a `.pt2` or `.onnx` file.

    shapes: shapes of the inputs; by default those of the file, or one input of `DEFAULT_SHAPE`.
    """
    tree: dict[str, Any] = {"model": {"source": model, "arguments": arguments}, "passes": []}
    if shapes:
        tree["inputs"] = [{"shape": list(shape)} for shape in shapes]
    return prepare(parse_recipe(tree)).program


def at_shapes(program: Program, shapes: Mapping[str, Sequence[int]], batch: int | None) -> Program:
    """Capture a program again with fixed shapes.

    shapes: shapes of inputs by name; other inputs keep the example's shape, with `batch` for a dynamic batch. Raises
    BadInput for shapes that do not fit the inputs.
    """
    check_names(program, shapes)
    inputs = iter(specs(program)[0])

    def make(tensor: torch.Tensor) -> torch.Tensor:
        spec = next(inputs)
        sizes = enumerate(zip(spec.shape, tensor.shape, strict=True))
        example = [batch if batch and s is None and not i else n for i, (s, n) in sizes]
        shape = tuple(shapes.get(spec.name, example))
        if len(shape) != len(spec.shape) or any(b not in (None, a) for a, b in zip(shape, spec.shape, strict=True)):
            raise BadInput(f"--shape {spec.name}: {shape} does not fit {spec.shape}")
        return torch.randn(shape).to(tensor) if tensor.is_floating_point() else torch.zeros(shape).to(tensor)

    args, kwargs = pytree.tree_map_only(torch.Tensor, make, (program.args, program.kwargs))
    return capture(program.module(), args, kwargs)
