"""Relaxation: a block as a mixture of its dense and its pruned form, with a parameter for their shares.

UPDP (arXiv 2401.06426) never removes an activation at once, which would corrupt the weights, but in small steps. Here every
block to prune is rewritten so that one entry `l` of a buffer of the program mixes both forms: 1 is exactly the dense block,
0 exactly a form that can be merged. The graph stays the same, so training needs no new capture.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from ...graph.edit import Editor, like, place_tensor, rebuild
from ...graph.errors import BadInput
from ...graph.facts import MAPS, PADS
from ...graph.nodes import arguments, fetch, op_name, set_argument, shape
from ...graph.program import Program
from ...graph.trainable import TrainableModule
from ..fuse.regions import Regions
from .blocks import ACTIVATIONS, NORMS, Block, branches_of, channel_axis, has_layers, norm_axis
from .padding import centre, earliest, pad_argument, sides_of, spatial, unpad, zeros_before

aten = torch.ops.aten
FOLDER = "relaxed"
SWITCHES = f"{FOLDER}.l"
MOMENTUM, EPS = 0.1, 1e-5


def relax(
    program: Program, blocks: Sequence[Block], settled: bool = False, tail: bool = True, fitted: bool = False
) -> Program:
    """The program with every block rewritten so that `l` (a buffer `relaxed.l` of ones, an entry for each block) mixes its
    dense and its pruned form. With `settled`, the pruned forms alone, whose weights have the same names.

    - An activation inside becomes `l act(x) + (1 - l) x`, or, if `fitted`, `l act(x) + (1 - l) BN(x)`: `start_norms` makes
      the BatchNorm the affine map that is nearest to the activation (ours), while the identity is often far from it.
    - A LayerNorm, GroupNorm or RMSNorm becomes `l LN(x) + (1 - l) BN(x)`; the BatchNorm starts with its scale and shift.
    - Of several convolutions with a spatial kernel, the first keeps it; of the others only the centre tap stays, and the
      rest of the kernel is multiplied by `l` (ours: two 3x3 merged are a 5x5, which costs more than both).
    - Zero padding in front of that first convolution moves towards the head of the branch, as far as the nodes there treat
      all positions alike. At `l`, the border of the padded value is `(1 - l)` times what the layers before make of zeros,
      so that at 1 it is zero, as in the dense block.
    - With `tail`, a block that no activation follows gets one like its own: `l y + (1 - l) act(BN(y))`.
    - An attention block is left out as a whole: `x + l f(x)`.
    The mixtures are UPDP's; fit, kernel and border are ours. In training, batch statistics include the border at any `l`.
    Raises
    BadInput for a program that is relaxed already.
    """
    copied = program.copy()
    relaxer = _Relaxer(copied.graph_module, settled, tail, fitted)
    if blocks and not settled:
        relaxer.add_switches(len(blocks))
    branches = [[] if b.dropped else branches_of(relaxer.nodes, b) for b in blocks]  # found before any rewrite
    for index, (block, paths) in enumerate(zip(blocks, branches, strict=True)):
        relaxer.block(index, block, paths)
    relaxer.edit.finish()
    return copied.derive(rebuild(copied.module()))


def set_switches(module: TrainableModule, values: Sequence[float]) -> None:
    """Set `l` of every block, not in place, so that a graph of the autograd engine that used the old values still works."""
    place_tensor(module, SWITCHES, torch.as_tensor(values, dtype=torch.float32, device=fetch(module, SWITCHES).device))


def settle(pruned: Program, relaxed: Program) -> Program:
    """A copy of the pruned forms, what `relax` gives with `settled`, with the trained weights of the relaxed program."""
    result = pruned.copy()
    trained = relaxed.module().state_dict()

    def take(name: str, old: Any) -> Any:
        if name not in trained:
            return old
        value = trained[name] if trained[name].shape == old.shape else centre(trained[name])
        return like(old, value.detach().clone().to(old.dtype))

    return result.derive(rebuild(result.module(), take))


class _Relaxer:
    """Rewrites the graph of one module in place; the shapes of values are computed when all is done."""

    def __init__(self, module: TrainableModule, settled: bool, tail: bool, fitted: bool):
        self.module, self.graph, self.settled, self.tail, self.fitted = module, module.graph, settled, tail, fitted
        self.edit, self.regions = Editor(module), Regions(module)
        self.nodes = {n.name: n for n in self.graph.nodes}
        pruned_before = [n.split(".") for n in module.state_dict() if n.startswith(f"{FOLDER}.")]
        if SWITCHES.split(".") in pruned_before:
            raise BadInput("PruneDepth: the program is relaxed already; merge it first, with PruneDepth.merge")
        self.first = 1 + max((int(index) for _, index, *_ in pruned_before), default=-1)
        self.label: str | None = None  # the block that new nodes belong to

    def add_switches(self, count: int) -> None:
        first = next(n for n in self.graph.nodes if n.op == "call_function")
        with self.edit.before(first):
            self.switches = self.edit.store(SWITCHES, torch.ones(count))

    def block(self, index: int, block: Block, paths: list[list[fx.Node] | None]) -> None:
        """Rewrite one block. paths: its branches, with None for a branch that forks."""
        self.label, self.norms, self.kernels = block.name, 0, 0
        self.folder = f"{FOLDER}.{self.first + index}"
        exit_ = self.nodes[block.exit]
        for name in block.nodes:
            self.nodes[name].meta["block"] = block.name
        if not self.settled:
            with self.edit.before(self.nodes[block.nodes[0]]):
                self.l = self._call(aten.select.int, self.switches, 0, index)
                self.rest = self._call(aten.rsub.Scalar, self.l, 1)
        if block.dropped:
            self._drop(block, exit_)
            return
        act = next((self.nodes[n] for n in reversed(block.nodes) if op_name(self.nodes[n]) in ACTIVATIONS), None)
        for path in paths:
            kernels = spatial(path or ())
            for conv in kernels[1:]:
                self._shrink(conv)
            if path and kernels:
                self._pad_first(path[: path.index(kernels[0])], kernels[0])
        for name in block.nodes:
            node = self.nodes[name]
            if op_name(node) in ACTIVATIONS:
                self._mix(node, partial(self._linear, node))
            elif op_name(node) in NORMS:
                self._mix(node, partial(self._batch_norm, node.args[0], norm_axis(node), node))
        if self.tail and not block.tailed and act is not None:
            self._mix(exit_, partial(self._tail, exit_, act))

    def _drop(self, block: Block, exit_: fx.Node) -> None:
        """Leave the branch of a residual addition out; its other operand is the block's entry, perhaps relaxed and
        scaled."""
        a = arguments(exit_)
        branch, entry = ("self", "other") if has_layers(a["self"], block.nodes) else ("other", "self")
        with self.edit.before(exit_):
            if not self.settled:
                set_argument(exit_, branch, self._call(aten.mul.Tensor, a[branch], self.l))
                return
            scaled = entry == "other" and a["alpha"] != 1
            left = self._call(aten.mul.Scalar, a[entry], a["alpha"]) if scaled else a[entry]
        exit_.replace_all_uses_with(left)

    def _mix(self, node: fx.Node, make_pruned: Callable[[], fx.Node]) -> None:
        """Replace a node, for all that read it, by `l node + (1 - l) pruned`, or by the pruned form alone if settled."""
        users = list(node.users)
        with self.edit.after(node):
            mixed = make_pruned()
            if not self.settled:
                mixed = self._mixed(node, mixed)
        for user in users:
            if user is not mixed:
                user.replace_input_with(node, mixed)

    def _mixed(self, dense: fx.Node, pruned: fx.Node) -> fx.Node:
        left = self._call(aten.mul.Tensor, dense, self.l)
        return self._call(aten.add.Tensor, left, self._call(aten.mul.Tensor, pruned, self.rest))

    def _linear(self, act: fx.Node) -> fx.Node:
        """The affine map that an activation fades to."""
        if not self.fitted:
            return act.args[0]  # type: ignore[return-value]
        return self._batch_norm(act.args[0], channel_axis(self.graph, act), None)

    def _tail(self, value: fx.Node, act: fx.Node) -> fx.Node:
        normed = self._batch_norm(value, channel_axis(self.graph, value), None)
        if op_name(act) != "prelu":
            return self._call(act.target, normed, *act.args[1:], **act.kwargs)
        slopes = fetch(self.module, str(arguments(act)["weight"].target)).detach()  # one for each channel of the block
        slope = self.edit.store(f"{self.folder}.slope", torch.nn.Parameter(slopes.mean().reshape(1)))
        return self._call(act.target, normed, slope)

    def _batch_norm(self, value: Any, axis: Any, norm: fx.Node | None) -> fx.Node:
        """Batch normalisation over an axis, with the scale and shift of the normalisation that it stands for, if any."""
        size = shape(value)[axis]
        a = arguments(norm) if norm is not None else {}
        scales = {k: fetch(self.module, str(a[k].target)) if a.get(k) is not None else None for k in ("weight", "bias")}
        prefix = f"{self.folder}.norm{self.norms}"
        self.norms += 1
        some = next(p for p in self.module.parameters() if p.is_floating_point())
        fills = {"weight": torch.ones, "bias": torch.zeros, "running_mean": torch.zeros, "running_var": torch.ones}
        stored = []
        for key, fill in fills.items():
            scale = scales.get(key)
            tensor = fill(size, dtype=some.dtype, device=some.device) if scale is None else scale.detach().clone()
            stored.append(self.edit.store(f"{prefix}.{key}", torch.nn.Parameter(tensor) if key in scales else tensor))
        moved = value if axis == 1 else self._call(aten.transpose.int, value, 1, axis)
        eps = EPS if a.get("eps") is None else float(a["eps"])
        normed = self._call(aten.batch_norm.default, moved, *stored, False, MOMENTUM, eps, False)
        return normed if axis == 1 else self._call(aten.transpose.int, normed, 1, axis)

    # ---------------------------------------------------------------------------------------------------------- kernels
    def _shrink(self, conv: fx.Node) -> None:
        """Let all taps of a kernel but the centre fade."""
        stored = arguments(conv)["weight"]
        if self.settled:
            weight = fetch(self.module, str(stored.target))
            self.edit.overwrite(stored, like(weight, centre(weight.detach()).clone()))
            unpad(conv)
            return
        extent = shape(stored)[2:]
        mask = torch.zeros(1, 1, *extent)
        mask[(0, 0, *(k // 2 for k in extent))] = 1
        with self.edit.before(conv):
            middle, ring = (
                self.edit.store(f"{self.folder}.{key}{self.kernels}", value.to(stored.meta["val"].dtype))
                for key, value in (("centre", mask), ("ring", 1 - mask))
            )
            factor = self._call(aten.add.Tensor, middle, self._call(aten.mul.Tensor, ring, self.l))
            set_argument(conv, "weight", self._call(aten.mul.Tensor, stored, factor))
        self.kernels += 1

    def _pad_first(self, before: list[fx.Node], conv: fx.Node) -> None:
        """Move the zeros in front of a convolution towards the head of its branch, past the nodes `before` it whose pruned
        forms do not map zeros to zeros, since it could not be merged with those otherwise."""
        source, sides = arguments(conv)["input"], zeros_before(conv)
        if sides is None and before and op_name(before[-1]) in PADS:
            padding = before.pop()
            sides, source = sides_of(padding), arguments(padding)["self"]
        place = earliest(before, sides, self.regions, self._shifts) if sides is not None else None
        if sides is None or place is None:
            return
        head, moved = before[place[0]], place[1]
        entry = next(n for n in head.all_input_nodes if n not in self.regions.constants)
        with self.edit.before(head):
            padded = self._call(aten.constant_pad_nd.default, entry, pad_argument(moved))
        head.replace_input_with(entry, padded)
        mixed = source
        if not self.settled:
            # The border of the value is now computed from the zeros at the head; the dense form has zeros there instead.
            with self.edit.before(conv):
                inner = [(-a, -b) for a, b in sides]
                cropped = self._call(aten.constant_pad_nd.default, source, pad_argument(inner))
                zeros = self._call(aten.constant_pad_nd.default, cropped, pad_argument(sides))
                mixed = self._mixed(zeros, source)
        conv.replace_input_with(arguments(conv)["input"], mixed)
        unpad(conv)

    def _shifts(self, node: fx.Node) -> bool:
        """Whether a node's pruned form does not map zeros to zeros."""
        name = op_name(node)
        if name in MAPS:
            return arguments(node)["bias"] is not None
        return name in (*NORMS, "batch_norm", "add", "sub", "rsub") or (self.fitted and name in ACTIVATIONS)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node of the block; until all is done, it has the shape of its first operand."""
        first = next(a for a in args if isinstance(a, fx.Node))
        node = self.edit.call(target, args, kwargs, value=first.meta["val"])
        node.meta["block"] = self.label
        return node
