"""Merging of linear operators: a table of rules, each a pattern, a check and a rewrite, and every merge is verified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from ..graph.ops import arguments, fetch, op_name, set_argument, shape
from ..graph.program import Program, TrainableModule, like, place_tensor, rebuild
from ..graph.verify.evaluate import Evaluator, double_weights, evaluated, invoke, random_inputs, relative_error
from .base import Context, Pass, PassResult

CONVS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
STATISTICS = ("weight", "bias", "running_mean", "running_var")
TOLERANCE = 1e-10

Chain = tuple[fx.Node, ...]
Read = Callable[[fx.Node, str], torch.Tensor | None]


@dataclass(frozen=True)
class Merged:
    """What takes the place of a chain: its node `keep`, fed with the chain's input, with other weights.

    tensors: new float64 values by argument name. constants: other arguments that change, such as a padding.
    """

    keep: fx.Node
    tensors: dict[str, torch.Tensor]
    constants: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """pattern: the chain that ends at a node, producer first, each the next one's first argument; or None. check: why
    that chain has to stay as it is, or None. rewrite: what takes its place, given a function that reads the tensor of
    an argument in float64 (None where the argument is None).

    The engine itself checks what holds for every rule: inner results have one user, the weights are stored tensors
    that nothing else uses, and the merged operator equals the chain on random inputs in float64.
    """

    name: str
    pattern: Callable[[fx.Node], Chain | None]
    check: Callable[[Chain], str | None]
    rewrite: Callable[[Chain, Read], Merged]


@dataclass(frozen=True)
class Fuse(Pass):
    """Fold every batch normalisation into the convolution or linear layer before or after it, exactly.

    With `s = gamma / sqrt(var + eps)`, of the running statistics: after a linear map (convolution, transposed
    convolution, linear layer) `W' = s W`, `b' = beta + s (b - mean)`; before an unpadded convolution or a linear layer
    `W' = W diag(s)`, `b' = b + W (beta - s mean)` (ours; the first form is folklore, see Jacob et al., arXiv
    1712.05877). Before a padded convolution it would be wrong at the border, since the padding is not normalised.

    Every fold is checked by itself and all of them together on the whole network, on random inputs in float64; one
    that is off by more than 1e-10 (relative) is not done. Refused, and named in the record with the reason: a
    normalisation by batch statistics, weights that are shared, tied or computed, intermediate results used elsewhere,
    a normalisation over another axis than the layer's features, or one with no such layer next to it. The result
    computes what the input program computes in eval mode, and has no normalisation left to train where one was folded.
    """

    exact: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> PassResult:
        merger = _Merger(program, context.seed)
        while merger.sweep():
            pass
        record: dict[str, Any] = {"changed": merger.changed, "refused": merger.refusals(), "error": 0.0}
        if not merger.changed:
            return PassResult(program.copy(), record)
        fused = program.derive(rebuild(merger.module, lambda name, value: value), stale=False)
        generator = torch.Generator().manual_seed(context.seed)
        inputs = random_inputs(program, generator)
        expected = Evaluator(program, double_weights(program)).run(inputs)
        found = Evaluator(fused, double_weights(fused) | merger.exact).run(inputs)
        record["error"] = relative_error(found, expected)
        if not record["error"] <= TOLERANCE:
            why = f"the whole network is {record['error']:.1e} off with all folds, more than {TOLERANCE:.0e}"
            record |= {"changed": [], "refused": [{"what": str(c["into"]), "why": why} for c in merger.changed]}
            return PassResult(program.copy(), record)
        return PassResult(fused, record)


# --------------------------------------------------------------------------------------------------------------- rules
def _map_then_norm(node: fx.Node) -> Chain | None:
    before = node.args[0] if op_name(node) == "batch_norm" else None
    maps = (*CONVS, *TRANSPOSED, "linear")
    return (before, node) if isinstance(before, fx.Node) and op_name(before) in maps else None


def _norm_then_map(node: fx.Node) -> Chain | None:
    before = node.args[0] if op_name(node) in (*CONVS, *TRANSPOSED, "linear") else None
    return (before, node) if isinstance(before, fx.Node) and op_name(before) == "batch_norm" else None


def _check_map_then_norm(chain: Chain) -> str | None:
    linear, norm = chain
    return _check_norm(norm) or _check_axis(linear, linear)


def _check_norm_then_map(chain: Chain) -> str | None:
    norm, linear = chain
    if op_name(linear) in TRANSPOSED:
        return "before a transposed convolution, whose border outputs see only part of the kernel"
    padding = arguments(linear).get("padding", [0])
    if padding != "valid" and any(p != 0 for p in padding):
        return "before a zero-padded convolution, so that the fold would be wrong at the border"
    return _check_norm(norm) or _check_axis(linear, norm)


def _check_norm(norm: fx.Node) -> str | None:
    a = arguments(norm)
    if a["running_mean"] is None or a["running_var"] is None or a["training"]:
        return "it normalises with the statistics of the batch"
    if any(a[key] is not None and a[key].op != "get_attr" for key in STATISTICS):
        return "its statistics or scales are computed, not stored"
    return None


def _check_axis(linear: fx.Node, normed: fx.Node) -> str | None:
    """Batch normalisation runs over dimension 1, which must be the features of the layer."""
    weight = arguments(linear)["weight"]
    return None if len(shape(normed)) == len(shape(weight)) else "it runs over another axis than the layer's features"


def _scale_and_shift(norm: fx.Node, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
    """`s` and `t` such that the normalisation is `s x + t`."""
    gamma, beta, mean, var = (read(norm, key) for key in STATISTICS)
    assert mean is not None
    assert var is not None
    scale = (var + arguments(norm)["eps"]).rsqrt() * (1 if gamma is None else gamma)
    return scale, (0 if beta is None else beta) - scale * mean


def _rewrite_map_then_norm(chain: Chain, read: Read) -> Merged:
    linear, norm = chain
    scale, shift = _scale_and_shift(norm, read)
    weight, bias = read(linear, "weight"), read(linear, "bias")
    assert weight is not None
    if op_name(linear) in TRANSPOSED:  # weight is [groups * inputs, outputs, kernel]
        grouped = weight.unflatten(0, (arguments(linear)["groups"], -1))
        weight = (grouped * _expand(scale.view(len(grouped), 1, -1), grouped)).flatten(0, 1)
    else:
        weight = weight * _expand(scale, weight)
    return Merged(linear, {"weight": weight, "bias": shift if bias is None else shift + scale * bias})


def _rewrite_norm_then_map(chain: Chain, read: Read) -> Merged:
    norm, linear = chain
    scale, shift = _scale_and_shift(norm, read)
    weight, bias = read(linear, "weight"), read(linear, "bias")
    assert weight is not None
    grouped = weight.unflatten(0, (arguments(linear).get("groups", 1), -1))  # [groups, outputs, inputs, kernel]
    scales, shifts = (_expand(t.view(len(grouped), 1, -1), grouped) for t in (scale, shift))
    added = (grouped * shifts).flatten(2).sum(2).flatten()
    weight = (grouped * scales).flatten(0, 1)
    return Merged(linear, {"weight": weight, "bias": added if bias is None else bias + added})


def _expand(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor with trailing dimensions of size 1 up to the rank of `like`."""
    return vector.view(*vector.shape, *[1] * (like.dim() - vector.dim()))


