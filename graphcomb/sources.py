"""Load models, data and functions that a recipe names as `package.module:callable`, file or built-in name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.export import ExportedProgram

from . import data as builtin
from .graph.errors import BadInput, GraphcombError, in_a_line, named, nearest
from .graph.program import Program, load


def resolve(spec: str, field: str) -> Any:
    """Import and return the object `package.module:attribute`; modules in the working folder are found, too.

    field: the field of the recipe, for the message. Raises BadInput if there is no such object.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise BadInput(f'{field}: "{spec}" is not of the form package.module:callable')
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:
        raise BadInput(f'{field}: cannot import "{module_name}" ({in_a_line(error)})') from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [name for name in dir(value) if not name.startswith("_")]
            raise BadInput(f'{field}: {module_name} has no "{attribute}"; {nearest(part, public)}')
        value = getattr(value, part)
    return value


def call(spec: str, arguments: dict[str, Any], field: str) -> Any:
    """Call the object `spec` with keyword arguments and return the result. Raises a GraphcombError, which names `field`, for
    every exception of the call."""
    function = resolve(spec, field)
    if not callable(function):
        raise BadInput(f"{field}: {spec} is a {type(function).__name__}, not a callable")
    return _guarded(function, spec, arguments, field)


def load_model(spec: str, arguments: dict[str, Any] | None = None) -> torch.nn.Module | Program:
    """Return a module from `package.module:callable`, or a Program from a `.pt2` file or an exported program.

    Raises a GraphcombError, which names the field `model`, for anything else.
    """
    if spec.endswith(".pt2"):
        if arguments:
            raise BadInput("model: a .pt2 file takes no arguments")
        with named("model"):
            return load(spec)
    if ":" not in spec:
        raise BadInput(f'model: "{spec}" is neither package.module:callable nor a .pt2 or .onnx file')
    model = call(spec, arguments or {}, "model")
    if isinstance(model, ExportedProgram):
        return Program.from_exported(model)
    if not isinstance(model, (torch.nn.Module, Program)):
        raise BadInput(f"model: {spec} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def load_onnx(
    spec: str,
    arguments: dict[str, Any],
    args: tuple[torch.Tensor, ...] | None,
    dynamic_shapes: str | None,
    outputs: list[str] | None = None,
) -> Program:
    """Return the Program of an `.onnx` file.

    arguments: {"shapes": shapes of inputs by name}, or {}. The other arguments are those of `from_onnx`. Raises a
    GraphcombError, which names the field `model`.
    """
    from .graph.onnx.from_onnx import from_onnx  # imported here, since it imports ONNX Runtime

    shapes = arguments.get("shapes", {})
    if set(arguments) - {"shapes"} or not isinstance(shapes, dict):
        raise BadInput("model: an .onnx file takes no arguments but shapes, {name of an input: [sizes]}")
    with named("model"):
        return from_onnx(spec, args, shapes=shapes, dynamic_shapes=dynamic_shapes, outputs=outputs)


def load_data(spec: str, arguments: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """Return the loaders of training and validation batches. Both can be iterated several times.

    A callable returns two loaders or one, which is then used for both. Raises a GraphcombError, which names the field
    `data`, for unknown data, a callable that fails, and a result that is no loader.
    """
    arguments = arguments or {}
    if ":" in spec:
        loaders = call(spec, arguments, "data")
    elif spec in builtin.BUILTIN:
        loaders = _guarded(builtin.BUILTIN[spec], spec, arguments, "data")
    else:
        raise BadInput(f'data: unknown data "{spec}"; {nearest(spec, builtin.BUILTIN)}, or package.module:callable')
    pair = loaders if isinstance(loaders, tuple) and len(loaders) == 2 else (loaders, loaders)
    for loader in pair:
        if isinstance(loader, (str, dict, torch.Tensor)) or not isinstance(loader, Iterable):
            raise BadInput(f"data: {spec} returned a {type(loader).__name__}, not a DataLoader or (train, val)")
        if isinstance(loader, Iterator):
            raise BadInput(f"data: {spec} returned a one-shot iterator; return a DataLoader or a list of batches")
    return pair


def first_batch(loader: Any) -> Any:
    """Return the first batch of a loader. Raises BadInput if the loader yields no batch or fails."""
    try:
        return next(iter(loader))
    except StopIteration:
        raise BadInput("data: the loader yields no batch") from None
    except GraphcombError:
        raise
    except Exception as error:
        raise BadInput(f"data: the loader fails on its first batch ({in_a_line(error)})") from error


def _guarded(function: Any, spec: str, arguments: dict[str, Any], field: str) -> Any:
    try:
        return function(**arguments)
    except GraphcombError as error:
        raise type(error)(f"{field}: {error}") from error
    except Exception as error:
        text = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
        raise BadInput(f"{field}: {spec}({text}) failed ({in_a_line(error)})") from error
