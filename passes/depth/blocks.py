"""Blocks of a network, found in its graph: regions with one entry and one exit, and what each could be pruned to.

UPDP (arXiv 2401.06426) takes the blocks of its four families as given; finding them by dominance is ours. Names of modules
serve as labels only.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import fx

from ...graph.cost import evaluate, macs
from ...graph.facts import CONVS, MAPS, PADS, names
from ...graph.nodes import arguments, module_paths, op_name, permutation, shape
from ...graph.program import Program

ACTIVATIONS = names(
    "relu relu6 gelu silu hardswish hardtanh leaky_relu elu mish selu softplus celu hardsigmoid sigmoid tanh prelu"
)
NORMS = ("layer_norm", "group_norm", "rms_norm")
IN_CHAINS = (*MAPS, *ACTIVATIONS, *NORMS, *PADS, "batch_norm", "dropout", "permute", "transpose", "mul")
OTHER_BENDS = names(
    "clamp clamp_min clamp_max threshold hardshrink softshrink rrelu log_sigmoid glu abs erf exp log pow sqrt rsqrt "
    "reciprocal sin cos maximum minimum instance_norm"
)
ATTENTION = ("scaled_dot_product_attention", "softmax", "_softmax")


@dataclass(frozen=True)
class Block:
    """A region of a graph, described by node names, so that it can be found in copies of the program too.

    name: label, from the block's innermost module. entry: the value that the block reads. exit: the value that it gives, a
    residual addition or the last node of a chain. nodes: all nodes between the two, and the exit. kind: "residual",
    "inverted residual", "convnext", "mlp", "attention" or "chain". macs, params: of its nodes, for the example input.
    tailed: whether an activation follows the block, so that its pruned form needs none. dropped: whether the block cannot
    be merged, only left out as a whole.

    saves: MACs that pruning the block saves. kernels: how many fewer kernels an engine then launches, counting one for each
    layer, normalisation over features and attention that is left after `Fuse` (ours); activations, additions and moves of
    data count nothing, since compilers fuse them into those, and where one does not, the engine saves more. Both are None
    for a block that cannot be pruned, for the reason `why`.
    """

    name: str
    kind: str
    entry: str
    exit: str
    nodes: tuple[str, ...]
    macs: int
    params: int
    tailed: bool
    dropped: bool = False
    saves: int | None = None
    kernels: int | None = None
    why: str | None = None

    @property
    def prunable(self) -> bool:
        """Whether the block can be pruned."""
        return self.why is None


def is_data(node: fx.Node) -> bool:
    """Whether a node computes a tensor."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)


class _Flow:
    """The flow of data through a graph: the tensors that depend on an input, without sizes and stored tensors."""

    def __init__(self, graph: fx.Graph):
        self.order: dict[fx.Node, int] = {}
        self.before: dict[fx.Node, list[fx.Node]] = {}
        self.after: dict[fx.Node, list[fx.Node]] = {}
        self.dominator: dict[fx.Node, fx.Node | None] = {}
        for node in graph.nodes:
            if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)) and node.op != "output":
                continue
            inputs = [n for n in node.all_input_nodes if n in self.order]
            if node.op != "placeholder" and not inputs:
                continue
            self.order[node], self.before[node], self.after[node] = len(self.order), inputs, []
            for n in inputs:
                self.after[n].append(node)
            self.dominator[node] = None if node.op == "placeholder" else self.meet(inputs)

    def meet(self, nodes: list[fx.Node]) -> fx.Node | None:
        """The nearest value through which every path to each of these nodes goes, or None (Cooper, Harvey and Kennedy's
        dominators)."""
        first: fx.Node | None = nodes[0]
        for node in nodes[1:]:
            other: fx.Node | None = node
            while first is not other:
                if first is None or other is None:
                    return None
                if self.order[first] > self.order[other]:
                    first = self.dominator[first]
                else:
                    other = self.dominator[other]
        return first

    def between(self, entry: fx.Node, exit_: fx.Node) -> list[fx.Node] | None:
        """The nodes on paths from the entry to the exit, and the exit; None if one of them is also used elsewhere."""
        inside, stack = {exit_}, [exit_]
        while stack:
            for n in self.before[stack.pop()]:
                if n is not entry and n not in inside:
                    inside.add(n)
                    stack.append(n)
        if any(n is not exit_ and not inside.issuperset(self.after[n]) for n in inside):
            return None
        return sorted(inside, key=self.order.__getitem__)


