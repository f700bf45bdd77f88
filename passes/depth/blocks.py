"""Blocks of a network, found in its graph: regions with one entry and one exit, and what depth pruning could do with each.

UPDP (arXiv 2401.06426) takes the blocks of its four families as given; finding them by dominance is ours. Names of modules
are used as labels only.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ...graph.cost import evaluate, macs
from ...graph.facts import CONVS, MAPS, PADS
from ...graph.nodes import arguments, module_paths, op_name, permutation, shape
from ...graph.program import Program

ACTIVATIONS = (
    "relu", "relu6", "gelu", "silu", "hardswish", "hardtanh", "leaky_relu", "elu", "mish", "selu", "softplus", "celu",
    "hardsigmoid", "sigmoid", "tanh", "prelu",
)  # fmt: skip
NORMS = ("layer_norm", "group_norm", "rms_norm")
IN_CHAINS = (*MAPS, *ACTIVATIONS, *NORMS, *PADS, "batch_norm", "dropout", "permute", "transpose", "mul")
OTHER_BENDS = (
    "clamp", "clamp_min", "clamp_max", "threshold", "hardshrink", "softshrink", "rrelu", "log_sigmoid", "glu", "abs", "erf",
    "exp", "log", "pow", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "maximum", "minimum", "instance_norm",
)  # fmt: skip
ATTENTION = ("scaled_dot_product_attention", "softmax", "_softmax")


@dataclass(frozen=True)
class Block:
    """One region of a graph, by node names, so that it is found in copies of the program too.

    entry: the value it reads; exit: the one it gives, a residual addition or the last node of a chain. nodes: everything
    in between and the exit. kind: "residual", "inverted residual", "convnext", "mlp", "attention" or "chain".
    macs, params: of its nodes, for the example input. saves: MACs that its pruned form saves; kernels: how many kernels
    fewer an engine runs, with one for each layer, normalisation over features and attention that is left after `Fuse`
    (ours). Activations, additions and moves of data count nothing: compilers run them within those, and where one does
    not, the engine saves more. Both are None where it cannot be pruned, for the reason `why`. dropped: it cannot be
    merged, only left out as a whole. tailed: an activation follows it, so that its pruned form needs none.
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
        """Whether it can be pruned."""
        return self.why is None


def is_data(node: fx.Node) -> bool:
    """Whether a node computes a tensor."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)


class _Flow:
    """The flow of data through a graph: tensors that depend on an input, without shapes and stored tensors."""

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
        """The nearest value that every path to any of the nodes passes, or is (Cooper, Harvey and Kennedy)."""
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
        """The nodes on paths from the entry to the exit, with it; None when one of them is used elsewhere."""
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
    covered: set[fx.Node] = set()  # by residual blocks
    regions: list[tuple[fx.Node, fx.Node, list[fx.Node]]] = []  # entry, exit, nodes
    for node in flow.order:
        entry = _residual_entry(flow, node)
        nodes = flow.between(entry, node) if entry is not None else None
        if entry is None or not nodes or covered.intersection(nodes):
            continue
        names = {n.name for n in nodes}
        branches = sum(has_layers(n, names) for n in node.all_input_nodes)
        attends = any(op_name(n) in ATTENTION for n in nodes)
        # Attention can only be left out, as long as it is the one branch; linear branches are left to `Fuse`.
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
    """Where the two branches that the node adds part."""
    if op_name(node) != "add":
        return None
    terms = [arguments(node)["self"], arguments(node)["other"]]
    if not all(isinstance(t, fx.Node) and t in flow.order and shape(t) == shape(node) for t in terms):
        return None
    return flow.meet(terms)


def _bends(node: fx.Node) -> bool:
    """Whether the node is no affine map."""
    return op_name(node) in (*ACTIVATIONS, *NORMS, *ATTENTION, *OTHER_BENDS)


def _chains(flow: _Flow, covered: set[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node, list[fx.Node]]]:
    """Two layers, or three up to a linear bottleneck, in a row outside of other blocks, with an activation between."""
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
    depthwise = [
        n for n in layers if op_name(n) in CONVS and 1 < arguments(n)["groups"] == shape(arguments(n)["input"])[1]
    ]
    if not depthwise:
        return "mlp" if layers and all(op_name(n) == "linear" for n in layers) else "residual"
    return "convnext" if depthwise[0] is layers[0] else "inverted residual"


def _label(nodes: list[fx.Node]) -> str:
    """The innermost module that all layers of the region lie in, or the name of its last node."""
    paths = []
    for n in nodes:
        if op_name(n) in MAPS:
            inside = [path for path in module_paths(n) if path]
            paths.append(inside[-1].split(".") if inside else [])
    common = paths[0] if paths else []
    for path in paths[1:]:
        same = [a == b for a, b in zip(common, path, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    return ".".join(common) or nodes[-1].name


def has_layers(end: fx.Node, names: Container[str]) -> bool:
    """Whether there is a layer or attention among the nodes of these names that lead to `end`."""
    stack = [end]
    while stack:
        node = stack.pop()
        if node.name in names:
            if op_name(node) in (*MAPS, *ATTENTION):
                return True
            stack += node.all_input_nodes
    return False


def single_path(block: Block, end: fx.Node) -> list[fx.Node] | None:
    """The nodes from the block's entry to `end`, if they follow each other without a fork; None otherwise."""
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
    """The paths that a residual addition adds, or the one of a chain; None for one that forks."""
    exit_ = nodes[block.exit]
    if block.kind == "chain":
        return [single_path(block, exit_)]
    terms = [t for t in (arguments(exit_)["self"], arguments(exit_)["other"]) if t.name != block.entry]
    return [single_path(block, t) for t in terms]


def norm_axis(norm: fx.Node) -> int | None:
    """The axis of the channels that a LayerNorm, GroupNorm or RMSNorm scales; None where it normalises something else."""
    if op_name(norm) == "group_norm":
        return 1
    axes = arguments(norm)["normalized_shape"]
    return len(shape(norm)) - 1 if len(axes) == 1 and len(shape(norm)) > 1 else None


def channel_axis(graph: fx.Graph, value: fx.Node) -> int:
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
