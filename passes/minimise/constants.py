"""Which entries of a network's values are the same for all inputs, and what they are. Source: ours.

The graph is run once, in float64, on values with unknown entries: the inputs are unknown, the weights are known. An
operator's result is known where nothing unknown takes part: `0 * x` is 0, so a channel whose weights are all zero is its
bias at every position. Padding needs no special care, since the border is computed like any other position. Where an
operator has no rule here, its result is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.compat import pytree
from ...graph.facts import (
    ADAPTIVE_MEANS,
    CONVS,
    COPIES,
    JOINS,
    MAPS,
    MATRIX_PRODUCTS,
    PADS,
    PARTS,
    TRANSPOSED_CONVS,
    UNTAGGED_BINARY,
    UNTAGGED_UNARY,
    VIEWS,
    is_pointwise,
    is_random,
    names,
)
from ...graph.nodes import is_operator, op_name
from ...graph.program import Program
from ...graph.verify.evaluate import (
    Evaluator,
    double_weights,
    evaluated,
    example_inputs,
    invoke,
    size_symbols,
    to_double,
)

MOVES = (  # operators whose results consist of entries of their first argument
    VIEWS | JOINS | PARTS | frozenset(PADS) | names(
        "permute transpose t movedim swapaxes swapdims expand expand_as broadcast_to repeat repeat_interleave tile roll "
        "flip index_select pixel_shuffle pixel_unshuffle channel_shuffle stack mT unfold"
    )
)  # fmt: skip
MEANS = ADAPTIVE_MEANS | names(  # sums with non-negative weights
    "mean sum avg_pool1d avg_pool2d avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
    "upsample_bilinear2d upsample_trilinear3d"
)
MAXIMA = names("amax max_pool1d max_pool2d max_pool3d")
PRODUCTS = {name: MATRIX_PRODUCTS[name] for name in ("matmul", "mm", "bmm")} | dict.fromkeys(MAPS, ("input", "weight"))
UNSET = names("empty empty_like new_empty empty_strided")
STILL = COPIES | names("scaled_dot_product_attention")  # operators that are random in training alone
SAME = 1e-12  # relative difference that rounding in float64 may cause between positions of one constant


@dataclass(frozen=True)
class Partial:
    """A tensor that is known in part. value: the entries, 0 where they are unknown. unknown: bool, of the same shape."""

    value: Tensor
    unknown: Tensor

    @classmethod
    def of(cls, value: Tensor, unknown: Tensor) -> Partial:
        """A tensor whose unknown entries also include those that are not finite."""
        if value.is_floating_point() or value.is_complex():
            unknown = unknown | ~value.isfinite()
        return cls(value.masked_fill(unknown, 0), unknown)

    @property
    def absent(self) -> Tensor:
        """Where the value is known to be zero, bool."""
        return ~self.unknown & (self.value == 0)

    def along(self, dim: int) -> tuple[Tensor, Tensor]:
        """For each index of a dimension, whether all of its entries are known, and their common value (float64, NaN if they
        have none)."""
        value = torch.where(self.value == 0, 0.0, torch.nan) if self.value.is_complex() else self.value.double()
        rows, unknown = (t.movedim(dim, 0).flatten(1) for t in (value, self.unknown))
        known = ~unknown.any(1)
        low, high = rows.amin(1), rows.amax(1)
        same = known & (high - low <= SAME * torch.maximum(high.abs(), low.abs()))
        return known, torch.where(same, rows[:, 0], torch.nan)


class Constants(Evaluator):
    """Runs a program on values that are known in part (see the module)."""

    def __init__(self, program: Program):
        super().__init__(program, double_weights(program))
        self.program = program
        symbols = size_symbols(program)
        self.batch_only, self.dynamic = all(d == 0 for _, d in symbols.values()), bool(symbols)

    def over(self, wanted: Iterable[tuple[fx.Node, int]]) -> dict[tuple[fx.Node, int], tuple[Tensor, Tensor]]:
        """The result of `Partial.along` for each of these nodes and dimensions."""
        places: dict[fx.Node, list[int]] = {}
        for node, dim in wanted:
            places.setdefault(node, []).append(dim)
        constants: dict[tuple[fx.Node, int], tuple[Tensor, Tensor]] = {}

        def see(node: fx.Node, value: Any) -> None:
            for dim in places.get(node, ()):
                constants[node, dim] = value.along(dim)

        self.run(example_inputs(self.program), see)
        return constants

    def enter(self, value: Any) -> Any:
        return _unknown(to_double(value))

    def fetch(self, name: str) -> Any:
        tensor = super().fetch(name)
        # A run changes the tensors that it writes to, so they are no constants.
        return _unknown(tensor) if name in self.written else _known(tensor)

    def call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if not is_operator(node):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
            leaves = pytree.tree_leaves((args, kwargs))
            if op_name(node) != "getitem" and any(isinstance(leaf, Partial) for leaf in leaves):
                return _unknown(node.target(*_values(args), **_values(kwargs)))  # type: ignore[operator]
            return node.target(*args, **kwargs)  # type: ignore[operator]
        a = evaluated(node, env)
        value = invoke(node, _values(a))
        parts = [leaf for leaf in pytree.tree_leaves(a) if isinstance(leaf, Partial)]
        sized = self.dynamic and any(not isinstance(env[n], (Partial, list, tuple)) for n in node.all_input_nodes)
        if not parts and sized:  # computed from a size, which may differ for other inputs
            return _unknown(value)
        if op_name(node) in UNSET or (is_random(node) and op_name(node) not in STILL):
            return _unknown(value)
        bordered = not self.batch_only and (op_name(node) in PRODUCTS or op_name(node).startswith("avg_pool"))
        if not bordered and not any(bool(p.unknown.any()) for p in parts):
            return pytree.tree_map(_known, value)
        return self._rule(node, a, value)

    def _rule(self, node: fx.Node, a: dict[str, Any], value: Any) -> Any:
        """The result of an operator with an unknown argument. value: its result if every unknown were 0."""
        name, first = op_name(node), next(iter(a))
        if name in MOVES or (name in MEANS | MAXIMA and isinstance(value, Tensor)):
            others = [p for p in pytree.tree_leaves({**a, first: None}) if isinstance(p, Partial)]
            if any(bool(p.unknown.any()) for p in others):
                return _unknown(value)
            marks = pytree.tree_map(lambda p: self._mark(name, a, p), a[first])
            fill = {"value": 0} if name in PADS and a["value"] is not None else {}
            hit = invoke(node, _values(a) | {first: marks} | fill)
            return pytree.tree_map(lambda v, h: Partial.of(v, h != 0), value, hit)
        if not isinstance(value, Tensor):
            return _unknown(value)
        if name in PRODUCTS:
            left, right = PRODUCTS[name]
            return Partial.of(value, self._product(node, a, a[left], a[right], lambda p, q: {left: p, right: q}))
        if name == "einsum" and len(a["tensors"]) == 2:
            x, w = a["tensors"]
            return Partial.of(value, self._product(node, a, x, w, lambda p, q: {"tensors": [p, q]}))
        if name == "batch_norm":
            return Partial.of(value, _normalised(a))
        if name == "scaled_dot_product_attention":
            return _attended(a, value)
        if is_pointwise(node) or name in UNTAGGED_UNARY | UNTAGGED_BINARY:
            return _pointwise(name, a, value)
        return _unknown(value)

    def _mark(self, name: str, a: dict[str, Any], part: Partial) -> Tensor:
        """The unknown entries as ones, else zeros; where sizes may change, also the entries that padding would change."""
        unknown = part.unknown
        if name.startswith("avg_pool") and not self.batch_only and any(_numbers(a["padding"])):
            unknown = ~part.absent
        return unknown.to(part.value.dtype)

    def _product(
        self, node: fx.Node, a: dict[str, Any], x: Partial, w: Partial, put: Callable[[Tensor, Tensor], dict[str, Any]]
    ) -> Tensor:
        """Where a sum of products is unknown, bool: a product is known where one factor is zero or both are known. put: a
        function that makes the operator's arguments of the two factors."""
        bias = a.get("bias")
        plain = _values(a) | ({} if bias is None else {"bias": None})

        def count(p: Tensor, q: Tensor) -> Tensor:
            return invoke(node, plain | put(p.to(x.value.dtype), q.to(w.value.dtype)))

        # With inputs of other sizes, other entries lie at the border.
        known = x.absent if not self.batch_only and _borders(node, a) else ~x.unknown
        unknown = (count(~x.absent, ~w.absent) - count(known & ~x.absent, ~w.unknown & ~w.absent)).abs() > 0.5
        return unknown if bias is None or not bool(bias.unknown.any()) else torch.ones_like(unknown)


