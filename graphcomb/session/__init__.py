"""Passes that train, in the user's own training loop."""

from .session import Session, attach

__all__ = ["Session", "attach"]
