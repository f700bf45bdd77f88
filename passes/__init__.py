"""Passes: one rewrite or training stage per file. A recipe names them by class; fields are their options."""

from .base import Context, Pass, PassResult
from .channels.remove_channels import RemoveChannels
from .comb import Comb
from .depth.prune_depth import PruneDepth
from .fuse.fuse import Fuse
from .legalise.legalise import Legalise
from .minimise.minimise import Minimise
from .quantize import Quantize
from .repair import Recalibrate, Repair
from .sparse.sparsify import Sparsify
from .split_fused import SplitFused
from .train.distill import Distill

__all__ = [
    "Comb",
    "Context",
    "Distill",
    "Fuse",
    "Legalise",
    "Minimise",
    "Pass",
    "PassResult",
    "PruneDepth",
    "Quantize",
    "Recalibrate",
    "RemoveChannels",
    "Repair",
    "Sparsify",
    "SplitFused",
]
