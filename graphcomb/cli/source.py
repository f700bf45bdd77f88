"""`graphcomb source`: write a program as Python source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shared.arguments import Arguments, Inputs, read_sizes, read_values
from .shared.output import console


def source(
    model: Annotated[str, typer.Argument(help="A .pt2 file, or package.module:callable.")],
    out: Annotated[Path, typer.Argument(metavar="MODEL.py", help="The file to write.")],
    arg: Arguments = None,
    input_: Inputs = None,
) -> None:
    """Write a program as a readable Python module, which needs only PyTorch, and its weights to a file beside it."""
    from ..graph.errors import BadInput
    from .shared.shapes import captured

    if out.suffix != ".py":
        raise BadInput(f"{out}: the file to write ends in .py")
    program = captured(model, read_values(arg or ()), [read_sizes(s) for s in input_ or ()])
    written = program.to_source(out)
    console.print(f"{written} and {written.with_suffix('.safetensors').name} written", soft_wrap=True)
