"""The pass that reports what the comb found; it changes nothing."""

from dataclasses import dataclass

from ..graph.comb.solve import Comb as Solver
from ..graph.program import Program
from .base import Context, Pass, PassResult, Refusal


@dataclass(frozen=True)
class Comb(Pass):
    """Solve the axes and record every group of channels, which groups are frozen, and why. The program stays as it is."""

    def run(self, program: Program, context: Context) -> PassResult:
        solved = Solver(program)
        free = [g for g in solved.groups if g.frozen is None]
        record = {
            "groups": [{"name": g.name, "kind": g.kind, "size": g.size, "members": len(g.members)} for g in free],
            "refused": [Refusal(g.name, g.frozen, {"kind": g.kind, "size": g.size}) for g in solved.groups if g.frozen],
            "prunable_share": solved.coverage(),
        }
        return PassResult(program.copy(), record)
