"""The restriction oracle, a second opinion: the original network with the removed indices cut off where they are used.

Unlike the absence oracle it takes the comb's word for what every axis is made of: masks of all tensors are read from the
solved axes. The original graph runs unchanged on finite numbers; contractions zero the removed indices of their operands,
normalisations and reductions leave them out, and whatever else the removed entries hold must not matter. Source: ours.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx

from graphcomb.graph.comb import axes as ax
from graphcomb.graph.comb.solve import Comb
from graphcomb.graph.errors import GraphcombError
from graphcomb.graph.nodes import arguments, is_operator, op_name
from graphcomb.graph.program import Program
from graphcomb.graph.verify.check import Trial
from graphcomb.graph.verify.evaluate import Evaluator, evaluated, invoke, relative_error
from graphcomb.graph.verify.meanings.contraction import spell_out
from graphcomb.graph.verify.presence import along
from graphcomb.graph.verify.removal import Removed, checked, kept, removed_since

Masks = dict[ax.Factor, np.ndarray]
STATISTICS = frozenset(
    "mean sum nansum amax amin var std linalg_vector_norm norm logsumexp prod all any var_mean std_mean aminmax "
    "frobenius_norm count_nonzero max min median mode "
    "softmax log_softmax _softmax _log_softmax softmin _safe_softmax".split()
)
SAME_SHAPE = frozenset("softmax log_softmax _softmax _log_softmax softmin _safe_softmax".split())


def restriction(before: Program, result: Any, *, seed: int = 0, comb: Comb | None = None) -> float:
    """Worst relative error in float64 of a pruned program against the restricted original, on random weights.

    comb: the solved axes of `before`, solved here if not given. GraphcombError when what was removed is no union of atoms.
    """
    removed = checked(before, removed_since(before, result))
    comb = comb or Comb(before)
    masks = atom_masks(comb, removed)
    trial = Trial(before, result.program, removed, seed)
    trial.prepare()
    expected = Restriction(comb, trial.weights, masks).run(trial.inputs)
    return relative_error(Evaluator(result.program, trial.sliced).run(trial.inputs), expected)


def interference(before: Program, result: Any, *, seed: int = 0, comb: Comb | None = None) -> float:
    """How far noise on everything that was removed reaches into the outputs: 0 when it is cut off everywhere.

    The restricted original runs twice; in between, all removed entries of parameters and buffers are replaced by noise.
    Relative, in float64.
    """
    removed = checked(before, removed_since(before, result))
    comb = comb or Comb(before)
    masks = atom_masks(comb, removed)
    trial = Trial(before, result.program, removed, seed)
    trial.draw(seed)
    clean = Restriction(comb, trial.weights, masks).run(trial.inputs)
    noisy = {name: _disturbed(w, removed.get(name, {}), trial.generator) for name, w in trial.weights.items()}
    return relative_error(Restriction(comb, noisy, masks).run(trial.inputs), clean)


def atom_masks(comb: Comb, removed: Removed) -> Masks:
    """Which indices of each atom stay, read off the parameters; checks that they say the same everywhere."""
    counts: dict[ax.Factor, np.ndarray] = {}
    for name, lost in removed.items():
        for d, indices in lost.items():
            axis = comb.parameters[name][d]
            stays = np.zeros(ax.size(axis), dtype=np.int64)
            stays[kept(len(stays), indices)] = 1
            ax.fold(axis, stays, counts)
    masks = {atom: count > 0 for atom, count in counts.items() if not (count > 0).all()}
    for name, axes in comb.parameters.items():
        for d, axis in enumerate(axes):
            expected = kept(ax.size(axis), removed.get(name, {}).get(d, ()))
            if not np.array_equal(np.flatnonzero(ax.kept_mask(axis, masks)), expected):
                raise GraphcombError(f"what was removed of {name}, dimension {d}, is not what its atoms lose elsewhere")
    return masks


def _disturbed(weight: torch.Tensor, lost: Any, generator: torch.Generator) -> torch.Tensor:
    if not lost or not weight.is_floating_point():
        return weight
    weight = weight.clone()
    for d, indices in lost.items():
        at = torch.tensor(indices, device=weight.device)
        part = weight.index_select(d, at)
        noise = torch.rand(part.shape, generator=generator, dtype=torch.float64).to(weight.device)
        weight.index_copy_(d, at, part * (0.5 + noise) + 0.3 * noise)
    return weight


class Restriction(Evaluator):
    """Runs the original program with the removed indices of every operand cut off."""

    def __init__(self, comb: Comb, weights: dict[str, torch.Tensor], masks: Masks):
        super().__init__(comb.program, weights)
        self.comb, self.masks = comb, masks
        self.device = next((w.device for w in weights.values()), torch.device("cpu"))

    # -------------------------------------------------------------------------------------------------------- helpers
    def mask(self, node: fx.Node, d: int) -> torch.Tensor | None:
        """Which indices of a node's axis stay; None for all."""
        axis = self.comb.axes[node][d]
        if not ax.touches(axis, self.masks):
            return None
        return torch.from_numpy(ax.kept_mask(axis, self.masks)).to(self.device)

    def zeroed(self, value: torch.Tensor, node: fx.Node, d: int) -> torch.Tensor:
        mask = self.mask(node, d)
        if mask is None or value.shape[d] == 1:
            return value
        return value * along(mask.to(value.dtype), d % value.dim(), value.dim())

    def present(self, node: fx.Node, dims: list[int]) -> dict[int, torch.Tensor]:
        """Positions that stay, for those of the dimensions that lose any."""
        found = {d: self.mask(node, d) for d in dims}
        return {d: m.nonzero()[:, 0] for d, m in found.items() if m is not None}

    # ------------------------------------------------------------------------------------------------------------ ops
    def call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if not is_operator(node):
            return super().call(node, env)
        name, nodes, a = op_name(node), arguments(node), evaluated(node, env)
        if name.startswith("conv") or name == "torchvision::deform_conv2d":
            rank = a["input"].dim() - a["weight"].dim()
            a["input"] = self.zeroed(a["input"], nodes["input"], 1 + rank)
            a["weight"] = self.zeroed(a["weight"], nodes["weight"], 0 if "transpose" in name else 1)
        elif "params" in a or "w_hh" in a:  # recurrences: what a weight reads
            for key in {"w_ih", "w_hh"} & a.keys():
                a[key] = self.zeroed(a[key], nodes[key], 1)
            pairs = zip(a.get("params", ()), nodes.get("params", ()), strict=True)
            a["params"] = [self.zeroed(w, n, 1) if w.dim() == 2 else w for w, n in pairs]
        elif name == "linear":
            a["input"] = self.zeroed(a["input"], nodes["input"], -1)
        elif name in ("matmul", "bmm", "mm", "mv", "dot", "addmm", "baddbmm"):
            left = next(k for k in ("mat1", "batch1", "self") if k in a)
            right = next(k for k in ("mat2", "batch2", "other", "vec", "tensor") if k in a)
            a[left] = self.zeroed(a[left], nodes[left], -1)
            a[right] = self.zeroed(a[right], nodes[right], max(-2, -a[right].dim()))
        elif name == "einsum":
            a["tensors"] = values = list(a["tensors"])
            terms, result = spell_out(a["equation"], [t.dim() for t in values])
            for i, term in enumerate(terms):
                for d, letter in enumerate(term):
                    if letter not in result:
                        values[i] = self.zeroed(values[i], nodes["tensors"][i], d)
        elif name == "scaled_dot_product_attention":
            self._attention(nodes, a)
        elif name == "_weight_norm":
            for d in set(range(a["v"].dim())) - {a["dim"] if a["dim"] < 0 else a["dim"] % a["v"].dim()}:
                a["v"] = self.zeroed(a["v"], nodes["v"], d)
        elif name in ("layer_norm", "rms_norm"):
            return self._layer_norm(name, nodes, a)
        elif name == "group_norm" or a.get("use_input_stats") or (name == "batch_norm" and a["training"]):
            return self._moments(name, nodes, a)
        elif name in STATISTICS and not isinstance(nodes.get("other"), fx.Node):
            return self._statistics(node, name, nodes, a)
        elif name.startswith("adaptive_avg_pool"):
            for k in range(1, len(a["output_size"]) + 1):
                for d, at in self.present(nodes["self"], [-k]).items():
                    a["self"] = a["self"].index_select(d, at)
        elif name in ("cosine_similarity", "cdist"):
            d = a.get("dim", -1)
            for key in ("x1", "x2"):
                a[key] = self.zeroed(a[key], nodes[key], d)
        return invoke(node, a)

    def _attention(self, nodes: dict[str, Any], a: dict[str, Any]) -> None:
        for key in ("query", "key"):
            a[key] = self.zeroed(a[key], nodes[key], -1)
        keys = self.mask(nodes["key"], -2)
        if keys is not None:
            logits = torch.zeros(a["query"].shape[-2], len(keys), dtype=torch.float64, device=self.device)
            logits.masked_fill_(~keys, -math.inf)
            if a["is_causal"]:
                logits.masked_fill_(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
                a["is_causal"] = False
            given = a["attn_mask"]
            if given is not None and given.dtype == torch.bool:
                given = torch.zeros_like(given, dtype=torch.float64).masked_fill(~given, -math.inf)
            a["attn_mask"] = logits if given is None else given + logits

    def _layer_norm(self, name: str, nodes: dict[str, Any], a: dict[str, Any]) -> torch.Tensor:
        """Moments as weighted means over the entries that stay."""
        x, k = a["input"], len(a["normalized_shape"])
        dims = list(range(x.dim() - k, x.dim()))
        weight = self._weight(nodes["input"], dims, x)
        eps = a["eps"] if a["eps"] is not None else torch.finfo(x.dtype).eps
        if name == "layer_norm":
            x = x - _mean(x, weight, dims)
        y = x / torch.sqrt(_mean(x * x, weight, dims) + eps)
        y = y if a.get("weight") is None else y * a["weight"]
        return y if a.get("bias") is None else y + a["bias"]

    def _moments(self, name: str, nodes: dict[str, Any], a: dict[str, Any]) -> torch.Tensor:
        """GroupNorm, InstanceNorm, and BatchNorm with statistics of the batch."""
        x, weight = a["input"], self._weight(nodes["input"], list(range(a["input"].dim())), a["input"])
        if name == "group_norm":
            shape = (x.shape[0], a["num_groups"], -1, *x.shape[2:])
            x, weight, dims = x.reshape(shape), weight.reshape(shape), list(range(2, x.dim() + 1))
        else:
            dims = [d for d in range(x.dim()) if d != 1 and not (d == 0 and name == "instance_norm")]
        x = x - _mean(x, weight, dims)
        y = (x / torch.sqrt(_mean(x * x, weight, dims) + a["eps"])).reshape(a["input"].shape)
        per_channel = [1, -1, *[1] * (y.dim() - 2)]
        y = y if a["weight"] is None else y * a["weight"].reshape(per_channel)
        return y if a["bias"] is None else y + a["bias"].reshape(per_channel)

    def _weight(self, node: fx.Node, dims: list[int], x: torch.Tensor) -> torch.Tensor:
        """1 where an entry stays along all the dimensions, 0 elsewhere, like x."""
        weight = torch.ones_like(x)
        for d in dims:
            weight = self.zeroed(weight, node, d)
        return weight

    def _statistics(self, node: fx.Node, name: str, nodes: dict[str, Any], a: dict[str, Any]) -> Any:
        key = "self" if "self" in a else "input"
        rank, given = a[key].dim(), a.get("dim")
        dims = range(rank) if given in (None, []) else [given] if isinstance(given, int) else given
        present = self.present(nodes[key], [d % rank for d in dims])
        whole = a[key]
        for d, at in present.items():
            a[key] = a[key].index_select(d, at)
        result = invoke(node, a)
        if name in SAME_SHAPE:
            for d, at in present.items():
                result = torch.zeros_like(whole).index_copy_(d, at, result)
        return result


def _mean(x: torch.Tensor, weight: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """Weighted mean; 0 where nothing has weight."""
    return (x * weight).sum(dims, keepdim=True) / weight.sum(dims, keepdim=True).clamp_min(1.0)