def candidates(program: Program) -> list[Block]:
    """All blocks of a program in the order of their exits, whether they can be pruned or not."""
    flow = _Flow(program.graph)
    covered: set[fx.Node] = set()  # nodes of residual blocks
    regions: list[tuple[fx.Node, fx.Node, list[fx.Node]]] = []  # entry, exit, nodes
    for node in flow.order:
        entry = _residual_entry(flow, node)
        nodes = flow.between(entry, node) if entry is not None else None
        if entry is None or not nodes or covered.intersection(nodes):
            continue
        names = {n.name for n in nodes}
        branches = sum(has_layers(n, names) for n in node.all_input_nodes)
        attends = any(op_name(n) in ATTENTION for n in nodes)
        # Attention can only be left out, and only where it is the one branch. Blocks that are linear are `Fuse`'s.
        if (attends and branches == 1) or (not attends and any(_bends(n) for n in nodes)):
            regions.append((entry, node, nodes))
            covered.update(nodes)
    regions += _chains(flow, covered)
    labels: dict[str, int] = {}
    parameters = {name for name, _ in program.module().named_parameters()}
    blocks = []
    for entry, exit_, nodes in sorted(regions, key=lambda region: flow.order[region[1]]):
        label = _label(nodes)
        labels[label] = labels.get(label, 0) + 1
        name = label if labels[label] == 1 else f"{label}#{labels[label]}"
        blocks.append(_block(flow, parameters, name, entry, exit_, nodes))
    return blocks


def _residual_entry(flow: _Flow, node: fx.Node) -> fx.Node | None:
    """The value from which both operands of an addition are computed, or None."""
    if op_name(node) != "add":
        return None
    terms = [arguments(node)["self"], arguments(node)["other"]]
    if not all(isinstance(t, fx.Node) and t in flow.order and shape(t) == shape(node) for t in terms):
        return None
    return flow.meet(terms)


def _bends(node: fx.Node) -> bool:
    """Whether the node is a known non-linear operator or normalisation."""
    return op_name(node) in (*ACTIVATIONS, *NORMS, *ATTENTION, *OTHER_BENDS)


def _chains(flow: _Flow, covered: set[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node, list[fx.Node]]]:
    """Yield entry, exit and nodes of two layers in a row outside of other blocks, with an activation between; or of three,
    up to a linear bottleneck."""
    done: set[fx.Node] = set(covered)
    for start in flow.order:
        if start in done or op_name(start) not in MAPS or not flow.before[start]:
            continue
        run = [start]
        while len(after := flow.after[run[-1]]) == 1 and after[0] not in covered and len(flow.before[after[0]]) == 1:
            if op_name(after[0]) not in IN_CHAINS:
                break
            run.append(after[0])
        layers = [i for i, n in enumerate(run) if op_name(n) in MAPS]
        bends = [any(_bends(n) for n in run[a:b]) for a, b in zip(layers, [*layers[1:], len(run)], strict=True)]
        if len(layers) < 2 or not bends[0]:
            continue
        last = 2 if len(layers) > 2 and bends[1] and not bends[2] else 1
        stop = layers[last] + 1
        while stop < len(run) and op_name(run[stop]) == "batch_norm":
            stop += 1
        done.update(run[:stop])
        yield flow.before[start][0], run[stop - 1], run[:stop]


