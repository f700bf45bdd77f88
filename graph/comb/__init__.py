"""The comb: the atoms that every dimension of every tensor consists of, and the indices that must be removed together."""

from .groups import Group
from .solve import Comb, comb

__all__ = ["Comb", "Group", "comb"]
