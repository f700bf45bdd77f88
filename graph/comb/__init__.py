"""The comb: what every dimension of every tensor is made of, and which indices must go together."""

from .groups import Group
from .solve import Comb, comb

__all__ = ["Comb", "Group", "comb"]
