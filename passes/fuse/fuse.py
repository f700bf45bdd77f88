"""The pass that merges linear operators: it finds regions, merges them where that is cheaper, and verifies every merge."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from ...graph.edit import rebuild
from ...graph.facts import MAPS
from ...graph.nodes import arguments, op_name
from ...graph.program import Program
from ..base import Context, Pass, PassResult, Refusal
from .choose_merges import Layers
from .merge_in_graph import Merger
from .merge_weights import Inexact
from .parts import geometry_of, map_of
from .proof import EPSILON, TOLERANCE, Proof
from .regions import OTHER_AXIS


@dataclass(frozen=True)
class Fuse(Pass):
    """Merge neighbouring linear operators into one convolution or linear layer wherever that is exact and cheaper.

    Linear operators are convolutions, transposed ones (which only a scale can follow), linear layers, batch
    normalisation by its running statistics, zero padding, and adding or multiplying by a constant or a vector of
    channels (layer scale). Chains of them, sums of parallel branches of one input, and sums with that input itself are
    regions with one entry and one exit, found in the graph without hints: normalisation before or after a layer, 1x1
    and linear chains, convolutions in a row with strides, dilation and groups, identity skips, and the branches of
    RepVGG (arXiv 2101.03697), MobileOne, RepViT and FastViT. The algebra is that of `passes.fuse.merge_weights`. Dynamic
    programming (ours) cuts a region into the pieces that take the fewest multiply-accumulates (MACs) and, among equals,
    launch the fewest kernels.

    Every merge is checked by itself in float64, borders included, on random inputs, with its own weights and with
    random ones (a layer scale of 1e-6 would hide an error); then all merges together on the whole network. A merge
    whose relative error exceeds 1e-10 is not done. Where the network itself magnifies rounding errors, so that
    comparing its outputs proves nothing, every node is compared on the values that its inputs have in the original
    network, which proves the whole by induction.

    Refused, with the reason in the record: a change of precision within a merge; a padded convolution after one that
    has a bias or a larger kernel (wrong at the border); batch statistics; weights that are shared, tied or computed;
    intermediate results that are used elsewhere; a normalisation over another axis than the layer's features, or
    without a layer next to it. `gated` in the record lists merges that would be exact but cost more. The result
    computes what the input program computes in eval mode; parameters that were merged away cannot be trained any more.
    """

    exact: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> PassResult:
        wrong: dict[str, str] = {}  # ends of merges that the whole network showed to be wrong, with the reason
        while True:
            merger = Merger(program, context.seed, wrong)
            merger.run()
            record: dict[str, Any] = {"changed": merger.changed, "refused": _refusals(merger)}
            record |= {"gated": [pair.row() for pair in _pairs(merger.planner.gated)], "error": 0.0}
            if not merger.changed:
                return PassResult(program.copy(), record)
            proof = merger.proof()
            if not proof.wrong:
                break
            wrong |= proof.wrong
        fused = program.derive(rebuild(merger.module), stale=False)
        return PassResult(fused, record | {"error": proof.error} | _magnified(proof))


def _magnified(proof: Proof) -> dict[str, Any]:
    """The note and the kind of proof for the record where comparing outputs proved nothing; else nothing."""
    if proof.magnified is None:
        return {}
    note = (
        f"the network magnifies rounding errors: one of {EPSILON:.0e} in its inputs moves its outputs by "
        f"{proof.magnified:.1e}; so every merge was compared on the values that it has in the network"
    )
    oracle = {"oracle": "input program, node by node", "error": proof.error, "tolerance": TOLERANCE}
    return {"note": note, "verified": oracle}


# ------------------------------------------------------------------------------------------ why what is left was not merged
def _refusals(merger: Merger) -> list[Refusal]:
    """Every normalisation that is left, every pair of layers that could not be merged, and every merge that was wrong."""
    left = [n for n in merger.graph.nodes if op_name(n) == "batch_norm"]
    norms = [Refusal(_label(n), _why_left(merger, n)) for n in left]
    wrong = [Refusal(end.name, f.why) for end, f in merger.failed.items() if f.members.isdisjoint(left)]
    return norms + _pairs(merger.planner.refused) + wrong


def _pairs(reasons: dict[Layers, str]) -> list[Refusal]:
    """Refusals for pairs of neighbouring layers, which are named by their weights."""
    return [
        Refusal(" + ".join(str(arguments(n)["weight"].target).removesuffix(".weight") for n in layers), why)
        for layers, why in reasons.items()
    ]


def _why_left(merger: Merger, norm: fx.Node) -> str:
    before, reasons = norm.args[0], []
    if isinstance(before, fx.Node) and op_name(before) in MAPS:
        reasons.append(f"batch_norm after linear map: {_between(merger, before, norm)}")
    for user in norm.users:
        if op_name(user) in MAPS and user.args[0] is norm:
            reasons.append(f"batch_norm before linear map: {_between(merger, norm, user)}")
    reasons += [f.why for f in merger.failed.values() if norm in f.members]
    after = ", ".join(op_name(u) for u in norm.users)
    return "; ".join(reasons) or f"no linear layer next to it ({op_name(before)} -> batch_norm -> {after})"  # type: ignore[arg-type]


def _between(merger: Merger, first: fx.Node, second: fx.Node) -> str:
    """Why a layer and a normalisation were not merged."""
    regions = merger.regions
    if len(first.users) > 1:
        return f"{first.name} is used by {len(first.users)} nodes"
    if problem := regions.problem(first) or regions.problem(second):
        return problem
    a, b = regions.step(first), regions.step(second)
    assert a is not None
    assert b is not None
    if a.axis != b.axis or a.axis is None:
        return OTHER_AXIS
    try:
        map_of(a, a.axis, geometry_of).then(map_of(b, a.axis, geometry_of))
    except Inexact as why:
        return str(why)
    return "it is cheaper as it is" if not merger.failed else "a merge was wrong"


def _label(norm: fx.Node) -> str:
    mean = arguments(norm)["running_mean"]
    return str(mean.target).removesuffix(".running_mean") if mean is not None else norm.name
