"""Op rules, by topic; importing the package fills the table."""

from . import contraction, elementwise, indexing, layout, recurrent, reduction, spatial  # noqa: F401
from .registry import RULES, NoRule, Rule, rule

__all__ = ["RULES", "NoRule", "Rule", "rule"]
