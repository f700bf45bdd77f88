"""The comb: what every dimension of every tensor is made of, and which indices must go together."""

from .solve import Comb, Group, comb

__all__ = ["Comb", "Group", "comb"]
