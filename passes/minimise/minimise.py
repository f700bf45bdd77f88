"""The pass that removes what zeros in weights have made useless."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...graph.comb.groups import DEFAULT_KINDS, Group
from ...graph.comb.solve import Comb
from ...graph.comb.surgery import Removed, remove
from ...graph.errors import GraphcombError
from ...graph.nodes import fetch
from ...graph.program import Program
from ...graph.sparse import sparse_weights
from ...graph.verify import TOLERANCE, check, equivalence
from ...graph.verify.removal import composed
from ..base import Context, Pass, PassResult, Refusal
from .live import Liveness, Masks, frozen_zeros

ROUNDED = 1e-5  # tolerance where a bias took a constant and was rounded to float32


@dataclass(frozen=True)
class Minimise(Pass):
    """Remove the channels, heads and hidden units that zeros in weights have made useless; nothing else changes.

    After unstructured sparsity, by `Sparsify` or any other method, some indices are *unread*: every weight that reads them
    is zero. Others are *dead*: all weights that compute them are zero, so their value is a constant `k`, such as
    `act(BN(bias))`, and their readers take `W k` into their biases, or into the running mean of the BatchNorm behind them.
    Both go, with all that only they needed, until nothing is left to remove. The result is a smaller dense network that
    computes the same in eval mode. That is proven in float64 (`record["unchanged"]`) besides the removal itself
    (`record["verified"]`).

    Left alone, and named with the reason: a constant other than zero in front of padding (it is not the same at the
    border), at a layer with neither bias nor BatchNorm, or that differs between positions; axes that a LayerNorm or the
    like takes statistics over; groups that are frozen; input channels of weights with a pattern such as 2:4, which would
    break; and the last indices of a group. A residual trunk's index is dead only where everything that is added to it is.

    The record says for each group how many indices went, how many of these were `dead` and how many `unread`, and why the
    others stay. Source: ours, after Squeeze-Release (arXiv 2606.14346).
    """

    exact: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> PassResult:
        current, masked = program, program.copy()
        removed: Removed = {}
        changed: dict[str, dict[str, Any]] = {}
        folded: set[str] = set()
        reasons: dict[tuple[str, str], Refusal] = {}
        while True:
            comb = Comb(current)
            live, refusals = _examine(comb)
            reasons |= {(row.what, row.why): row for row in refusals}
            masks = {atom: mask for atom, mask in live.masks.items() if not mask.all()}
            if not masks:
                break
            # What was removed may be why an operator's result was unknown to `constants`, so look again.
            current, lost = remove(comb, masks)
            folds = live.folds()
            folded |= folds.keys()
            for name, added in folds.items():
                kept = np.delete(np.arange(len(added)), lost.get(name, {}).get(0, []))
                _add(fetch(current.module(), name).data, np.arange(len(kept)), added[kept])
                whole = fetch(masked.module(), name).data
                _add(whole, np.delete(np.arange(len(whole)), removed.get(name, {}).get(0, [])), added)
            removed = composed([removed, lost])
            for row in _changes(live, masks):
                before = changed.setdefault(row["what"], row | {"dead": 0, "unread": 0})
                before |= {"after": row["after"], "dead": before["dead"] + row["dead"]}
                before["unread"] += row["unread"]
            cost = comb.cost({atom: int(mask.sum()) for atom, mask in masks.items()})
        refused = list(reasons.values())
        if not removed:
            return PassResult(program.copy(), {"changed": [], "refused": refused})
        current.known_cost = cost
        record: dict[str, Any] = {"changed": list(changed.values()), "refused": refused, "folded": sorted(folded)}
        result = PassResult(current, record | {"removed": removed}, removed, masked)
        result.record |= self._proven(program, result, bool(folded), context)
        return result

    @staticmethod
    def _proven(program: Program, result: PassResult, folded: bool, context: Context) -> dict[str, Any]:
        """Prove that the result is a slice of the network with folded constants, and that it computes what the input
        program does."""
        verdict = check(program, result, seed=context.seed)
        single = any(p.dtype != torch.float64 for p in program.module().parameters())
        tolerance = ROUNDED if folded and single else TOLERANCE
        error = equivalence(program, result.program, seed=context.seed)
        # A removal that no weights could make visible is right, too: what was removed had no path to the outputs.
        if verdict.disagreements or not verdict.error <= TOLERANCE or not error <= tolerance:
            why = next(iter(verdict.disagreements), f"it is {error:.1e} off the program that went in")
            raise GraphcombError(f"Minimise: the result is not the same network ({why}); a bug of graphcomb")
        return {
            "verified": {"oracle": "absence oracle", "error": verdict.error, "tolerance": TOLERANCE},
            "unchanged": {"oracle": "input program", "error": error, "tolerance": tolerance},
        }


def _examine(comb: Comb) -> tuple[Liveness, list[Refusal]]:
    """What the outputs need, and refusals for indices that stay although they are zero, constant or unread."""
    patterned = {name for name, pattern in sparse_weights(comb.program).items() if pattern}
    reasons = [(group, group.frozen or _barred(group, patterned)) for group in comb.groups]
    zeros = frozen_zeros(comb, [group for group, why in reasons if why])
    live = Liveness(comb, [group for group, why in reasons if why is None])
    live.solve()
    left, refused = live.left(), []

    def refuse(group: Group, why: str, count: int) -> None:
        refused.append(Refusal(group.name, why, {"kind": group.kind, "size": group.size, "count": count}))

    for group, why in reasons:
        if why is not None and group.atom in zeros:
            refuse(group, why, zeros[group.atom])
        for reader, where in left.get(group.atom, {}).items():
            refuse(group, reader, int(where.sum()))
        if group.atom in live.forced:
            text = f"nothing needs what it computes, but an operator needs {group.least} of its indices"
            refuse(group, text, live.forced[group.atom])
    return live, refused


def _changes(live: Liveness, masks: Masks) -> Iterator[dict[str, Any]]:
    """Yield a row of the record for each group that loses indices."""
    dead = live.dead()
    for group in (g for g in live.groups if g.atom in masks):
        gone = ~masks[group.atom]
        count = int((gone & dead[group.atom]).sum()) if group.atom in dead else 0
        yield {
            "what": group.name, "kind": group.kind, "before": group.size, "after": int((~gone).sum()), "dead": count,
            "unread": int(gone.sum()) - count,
        }  # fmt: skip


def _add(stored: Tensor, rows: np.ndarray, added: Tensor) -> None:
    index = torch.from_numpy(rows).to(stored.device)
    stored[index] = (stored[index].double() + added.to(stored.device)).to(stored.dtype)


def _barred(group: Group, patterned: set[str]) -> str | None:
    """Why a group that is not frozen must stay whole, or None."""
    if group.kind not in DEFAULT_KINDS:
        return f"indices of the kind {group.kind} are left alone"
    for name, dim in group.members:
        if name in patterned and dim == 1:
            return f"it is the input of {name}, whose pattern would break"
    return None
