"""Merging of linear operators into one, such as Conv + BatchNorm: `regions` finds them, `merge_kernels` has the weights,
`merge_nodes` edits the graph."""

from .fuse import Fuse

__all__ = ["Fuse"]
