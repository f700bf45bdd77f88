"""The toy networks of these tests: `CASES` by name."""

from . import attention, layers, movement, recurrent  # noqa: F401  # fill the table
from .case import CASES, Head, TokenHead

__all__ = ["CASES", "Head", "TokenHead"]
