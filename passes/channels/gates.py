"""First-order effect of masking an index, exactly: the derivative of the loss with respect to one gate per index.

A gate stands at every place where the entries along an axis are added up, which is where an index is read:

- contractions (linear, convolution, matmul, einsum, attention): the products of index i count `gate[i]` times, once per
  product however many of its operands the axis is in;
- normalisations, means, variances and softmax over the axis: index i counts `gate[i]` times in the moments and sums, so
  statistics are those of what is left, as after surgery;
- sums: index i counts `gate[i]` times; in p-norms, cosine similarities and distances its powers do;
- whatever else takes an axis away (maxima): the operand's entries at index i are multiplied by `gate[i]`.

What acts on each entry by itself, depthwise convolutions and elementwise products included, reads nothing. With the
gates of an index at 0 the network is the one that `graph.surgery` leaves without it (`graph.verify.restriction` says the
same with hard masks); at 1, where the derivative is taken, it is the network itself. Definition and derivation: ours.

A weight that reads an axis has the derivative in its gradient: the sum of weight * gradient over the entries that read
index i. Elsewhere (products of two activations, statistics, frozen weights, tensors used in several roles) the graph is
tapped: identities that see the gradient as it passes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ...graph.comb import axes as ax
from ...graph.comb.axes import Axis, Factor, Misaligned
from ...graph.comb.rules.contraction import spelled_out
from ...graph.comb.solve import Comb
from ...graph.compat import pytree
from ...graph.nodes import arguments, fetch, is_operator, op_name, set_argument, shape
from ...graph.trainable import TrainableModule
from ..common.sums import weighted_sums

Totals = dict[Factor, np.ndarray]
MATMULS = {
    "matmul": ("self", "other"), "bmm": ("self", "mat2"), "mm": ("self", "mat2"), "mv": ("self", "vec"),
    "dot": ("self", "tensor"), "addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"),
}  # fmt: skip
PARTS = frozenset("slice narrow select split split_with_sizes chunk unbind tensor_split getitem".split())
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "torchvision::deform_conv2d")


@dataclass(frozen=True)
class Operand:
    """A tensor operand of a node: the argument, its place in the argument's list if it is one, and one of its
    dimensions."""

    source: fx.Node
    key: str
    place: int | None
    dim: int


@dataclass(frozen=True)
class Read:
    """Products that a node adds up along an axis. Value * gradient summed over the axis of any one of the operands, times
    `share`, is the derivative by the gates of these atoms."""

    node: fx.Node
    operands: tuple[Operand, ...]
    atoms: frozenset[Factor]
    share: float = 1.0


@dataclass(frozen=True)
class Moments:
    """Statistics that a node takes along some dimensions of an operand. function(arguments, gates) computes the node with
    weights `{dim: vector}` in the statistics."""

    node: fx.Node
    source: fx.Node
    dims: tuple[int, ...]
    function: Callable[[dict[str, Any], dict[int, Tensor]], Any]


# ------------------------------------------------------------------------------------------------------- what is read
def find_reads(comb: Comb, wanted: dict[Factor, None]) -> tuple[list[Read], list[Moments]]:
    """Every place of the graph where an axis with one of the wanted atoms is read."""
    reads: list[Read] = []
    moments: list[Moments] = []
    for node in comb.module.graph.nodes:
        if node.op != "call_function" or not is_operator(node) or comb.axes[node] is None:
            continue
        if not any(ax.touches(axis, wanted) for i in node.all_input_nodes for axis in comb.axes[i] or () if _plain(i)):
            continue
        own_reads, own_moments = _reads_of(comb, node, wanted)
        reads += [r for r in own_reads if r.atoms]
        moments += own_moments
    return reads, moments


def _plain(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor) or node.op == "get_attr"


def _reads_of(comb: Comb, node: fx.Node, wanted: dict[Factor, None]) -> tuple[list[Read], list[Moments]]:
    name, a = op_name(node), arguments(node)

    def atoms(axis: Axis) -> frozenset[Factor]:
        return frozenset(atom for atom in ax.atoms([axis]) if atom in wanted)

    def read(*operands: Operand, of: Axis | None = None, share: float = 1.0) -> Read:
        first = operands[0]
        return Read(node, operands, atoms(comb.axes[first.source][first.dim] if of is None else of), share)

    def over(key: str, dims: Iterable[int], function: Callable[..., Any]) -> list[Moments]:
        axes = comb.axes[a[key]]
        touched = tuple(d for d in sorted({d % len(axes) for d in dims}) if atoms(axes[d]))
        return [Moments(node, a[key], touched, function)] if touched else []

    if name in CONVOLUTIONS:
        weight, x = Operand(a["weight"], "weight", None, 1), Operand(a["input"], "input", None, 1)
        return [read(weight, x, of=comb.axes[a["weight"]][1])], []
    if name.startswith("conv_transpose"):
        weight, x = Operand(a["weight"], "weight", None, 0), Operand(a["input"], "input", None, 1)
        try:
            _, inner = ax.take_inner(comb.axes[a["weight"]][0], shape(a["weight"])[0] // a["groups"])
        except Misaligned:  # then it is frozen
            inner = []
        return [read(weight, x, of=inner)], []
    if name == "linear":
        last = len(shape(a["input"])) - 1
        return [read(Operand(a["weight"], "weight", None, 1), Operand(a["input"], "input", None, last))], []
    if name in MATMULS:
        left, right = MATMULS[name]
        p, q = a[left], a[right]
        operands = (Operand(p, left, None, len(shape(p)) - 1), Operand(q, right, None, max(len(shape(q)) - 2, 0)))
        return [read(*operands)], []
    if name == "einsum":
        terms, result = spelled_out(a["equation"], [len(shape(t)) for t in a["tensors"]])
        found = []
        for letter in dict.fromkeys("".join(terms)):
            if letter not in result:
                places = [
                    Operand(t, "tensors", i, term.index(letter))
                    for i, (term, t) in enumerate(zip(terms, a["tensors"], strict=True))
                    if letter in term and shape(t)[term.index(letter)] > 1
                ]
                found += [read(*places)] if places else []
        return found, []
    if name == "scaled_dot_product_attention":
        width = len(shape(a["query"])) - 1
        products = read(Operand(a["query"], "query", None, width), Operand(a["key"], "key", None, width))
        return [products], over("key", [-2], _attention)
    key = "self" if "self" in a else "input"
    if name in STATISTICS and isinstance(a.get(key), fx.Node) and not isinstance(a.get("other"), fx.Node):
        dims = _statistics_dims(name, a, len(shape(a[key])))
        return [], over(key, dims, STATISTICS[name]) if dims else []
    shares = {"cosine_similarity": 0.5, "cdist": 0.5, "pairwise_distance": 0.5}
    if name in ("linalg_vector_norm", "norm", "frobenius_norm"):
        order = a.get("ord", a.get("p"))
        order = 2 if order is None else order
        share = 1 / order if isinstance(order, (int, float)) and 0 < order < math.inf else 1.0
        return _vanished(comb, node, atoms, share), []
    return [] if name in PARTS else _vanished(comb, node, atoms, shares.get(name, 1.0)), []


def _vanished(comb: Comb, node: fx.Node, atoms: Callable[[Axis], frozenset[Factor]], share: float) -> list[Read]:
    """The axes of its operands that a node's results no longer have."""
    left = frozenset(ax.atoms(comb._flat(node)))
    found = []
    for key, value in arguments(node).items():
        several = isinstance(value, (list, tuple))
        for place, source in enumerate(value if several else [value]):
            if isinstance(source, fx.Node) and _plain(source) and comb.axes[source] is not None:
                for d, axis in enumerate(comb.axes[source]):
                    operand = Operand(source, key, place if several else None, d)
                    found.append(Read(node, (operand,), atoms(axis) - left, share))
    return found


