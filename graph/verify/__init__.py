"""Oracles: independent proof that a rewritten program computes what it should. Source: ours.

`surgery` (a number) and `check` (a verdict) run the absence oracle on random weights; `restriction` and `interference` are
second opinions that read masks from the comb; `parity` and `equivalence` compare two forms of one model; `mutation_test`
measures whether a wrong index would be noticed; `randomised` makes a program whose weights hide nothing; `means` tells the
absence oracle about a custom operator.
"""

from .absence import Call, entrywise, means
from .check import TOLERANCE, Verdict, check, surgery
from .mutate import Mutation, MutationReport, mutate, mutation_test
from .parity import equivalence, parity, randomised
from .presence import Disagreement, Held
from .restriction import interference, restriction

__all__ = [
    "TOLERANCE",
    "Call",
    "Disagreement",
    "Held",
    "Mutation",
    "MutationReport",
    "Verdict",
    "check",
    "entrywise",
    "equivalence",
    "interference",
    "means",
    "mutate",
    "mutation_test",
    "parity",
    "randomised",
    "restriction",
    "surgery",
]
