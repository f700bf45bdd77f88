"""Checks of values against type hints, for the options of passes (in Python and in recipes) and of engines."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import BadInput

WORDS = {
    float: "a number", int: "a whole number", bool: "true or false", str: "text", os.PathLike: "text",
    tuple[str, ...]: "a list of texts", Sequence: "a list", Mapping: "a mapping", Callable: "a function",
}  # fmt: skip


def checked(hint: Any, value: Any, name: str) -> Any:
    """Return the value in the type of its hint, or raise BadInput: `name: a number, not 'half'`.

    Only lossless conversions are made: a whole number becomes a float, a scalar of NumPy or PyTorch becomes one of Python,
    and for a tuple a list is accepted, or a single text. True and false are no numbers, and numbers must be finite.
    """
    from pydantic import ValidationError

    plain = value.item() if getattr(value, "shape", None) == () else value
    if get_origin(hint) is tuple:
        plain = _tuples((plain,) if isinstance(plain, str) else plain)
    try:
        return _adapter(hint).validate_python(plain)
    except ValidationError as error:
        infinite = error.errors()[0]["type"] == "finite_number"
        raise BadInput(f"{name}: {'a finite number' if infinite else in_words(hint)}, not {value!r}") from None


def in_words(hint: Any) -> str:
    """What a type hint asks for, as in "a whole number or a list"; None is left out."""
    origin = get_origin(hint) or hint
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(in_words(part) for part in get_args(hint) if part is not NoneType))
    if origin is Literal:
        return " or ".join([", ".join(map(str, get_args(hint)[:-1])), str(get_args(hint)[-1])]).removeprefix(" or ")
    if origin is tuple and hint not in WORDS:
        parts = [in_words(part) for part in get_args(hint) if part is not ...]
        return f"a list, each {parts[0]}" if ... in get_args(hint) else f"[{', '.join(parts)}]"
    return WORDS.get(hint) or WORDS.get(origin) or f"a {getattr(origin, '__name__', origin)}"


def check_fields(instance: Any, prefix: str | None = None) -> None:
    """Check every field of a frozen dataclass against its type hint, and store what `checked` returns.

    prefix: the start of a field's name in messages, by default the class (`RemoveChannels.ratio: ...`). Raises BadInput for
    the first field that does not fit.
    """
    cls = type(instance)
    hints, prefix = field_hints(cls), f"{cls.__name__}." if prefix is None else prefix
    for field in dataclasses.fields(instance):
        if field.name in hints:
            value = checked(hints[field.name], getattr(instance, field.name), prefix + field.name)
            object.__setattr__(instance, field.name, value)


def field_hints(cls: type) -> dict[str, Any]:
    """The type hints of a class; empty, so that nothing is checked, if a name in them is unknown at run time."""
    try:
        return get_type_hints(cls)
    except NameError:
        return {}


@functools.cache
def _adapter(hint: Any) -> Any:
    """The validator of a hint, built once. Imports pydantic late, for a quick start of the command line."""
    from pydantic import ConfigDict, TypeAdapter

    strict = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    return TypeAdapter(hint, config=None if dataclasses.is_dataclass(hint) else strict)


def _tuples(value: Any) -> Any:
    """The value with all its lists as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
