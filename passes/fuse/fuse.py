"""Merging of linear operators: regions of affine maps are found, priced, merged where it pays, and every merge verified."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, ClassVar

import torch
from torch import fx

from ...graph.cost import evaluate, macs
from ...graph.edit import like, place_tensor, rebuild
from ...graph.flags import DROPOUTS
from ...graph.nodes import arguments, fetch, is_operator, op_name, shape
from ...graph.program import Program
from ...graph.sparse import sparse_weights
from ...graph.trainable import TrainableModule
from ...graph.verify.evaluate import (  # fmt: skip
    Evaluator,
    double_weights,
    evaluated,
    invoke,
    random_inputs,
    relative_error,
    to_double,
)
from ..base import Context, Pass, PassResult
from .affine import Geometry, Inexact, Kernel

CONVS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
MAPS = (*CONVS, *TRANSPOSED, "linear")
VIEWS = ("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as")
STATISTICS = ("weight", "bias", "running_mean", "running_var")
TOLERANCE, EPSILON = 1e-10, torch.finfo(torch.float64).eps
LONGEST = 16  # parts of a chain that are merged into one map at most

Values = Callable[[fx.Node], torch.Tensor]  # float64 tensor of an attribute
Cost = tuple[int, int]  # MACs for the example input, kernels launched


@dataclass(frozen=True)
class Fuse(Pass):
    """Merge neighbouring linear operators into one convolution or linear layer wherever that is exact and cheaper.

    Linear are convolutions, transposed ones (which only a scale can follow), linear layers, batch normalisation by its
    running statistics, zero padding, and adding or multiplying by a constant or a vector of channels (layer scale).
    Chains of them, sums of parallel branches of one input, and sums with that input itself are regions with one entry
    and one exit, found in the graph without hints: normalisation before or after a layer, 1x1 and linear chains,
    convolutions in a row with strides, dilation and groups, identity skips, and the branches of RepVGG (arXiv
    2101.03697), MobileOne, RepViT and FastViT. The algebra is `passes.kernel.Kernel`'s; a region is cut into pieces by
    dynamic programming (ours), so that no merge is done that takes more MACs, and of equal ones the fewest kernels are
    launched.

    Every merge is checked by itself, border included, on random inputs in float64, with its own weights and with random
    ones (a layer scale of 1e-6 would hide an error), and all of them together on the whole network; one that is off by
    more than 1e-10 (relative) is not done. Where the network itself magnifies rounding errors, so that its outputs prove
    nothing, every node is compared on the values that its inputs have in the original network, which proves the whole
    by induction. Refused, with the reason in the record: a change of precision within a merge, a padded convolution after
    one that
    has a bias or a larger kernel (wrong at the border), batch statistics, weights that are shared, tied or computed,
    intermediate results used elsewhere, a normalisation over another axis than the layer's features, or with no such
    layer next to it. `gated` in the record lists merges that would be exact and cost more. The result computes what the
    input program computes in eval mode, and has nothing left to train where something was merged away.
    """

    exact: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> PassResult:
        wrong: dict[str, str] = {}  # ends of merges that the whole network showed to be wrong, and how
        while True:
            merger = _Merger(program, context.seed, wrong)
            while merger.sweep():
                pass
            record: dict[str, Any] = {"changed": merger.changed, "refused": merger.refusals(), "gated": merger.gated()}
            record["error"] = 0.0
            if not merger.changed:
                return PassResult(program.copy(), record)
            proof = merger.proof(program)
            if not proof.wrong:
                break
            wrong |= proof.wrong
        fused = program.derive(rebuild(merger.module, lambda name, value: value), stale=False)
        record["error"] = proof.error
        if proof.magnified is not None:
            record["note"] = (
                f"the network magnifies rounding errors: one of {EPSILON:.0e} in its inputs moves its outputs by "
                f"{proof.magnified:.1e}; so every merge was compared on the values that it has in the network"
            )
            record["verified"] = {
                "oracle": "input program, node by node", "error": proof.error, "tolerance": TOLERANCE
            }  # fmt: skip
        return PassResult(fused, record)


@dataclass(frozen=True)
class Proof:
    """What running a fused network beside its original showed.

    error: worst relative error, of the outputs or, where `magnified` is given, of any node on the values that its inputs
    have in the original. magnified: by how much the smallest change of the inputs moves the outputs, where comparing
    outputs can prove nothing. wrong: ends of wrong merges, by their names in the original, with the reason.
    """

    error: float
    magnified: float | None = None
    wrong: dict[str, str] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------- regions
@dataclass(frozen=True)
class Step:
    """One affine map, by channel: `nodes`, producer first, read `source`.

    axis: of the channels in the value, None where any will do. carrier: the layer whose weights it has, if any.
    geometry: of the map, given the number of channels and of spatial dimensions. numbers: its weight (or scale) and bias
    (or shift), each perhaps a number for all channels, given a function that reads a stored tensor. folds: its first node
    folds all dimensions but the last into one, its last one unfolds them.
    """

    nodes: tuple[fx.Node, ...]
    source: fx.Node
    axis: int | None
    geometry: Callable[[int, int], Geometry]
    numbers: Callable[[Values], tuple[Any, Any]]
    carrier: fx.Node | None = None
    folds: bool = False

    @property
    def members(self) -> set[fx.Node]:
        return set(self.nodes)

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def carriers(self) -> list[fx.Node]:
        return [self.carrier] if self.carrier else []


@dataclass(frozen=True)
class Sum:
    """Branches of one source, added up by `nodes`: `(factor, node where the branch ends, its parts)` each."""

    nodes: tuple[fx.Node, ...]
    source: fx.Node
    axis: int | None
    terms: tuple[tuple[float, fx.Node, tuple[Part, ...]], ...]

    @property
    def members(self) -> set[fx.Node]:
        return set(self.nodes).union(*(p.members for _, _, parts in self.terms for p in parts))

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def carriers(self) -> list[fx.Node]:
        return [c for _, _, parts in self.terms for p in parts for c in p.carriers]


Part = Step | Sum


class Regions:
    """The affine parts of a graph. `problem` says why a layer or normalisation is none."""

    def __init__(self, module: TrainableModule):
        self.module = module
        self.constants = _constants(module.graph)
        self.names: dict[int, set[str]] = {}
        for n in module.graph.nodes:
            if n.op == "get_attr":
                self.names.setdefault(id(fetch(module, str(n.target))), set()).add(str(n.target))

    def find(self) -> Iterator[tuple[list[Part], fx.Node]]:
        """Chains that are as long as possible, last first."""
        seen: set[fx.Node] = set()
        for node in reversed(list(self.module.graph.nodes)):
            if node not in seen:
                parts, source = self.chain(node)
                seen.update(*(p.members for p in parts))
                if any(p.carriers for p in parts):
                    yield parts, source

    def chain(self, node: fx.Node) -> tuple[list[Part], fx.Node]:
        """The parts in a row that end at the node, first one first, and what they read."""
        parts: list[Part] = []
        axis = None
        while part := self.step(node) or self._sum(node):
            if None not in (axis, part.axis) and axis != part.axis:
                break
            parts.insert(0, part)
            axis, node = part.axis if axis is None else axis, part.source
            if not set(node.users) <= part.members:
                break
        return parts, node

    def step(self, node: fx.Node) -> Step | None:
        """The node as an affine map of what it reads, in one precision; None where it is none."""
        found = self._step(node)
        return found if found and all(_dtype(n) == _dtype(found.source) for n in found.nodes) else None

    def _step(self, node: fx.Node) -> Step | None:
        name = op_name(node)
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        if name in MAPS:
            return None if self.problem(node) else _layer(node)
        if name == "batch_norm":
            return None if self.problem(node) else _norm((node,), 1)
        if name in ("transpose", "permute"):
            return self._moved_norm(node)
        if name in VIEWS:
            return self._folded_norm(node)
        return self._elementwise(node)

    def _moved_norm(self, node: fx.Node) -> Step | None:
        """A normalisation between a permutation and its inverse: it runs over another axis than the first."""
        norm = node.args[0]
        if not isinstance(norm, fx.Node) or op_name(norm) != "batch_norm" or self.problem(norm):
            return None
        first = norm.args[0]
        there, back = permutation(first), permutation(node)
        alone = len(norm.users) == 1 and len(first.users) == 1  # type: ignore[union-attr]
        if there is None or back is None or not alone or [there[d] for d in back] != sorted(there):
            return None
        return _norm((first, norm, node), there[1])  # type: ignore[arg-type]

    def _folded_norm(self, node: fx.Node) -> Step | None:
        """A normalisation between folding all dimensions but the last into one and unfolding them again, as LeViT's
        layers of tokens have it: it runs over the last axis."""
        norm = node.args[0]
        if not isinstance(norm, fx.Node) or op_name(norm) != "batch_norm" or self.problem(norm):
            return None
        first = norm.args[0]
        if (
            not isinstance(first, fx.Node)
            or op_name(first) not in VIEWS
            or not len(norm.users) == len(first.users) == 1
        ):
            return None
        inner, outer = shape(first), shape(first.args[0])  # type: ignore[arg-type]
        if len(inner) != 2 or len(outer) < 3 or inner[1] != outer[-1] or tuple(shape(node)) != tuple(outer):
            return None
        return replace(_norm((first, norm, node), len(outer) - 1), folds=True)

    def _elementwise(self, node: fx.Node) -> Step | None:
        """Arithmetic with a constant, zero padding, and dropout, which does nothing in eval mode."""
        name = op_name(node)
        if name in DROPOUTS:
            nothing = partial(Geometry.scaling, biased=False)
            return Step((node,), node.args[0], None, nothing, lambda values: (1, None))  # type: ignore[arg-type]
        if name in ("constant_pad_nd", "pad"):
            return _zero_padding(node)
        if name not in ("mul", "div", "add", "sub", "rsub", "neg") or not shape(node):
            return None
        a = arguments(node)
        left, right, alpha = a["self"], a.get("other", -1.0), a.get("alpha", 1)
        if name == "rsub":
            name, left, right = "sub", right, left
        if a.get("rounding_mode") is not None:
            return None
        swapped = self._constant(left)
        source, constant = (right, left) if swapped else (left, right)
        fits = isinstance(source, fx.Node) and not self._constant(source) and self._constant(constant)
        if not fits or shape(source) != shape(node) or (swapped and name == "div"):
            return None
        axis = _vector_axis(constant, len(shape(node)))
        if axis == -1 or not node.meta["val"].is_floating_point():
            return None

        sign = alpha if name == "add" else -alpha  # of the second operand of a sum
        shifted = name in ("add", "sub") and constant != 0

        def numbers(values: Values) -> tuple[Any, Any]:
            given = _constant(constant, values) if isinstance(constant, fx.Node) else constant
            if name in ("mul", "neg", "div"):
                return 1 / given if name == "div" else given, None
            scale, shift = (sign, given) if swapped else (1, sign * given)
            return scale, shift if shifted else None

        return Step((node,), source, axis, partial(Geometry.scaling, biased=shifted), numbers)

    def _constant(self, value: Any) -> bool:
        """A number, or a tensor made of stored tensors alone."""
        if isinstance(value, fx.Node):
            return value in self.constants
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    def addends(self, node: fx.Node) -> list[tuple[float, fx.Node]] | None:
        """Both operands of a sum or difference of tensors of equal shape, with their factors."""
        if op_name(node) not in ("add", "sub"):
            return None
        a = arguments(node)
        left, right = a["self"], a["other"]
        if any(not isinstance(n, fx.Node) or self._constant(n) for n in (left, right)):
            return None
        tensors = all(isinstance(n.meta["val"], torch.Tensor) for n in (left, right, node))
        if not tensors or not shape(left) == shape(right) == shape(node) or not node.meta["val"].is_floating_point():
            return None
        if not _dtype(left) == _dtype(right) == _dtype(node):  # a sum that promotes: branches of unlike precision
            return None
        alpha = float(a.get("alpha", 1))
        return [(1.0, left), (alpha if op_name(node) == "add" else -alpha, right)]

    def _sum(self, node: fx.Node) -> Sum | None:
        if self.addends(node) is None:
            return None
        adds: list[fx.Node] = []
        terms = list(self._terms(node, 1.0, adds))
        branches = []
        for _, end in terms:
            parts, _ = self.chain(end) if set(end.users) <= set(adds) else ([], end)
            branches.append(parts)
        places = [[end, *(p.source for p in reversed(parts))] for (_, end), parts in zip(terms, branches, strict=True)]
        source = next((n for n in places[0] if all(n in others for others in places)), None)
        if source is None:
            return None
        cut = [
            (factor, end, tuple(parts[len(parts) - place.index(source) :]))
            for (factor, end), parts, place in zip(terms, branches, places, strict=True)
        ]
        axes = {p.axis for _, _, parts in cut for p in parts} - {None}
        return Sum(tuple(sorted(adds)), source, next(iter(axes), None), tuple(cut)) if len(axes) < 2 else None

    def _terms(self, node: fx.Node, factor: float, adds: list[fx.Node]) -> Iterator[tuple[float, fx.Node]]:
        adds.append(node)
        for sign, term in self.addends(node) or ():
            if len(term.users) == 1 and self.addends(term):
                yield from self._terms(term, factor * sign, adds)
            else:
                yield factor * sign, term

    def problem(self, node: fx.Node) -> str | None:
        """Why a layer or normalisation cannot be merged with anything."""
        a = arguments(node)
        if op_name(node) == "batch_norm":
            if a["running_mean"] is None or a["running_var"] is None or a["training"]:
                return "it normalises with the statistics of the batch"
            if any(a[key] is not None and a[key].op != "get_attr" for key in STATISTICS):
                return "its statistics or scales are computed, not stored"
            return None
        for key in ("weight", "bias"):
            stored = a[key]
            if stored is None:
                continue
            if stored.op != "get_attr":
                return f"the layer's weights are computed by {stored.name}"
            tied = self.names.get(id(fetch(self.module, str(stored.target))), set()) - {str(stored.target)}
            if tied or len(stored.users) > 1:
                return f"{stored.target} is shared with {', '.join(sorted(tied)) or 'another layer'}"
        ranks = len(shape(node)), len(shape(a["weight"]))
        if ranks[0] < 2 or (op_name(node) != "linear" and ranks[0] != ranks[1]):
            return OTHER_AXIS
        return None


def _dtype(node: fx.Node) -> torch.dtype:
    """The precision of a tensor. Float64 checks cannot see where it changes, so a merge keeps to one."""
    return node.meta["val"].dtype


OTHER_AXIS = "it runs over another axis than the layer's features"


def _layer(node: fx.Node) -> Step:
    a = arguments(node)
    name, rank, size = op_name(node), len(shape(node)), shape(a["weight"])

    def geometry(channels: int, dims: int) -> Geometry:
        biased = a["bias"] is not None
        if name == "linear":
            return Geometry(size[0], size[1], biased=biased)
        stride, dilation = (_tuple(a[key], dims) for key in ("stride", "dilation"))
        extent, groups, transposed = size[2:], a["groups"], name in TRANSPOSED
        if a["padding"] == "same":
            spans = [(k - 1) * d for k, d in zip(extent, dilation, strict=True)]
            padding = tuple((s // 2, s - s // 2) for s in spans)
        else:
            padding = tuple((p, p) for p in _tuple([0] if a["padding"] == "valid" else a["padding"], dims))
        outputs = size[1] * groups if transposed else size[0]
        more = _tuple(a["output_padding"], dims) if transposed else ()
        return Geometry(outputs, channels, extent, stride, padding, dilation, groups, biased, transposed, more)

    def numbers(values: Values) -> tuple[Any, Any]:
        weight = values(a["weight"])
        own = _swapped(weight, a["groups"]) if name in TRANSPOSED else weight
        return own, None if a["bias"] is None else values(a["bias"])

    source = next(iter(a.values()))
    return Step((node,), source, rank - 1 if name == "linear" else 1, geometry, numbers, node)


def _swapped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Inputs and outputs of a transposed convolution's weight change places."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _norm(nodes: tuple[fx.Node, ...], axis: int) -> Step:
    norm = next(n for n in nodes if op_name(n) == "batch_norm")
    a = arguments(norm)

    def numbers(values: Values) -> tuple[Any, Any]:
        gamma, beta, mean, var = (None if a[k] is None else values(a[k]) for k in STATISTICS)
        assert mean is not None
        assert var is not None
        scale = (var + a["eps"]).rsqrt() * (1 if gamma is None else gamma)
        return scale, (0 if beta is None else beta) - scale * mean

    return Step(nodes, nodes[0].args[0], axis, partial(Geometry.scaling, biased=True), numbers)  # type: ignore[arg-type]


def _zero_padding(node: fx.Node) -> Step | None:
    a = arguments(node)
    pad, rank = list(a["pad"]), len(shape(node))
    zeros = a.get("mode", "constant") == "constant" and not a["value"]
    if not zeros or any(not isinstance(p, int) or p < 0 for p in pad) or len(pad) > 2 * (rank - 2):
        return None

    def geometry(channels: int, dims: int) -> Geometry:
        pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]  # last dimension first
        padding = ((0, 0),) * (dims - len(pairs)) + tuple(reversed(pairs))
        return replace(Geometry.scaling(channels, dims, False), padding=padding)

    return Step((node,), node.args[0], 1, geometry, lambda values: (1, None))  # type: ignore[arg-type]


def _constants(graph: fx.Graph) -> set[Any]:
    """Stored tensors and what is computed from them alone."""
    found: set[Any] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        pure = node.op == "call_function" and is_operator(node) and inputs and found.issuperset(inputs)
        if (node.op == "get_attr" or pure) and isinstance(node.meta.get("val"), torch.Tensor):
            found.add(node)
    return found


def _vector_axis(constant: Any, rank: int) -> int | None:
    """The axis of a value of that rank along which the constant varies; None where it does not, -1 where none would do."""
    if not isinstance(constant, fx.Node):
        return None
    sizes = shape(constant)
    wide = [d - len(sizes) + rank for d, s in enumerate(sizes) if s != 1]
    if not wide:
        return None
    return wide[0] if len(wide) == 1 and wide[0] in (1, rank - 1) and wide[0] > 0 else -1


def _constant(node: fx.Node, values: Values) -> Any:
    """The value of a stored tensor or of what is computed from such."""
    if node.op == "get_attr":
        return to_double(values(node))
    return invoke(node, evaluated(node, {n: _constant(n, values) for n in node.all_input_nodes}))


def permutation(node: Any) -> list[int] | None:
    """The dimensions of its input in the order the node gives them."""
    if not isinstance(node, fx.Node) or op_name(node) not in ("transpose", "permute"):
        return None
    a, rank = arguments(node), len(shape(node))
    if op_name(node) == "permute":
        return [d % rank for d in a["dims"]]
    order = list(range(rank))
    i, j = a["dim0"] % rank, a["dim1"] % rank
    order[i], order[j] = j, i
    return order


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    return tuple(value) * dims if len(value) == 1 else tuple(value)


# -------------------------------------------------------------------------------------------------------------- prices
@dataclass(frozen=True)
class Merge:
    """One map in the place of parts: of all of `parts` in a row, or of some `terms` of a sum (then `rest` stays).

    before, after: cost of what it replaces and its own. branches: `(factor, end, parts)` of what it replaces.
    """

    source: fx.Node
    last: fx.Node
    axis: int
    parts: tuple[Part, ...]
    terms: tuple[int, ...] | None
    shape: Geometry
    before: Cost
    after: Cost

    @property
    def branches(self) -> list[tuple[float, fx.Node, tuple[Part, ...]]]:
        if self.terms is None:
            return [(1.0, self.last, self.parts)]
        return [self._sum.terms[i] for i in self.terms]

    @property
    def rest(self) -> list[tuple[float, fx.Node]]:
        """Factors and ends of the branches of a sum that stay."""
        if self.terms is None:
            return []
        return [(f, end) for i, (f, end, _) in enumerate(self._sum.terms) if i not in self.terms]

    @property
    def members(self) -> set[fx.Node]:
        """The nodes it makes superfluous."""
        inner = set().union(*(p.members for _, _, parts in self.branches for p in parts))
        return inner if self.terms is None else inner | set(self._sum.nodes)

    @property
    def _sum(self) -> Sum:
        assert isinstance(self.parts[0], Sum)
        return self.parts[0]


@dataclass
class Choice:
    """The cheapest way to run a chain: its cost, and the merges to do."""

    cost: Cost
    merges: list[Merge] = field(default_factory=list)

    def __add__(self, other: Choice) -> Choice:
        return Choice(_plus(self.cost, other.cost), self.merges + other.merges)


def _plus(*costs: Cost) -> Cost:
    return sum(c[0] for c in costs), sum(c[1] for c in costs)


class Planner:
    """Cuts chains into pieces, each merged into one map, so that MACs and then kernels are fewest (ours).

    skip: ends of merges that were tried and are wrong. sparse: weights that no other map may fill up. refused, gated:
    neighbouring layers that cannot be merged exactly, or that cost more when they are.
    """

    def __init__(self, skip: Iterable[fx.Node], sparse: Mapping[str, str | None]):
        self.skip, self.sparse = set(skip), sparse
        self.refused: dict[tuple[fx.Node, fx.Node], str] = {}
        self.gated: dict[tuple[fx.Node, fx.Node], str] = {}
        self.known: dict[tuple[fx.Node, int], Choice] = {}

    def chain(self, parts: Sequence[Part], axis: int) -> Choice:
        """The cheapest way to run parts in a row."""
        singles: list[Geometry | Inexact] = []
        for part in parts:
            try:
                singles.append(map_of(part, axis, _geometry))
            except Inexact as why:
                singles.append(why)
        best = [Choice((0, 0))]
        for j, part in enumerate(parts):
            best.append(best[j] + self._alone(part, axis))
            running = singles[j]
            for i in range(j - 1, max(-1, j - LONGEST), -1):
                first = singles[i]
                if isinstance(running, Inexact) or isinstance(first, Inexact):
                    break
                try:
                    running = first.then(running)
                    running.convolution_padding()
                except Inexact as why:
                    self._note(self.refused, parts[i], part, str(why))
                    break
                apart = _plus(*(self._alone(p, axis).cost for p in parts[i : j + 1]))
                merge = self._merge(parts[i : j + 1], axis, None, running, apart)
                if merge is None:
                    continue
                merged = best[i] + Choice(merge.after, [merge])
                if merged.cost < best[j + 1].cost:
                    best[j + 1] = merged
                elif i == j - 1 and merge.after[0] > apart[0]:
                    why_not = f"merged they take {merge.after[0]:,} MACs instead of {apart[0]:,}"
                    self._note(self.gated, parts[i], part, why_not)
        return best[-1]

    def _alone(self, part: Part, axis: int) -> Choice:
        """The cheapest way to run one part without its neighbours."""
        key = part.last, axis
        if key not in self.known:
            if isinstance(part, Step):
                launched = sum(op_name(n) not in DROPOUTS for n in part.nodes)
                self.known[key] = Choice((sum(evaluate(macs(n)) for n in part.nodes), launched))
            else:
                self.known[key] = self._branches(part, axis)
        return self.known[key]

    def _branches(self, part: Sum, axis: int) -> Choice:
        """The cheapest way to run a sum: the most expensive branch takes in every other one that pays."""
        own = [self.chain(parts, axis) for _, _, parts in part.terms]
        known: dict[int, Geometry] = {}
        for i, (_, _, parts) in enumerate(part.terms):
            try:
                known[i] = map_of_chain(parts, axis, part.source, _geometry)
            except Inexact as why:
                self._note(self.refused, parts[0], parts[-1], str(why))
        best = sum(own, Choice((0, len(own) - 1)))
        for first in sorted(known, key=lambda i: -known[i].taps)[:2]:
            taken, total = [first], known[first]
            cost = _price(total, part.source, part.last)
            for i in known.keys() - {first}:
                try:
                    wider = total.plus(known[i])
                    wider.convolution_padding()
                except Inexact:
                    continue
                price = _price(wider, part.source, part.last)
                if price < _plus(cost, own[i].cost, (0, 1)):
                    taken, total, cost = [*taken, i], wider, price
            before = _plus(*(own[i].cost for i in taken), (0, len(taken) - 1))
            terms = None if len(taken) == len(own) else tuple(sorted(taken))
            merge = self._merge([part], axis, terms, total, before) if len(taken) > 1 else None
            if merge is not None:
                rest = [own[i] for i in range(len(own)) if i not in taken]
                found = sum(rest, Choice(_plus(cost, (0, len(rest))), [merge]))
                best = min(best, found, key=lambda c: c.cost)
        return best

    def _merge(
        self, parts: Sequence[Part], axis: int, terms: tuple[int, ...] | None, kernel: Geometry, before: Cost
    ) -> Merge | None:
        source, last = parts[0].source, parts[-1].last
        carriers = [c for p in parts for c in p.carriers]
        if last in self.skip or not carriers:
            return None
        if len(carriers) > 1 or any(isinstance(p, Sum) for p in parts):
            names = [str(arguments(c)["weight"].target) for c in carriers]
            if filled := [name for name in names if name in self.sparse]:
                pattern = self.sparse[filled[0]] or "sparse"
                why = f"it would fill up {filled[0]}, which Sparsify made {pattern}; run Fuse before Sparsify"
                self.refused[carriers[0], carriers[-1]] = why
                return None
        return Merge(source, last, axis, tuple(parts), terms, kernel, before, _price(kernel, source, last))

    def _note(self, into: dict[tuple[fx.Node, fx.Node], str], first: Part, second: Part, why: str) -> None:
        """Remember what stands between two layers; normalisations are explained by themselves."""
        if first.carriers and second.carriers and first is not second:
            into[first.carriers[-1], second.carriers[0]] = why


Leaf = Callable[[Step | None, int, int], Any]  # what a step is (None: the identity), by channels and dimensions


def _geometry(step: Step | None, channels: int, dims: int) -> Geometry:
    return Geometry.scaling(channels, dims, False) if step is None else step.geometry(channels, dims)


def _kernel(values: Values) -> Leaf:
    def leaf(step: Step | None, channels: int, dims: int) -> Kernel:
        g = _geometry(step, channels, dims)
        weight, bias = step.numbers(values) if step else (1, None)
        filled = _filled(weight, (g.outputs, g.inputs // g.groups, *g.extent))
        return Kernel(g, filled, None if bias is None else _filled(bias, (g.outputs,)))

    return leaf


def _filled(value: Any, size: tuple[int, ...]) -> torch.Tensor:
    """A tensor of that size from one of as many entries, from one entry, or from a number."""
    found = torch.as_tensor(value, dtype=torch.float64).flatten()
    return found.expand(math.prod(size)).reshape(size)


def map_of(part: Part, axis: int, leaf: Leaf) -> Any:
    """A part as one map: a geometry or a kernel, whatever the leaves are."""
    if isinstance(part, Step):
        return leaf(part, *_layout(part.source, axis))
    return summed((f, map_of_chain(parts, axis, part.source, leaf)) for f, _, parts in part.terms)


def map_of_chain(parts: Sequence[Part], axis: int, source: fx.Node, leaf: Leaf) -> Any:
    """Parts in a row as one map; none at all are the identity."""
    if not parts:
        return leaf(None, *_layout(source, axis))
    result = map_of(parts[-1], axis, leaf)
    for part in reversed(parts[:-1]):
        result = map_of(part, axis, leaf).then(result)
    return result


def summed(terms: Iterable[tuple[float, Any]]) -> Any:
    """The sum of maps times numbers."""
    first, *others = (found if factor == 1 else found.scaled(factor) for factor, found in terms)
    return reduce(lambda a, b: a.plus(b), others, first)


def _steps(parts: Iterable[Part]) -> Iterator[Step]:
    """All affine maps in the parts, those in branches too."""
    for part in parts:
        if isinstance(part, Step):
            yield part
        else:
            yield from (s for _, _, own in part.terms for s in _steps(own))


def _layout(source: fx.Node, axis: int) -> tuple[int, int]:
    """Channels and spatial dimensions of a value whose channels are at that axis."""
    sizes = shape(source)
    return sizes[axis], len(sizes) - 2 if axis == 1 else 0


def _price(found: Geometry, source: fx.Node, last: fx.Node) -> Cost:
    """MACs and launches of one map between two values."""
    if found.transposed:
        return math.prod(shape(source)) * found.taps * found.outputs // found.inputs, 1
    return math.prod(shape(last)) * found.taps, 1


# -------------------------------------------------------------------------------------------------------------- engine
class _Merger:
    """Merges the regions of a copy of a program. `exact` holds the merged weights in float64, before they are rounded
    to the program's precision, so that chains of merges round once and checks see the algebra alone."""

    def __init__(self, program: Program, seed: int, wrong: Mapping[str, str] | None = None):
        copied = program.copy()
        self.module: TrainableModule = copied.graph_module.eval()
        self.graph = self.module.graph
        # For every node the node of the original program that has the same value.
        self.twins: dict[fx.Node, fx.Node] = dict(zip(self.graph.nodes, program.graph.nodes, strict=True))
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        self.sparse = sparse_weights(program)
        self.exact: dict[str, torch.Tensor] = {}
        self.changed: list[dict[str, Any]] = []
        known = ((node, (wrong or {}).get(twin.name)) for node, twin in self.twins.items())
        self.failed: dict[fx.Node, tuple[set[fx.Node], str]] = {n: ({n}, why) for n, why in known if why}
        self.moved: dict[fx.Node, fx.Node] = {}

    def sweep(self) -> bool:
        """Plan all regions and do what pays; whether anything was merged."""
        before = len(self.changed)
        self.regions, self.planner = Regions(self.module), Planner(self.failed, self.sparse)
        for parts, _ in list(self.regions.find()):
            axis = next(p.axis for p in parts if p.carriers)
            assert axis is not None
            for merge in self.planner.chain(parts, axis).merges:
                self._apply(merge)
        self.module.recompile()
        return len(self.changed) > before

    def proof(self, program: Program) -> Proof:
        """The fused network beside the original on the same random inputs, in float64, with the merged weights as they
        are before they are rounded."""
        inputs = random_inputs(program, torch.Generator().manual_seed(self.seed))
        copied = program.derive(self.module, stale=False)
        fused = Evaluator(copied, double_weights(copied) | self.exact)
        original = Evaluator(program, double_weights(program))
        expected = original.run(inputs)
        error = relative_error(fused.run(inputs), expected)
        if error <= TOLERANCE:
            return Proof(error)
        errors = self._node_errors(original, fused, inputs)
        wrong = {n.name: f"in the whole network it is {e:.1e} off" for n, e in errors.items() if not e <= TOLERANCE}
        moved = [x * (1 + EPSILON) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
        return Proof(max(errors.values(), default=0.0), relative_error(original.run(moved), expected), wrong)

    def _node_errors(self, original: Evaluator, fused: Evaluator, inputs: list[Any]) -> dict[fx.Node, float]:
        """By node of the original, the error of its twin here on the values that the original has."""
        values: dict[fx.Node, Any] = {}
        original.run(inputs, values.__setitem__)
        env: dict[fx.Node, Any] = {}
        errors: dict[fx.Node, float] = {}
        with torch.no_grad():
            for node in self.graph.nodes:
                twin = self.twins.get(node)
                if node.op == "get_attr":
                    env[node] = fused.fetch(str(node.target))
                elif node.op == "call_function":
                    env[node] = fused.call(node, env)
                    if twin is not None:
                        errors[twin] = relative_error(env[node], values[twin])
                if twin is not None and node.op in ("placeholder", "call_function"):
                    env[node] = values[twin]
        return errors

    def refusals(self) -> list[dict[str, str]]:
        """Every normalisation that is left, and every pair of layers that could not be merged, with the reason."""
        left = [n for n in self.graph.nodes if op_name(n) == "batch_norm"]
        norms = [{"what": _label(n), "why": self._why_left(n)} for n in left]
        pairs = [{"what": _pair(key), "why": why} for key, why in self.planner.refused.items()]
        wrong = [
            {"what": last.name, "why": why}
            for last, (members, why) in self.failed.items()
            if not any(n in members for n in left)
        ]
        return norms + pairs + wrong

    def gated(self) -> list[dict[str, str]]:
        """Neighbouring layers that could be merged exactly and cost more when they are."""
        return [{"what": _pair(key), "why": why} for key, why in self.planner.gated.items()]

    def _why_left(self, norm: fx.Node) -> str:
        before, reasons = norm.args[0], []
        if isinstance(before, fx.Node) and op_name(before) in MAPS:
            reasons.append(f"batch_norm after linear map: {self._between(before, norm)}")
        for user in norm.users:
            if op_name(user) in MAPS and user.args[0] is norm:
                reasons.append(f"batch_norm before linear map: {self._between(norm, user)}")
        reasons += [why for members, why in self.failed.values() if norm in members]
        return "; ".join(reasons) or _surroundings(norm)

    def _between(self, first: fx.Node, second: fx.Node) -> str:
        """What keeps a layer and a normalisation apart."""
        if len(first.users) > 1:
            return f"{first.name} is used by {len(first.users)} nodes"
        found = self.regions.problem(first) or self.regions.problem(second)
        if found:
            return found
        a, b = self.regions.step(first), self.regions.step(second)
        assert a is not None
        assert b is not None
        if a.axis != b.axis or a.axis is None:
            return OTHER_AXIS
        try:
            map_of(a, a.axis, _geometry).then(map_of(b, a.axis, _geometry))
        except Inexact as why:
            return str(why)
        return "it is cheaper as it is" if not self.failed else "a merge was wrong"

    def _value(self, stored: fx.Node) -> torch.Tensor:
        name = str(stored.target)
        found = self.exact.get(name)
        return to_double(fetch(self.module, name)) if found is None else found

    def _apply(self, merge: Merge) -> None:
        """Merge and check; a merge that is wrong is remembered and not done."""
        kernel = self._kernel(merge, self._value)
        drawing = self._drawing()
        error = max(self._error(merge, kernel, self._value), self._error(merge, self._kernel(merge, drawing), drawing))
        if not error <= TOLERANCE:
            self.failed[merge.last] = merge.members, f"the merged layer is {error:.1e} off"
            return
        members = merge.members
        nodes = [n.name for n in self.graph.nodes if n in members]
        into = self._commit(merge, kernel)
        self.changed.append({"rule": _rule(merge), "into": into, "nodes": nodes, "error": error})
        if merge.after[0] != merge.before[0]:
            self.changed[-1]["macs"] = [merge.before[0], merge.after[0]]

    def _drawing(self) -> Values:
        """Random values, the same ones at every call, in the place of the stored ones."""
        drawn: dict[str, torch.Tensor] = {}

        def read(stored: fx.Node) -> torch.Tensor:
            name = str(stored.target)
            if name not in drawn:
                own = self._value(stored)
                size = torch.rand(own.shape, generator=self.generator, dtype=torch.float64) + 0.5
                drawn[name] = torch.where(own < 0, -size, size) if own.is_floating_point() else own
            return drawn[name]

        return read

    def _kernel(self, merge: Merge, values: Values) -> Kernel:
        leaf = _kernel(values)
        return summed((f, map_of_chain(parts, merge.axis, merge.source, leaf)) for f, _, parts in merge.branches)

    def _error(self, merge: Merge, kernel: Kernel, values: Values) -> float:
        """Relative error of the merged operator on a random input, borders included, in float64."""
        given = torch.randn(_window(merge), generator=self.generator, dtype=torch.float64)
        env: dict[fx.Node, Any] = {self._now(merge.source): given}
        inner = set().union(*(p.members for _, _, parts in merge.branches for p in parts))
        ends = {s.nodes[i]: s for _, _, parts in merge.branches for s in _steps(parts) if s.folds for i in (0, -1)}
        for node in self.graph.nodes:
            if node in ends:  # its sizes are those of the network, not of this input
                step = ends[node]
                own = env[self._now(step.source)]
                env[node] = own.flatten(0, -2) if node is step.nodes[0] else env[step.nodes[1]].reshape(own.shape)
            elif node in inner:
                env |= {n: _constant(n, values) for n in node.all_input_nodes if n not in env}
                env[node] = invoke(node, evaluated(node, env))
        expected = sum(factor * env[self._now(end)] for factor, end, _ in merge.branches)
        return relative_error(_run(kernel, given), expected)

    def _now(self, node: fx.Node) -> fx.Node:
        """What stands for a node that may have been merged since the plan was made."""
        while node in self.moved:
            node = self.moved[node]
        return node

    def _commit(self, merge: Merge, kernel: Kernel) -> str:
        """Put the map into the graph, at the place of the layer with the most weights; the name of its weight."""
        carriers = [c for _, _, parts in merge.branches for p in parts for c in p.carriers]
        keep = max(carriers, key=lambda n: math.prod(shape(arguments(n)["weight"])))
        weight = self._store(keep, "weight", _own_weight(kernel))
        bias = None if kernel.bias is None else self._store(keep, "bias", kernel.bias)
        keep.target, args = _operator(op_name(keep), kernel.geometry)
        keep.args, keep.kwargs = (self._now(merge.source), weight, bias, *args), {}
        total = keep
        with self.graph.inserting_before(merge.last):
            for factor, end in merge.rest:
                alpha: dict[str, Any] = {} if factor == 1 else {"alpha": factor}
                total = self.graph.call_function(torch.ops.aten.add.Tensor, (total, self._now(end)), alpha)
                total.meta = dict(merge.last.meta)
        keep.meta["val"] = merge.last.meta["val"]
        twin = self.twins.get(merge.last)
        self.twins.pop(keep, None)  # of a sum that keeps some branches, it is a part that the original does not have
        if twin is not None:
            self.twins[total] = twin
        if merge.last is not total:
            merge.last.replace_all_uses_with(total, delete_user_cb=lambda user: user is not keep)
            self.moved[merge.last] = total
        members = merge.members - {keep}
        for node in [n for n in reversed(list(self.graph.nodes)) if n in members]:
            self._erase(node)
        return str(weight.target)

    def _erase(self, node: fx.Node) -> None:
        """Remove a node, and the stored tensors that only it used."""
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        for each in inputs:
            if not each.users and each in self.regions.constants:
                self._erase(each)

    def _store(self, keep: fx.Node, key: str, exact: torch.Tensor) -> fx.Node:
        """The node of the layer's weight or bias with a new value; a bias may be new."""
        stored = arguments(keep)[key]
        weight = fetch(self.module, str(arguments(keep)["weight"].target))
        name = self._new_name(keep, key) if stored is None else str(stored.target)
        place_tensor(self.module, name, like(weight, exact.to(weight.dtype)))
        self.exact[name] = exact
        if stored is None:
            with self.graph.inserting_before(keep):
                stored = self.graph.get_attr(name)
        stored.meta["val"] = arguments(keep)["weight"].meta["val"].new_empty(exact.shape)
        return stored

    def _new_name(self, node: fx.Node, key: str) -> str:
        """A free name next to the weight: `conv.weight` gives `conv.bias`."""
        owner, _, weight = str(arguments(node)["weight"].target).rpartition(".")
        name = weight.replace("weight", key) if "weight" in weight else f"{weight}_{key}"
        holder = fetch(self.module, owner) if owner else self.module
        while hasattr(holder, name):
            name += "_"
        return f"{owner}.{name}" if owner else name


def _operator(name: str, g: Geometry) -> tuple[Any, tuple[Any, ...]]:
    """The overload of an operator that computes a map, and its arguments after input, weight and bias."""
    target = getattr(torch.ops.aten, name)
    if name == "linear":
        return target.default, ()
    stride, dilation = list(g.stride), list(g.dilation)
    if g.transposed:
        overload = target.default if name == "conv_transpose1d" else target.input
        return overload, (stride, [a for a, _ in g.padding], list(g.output_padding), g.groups, dilation)
    padding = g.convolution_padding()
    return (target.padding if padding == "same" else target.default), (stride, padding, dilation, g.groups)


def _own_weight(kernel: Kernel) -> torch.Tensor:
    """The weight as the operator wants it."""
    return _swapped(kernel.weight, kernel.geometry.groups) if kernel.geometry.transposed else kernel.weight


def _run(kernel: Kernel, given: torch.Tensor) -> torch.Tensor:
    """The map on a value, through the operator it becomes."""
    g = kernel.geometry
    names = TRANSPOSED if g.transposed else CONVS
    target, args = _operator(names[len(g.extent) - 1] if g.extent else "linear", g)
    return target(given, _own_weight(kernel), kernel.bias, *args)


def _window(merge: Merge) -> list[int]:
    """A small input that still has the borders and an inside: two samples, spatial sizes cut to a few kernels."""
    size = shape(merge.source)
    result = [2, *(min(s, 3) for s in size[1:])]
    result[merge.axis] = size[merge.axis]
    if merge.axis == 1:
        for d, (span, stride) in enumerate(zip(merge.shape.span, merge.shape.stride, strict=True), 2):
            result[d] = min(size[d], 2 * (span + stride))
    return result


def _rule(merge: Merge) -> str:
    """What was merged, in words."""
    if len(merge.parts) == 1:
        part = merge.parts[0]
        assert isinstance(part, Sum)
        return f"sum of {len(merge.terms or part.terms)} branches"
    return " + ".join(op_name(p.nodes[len(p.nodes) // 2]) if isinstance(p, Step) else "sum" for p in merge.parts)


def _pair(nodes: tuple[fx.Node, fx.Node]) -> str:
    return " + ".join(str(arguments(n)["weight"].target).removesuffix(".weight") for n in nodes)


def _label(node: fx.Node) -> str:
    mean = arguments(node)["running_mean"]
    return str(mean.target).removesuffix(".running_mean") if mean is not None else node.name


def _surroundings(node: fx.Node) -> str:
    before, after = node.args[0], ", ".join(op_name(u) for u in node.users)
    return f"no linear layer next to it ({op_name(before)} -> batch_norm -> {after})"  # type: ignore[arg-type]
