"""Errors that a user may see: one clear line each; the command line prints it and exits with code 2."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def strict() -> bool:
    """Whether a mistake in a rule is raised: in our own tests, which set GRAPHCOMB_STRICT=1. For users it becomes a refusal
    that names it, so that their network is still pruned."""
    return os.environ.get("GRAPHCOMB_STRICT") == "1"


class GraphcombError(Exception):
    """Base of all errors that a user can act on. The message is one line that names the field or node."""


class BadInput(GraphcombError):
    """A recipe, model, data set, option or file is not what it should be."""


class CaptureError(GraphcombError):
    """`torch.export` refused the model, the exported graph cannot be made functional, or the program differs from the
    model."""


class Refused(GraphcombError):
    """A pass or rule is not sure that a rewrite is exact, so it does not do it."""


class Unreachable(GraphcombError):
    """A target (MACs, parameters, latency, number of blocks) cannot be reached; the message says what is reachable."""


class Contended(GraphcombError):
    """The machine is too busy for a measurement to be trusted."""


class MissingBackend(GraphcombError):
    """An optional package is not installed; the message names the extra to install."""


@contextmanager
def named(place: str) -> Iterator[None]:
    """A context whose errors name a place, such as a field of a recipe, before what they say."""
    try:
        yield
    except GraphcombError as error:
        raise type(error)(f"{place}: {error}") from error


def in_a_line(error: BaseException, most: int = 200) -> str:
    """Another library's error in one line: its class and the first line of its message, up to `most` characters of it."""
    line = first_line(error)
    return f"{type(error).__name__}: {line[:most]}" if line else type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, or ""."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the most similar valid names, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def reason(error: BaseException) -> str:
    """The first line of the innermost error's message that is not blank, up to 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (first_line(error) or type(error).__name__)[:300]
