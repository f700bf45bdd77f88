"""Merging of linear operators into one, such as Conv + BatchNorm: `regions` finds them, `merge_weights` has the weights,
`merge_in_graph` edits the graph."""

from .fuse import Fuse

__all__ = ["Fuse"]
