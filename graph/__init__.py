"""The program and what we know about it."""

from .program import Program, capture, load

__all__ = ["Program", "capture", "load"]
