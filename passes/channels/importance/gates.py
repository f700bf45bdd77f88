"""The exact first-order effect of masking an index: the derivative of the loss with respect to one gate per index.

A gate stands wherever the entries along an axis are added up, which is where an index is read:

- contractions (linear, convolution, matmul, einsum, attention): the products of index i count `gate[i]` times, once per
  product, even if several of its operands have the axis;
- normalisations, means, variances and softmax over the axis: index i counts `gate[i]` times in the moments and sums, so
  statistics are those of the remaining indices, as after removal;
- sums: index i counts `gate[i]` times; in p-norms, cosine similarities and distances its powers do;
- other operators whose results lack the axis (maxima): the operand's entries at index i are multiplied by `gate[i]`.

Operators that act on each entry by itself, depthwise convolutions and elementwise products included, read nothing. With the
gates of an index at 0 the network is the one that `graph.comb.surgery` leaves without it (the restriction oracle says the
same with hard masks); at 1, where the derivative is taken, it is the original. Definition and derivation: ours.

For a weight that reads an axis, the derivative is in the weight's gradient: the sum of weight * gradient over the entries
that read index i. Elsewhere (products of two activations, statistics, frozen weights, tensors used in several roles) the
graph is tapped by identities that see the gradient.
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

from ....graph.comb import axes as ax
from ....graph.comb.axes import Axis, Factor
from ....graph.comb.solve import Comb
from ....graph.compat import pytree
from ....graph.errors import BadInput
from ....graph.facts import CASTS
from ....graph.nodes import arguments, fetch, op_name, set_argument, shape
from ....graph.trainable import TrainableModule
from .members import by_atom
from .reads import Moments, Operand, Read, find_reads
from .sums import weighted_sums

Totals = dict[Factor, np.ndarray]


@dataclass
class Tap:
    """Where the sums of a tapped value go: the axes that they belong to, the atoms of these axes that are scored, a factor,
    and the sums so far, one vector for each axis."""

    axes: list[Axis]
    atoms: frozenset[Factor]
    share: float = 1.0
    sums: list[Any] = field(default_factory=list)

    def add(self, sums: Sequence[Tensor]) -> None:
        """Add the sums of a backward pass, one vector for each axis."""
        self.sums = [s + f for s, f in zip(self.sums, sums, strict=True)] if self.sums else list(sums)


def _uncast(node: fx.Node) -> fx.Node:
    """The value before casts to another precision, which autocast inserts; the gradient of a cast is cast back."""
    while op_name(node) in CASTS and node.all_input_nodes[:1] == [node.args[0]]:
        node = node.all_input_nodes[0]
    return node


def _users(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a value, once for each argument; casts are replaced by their users."""
    users = []
    for user in node.users:
        times = pytree.tree_leaves((user.args, user.kwargs)).count(node)
        users += _users(user) if op_name(user) in CASTS and times == 1 else [user] * times
    return users


