"""Oracles: independent proof that a rewritten program computes what it should. Source: ours.

`surgery` (a number) and `check` (a verdict) run the absence oracle on random weights; `parity` and `equivalence` compare
two forms of one model; `randomised` makes a program whose weights hide no error; `means` tells the absence oracle about a
custom operator.
"""

from .check import TOLERANCE, Verdict, check, surgery
from .meanings import Call, means
from .meanings.entrywise import entrywise
from .parity import equivalence, parity, randomised
from .presence import Disagreement, Held

__all__ = [
    "TOLERANCE", "Call", "Disagreement", "Held", "Verdict", "check", "entrywise", "equivalence", "means", "parity",
    "randomised", "surgery",
]  # fmt: skip
