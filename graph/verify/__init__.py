"""Oracles: independent proof that a rewritten program computes what it should. Source: ours.

`surgery` and `check` run the absence oracle on random weights.
"""

from .check import Verdict, check, surgery

__all__ = ["Verdict", "check", "surgery"]
