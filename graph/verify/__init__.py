"""Oracles: independent proof that a rewritten program computes what it should. Source: ours.

`surgery` (a number) and `check` (a verdict) run the absence oracle on random weights; `restriction` and `interference` are
second opinions that read masks from the comb; `parity` and `equivalence` compare two forms of one model; `mutation_test`
measures whether a wrong index would be noticed; `randomised` makes a program whose weights hide nothing.
"""

from .check import TOLERANCE, Verdict, check, surgery
from .mutate import Mutation, MutationReport, mutate, mutation_test
from .parity import equivalence, parity, randomised
from .restriction import interference, restriction

__all__ = [
    "TOLERANCE",
    "Mutation",
    "MutationReport",
    "Verdict",
    "check",
    "equivalence",
    "interference",
    "mutate",
    "mutation_test",
    "parity",
    "randomised",
    "restriction",
    "surgery",
]