# ---------------------------------------------------------------------------------------- statistics with gates in them
def _spread(x: Tensor, gates: dict[int, Tensor]) -> Tensor:
    """The product of the gates at every entry of x."""
    weight = torch.ones_like(x)
    for d, gate in gates.items():
        weight = weight * gate.view([-1 if k == d else 1 for k in range(x.dim())])
    return weight


def _mean(x: Tensor, weight: Tensor, dims: list[int]) -> Tensor:
    return (x * weight).sum(dims, keepdim=True) / weight.sum(dims, keepdim=True)


def _variance(x: Tensor, weight: Tensor, dims: list[int]) -> Tensor:
    return _mean((x - _mean(x, weight, dims)).square(), weight, dims)


def _per_channel(y: Tensor, a: dict[str, Any]) -> Tensor:
    form = [1, -1, *[1] * (y.dim() - 2)]
    y = y if a.get("weight") is None else y * a["weight"].view(form)
    return y if a.get("bias") is None else y + a["bias"].view(form)


def _layer_norm(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    x = a["input"]
    weight, dims = _spread(x, gates), list(range(x.dim() - len(a["normalized_shape"]), x.dim()))
    y = (x - _mean(x, weight, dims)) * (_variance(x, weight, dims) + a["eps"]).rsqrt()
    y = y if a.get("weight") is None else y * a["weight"]
    return y if a.get("bias") is None else y + a["bias"]


def _rms_norm(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    x = a["input"]
    weight, dims = _spread(x, gates), list(range(x.dim() - len(a["normalized_shape"]), x.dim()))
    eps = torch.finfo(x.dtype).eps if a.get("eps") is None else a["eps"]
    y = x * (_mean(x.square(), weight, dims) + eps).rsqrt()
    return y if a.get("weight") is None else y * a["weight"]


def _group_norm(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    x = a["input"]
    grouped = (len(x), a["num_groups"], -1)
    rows, weight = x.reshape(grouped), _spread(x, gates).reshape(grouped)
    y = (rows - _mean(rows, weight, [2])) * (_variance(rows, weight, [2]) + a["eps"]).rsqrt()
    return _per_channel(y.reshape(x.shape), a)


def _batch_norm(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    """With statistics of the batch, as weight standardisation takes them."""
    x = a["input"]
    weight, dims = _spread(x, gates), [d for d in range(x.dim()) if d != 1]
    return _per_channel((x - _mean(x, weight, dims)) * (_variance(x, weight, dims) + a["eps"]).rsqrt(), a)


def _instance_norm(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    x = a["input"]
    weight, dims = _spread(x, gates), list(range(2, x.dim()))
    return _per_channel((x - _mean(x, weight, dims)) * (_variance(x, weight, dims) + a["eps"]).rsqrt(), a)


def _softmax(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    x = a["self"] if "self" in a else a["input"]
    return (x - (_spread(x, gates).log() + x).logsumexp(a["dim"], keepdim=True)).exp()


def _log_softmax(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    return _softmax(a, gates).log()


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """A reduction from its form `function(x, weight, dims, arguments)` with the dimensions kept."""

    def reduce(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
        x = a["self"]
        dims = _reduced_dims(a, x.dim())
        y = function(x, _spread(x, gates), dims, a)
        return y if a.get("keepdim") else y.squeeze(dims)

    return reduce


def _unbiased(x: Tensor, weight: Tensor, dims: list[int], a: dict[str, Any]) -> Tensor:
    correction = a.get("correction", 1) if "unbiased" not in a else int(a["unbiased"])
    count = weight.sum(dims, keepdim=True)
    return _variance(x, weight, dims) * count / (count - (1 if correction is None else correction))


def _both(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, gates: (function(a, gates), STATISTICS["mean"](a, gates))


def _pool(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    """An adaptive pooling to size 1 along the gated dimensions."""
    x, dims = a["self"], list(gates)
    mean = _mean(x, _spread(x, gates), dims).expand_as(x)
    sizes = a["output_size"]
    return getattr(torch.nn.functional, f"adaptive_avg_pool{len(sizes)}d")(mean, sizes)


def _attention(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    """Keys as the softmax sees them: a gate multiplies the exponential of its logits."""
    mask, (gate,) = a.get("attn_mask"), gates.values()
    n, m = a["query"].shape[-2], a["key"].shape[-2]
    if a.get("is_causal"):
        mask = torch.ones(n, m, dtype=torch.bool, device=gate.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=gate.dtype, device=gate.device).masked_fill(~mask, -math.inf)
    mask = gate.log().expand(n, m) if mask is None else mask.to(gate.dtype) + gate.log()
    q, k, v = a["query"], a["key"], a["value"]
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=a.get("scale"), enable_gqa=a.get("enable_gqa", False)
    )


STATISTICS: dict[str, Callable[[dict[str, Any], dict[int, Tensor]], Any]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "mean": _reduced(lambda x, w, dims, a: _mean(x, w, dims)),
    "sum": _reduced(lambda x, w, dims, a: (x * w).sum(dims, keepdim=True)),
    "var": _reduced(_unbiased),
    "std": _reduced(lambda *args: _unbiased(*args).sqrt()),
    "logsumexp": _reduced(lambda x, w, dims, a: (x + w.log()).logsumexp(dims, keepdim=True)),
}
STATISTICS |= {"var_mean": _both(STATISTICS["var"]), "std_mean": _both(STATISTICS["std"])}
STATISTICS |= dict.fromkeys(("softmax", "_softmax", "_safe_softmax"), _softmax)
STATISTICS |= dict.fromkeys(("log_softmax", "_log_softmax"), _log_softmax)
STATISTICS |= {f"adaptive_avg_pool{n}d": _pool for n in (1, 2, 3)}


def _reduced_dims(a: dict[str, Any], rank: int) -> list[int]:
    given = a.get("dim")
    dims = range(rank) if given is None or given == [] else [given] if isinstance(given, int) else given
    return [d % rank for d in dims]


def _statistics_dims(name: str, a: dict[str, Any], rank: int) -> list[int]:
    """Over which dimensions a node takes its statistics."""
    if name in ("layer_norm", "rms_norm"):
        return list(range(rank - len(a["normalized_shape"]), rank))
    if name == "group_norm":
        return list(range(1, rank))
    if name == "batch_norm":
        return [d for d in range(rank) if d != 1] if a["running_mean"] is None else []
    if name == "instance_norm":
        return list(range(2, rank))
    if name.startswith("adaptive_avg_pool"):
        return [rank - k for k in range(1, len(a["output_size"]) + 1) if a["output_size"][-k] == 1]
    return _reduced_dims(a, rank)


# ------------------------------------------------------------------------------------------------------------- the taps
@dataclass
class Tap:
    """Where a tapped value's sums go: the axes they lie along, which of their atoms count, and the sums so far."""

    axes: list[Axis]
    atoms: frozenset[Factor]
    share: float = 1.0
    sums: list[Any] = field(default_factory=list)

    def add(self, found: Sequence[Tensor]) -> None:
        self.sums = [s + f for s, f in zip(self.sums, found, strict=True)] if self.sums else list(found)


class Gates:
    """Derivatives of the loss by the gates of a network's indices, gathered in its backward passes.

    comb, wanted: the network as it was solved, and the atoms that have gates. masks: which of their indices it still has.
    module: the network as it is, with the comb's node names. Run it within `tapped`; `totals` then gives the sums since
    the last call: of the gradients that lie in its parameters and of what the taps saw.
    """

    def __init__(self, comb: Comb, wanted: Iterable[Factor], masks: ax.Masks | None, module: TrainableModule):
        self.comb, self.masks, self.module = comb, masks or {}, module
        self.wanted = dict.fromkeys(wanted)
        self.parameters: list[tuple[str, int, Tap]] = []
        self.reads: list[tuple[Read, Operand, Tap]] = []
        self.moments: list[tuple[Moments, Tap]] = []
        self.active = True
        reads, moments = find_reads(comb, self.wanted)
        direct = self._direct(reads)
        seen: set[tuple[int, int]] = set()
        for read in reads:
            own = next((o for o in read.operands if (self._tensor(o), o.dim) in direct), None)
            if own is not None:
                if (self._tensor(own), own.dim) not in seen:
                    seen.add((self._tensor(own), own.dim))
                    self.parameters.append((str(own.source.target), own.dim, self._tap(read, own)))
                continue
            values = [o for o in read.operands if o.source.op != "get_attr"] or list(read.operands)
            smallest = min(values, key=lambda o: math.prod(shape(o.source)))
            self.reads.append((read, smallest, self._tap(read, smallest)))
        for m in moments:
            axes = [comb.axes[m.source][d] for d in m.dims]
            self.moments.append((m, Tap(axes, frozenset(self.wanted))))

    def _tap(self, read: Read, operand: Operand) -> Tap:
        return Tap([self.comb.axes[operand.source][operand.dim]], read.atoms, read.share)

    def _tensor(self, operand: Operand) -> int:
        """Which stored tensor an operand is (a number), 0 for one that is computed."""
        return id(fetch(self.module, str(operand.source.target))) if operand.source.op == "get_attr" else 0

    def _direct(self, reads: list[Read]) -> set[tuple[int, int]]:
        """The parameters, each with a dimension, whose gradients say all: trained, and every use reads that dimension."""
        uses: dict[int, list[fx.Node]] = defaultdict(list)
        for node in self.comb.module.graph.nodes:
            if node.op == "get_attr":
                tensor = fetch(self.module, str(node.target))
                if isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad:
                    for user in node.users:
                        uses[id(tensor)] += [user] * pytree.tree_leaves((user.args, user.kwargs)).count(node)
        read_by: dict[tuple[int, int], list[fx.Node]] = defaultdict(list)
        for read in reads:
            for operand in read.operands:
                if operand.place is None and read.share == 1.0:
                    read_by[self._tensor(operand), operand.dim].append(read.node)
        return {key for key, nodes in read_by.items() if key[0] in uses and Counter(uses[key[0]]) == Counter(nodes)}

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """The module's graph has the taps in it."""
        if not self.reads and not self.moments:
            yield
            return
        graph = self.module.graph
        by_name = {n.name: n for n in graph.nodes}
        for read, operand, tap in self.reads:
            node = by_name[read.node.name]
            value = arguments(node)[operand.key]
            source = value if operand.place is None else value[operand.place]
            with graph.inserting_before(node):
                new = graph.call_function(_passing(self, tap, operand.dim), (source,))
            replaced = new if operand.place is None else [new if i == operand.place else v for i, v in enumerate(value)]
            set_argument(node, operand.key, replaced)
        for moments, tap in self.moments:
            node = by_name[moments.node.name]
            with graph.inserting_after(node):
                graph.call_function(_watching(self, tap, moments, node), (node, *node.args), dict(node.kwargs))
        self.module.recompile()
        try:
            yield
        finally:
            for node in reversed(list(graph.nodes)):
                if getattr(node.target, "_gates", None) is self:
                    if node.users:
                        node.replace_all_uses_with(node.args[0])
                    graph.erase_node(node)
            self.module.recompile()

    def totals(self, share: Callable[[np.ndarray], np.ndarray] = lambda values: values, scale: float = 1.0) -> Totals:
        """By atom, the derivatives by its gates in the original's numbering, 0 where the network has lost the index.

        share: makes what the taps saw in one process the mean over all. scale: by how much the loss was multiplied, which
        the parameters' gradients no longer are.
        """
        found: Totals = {}
        given = [(name, dim, tap) for name, dim, tap in self.parameters if fetch(self.module, name).grad is not None]
        tensors = [fetch(self.module, name) for name, _, _ in given]
        sums = weighted_sums([(t.detach(), t.grad, [dim]) for t, (_, dim, _) in zip(tensors, given, strict=True)])
        for (_, dim, tap), values in zip(given, sums, strict=True):
            self._fold(tap.axes[0], values[dim] * tap.share, tap.atoms, found)
        taps = [tap for _, _, tap in self.reads] + [tap for _, tap in self.moments]
        if taps:
            self._fold_taps(taps, share, scale, found)
        return found

    def _fold_taps(
        self, taps: list[Tap], share: Callable[[np.ndarray], np.ndarray], scale: float, found: Totals
    ) -> None:
        sizes = [[self._size(axis) for axis in tap.axes] for tap in taps]
        rows = [
            value for tap, own in zip(taps, sizes, strict=True) for value in (tap.sums or [torch.zeros(n) for n in own])
        ]
        device = next((r.device for r in rows if r.device.type != "cpu"), torch.device("cpu"))
        values = share(torch.cat([r.to(device).double() for r in rows]).cpu().numpy() / scale)
        parts = iter(np.split(values, np.cumsum([n for own in sizes for n in own])[:-1]))
        for tap in taps:
            for axis in tap.axes:
                self._fold(axis, next(parts) * tap.share, tap.atoms, found)
            tap.sums = []

    def _size(self, axis: Axis) -> int:
        return ax.kept_size(axis, {atom: int(mask.sum()) for atom, mask in self.masks.items()})

    def _fold(self, axis: Axis, values: np.ndarray, atoms: frozenset[Factor], found: Totals) -> None:
        if ax.touches(axis, self.masks):
            kept = ax.kept_mask(axis, self.masks)
            values, given = np.zeros(len(kept)), values
            values[kept] = given
        own: Totals = {}
        ax.fold(axis, values, own)
        for atom in own.keys() & atoms:
            found[atom] = found[atom] + own[atom] if atom in found else own[atom]


def _wide(value: Any) -> Any:
    """Detached, and of at least single precision where it is a floating tensor."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return value.float() if value.is_floating_point() and value.element_size() < 4 else value


def _passing(gates: Gates, tap: Tap, dim: int) -> Callable[[Tensor], Tensor]:
    """An identity that adds up value * gradient along a dimension."""

    def pass_on(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not gates.active:
            return x
        y = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        others = [d for d in range(x.dim()) if d != dim]
        kept = x.detach()

        def pull(gradient: Tensor) -> None:
            product = _wide(kept) * _wide(gradient)
            tap.add([product.sum(others) if others else product])

        y.register_hook(pull)
        return y

    pass_on._gates = gates  # type: ignore[attr-defined]
    return pass_on


def _watching(gates: Gates, tap: Tap, moments: Moments, node: fx.Node) -> Callable[..., None]:
    """Sees a node's results and arguments, and adds up the derivatives by the gates in its statistics."""
    names = list(arguments(node))
    key = next(k for k, v in arguments(moments.node).items() if v is moments.source)
    defaults = {k: v for k, v in arguments(node).items() if not isinstance(v, fx.Node)}

    def watch(result: Any, *args: Any, **kwargs: Any) -> None:
        if not torch.is_grad_enabled() or not gates.active:
            return
        a = {k: _wide(v) for k, v in (defaults | dict(zip(names, args, strict=False)) | kwargs).items()}

        def pull(gradient: Tensor, which: int | None) -> None:
            x = a[key]
            with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
                ones = {
                    d: torch.ones(x.shape[d], dtype=x.dtype, device=x.device, requires_grad=True) for d in moments.dims
                }
                again = moments.function(a, ones)
                again = again if which is None else again[which]
                tap.add(torch.autograd.grad(again, list(ones.values()), _wide(gradient).to(again.dtype)))

        for which, value in [(None, result)] if isinstance(result, Tensor) else enumerate(result):
            if value.requires_grad:
                value.register_hook(lambda gradient, which=which: pull(gradient, which))

    watch._gates = gates  # type: ignore[attr-defined]
    return watch
