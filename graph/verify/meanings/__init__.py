"""What absent entries mean to operators, by topic; importing the package fills the table."""

from . import contraction, entrywise, movement, positions, recurrent, reduction, repetition  # noqa: F401
from .registry import REPEATING, RULES, Call, means

__all__ = ["REPEATING", "RULES", "Call", "means"]
