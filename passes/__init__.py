"""Passes: one rewrite or training stage per file. A recipe names them by class; fields are their options."""

from .base import Context, Pass, PassResult
from .comb import Comb
from .remove_channels import RemoveChannels

__all__ = ["Comb", "Context", "Pass", "PassResult", "RemoveChannels"]