def _block(flow: _Flow, parameters: set[str], name: str, entry: fx.Node, exit_: fx.Node, nodes: list[fx.Node]) -> Block:
    stored = {n for node in nodes for n in node.all_input_nodes if n.op == "get_attr" and n.target in parameters}
    after = flow.after[exit_]
    return Block(
        name, _kind(nodes, exit_), entry.name, exit_.name, tuple(n.name for n in nodes),
        sum(evaluate(macs(n)) for n in nodes),
        sum(n.meta["val"].numel() for n in stored),
        len(after) == 1 and op_name(after[0]) in ACTIVATIONS,
    )  # fmt: skip


def _kind(nodes: list[fx.Node], exit_: fx.Node) -> str:
    names = [op_name(n) for n in nodes]
    if any(n in ATTENTION for n in names):
        return "attention"
    if op_name(exit_) != "add":
        return "chain"
    layers = [n for n in nodes if op_name(n) in MAPS]
    convs = [n for n in layers if op_name(n) in CONVS]
    depthwise = [n for n in convs if 1 < arguments(n)["groups"] == shape(arguments(n)["input"])[1]]
    if not depthwise:
        return "mlp" if layers and all(op_name(n) == "linear" for n in layers) else "residual"
    return "convnext" if depthwise[0] is layers[0] else "inverted residual"


def _label(nodes: list[fx.Node]) -> str:
    """The innermost module that contains all layers of the region, or the name of the region's last node."""
    paths = []
    for n in nodes:
        if op_name(n) in MAPS:
            inside = [path for path in module_paths(n) if path]
            paths.append(inside[-1].split(".") if inside else [])
    common = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in common) or nodes[-1].name


def has_layers(end: fx.Node, names: Container[str]) -> bool:
    """Whether a layer or attention among the nodes of these names leads to `end`."""
    stack = [end]
    while stack:
        node = stack.pop()
        if node.name in names:
            if op_name(node) in (*MAPS, *ATTENTION):
                return True
            stack += node.all_input_nodes
    return False


def single_path(block: Block, end: fx.Node) -> list[fx.Node] | None:
    """The nodes from the block's entry to `end` if they follow one another without a fork, else None."""
    inside, node = set(block.nodes), end
    path: list[fx.Node] = []
    while node.name != block.entry:
        if node.name not in inside:
            return None
        inputs = [n for n in node.all_input_nodes if n.name in inside or n.name == block.entry]
        if len(inputs) != 1:
            return None
        path.insert(0, node)
        node = inputs[0]
    return path


def branches_of(nodes: dict[str, fx.Node], block: Block) -> list[list[fx.Node] | None]:
    """The paths that a residual addition adds, or the one path of a chain; None in place of a path that forks."""
    exit_ = nodes[block.exit]
    if block.kind == "chain":
        return [single_path(block, exit_)]
    terms = [t for t in (arguments(exit_)["self"], arguments(exit_)["other"]) if t.name != block.entry]
    return [single_path(block, t) for t in terms]


def norm_axis(norm: fx.Node) -> int | None:
    """The axis of the channels that a LayerNorm, GroupNorm or RMSNorm normalises; None if it normalises more than
    channels."""
    if op_name(norm) == "group_norm":
        return 1
    axes = arguments(norm)["normalized_shape"]
    return len(shape(norm)) - 1 if len(axes) == 1 and len(shape(norm)) > 1 else None


def channel_axis(graph: fx.Graph, value: fx.Node) -> int:
    """The axis of a value's channels: axis 1 of a convolution's result, the last axis of a linear layer's, and where the
    permutations since then have moved it."""
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
    if axis is None:  # no layer of this network computes the value
        rank = len(shape(value))
        return 1 if rank == 2 or any(op_name(n) in CONVS and len(shape(n)) == rank for n in graph.nodes) else rank - 1
    for order in reversed(moves):
        axis = order.index(axis)
    return axis
