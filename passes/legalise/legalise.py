"""The pass that rewrites what a deep learning accelerator (DLA) lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ...graph.errors import BadInput, GraphcombError
from ...graph.program import Program
from ...graph.verify import TOLERANCE, equivalence
from ..base import Change, Context, Pass, PassResult, Refusal, check_field
from ..common.scoring import evaluate
from ..train.distill import Distill
from .steps import STEPS, applied


@dataclass(frozen=True)
class Legalise(Pass):
    """Rewrite operators that the target's DLA lacks by those that it has, so that fewer layers fall back to the GPU.

    Every change between DLA and GPU copies a tensor. A step is done in the whole network. Those that save most changes come
    first, and each is kept only if it saves a change, or else a layer on the GPU. Where each layer runs is what the
    context's `placement` predicts, for a recipe the documented rules of its target (`graphcomb.runtime.dla_placement`).

    Exact steps, each of which is proven in float64 against the network before it: `hard-swish` (also hard-sigmoid) by its
    definition, `mean` as average pooling, `linear` over a flattened image as convolution, `deconvolution` without groups,
    padding and dilation, `resize` (nearest, by whole numbers) as deconvolution. The last two may cost further
    multiply-accumulates, which the record's cost shows. (Zero padding needs no step: the export puts it into convolutions.)

    Steps that compute something else: `silu` becomes hard-swish, `gelu` x sigmoid(1.702 x). They need the context's `val`;
    each is kept only if the metric falls by no more than allowed.

    - steps: what may be done.
    - always: what is done although it saves nothing by the rules: a DLA in INT8 computes the sigmoid of SiLU in fp16.
    - tolerance: how far the metric may fall in each step that is not exact, compared with the network before it.
    - train: how the network is trained after each of them, with the context's teacher or the input program as the teacher.

    The record's `steps` says what each one saved and its error or metric, and `placement` the number of changes and of
    layers on the GPU. Raises BadInput without a target that has a DLA and without a placement. Source: ours.
    """

    steps: tuple[str, ...] = tuple(STEPS)
    always: tuple[str, ...] = ()
    tolerance: float = 0.01
    train: Distill | None = None

    def __post_init__(self) -> None:
        for field in ("steps", "always"):
            check_field(self, field, set(getattr(self, field)) <= set(STEPS), f"of {', '.join(STEPS)}")
        check_field(self, "tolerance", self.tolerance >= 0, "at least 0")

    def run(self, program: Program, context: Context) -> PassResult:
        rules = getattr(context.target, "dla", None)
        if rules is None or context.placement is None:
            raise BadInput(
                "Legalise: needs a target with a DLA, and where its layers run (placement=dla_placement(target))"
            )
        place = context.placement
        current, before = program, _left(place(program))
        now, taken, changed = before, [], []
        refused: dict[tuple[str, str], Refusal] = {}

        def trial(name: str) -> tuple[tuple[int, int], Program, list[str]]:
            new, nodes, why = applied(current, name, rules)
            refused.update({(name, node): Refusal(node, text, {"step": name}) for node, text in why.items()})
            return _left(place(new)) if nodes else now, new, nodes

        first = {name: trial(name)[0] for name in dict.fromkeys([*self.always, *self.steps])}
        waiting, missed = sorted(first, key=lambda name: first[name]), []
        while waiting:
            name = waiting.pop(0)
            left, new, nodes = trial(name)
            if not nodes or (left >= now and name not in self.always):
                missed.append(name)
                continue
            row = {"step": name, "nodes": len(nodes), "placement": {"before": _row(now), "after": _row(left)}}
            new, proof, why = self._judged(name, current, new, program, context)
            if why:
                refused |= {(name, node): Refusal(node, why, {"step": name}) for node in nodes}
                continue
            taken.append(row | proof)
            changed += [Change(node, {"step": name}) for node in nodes]
            current, now = new, left
            waiting, missed = waiting + missed, []  # a step may save something after another one
        record = {
            "changed": changed,
            "refused": list(refused.values()),
            "steps": taken,
            "placement": {"before": _row(before), "after": _row(now)},
        }
        return PassResult(current if current is not program else program.copy(), record)

    def _judged(
        self, name: str, before: Program, after: Program, dense: Program, context: Context
    ) -> tuple[Program, dict[str, Any], str]:
        """Return the program after a step, the entries of its row, and why the step is undone, if it is."""
        instead = STEPS[name].instead
        if not instead:
            error = equivalence(before, after, seed=context.seed)
            if not error <= TOLERANCE:
                raise GraphcombError(f"Legalise: {name} is {error:.1e} off the program before it; a bug of graphcomb")
            return after, {"exact": True, "error": error}, ""
        if context.val is None:
            return after, {}, f"it would become {instead}, and there is no validation data to see what that costs"
        if self.train is not None:
            teacher = context.teacher or dense
            after = self.train(after, context.replaced("Legalise", teacher=teacher)).program
        scores = [evaluate(p, context.val, context.metric) for p in (before, after)]
        if scores[0] - scores[1] > self.tolerance:
            return after, {}, f"as {instead} the metric falls from {scores[0]:.4g} to {scores[1]:.4g}"
        return after, {"exact": False, "instead": instead, "metric": {"before": scores[0], "after": scores[1]}}, ""


def _left(placed: Sequence[tuple[str, str]]) -> tuple[int, int]:
    """Return the number of changes between DLA and GPU from one layer to the next, and of layers on the GPU."""
    on_gpu = [bool(why) for _, why in placed]
    return sum(a != b for a, b in pairwise(on_gpu)), sum(on_gpu)


def _row(left: tuple[int, int]) -> dict[str, int]:
    return dict(zip(("changes", "on_gpu"), left, strict=True))