def _numbers(padding: Any) -> list[int]:
    return [padding] if isinstance(padding, int) else list(padding)


def _borders(node: fx.Node, a: dict[str, Any]) -> bool:
    """Whether the node is a convolution that computes something else at the border than inside."""
    if op_name(node) in TRANSPOSED_CONVS:
        return True
    return op_name(node) in CONVS and (isinstance(a["padding"], str) or any(_numbers(a["padding"])))


def _values(tree: Any) -> Any:
    return pytree.tree_map(lambda p: p.value if isinstance(p, Partial) else p, tree)


def _known(value: Any) -> Any:
    return Partial.of(value, torch.zeros_like(value, dtype=torch.bool)) if isinstance(value, Tensor) else value


def _unknown(tree: Any) -> Any:
    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return Partial(torch.zeros_like(value), torch.ones_like(value, dtype=torch.bool))

    return pytree.tree_map(one, tree)


def _pointwise(name: str, a: dict[str, Any], value: Tensor) -> Partial:
    parts = [p for p in pytree.tree_leaves(a) if isinstance(p, Partial) and bool(p.unknown.any())]
    unknown = torch.zeros_like(value, dtype=torch.bool)
    if any(torch.broadcast_shapes(p.unknown.shape, value.shape) != value.shape for p in parts):
        return _unknown(value)
    for part in parts:
        unknown = unknown | part.unknown
    if name in ("mul", "multiply") and isinstance(a["other"], Partial):
        unknown = unknown & ~a["self"].absent & ~a["other"].absent
    return Partial.of(value, unknown)


