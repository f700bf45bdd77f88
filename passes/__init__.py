"""Passes: one rewrite or training stage per file. A recipe names them by class; fields are their options."""

from .base import Context, Pass, PassResult
from .comb import Comb
from .distill import Distill
from .fuse import Fuse
from .prune_depth import PruneDepth
from .quantize import Quantize
from .remove_channels import RemoveChannels
from .sparsify import Sparsify
from .split_fused import SplitFused

__all__ = [
    "Comb",
    "Context",
    "Distill",
    "Fuse",
    "Pass",
    "PassResult",
    "PruneDepth",
    "Quantize",
    "RemoveChannels",
    "Sparsify",
    "SplitFused",
]
