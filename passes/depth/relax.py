"""Relaxation: a block between its dense and its pruned form, with a parameter that says how far.

UPDP (arXiv 2401.06426) never takes an activation away at once, which corrupts the weights, but in small steps. Here every
block to prune is rewritten so that one entry `l` of a buffer of the program mixes both forms: 1 is exactly the dense
block, 0 exactly one that merges. The graph is the same all the time, so training needs no new capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...graph.edit import like, place_tensor, rebuild
from ...graph.errors import BadInput
from ...graph.nodes import arguments, fetch, op_name, set_argument, shape, writes
from ...graph.program import Program
from ...graph.sparse import sparse_weights
from ...graph.trainable import TrainableModule
from ..fuse.affine import CONVS, MAPS, TRANSPOSED
from ..fuse.regions import Regions, permutation
from .blocks import ACTIVATIONS, NORMS, Block, has_layers, single_path

aten = torch.ops.aten
FOLDER = "relaxed"
SWITCHES = f"{FOLDER}.l"
MOMENTUM, EPS = 0.1, 1e-5
PADS = ("constant_pad_nd", "pad")
Sides = list[tuple[int, int]]  # by axis, zeros before the first and after the last entry
ORDER = "run PruneDepth before Sparsify"


def obstacle(program: Program, block: Block) -> str | None:
    """Why a block has no mergeable form, or None."""
    nodes = {n.name: n for n in program.graph.nodes}
    regions, sparse = Regions(program.graph_module), sparse_weights(program)
    for name in block.nodes:
        node, op = nodes[name], op_name(nodes[name])
        if op in ("scaled_dot_product_attention", "softmax", "_softmax"):
            return f"{name} ({op}) is not linear; attention can only be left out as a whole"
        if op in ACTIVATIONS or op in ("permute", "transpose") or (op == "add" and regions.addends(node)):
            continue
        if op in NORMS:
            if _channels(node) is None:
                return f"{name} ({op}) does not normalise over channels alone"
            continue
        if op in MAPS or op == "batch_norm":
            if why := regions.problem(node):
                return f"{name}: {why}"
            weight = str(arguments(node)["weight"].target) if op in MAPS else None
            if weight in sparse:
                return f"merging would fill up {weight}, which Sparsify made {sparse[weight] or 'sparse'}; {ORDER}"
            continue
        if regions.step(node) is None:
            return f"{name} ({op}) is no affine map, and no activation or normalisation that becomes one"
    for path in _branches(nodes, block):
        for node in _spatial(path or ())[1:]:
            if not _centred(node):
                return f"{node.name}: its kernel has no centre that a layer of one tap could keep"
    return None


def relax(
    program: Program, blocks: Sequence[Block], settled: bool = False, tail: bool = True, fitted: bool = False
) -> Program:
    """The program with every block rewritten so that `l` (a buffer `relaxed.l`, one entry a block, ones) mixes its dense
    and its pruned form; with `settled` the pruned forms alone, under the same names of weights.

    - An activation inside becomes `l act(x) + (1 - l) x`, or, `fitted`, `l act(x) + (1 - l) BN(x)`: `start_norms` makes
      that the affine map which is nearest to the activation (ours), while the identity is often far from it.
    - A LayerNorm, GroupNorm or RMSNorm becomes `l LN(x) + (1 - l) BN(x)`; the BatchNorm starts with its scale and shift.
    - Of several convolutions with a spatial kernel the first keeps it, of the others only the centre tap stays: the rest
      of the kernel is multiplied by `l` (ours: two 3x3 merged are a 5x5, which costs more than both).
    - Zero padding in front of that first one moves towards the head of the branch, as far as the nodes there treat all
      positions alike: at `l` its ring of the padded value is `(1 - l)` of what the layers before make of the padding, so
      that at 1 it is zero, as in the dense block.
    - A block that no activation follows gets a tail, `l y + (1 - l) act(BN(y))`, with its own activation (`tail`).
    - An attention block is only left out as a whole: `x + l f(x)`.
    The mixtures are UPDP's; fit, kernel and ring are ours. In training, batch statistics include the ring at any `l`.
    """
    copied = program.copy()
    relaxer = _Relaxer(copied.graph_module, settled, tail, fitted)
    if blocks and not settled:
        relaxer.add_switches(len(blocks))
    paths = [[] if b.dropped else _branches(relaxer.nodes, b) for b in blocks]  # as they are before any rewrite
    for index, (block, own) in enumerate(zip(blocks, paths, strict=True)):
        relaxer.block(index, block, own)
    module = copied.module()
    module.graph.eliminate_dead_code(_stays)
    module.recompile()
    return copied.derive(rebuild(module, lambda name, value: value))


def _stays(node: fx.Node) -> bool:
    """Whether a node counts although nothing uses it; a random one, such as attention with dropout, does not."""
    return node.op in ("placeholder", "output") or writes(node)


def set_switches(module: TrainableModule, values: Sequence[float]) -> None:
    """Set `l` of every block; out of place, so that a graph built before can still be differentiated."""
    place_tensor(module, SWITCHES, torch.as_tensor(values, dtype=torch.float32, device=_switches(module).device))


def _switches(module: TrainableModule) -> torch.Tensor:
    return fetch(module, SWITCHES)


def settle(
    program: Program, blocks: Sequence[Block], relaxed: Program, tail: bool = True, fitted: bool = False
) -> Program:
    """The pruned forms alone, with the weights of the relaxed program after training."""
    result = relax(program, blocks, settled=True, tail=tail, fitted=fitted)
    trained, module = relaxed.module().state_dict(), result.module()
    for name, tensor in list(module.state_dict().items()):
        value = trained[name]
        if value.shape != tensor.shape:
            value = _centre(value)
        place_tensor(module, name, like(fetch(module, name), value.detach().clone().to(tensor.dtype)))
    return result


class _Relaxer:
    """Rewrites the graph of one module in place."""

    def __init__(self, module: TrainableModule, settled: bool, tail: bool, fitted: bool):
        self.module, self.graph, self.settled, self.tail, self.fitted = module, module.graph, settled, tail, fitted
        self.nodes = {n.name: n for n in self.graph.nodes}
        self.regions = Regions(module)
        known = [n.split(".") for n in module.state_dict() if n.startswith(f"{FOLDER}.")]  # of blocks pruned before
        if known and SWITCHES.split(".") in known:
            raise BadInput("PruneDepth: the program is relaxed already; merge it first, with PruneDepth.merge")
        self.first = 1 + max((int(index) for _, index, *_ in known), default=-1)
        self.switches: fx.Node | None = None

    def add_switches(self, count: int) -> None:
        place_tensor(self.module, SWITCHES, torch.ones(count))
        first = next(n for n in self.graph.nodes if n.op == "call_function")
        with self.graph.inserting_before(first):
            self.switches = self._attribute(SWITCHES)

    def block(self, index: int, block: Block, paths: list[list[fx.Node] | None]) -> None:
        self.label, self.norms, self.kernels = block.name, 0, 0
        self.folder = f"{FOLDER}.{self.first + index}"
        exit_ = self.nodes[block.exit]
        for name in block.nodes:
            self.nodes[name].meta["block"] = block.name
        if not self.settled:
            with self.graph.inserting_before(self.nodes[block.nodes[0]]):
                self.l = self._call(aten.select.int, self.switches, 0, index)
                self.rest = self._call(aten.rsub.Scalar, self.l, 1)
        if block.dropped:
            self._drop(block, exit_)
            return
        act = next((self.nodes[n] for n in reversed(block.nodes) if op_name(self.nodes[n]) in ACTIVATIONS), None)
        for path in paths:
            if path is not None:
                self._kernels(path)
        for name in block.nodes:
            node = self.nodes[name]
            if op_name(node) in ACTIVATIONS:
                self._replace(node, lambda node=node: self._linear(node))
            elif op_name(node) in NORMS:
                self._replace(node, lambda node=node: self._batch_norm(node.args[0], _channels(node), node))
        if self.tail and not block.tailed and act is not None:
            self._replace(exit_, lambda: self._tail(exit_, act))

    def _drop(self, block: Block, exit_: fx.Node) -> None:
        """Leave the branch of a residual addition out; its other operand is the block's entry, relaxed and scaled or not."""
        a = arguments(exit_)
        branch, entry = ("self", "other") if has_layers(a["self"], block.nodes) else ("other", "self")
        if self.settled:
            with self.graph.inserting_before(exit_):
                scaled = entry == "other" and a["alpha"] != 1
                left = self._call(aten.mul.Scalar, a[entry], a["alpha"]) if scaled else a[entry]
            exit_.replace_all_uses_with(left)
            return
        with self.graph.inserting_before(exit_):
            set_argument(exit_, branch, self._call(aten.mul.Tensor, a[branch], self.l))

    def _replace(self, node: fx.Node, pruned: Any) -> None:
        """Mix a node's value with its pruned form."""
        users = list(node.users)
        with self.graph.inserting_before(node.next):
            other = pruned()
            if self.settled:
                mixed = other
            else:
                dense = self._call(aten.mul.Tensor, node, self.l)
                mixed = self._call(aten.add.Tensor, dense, self._call(aten.mul.Tensor, other, self.rest))
        for user in users:
            if user is not mixed:
                user.replace_input_with(node, mixed)

    def _linear(self, act: fx.Node) -> fx.Node:
        """What an activation fades to."""
        if not self.fitted:
            return act.args[0]  # type: ignore[return-value]
        return self._batch_norm(act.args[0], _channel_axis(self.graph, act), None)

    def _tail(self, value: fx.Node, act: fx.Node) -> fx.Node:
        normed = self._batch_norm(value, _channel_axis(self.graph, value), None)
        if op_name(act) != "prelu":
            return self._call(act.target, normed, *act.args[1:], **act.kwargs)
        slopes = fetch(self.module, str(arguments(act)["weight"].target)).detach()  # of channels inside the block
        place_tensor(self.module, f"{self.folder}.slope", torch.nn.Parameter(slopes.mean().reshape(1)))
        return self._call(act.target, normed, self._attribute(f"{self.folder}.slope"))

    def _batch_norm(self, value: Any, axis: Any, norm: fx.Node | None) -> fx.Node:
        """Batch normalisation over an axis, with the scale and shift of the norm it stands for."""
        size = shape(value)[axis]
        a = arguments(norm) if norm is not None else {}
        given = {k: fetch(self.module, str(a[k].target)) if a.get(k) is not None else None for k in ("weight", "bias")}
        prefix = f"{self.folder}.norm{self.norms}"
        self.norms += 1
        some = next(p for p in self.module.parameters() if p.is_floating_point())
        make = {"weight": torch.ones, "bias": torch.zeros, "running_mean": torch.zeros, "running_var": torch.ones}
        stored = []
        for key, fill in make.items():
            own = given.get(key)
            tensor = fill(size, dtype=some.dtype, device=some.device) if own is None else own.detach().clone()
            place_tensor(self.module, f"{prefix}.{key}", torch.nn.Parameter(tensor) if key in given else tensor)
            stored.append(self._attribute(f"{prefix}.{key}"))
        moved = value if axis == 1 else self._call(aten.transpose.int, value, 1, axis)
        eps = EPS if a.get("eps") is None else float(a["eps"])
        normed = self._call(aten.batch_norm.default, moved, *stored, False, MOMENTUM, eps, False)
        return normed if axis == 1 else self._call(aten.transpose.int, normed, 1, axis)

    # ---------------------------------------------------------------------------------------------------------- kernels
    def _kernels(self, path: list[fx.Node]) -> None:
        spatial = _spatial(path)
        for node in spatial[1:]:
            self._shrink(node)
        if spatial:
            self._pad_first(path[: path.index(spatial[0])], spatial[0])

    def _shrink(self, node: fx.Node) -> None:
        """All taps but the one at the centre fade."""
        a = arguments(node)
        stored, extent = a["weight"], shape(a["weight"])[2:]
        if self.settled:
            name = str(stored.target)
            weight = fetch(self.module, name)
            place_tensor(self.module, name, like(weight, _centre(weight.detach()).clone()))
            stored.meta["val"] = stored.meta["val"].new_empty(_centre(weight).shape)
            _unpad(node)
            return
        mask = torch.zeros(1, 1, *extent)
        mask[(0, 0, *(k // 2 for k in extent))] = 1
        for key, value in (("centre", mask), ("ring", 1 - mask)):
            place_tensor(self.module, f"{self.folder}.{key}{self.kernels}", value.to(stored.meta["val"].dtype))
        with self.graph.inserting_before(node):
            centre, ring = (self._attribute(f"{self.folder}.{key}{self.kernels}") for key in ("centre", "ring"))
            factor = self._call(aten.add.Tensor, centre, self._call(aten.mul.Tensor, ring, self.l))
            set_argument(node, "weight", self._call(aten.mul.Tensor, stored, factor))
        self.kernels += 1

    def _pad_first(self, before: list[fx.Node], conv: fx.Node) -> None:
        """Move the zeros in front of a convolution towards the head of its branch, past the nodes `before` it that do not
        map zeros to zeros in their pruned forms: it could not be merged with those otherwise."""
        source = arguments(conv)["input"]
        sides = _zeros(conv)
        if sides is None and before and op_name(before[-1]) in PADS:
            padding = before.pop()
            sides, source = _sides(padding), arguments(padding)["self"]
        if sides is None:
            return
        at, moved = self._head(before, sides)
        if not any(self._shifts(n) for n in before[at:]):
            return
        entry = next(n for n in before[at].all_input_nodes if n not in self.regions.constants)
        with self.graph.inserting_before(before[at]):
            padded = self._call(aten.constant_pad_nd.default, entry, _padding(moved))
        before[at].replace_input_with(entry, padded)
        mixed = source
        if not self.settled:
            with self.graph.inserting_before(conv):
                inner = self._call(aten.constant_pad_nd.default, source, _padding([(-a, -b) for a, b in sides]))
                zeros = self._call(aten.constant_pad_nd.default, inner, _padding(sides))
                dense = self._call(aten.mul.Tensor, zeros, self.l)
                mixed = self._call(aten.add.Tensor, dense, self._call(aten.mul.Tensor, source, self.rest))
        conv.replace_input_with(arguments(conv)["input"], mixed)
        _unpad(conv)

    def _head(self, before: Sequence[fx.Node], sides: Sides) -> tuple[int, Sides]:
        """Before which of the nodes in front of a convolution its zeros can go at the earliest, and how many they are
        there. They lie along the same axes there, whatever permutations are in between."""
        at, found = len(before), sides
        axes = list(range(len(sides)))  # of the convolution's input, where they are before the node
        for i in reversed(range(len(before))):
            node = before[i]
            if order := permutation(node):
                axes = [order[a] for a in axes]
            elif not self._pointwise(node, axes):
                break
            elif op_name(node) in CONVS:
                strides = [1, 1, *_per_dim(arguments(node)["stride"], len(sides) - 2)]
                sides = [(a * s, b * s) for (a, b), s in zip(sides, strides, strict=True)]
            if axes == sorted(axes):
                at, found = i, sides
        return at, found

    def _pointwise(self, node: fx.Node, axes: Sequence[int]) -> bool:
        """Whether a node does the same at every position; axes: batch, channels and positions of a convolution."""
        name = op_name(node)
        if name in ACTIVATIONS:
            return _channel_axis(self.graph, node) not in axes[2:]
        if name in ("layer_norm", "rms_norm"):
            return _channels(node) not in axes[2:]
        if name in (*TRANSPOSED, *PADS) or (name in CONVS and (_zeros(node) or list(axes) != sorted(axes))):
            return False
        step = self.regions.step(node)
        return step is not None and step.axis not in axes[2:]

    def _shifts(self, node: fx.Node) -> bool:
        """Whether a node does not map zeros to zeros in its pruned form."""
        name = op_name(node)
        if name in MAPS:
            return arguments(node)["bias"] is not None
        return name in (*NORMS, "batch_norm", "add", "sub", "rsub") or (self.fitted and name in ACTIVATIONS)

    # ------------------------------------------------------------------------------------------------------------ nodes
    def _attribute(self, name: str) -> fx.Node:
        node = self.graph.get_attr(name)
        fake = next(n.meta["val"] for n in self.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)).fake_mode
        node.meta["val"] = fake.from_tensor(fetch(self.module, name), static_shapes=True)
        return node

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node; shapes of the values around it are computed when all is done."""
        node = self.graph.call_function(target, args, kwargs)
        first = next(a for a in args if isinstance(a, fx.Node))
        node.meta = {"val": first.meta["val"], "block": getattr(self, "label", None)}
        return node


def _branches(nodes: dict[str, fx.Node], block: Block) -> list[list[fx.Node] | None]:
    """The paths that a residual addition adds, or the one of a chain; None for one that forks."""
    exit_ = nodes[block.exit]
    if block.kind == "chain":
        return [single_path(block, exit_)]
    terms = [t for t in (arguments(exit_)["self"], arguments(exit_)["other"]) if t.name != block.entry]
    return [single_path(block, t) for t in terms]


def _channels(norm: fx.Node) -> int | None:
    """The axis of the channels that a LayerNorm, GroupNorm or RMSNorm scales; None where it normalises something else."""
    if op_name(norm) == "group_norm":
        return 1
    axes = arguments(norm)["normalized_shape"]
    return len(shape(norm)) - 1 if len(axes) == 1 and len(shape(norm)) > 1 else None


def _channel_axis(graph: fx.Graph, value: fx.Node) -> int:
    """The axis of a value's channels: where the layer that made it puts them, 1 after a convolution, last after a linear
    layer, wherever permutations between have moved that."""
    node, axis = value, None
    moves: list[list[int]] = []
    while axis is None:
        name, rank = op_name(node), len(shape(node))
        if name in CONVS or name in ("batch_norm", "group_norm"):
            axis = 1
        elif name in MAPS or name in ("layer_norm", "rms_norm"):
            axis = rank - 1
        else:
            if order := permutation(node):
                moves.append(order)
            tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
            before = [n for n in tensors if len(shape(n)) == rank and n.op == "call_function"]
            if not before:
                break
            node = before[0]
    if axis is None:  # made by no layer of this network
        rank = len(shape(value))
        return 1 if rank == 2 or any(op_name(n) in CONVS and len(shape(n)) == rank for n in graph.nodes) else rank - 1
    for order in reversed(moves):
        axis = order.index(axis)
    return axis


def _spatial(path: Sequence[fx.Node]) -> list[fx.Node]:
    """The convolutions whose kernels have more than one tap."""
    return [n for n in path if op_name(n) in CONVS and max(shape(arguments(n)["weight"])[2:]) > 1]


def _zeros(conv: fx.Node) -> Sides | None:
    """What a convolution pads its input by, or None."""
    a, extent = arguments(conv), shape(arguments(conv)["weight"])[2:]
    dims = len(extent)
    if a["padding"] == "same":
        spans = [(k - 1) * d for k, d in zip(extent, _per_dim(a["dilation"], dims), strict=True)]
        sides = [(s // 2, s - s // 2) for s in spans]
    else:
        sides = [(p, p) for p in ([0] * dims if a["padding"] == "valid" else _per_dim(a["padding"], dims))]
    return [(0, 0), (0, 0), *sides] if any(a or b for a, b in sides) else None


def _sides(padding: fx.Node) -> Sides:
    """What a node of its own pads by."""
    pad = arguments(padding)["pad"]
    pairs = list(zip(pad[::2], pad[1::2], strict=True))[::-1]  # given for the last dimension first
    return [(0, 0)] * (len(shape(padding)) - len(pairs)) + pairs


def _padding(sides: Sides) -> list[int]:
    """As an argument of `pad`."""
    return [p for pair in reversed(sides[2:]) for p in pair]


def _unpad(conv: fx.Node) -> None:
    """Let a convolution pad nothing, whether its padding is given by sizes or by a word."""
    a = arguments(conv)
    conv.target = getattr(aten, op_name(conv)).default
    dims = len(shape(a["weight"])) - 2
    conv.args = (a["input"], a["weight"], a["bias"], a["stride"], [0] * dims, a["dilation"], a["groups"])
    conv.kwargs = {}


def _centred(node: fx.Node) -> bool:
    """Whether the middle tap lies at the output's own position."""
    a = arguments(node)
    extent = shape(a["weight"])[2:]
    if isinstance(a["padding"], str):
        return a["padding"] == "same" and all(k % 2 for k in extent)
    dims = len(extent)
    sides = zip(extent, _per_dim(a["padding"], dims), _per_dim(a["dilation"], dims), strict=True)
    return all(k % 2 and p == d * (k // 2) for k, p, d in sides)


def _centre(weight: torch.Tensor) -> torch.Tensor:
    return weight[(slice(None), slice(None), *(slice(k // 2, k // 2 + 1) for k in weight.shape[2:]))]


def _per_dim(value: Sequence[int], dims: int) -> list[int]:
    return list(value) * dims if len(value) == 1 else list(value)


def require(blocks: Sequence[Block], names: Sequence[str]) -> list[Block]:
    """The blocks of these names. Raises BadInput for one that is not there or cannot be pruned."""
    known = {b.name: b for b in blocks}
    for name in names:
        if name not in known:
            raise BadInput(f"PruneDepth.names: no block {name!r}; there are {', '.join(known) or 'none'}")
        if known[name].why is not None:
            raise BadInput(f"PruneDepth.names: {name} cannot be pruned: {known[name].why}")
    return [known[name] for name in names]