def _normalised(a: dict[str, Any]) -> Tensor:
    """Where BatchNorm's result in eval mode is unknown: each channel is scaled and shifted, and a scale of zero leaves the
    shift."""
    x = a["input"]
    if a["running_mean"] is None or any(bool(a[k].unknown.any()) for k in ("running_mean", "running_var")):
        return torch.ones_like(x.unknown)
    shape = (1, -1, *[1] * (x.value.dim() - 2))
    unknown = x.unknown if a["weight"] is None else x.unknown & ~a["weight"].absent.view(shape)
    return unknown if a["bias"] is None else unknown | a["bias"].unknown.view(shape)


def _attended(a: dict[str, Any], value: Tensor) -> Partial:
    """Attention with an unknown operand: its weights add up to one over the keys, so a query gets what all values have in
    common; a query for which a mask leaves no keys gets zero."""
    v = a["value"]
    if v.value.shape[:-2] != value.shape[:-2]:  # keys and values shared by several heads
        return _unknown(value)
    common = v.value[..., :1, :]
    same = ~v.unknown.any(-2, keepdim=True) & (v.value == common).all(-2, keepdim=True)
    if a["attn_mask"] is not None:
        same &= common == 0
    return Partial.of(common.expand_as(value), ~same.expand_as(value))