RULES = (
    Rule("batch_norm after linear map", _map_then_norm, _check_map_then_norm, _rewrite_map_then_norm),
    Rule("batch_norm before linear map", _norm_then_map, _check_norm_then_map, _rewrite_norm_then_map),
)


# -------------------------------------------------------------------------------------------------------------- engine
class _Merger:
    """Applies the rules to a copy of a program. `exact` holds the merged weights in float64, before they are rounded
    to the program's precision, so that chains of merges round once and checks see the algebra alone."""

    def __init__(self, program: Program, seed: int):
        copied = program.copy()
        self.module: TrainableModule = copied.graph_module.eval()
        self.graph = self.module.graph
        self.generator = torch.Generator().manual_seed(seed)
        self.exact: dict[str, torch.Tensor] = {}
        self.changed: list[dict[str, Any]] = []
        self.reasons: dict[fx.Node, list[str]] = {}

    def sweep(self) -> bool:
        """Try every rule at every node once; whether anything was merged."""
        before = len(self.changed)
        self.reasons = {}
        for rule in RULES:
            for node in list(self.graph.nodes):
                chain = rule.pattern(node)
                if chain is not None:
                    why = self._merge(rule, chain)
                    norms = [n for n in chain if op_name(n) == "batch_norm"]
                    for norm in norms if why else ():
                        self.reasons.setdefault(norm, []).append(f"{rule.name}: {why}")
        self.module.recompile()
        return len(self.changed) > before

    def refusals(self) -> list[dict[str, str]]:
        """Every normalisation that is left, with the reason."""
        left = [n for n in self.graph.nodes if op_name(n) == "batch_norm"]
        return [{"what": _label(n), "why": "; ".join(self.reasons.get(n, [])) or _surroundings(n)} for n in left]

    def _merge(self, rule: Rule, chain: Chain) -> str | None:
        """Merge the chain, or say why not."""
        why = self._check(chain) or rule.check(chain)
        if why:
            return why
        merged = rule.rewrite(chain, self._read)
        error = self._error(chain, merged)
        if not error <= TOLERANCE:
            return f"the merged layer is {error:.1e} off"
        self._commit(chain, merged)
        into = str(arguments(merged.keep)["weight"].target)
        self.changed.append({"rule": rule.name, "into": into, "nodes": [n.name for n in chain], "error": error})
        return None

    def _check(self, chain: Chain) -> str | None:
        for node in chain[:-1]:
            if len(node.users) > 1:
                return f"{node.name} is used by {len(node.users)} nodes"
        for node in chain:
            if op_name(node) == "batch_norm":
                continue  # only read
            for key in ("weight", "bias"):
                why = self._shared(arguments(node).get(key))
                if why:
                    return why
        return None

    def _shared(self, stored: fx.Node | None) -> str | None:
        if stored is None:
            return None
        if stored.op != "get_attr":
            return f"the layer's weights are computed by {stored.name}"
        tensor = fetch(self.module, str(stored.target))
        others = [n for n in self.graph.nodes if n.op == "get_attr" and n is not stored]
        tied = [str(n.target) for n in others if fetch(self.module, str(n.target)) is tensor]
        if tied or len(stored.users) > 1:
            return f"{stored.target} is shared with {', '.join(tied) or 'another layer'}"
        return None

    def _read(self, node: fx.Node, key: str) -> torch.Tensor | None:
        stored = arguments(node)[key]
        return None if stored is None else self._value(str(stored.target))

    def _value(self, name: str) -> torch.Tensor:
        found = self.exact.get(name)
        return fetch(self.module, name).detach().double() if found is None else found

    def _error(self, chain: Chain, merged: Merged) -> float:
        """Relative error of the merged operator on a random input, borders included, in float64."""
        source = chain[0].args[0]
        assert isinstance(source, fx.Node)
        values = torch.randn(_window(chain, shape(source)), generator=self.generator, dtype=torch.float64)
        env: dict[fx.Node, Any] = {source: values}
        for node in chain:
            env |= {n: self._value(str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"}
            env[node] = invoke(node, evaluated(node, env))
        first = next(iter(arguments(merged.keep)))
        given = evaluated(merged.keep, env) | {first: values} | merged.tensors | merged.constants
        return relative_error(invoke(merged.keep, given), env[chain[-1]])

    def _commit(self, chain: Chain, merged: Merged) -> None:
        keep, last = merged.keep, chain[-1]
        weight = fetch(self.module, str(arguments(keep)["weight"].target))
        for key, exact in merged.tensors.items():
            stored = arguments(keep)[key]
            name = self._new_name(keep, key) if stored is None else str(stored.target)
            place_tensor(self.module, name, like(weight, exact.to(weight.dtype)))
            self.exact[name] = exact
            if stored is None:
                with self.graph.inserting_before(keep):
                    stored = self.graph.get_attr(name)
                set_argument(keep, key, stored)
            stored.meta["val"] = arguments(keep)["weight"].meta["val"].new_empty(exact.shape)
        for key, constant in merged.constants.items():
            set_argument(keep, key, constant)
        keep.replace_input_with(keep.args[0], chain[0].args[0])  # type: ignore[arg-type]
        last.replace_all_uses_with(keep, delete_user_cb=lambda user: user is not keep)
        for node in [n for n in reversed(chain) if n is not keep]:
            stored_inputs = [n for n in node.all_input_nodes if n.op == "get_attr"]
            self.graph.erase_node(node)
            for stored in stored_inputs:
                if not stored.users:
                    self.graph.erase_node(stored)

    def _new_name(self, node: fx.Node, key: str) -> str:
        """A free name next to the weight: `conv.weight` gives `conv.bias`."""
        owner, _, weight = str(arguments(node)["weight"].target).rpartition(".")
        name = weight.replace("weight", key) if "weight" in weight else f"{weight}_{key}"
        holder = fetch(self.module, owner) if owner else self.module
        while hasattr(holder, name):
            name += "_"
        return f"{owner}.{name}" if owner else name


def _window(chain: Chain, size: tuple[int, ...]) -> list[int]:
    """A small input that still has the borders and an inside: two samples, spatial sizes cut to a few kernels."""
    result = [2, *size[1:]]
    for node in chain:
        if op_name(node) in (*CONVS, *TRANSPOSED):
            a, kernel = arguments(node), shape(arguments(node)["weight"])[2:]
            steps = zip(kernel, _tuple(a["dilation"], kernel), _tuple(a["stride"], kernel), strict=True)
            for d, (k, dilation, stride) in enumerate(steps, 2):
                result[d] = min(size[d], 2 * (dilation * (k - 1) + 1 + stride))
    return result


def _tuple(value: Any, like: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value) * len(like) if len(value) == 1 else tuple(value)


def _label(node: fx.Node) -> str:
    mean = arguments(node)["running_mean"]
    return str(mean.target).removesuffix(".running_mean") if mean is not None else node.name


def _surroundings(node: fx.Node) -> str:
    before, after = node.args[0], ", ".join(op_name(u) for u in node.users)
    return f"no linear layer next to it ({op_name(before)} -> batch_norm -> {after})"  # type: ignore[arg-type]
