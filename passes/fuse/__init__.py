"""Merging of linear operators into one."""

from .fuse import Fuse

__all__ = ["Fuse"]
