"""Options that several commands have, and functions that parse their values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ...graph.errors import BadInput

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override a field, as in passes.0.ratio=0.3.")
]
SHAPE = "Shape of an input with dynamic dimensions other than the batch"
Shapes = Annotated[list[str] | None, typer.Option("--shape", metavar="NAME=1x3x480x640", help=f"{SHAPE}.")]
Arguments = Annotated[
    list[str] | None, typer.Option("--arg", metavar="NAME=VALUE", help="Keyword argument of the model's callable.")
]
Inputs = Annotated[list[str] | None, typer.Option("--input", metavar="1,3,224,224", help="Shape of an example input.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def read_values(pairs: Sequence[str], option: str = "--arg") -> dict[str, Any]:
    """Return by name the values, parsed as YAML, of texts such as `ratio=0.3`. Raises BadInput, which names the option."""
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise BadInput(f"{option} {pair}: expected name=value")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise BadInput(f"{option} {pair}: the value is not valid YAML") from error
    return values


def read_sizes(text: str, option: str = "--input") -> list[int]:
    """Return the whole numbers in a text such as `1,3,224,224`. Raises BadInput, which names the option."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(f"{option} {text}: expected sizes separated by commas, as in 1,3,224,224") from error