class Gates:
    """Derivatives of the loss with respect to the gates of a network's indices, gathered in backward passes.

    comb: of the original network. wanted: the atoms whose indices have gates. masks: which of their indices the network
    still has. module: the present network, with the comb's node names. Run it within `tapped`; `totals` then returns the
    sums since the last call, from the gradients of its parameters and from the taps.
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
            operand = next((o for o in read.operands if (self._tensor(o), o.dim) in direct), None)
            if operand is not None:
                if (self._tensor(operand), operand.dim) not in seen:
                    seen.add((self._tensor(operand), operand.dim))
                    name = str(_uncast(operand.source).target)
                    self.parameters.append((name, operand.dim, self._tap(read, operand)))
                continue
            values = [o for o in read.operands if not self._tensor(o)] or list(read.operands)
            smallest = min(values, key=lambda o: math.prod(shape(o.source)))
            self.reads.append((read, smallest, self._tap(read, smallest)))
        for m in moments:
            axes = [comb.axes[m.source][d] for d in m.dims]
            self.moments.append((m, Tap(axes, frozenset(self.wanted))))

    def _tap(self, read: Read, operand: Operand) -> Tap:
        return Tap([self.comb.axes[operand.source][operand.dim]], read.atoms, read.share)

    def _tensor(self, operand: Operand) -> int:
        """The id of the stored tensor that an operand is, be it cast to another precision; 0 for a computed operand."""
        node = _uncast(operand.source)
        return id(fetch(self.module, str(node.target))) if node.op == "get_attr" else 0

    def _direct(self, reads: list[Read]) -> set[tuple[int, int]]:
        """The trained parameters, each with a dimension, whose gradients suffice: every use of the parameter reads that
        dimension."""
        uses: dict[int, list[fx.Node]] = defaultdict(list)
        for node in self.comb.module.graph.nodes:
            if node.op == "get_attr":
                tensor = fetch(self.module, str(node.target))
                if isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad:
                    uses[id(tensor)] += _users(node)
        read_by: dict[tuple[int, int], list[fx.Node]] = defaultdict(list)
        for read in reads:
            for operand in read.operands:
                if operand.place is None and read.share == 1.0:
                    read_by[self._tensor(operand), operand.dim].append(read.node)
        return {key for key, nodes in read_by.items() if key[0] in uses and Counter(uses[key[0]]) == Counter(nodes)}

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """A context in which the module's graph contains the taps."""
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
        """For each atom, the derivatives with respect to its gates, in the original's numbering; 0 for indices that the
        network has lost.

        share: turns the taps' sums of one process into the mean over all processes. scale: the factor by which the loss was
        multiplied; it must be gone from the parameters' gradients. Raises BadInput where a weight has been frozen since the
        gates were made, since what it reads would score 0.
        """
        totals: Totals = {}
        for name, _, _ in self.parameters:
            if not fetch(self.module, name).requires_grad:
                raise BadInput(
                    f"importance from gradients: {name} was frozen during training (requires_grad=False), so what it reads "
                    "would score 0; freeze it before training begins, or after the last removal"
                )
        known = [(fetch(self.module, name), dim, tap) for name, dim, tap in self.parameters]
        parameters = [(tensor, dim, tap) for tensor, dim, tap in known if tensor.grad is not None]
        sums = weighted_sums([(tensor.detach(), tensor.grad, [dim]) for tensor, dim, _ in parameters])
        for (_, dim, tap), values in zip(parameters, sums, strict=True):
            self._fold(tap.axes[0], values[dim] * tap.share, tap.atoms, totals)
        taps = [tap for _, _, tap in self.reads] + [tap for _, tap in self.moments]
        if taps:
            self._fold_taps(taps, share, scale, totals)
        return totals

    def _fold_taps(
        self, taps: list[Tap], share: Callable[[np.ndarray], np.ndarray], scale: float, totals: Totals
    ) -> None:
        sizes = [[self._size(axis) for axis in tap.axes] for tap in taps]
        rows: list[Tensor] = []
        for tap, lengths in zip(taps, sizes, strict=True):
            rows += tap.sums or [torch.zeros(n) for n in lengths]
        device = next((r.device for r in rows if r.device.type != "cpu"), torch.device("cpu"))
        values = share(torch.cat([r.to(device).double() for r in rows]).cpu().numpy() / scale)
        parts = iter(np.split(values, np.cumsum([n for lengths in sizes for n in lengths])[:-1]))
        for tap in taps:
            for axis in tap.axes:
                self._fold(axis, next(parts) * tap.share, tap.atoms, totals)
            tap.sums = []

    def _size(self, axis: Axis) -> int:
        return ax.kept_size(axis, {atom: int(mask.sum()) for atom, mask in self.masks.items()})

    def _fold(self, axis: Axis, values: np.ndarray, atoms: frozenset[Factor], totals: Totals) -> None:
        folded = by_atom(axis, values, self.masks)
        for atom in folded.keys() & atoms:
            totals[atom] = totals[atom] + folded[atom] if atom in totals else folded[atom]


def _wide(value: Any) -> Any:
    """The value, detached, and in at least single precision if it is a floating-point tensor."""
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
    """A function of a node's results and arguments that adds up the derivatives with respect to the gates in its
    statistics."""
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
                ones = {d: x.new_ones(x.shape[d], requires_grad=True) for d in moments.dims}
                again = moments.function(a, ones)
                again = again if which is None else again[which]
                tap.add(torch.autograd.grad(again, list(ones.values()), _wide(gradient).to(again.dtype)))

        for which, value in [(None, result)] if isinstance(result, Tensor) else enumerate(result):
            if value.requires_grad:
                value.register_hook(lambda gradient, which=which: pull(gradient, which))

    watch._gates = gates  # type: ignore[attr-defined]
    return watch
