"""Which layers can be repaired, and what each is fitted to. Source: ours."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, fx

from ...graph.compat import pytree
from ...graph.facts import COPIES, FAKE_QUANTISATION, MAPS, RECURRENT, names
from ...graph.nodes import arguments, fetch, op_name, shape
from ...graph.program import Program, TrainableModule

Removed = dict[str, dict[int, list[int]]]
CHOICES = names("topk sort argsort argmax argmin")
FAINT = 1e-4  # one does not divide by a scale below this share of the largest


@dataclass(frozen=True)
class Consumer:
    """A layer `y = W x + b` of the smaller program whose weights may change, and its twin in the dense program: the node
    that computes what the layer stands for (see `twin_of`).

    weight, bias: names of parameters; bias is None where the layer has none of its own. mean: for a layer without a bias,
    the running mean of the BatchNorm behind it, which can take up a constant; else None. outputs, inputs: indices of the
    twin's outputs and inputs that the layer still has (inputs only if the twin's weight is the layer's). whole: True if
    each output is fitted to the twin's output, from all entries that the layer reads; False if all kernel positions share
    one map from the remaining input channels to the original ones.

    total, beside: if only an addition reads the layer, the dense network's addition, and the other operand in the smaller
    network. The layer is then fitted to their difference, so that it makes up for what the other operand lacks, such as a
    removed block. norm: the BatchNorm between the layer and that addition, whose scale is part of the fitted weights.
    """

    node: fx.Node
    twin: fx.Node
    weight: str
    bias: str | None
    mean: str | None
    groups: int
    outputs: np.ndarray
    inputs: np.ndarray
    whole: bool
    total: fx.Node | None = None
    beside: fx.Node | None = None
    norm: fx.Node | None = None

    @property
    def goal(self) -> fx.Node:
        """The dense node that the layer, or the map that its kernel positions share, is fitted to."""
        if not self.whole:
            return self.dense_x
        return self.twin if self.total is None else self.total

    @property
    def x(self) -> fx.Node:
        return arguments(self.node)["input"]

    @property
    def dense_x(self) -> fx.Node:
        return arguments(self.twin)["input"]

    @property
    def transposed(self) -> bool:
        return op_name(self.node).startswith("conv_transpose")

    @property
    def linear(self) -> bool:
        return op_name(self.node) == "linear"

    def left(self, y: Tensor, along: int) -> Tensor:
        """The outputs that the layer still has, out of the dense layer's outputs `y`, whose channels lie along a
        dimension."""
        if y.shape[along] == len(self.outputs):
            return y
        return y.index_select(along, torch.from_numpy(self.outputs).to(y.device))


@dataclass(frozen=True)
class Pair:
    """A smaller program beside the dense one.

    removed: what the smaller one lost, in the numbering of the dense one. same: nodes whose values equal those of the dense
    program, with their twins. sparse: names of weights with zeros that stay. largest: how many unknowns an output, or the
    mix of a head, may have.
    """

    dense: Program
    smaller: TrainableModule
    removed: Removed
    same: dict[fx.Node, fx.Node]
    sparse: set[str]
    largest: int

    @cached_property
    def twins(self) -> dict[str, fx.Node]:
        """The dense program's nodes by name."""
        return {node.name: node for node in self.dense.graph.nodes}

    @cached_property
    def uses(self) -> dict[int, int]:
        """See `uses_of`."""
        return uses_of(self.smaller)


def find(pair: Pair) -> tuple[list[Consumer], list[dict[str, str]]]:
    """The layers to repair, in the order they run: those that read what a removal has changed, or stand for more than
    before; and rows `{"what", "why"}` for such layers that must stay as they are."""
    twins, same = pair.twins, pair.same
    consumers, refused = [], []
    for node in pair.smaller.graph.nodes:
        if op_name(node) in RECURRENT and not all(i in same for i in node.all_input_nodes):
            weight = arguments(node).get("w_ih") or arguments(node)["params"][0]
            refused.append(
                {"what": str(weight.target), "why": "a recurrence is not linear; its weights stay as they are"}
            )
        if op_name(node) not in MAPS:
            continue
        twin = twin_of(node, twins, same)
        if arguments(node)["input"] in same and twin in (None, twins.get(node.name)):
            continue
        consumer = consumer_of(node, twin, pair)
        if isinstance(consumer, Consumer):
            consumers.append(_with_sum(consumer, pair) if consumer.whole else consumer)
        else:
            weight = arguments(node)["weight"]
            refused.append({"what": str(weight.target) if weight.op == "get_attr" else node.name, "why": consumer})
    # A cell is called once for every step, and a shared layer where it is used.
    return consumers, [row for i, row in enumerate(refused) if row not in refused[:i]]


def twin_of(node: fx.Node, twins: dict[str, fx.Node], same: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The dense node that computes what a layer stands for, or None.

    It is the node of the layer's name if the same nodes read both. Otherwise passes have rewritten the graph around the
    layer, as with merged blocks, and it is the node that the layer's readers read in the dense network, provided that they
    are there and have unchanged weights.
    """
    named = twins.get(node.name)
    if named is not None and op_name(named) == op_name(node) and _readers(named) == _readers(node):
        return named
    candidates = set()
    for user in node.users:
        twin = twins.get(user.name)
        if twin is None or twin.target != user.target:
            return None
        if not all(i in same for i in user.all_input_nodes if i.op == "get_attr"):
            return None
        ours, theirs = (pytree.tree_leaves((n.args, dict(n.kwargs)), is_leaf=_is_node) for n in (user, twin))
        if len(ours) != len(theirs):
            return None
        candidates |= {theirs[i] for i, leaf in enumerate(ours) if leaf is node}
    one = candidates.pop() if len(candidates) == 1 else None
    return one if isinstance(one, fx.Node) else None


def _with_sum(consumer: Consumer, pair: Pair) -> Consumer:
    """The consumer, with the addition behind it if there is one whose other operand has changed."""
    at, dense_at, norm = consumer.node, consumer.twin, None
    while len(at.users) == 1:
        before, (at,) = at, at.users
        twin = pair.twins.get(at.name)
        if twin is None or op_name(twin) != op_name(at) or dense_at not in twin.all_input_nodes:
            break
        if op_name(at) in COPIES:
            dense_at = twin
            continue
        if norm is None and before is consumer.node and consumer.mean is not None and _invertible(at, pair.smaller):
            dense_at, norm = twin, at
            continue
        operands, dense_operands = at.all_input_nodes, twin.all_input_nodes
        if op_name(at) != "add" or {len(operands), len(dense_operands)} != {2}:
            break
        beside = operands[operands[0] is before]
        unchanged = pair.same.get(beside) is dense_operands[dense_operands[0] is dense_at]
        earlier = (
            beside < consumer.node
        )  # in the order of the graph, so that its value is known when the layer is fitted
        fits = {shape(n) for n in (at, beside)} == {shape(consumer.node)} and shape(twin) == shape(consumer.twin)
        plain = arguments(at)["alpha"] == arguments(twin)["alpha"] == 1
        if earlier and fits and plain and not unchanged:
            return replace(consumer, total=twin, beside=beside, norm=norm)
        return consumer
    return consumer


def _invertible(node: fx.Node, module: TrainableModule) -> bool:
    """Whether a node is a BatchNorm that one can divide by the scales of."""
    if op_name(node) != "batch_norm":
        return False
    stored = [arguments(node)[key] for key in ("running_mean", "running_var", "weight", "bias")]
    if any(n is not None and n.op != "get_attr" for n in stored):
        return False
    scale = norm_of(module, node)[0].abs()
    return bool((scale > FAINT * scale.max()).all())


def _is_node(value: object) -> bool:
    return isinstance(value, fx.Node)


def _readers(node: fx.Node) -> set[str]:
    """The names of the nodes that read a node, except for those that only ask for a size."""
    return {user.name for user in node.users if not op_name(user).startswith("sym_size")}


def uses_of(module: TrainableModule) -> dict[int, int]:
    """Number of nodes that read each stored tensor, by the tensor's id."""
    uses: dict[int, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(tensor := fetch(module, str(node.target)), Tensor):
            uses[id(tensor)] = uses.get(id(tensor), 0) + len(node.users)
    return uses


def consumer_of(node: fx.Node, twin: fx.Node | None, pair: Pair) -> Consumer | str:
    """The layer as a consumer, or the reason why it cannot be repaired."""
    a, name, smaller, uses = arguments(node), op_name(node), pair.smaller, pair.uses
    weight, bias = a["weight"], a["bias"]
    if weight.op != "get_attr":
        quantised = op_name(weight) in FAKE_QUANTISATION
        return "it is quantised; Quantize comes last" if quantised else "its weight is computed, not a stored parameter"
    parameter = fetch(smaller, str(weight.target))
    if not isinstance(parameter, torch.nn.Parameter):
        return "its weight is a constant"
    if uses[id(parameter)] > 1:
        return "its weight is used more than once"
    if bias is not None and bias.op != "get_attr":
        return "its bias is computed, not a stored parameter"
    if twin is None:
        return "the dense network has no such layer to compare with"
    if not has_rows(node):
        return "its input is one vector without samples"
    groups, transposed = a.get("groups", 1), name.startswith("conv_transpose")
    if groups > 1 and transposed:
        return "a grouped transposed convolution"
    along = -1 if name == "linear" else 1
    into, ours, theirs = int(not transposed), list(shape(node)), list(shape(twin))
    lost = {int(d): indices for d, indices in pair.removed.get(str(weight.target), {}).items()}
    outputs = np.delete(np.arange(theirs.pop(along)), lost.get(1 - into, []))
    if len(outputs) != ours.pop(along):
        return "what was removed from its weight is not known"
    if ours[1:] != theirs[1:]:
        return "what it stands for has another size in the dense network"
    inputs = None
    if op_name(twin) == name and arguments(twin)["weight"].op == "get_attr":
        full = fetch(pair.dense.module(), str(arguments(twin)["weight"].target)).shape
        kept = [np.delete(np.arange(n), lost.get(d, [])) for d, n in enumerate(full)]
        inputs = kept[into] if [len(k) for k in kept] == list(parameter.shape) else None
    alone = bias is not None and uses[id(fetch(smaller, str(bias.target)))] == 1
    unknowns, kernel = math.prod(parameter.shape[1:]), math.prod(parameter.shape[2:])
    # Without kernel positions that share it, a map between channels has as many unknowns.
    whole = not transposed and (kernel == 1 or unknowns <= pair.largest)
    mean = mean_behind(node, smaller, uses) if bias is None and whole else None
    if not whole and (groups > 1 or inputs is None):
        return f"{unknowns} unknowns for each output, and {pair.largest} are the most"
    if not whole and str(weight.target) in pair.sparse:
        return "all kernel positions would share one map, which would fill its zeros"
    return Consumer(
        node, twin, str(weight.target), str(bias.target) if alone else None, mean, groups, outputs,
        np.arange(0) if inputs is None else inputs, whole,
    )  # fmt: skip


def has_rows(node: fx.Node) -> bool:
    """Whether the first dimension of a layer's input holds samples or positions."""
    least = 2 if op_name(node) == "linear" else len(shape(arguments(node)["weight"]))
    return len(shape(arguments(node)["input"])) >= least


def mean_behind(node: fx.Node, module: TrainableModule, uses: dict[int, int]) -> str | None:
    """The name of the running mean of a BatchNorm that is a layer's only reader, else None: `BN(y + c)` is BN with `mean -
    c` of `y`."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None or op_name(reader) != "batch_norm" or arguments(reader)["input"] is not node:
        return None
    mean = arguments(reader)["running_mean"]
    if mean is None or mean.op != "get_attr" or uses[id(fetch(module, str(mean.target)))] > 1:
        return None
    return str(mean.target)


def norm_of(module: TrainableModule, norm: fx.Node) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, mean and shift `(channels,)`, in float64, of a BatchNorm that computes `scale (y - mean) + shift`."""
    a = arguments(norm)

    def value(key: str, default: float) -> Tensor:
        mean = fetch(module, str(a["running_mean"].target))
        values = torch.full_like(mean, default) if a[key] is None else fetch(module, str(a[key].target))
        return values.detach().double()

    scale = value("weight", 1.0) * (value("running_var", 1.0) + a["eps"]).rsqrt()
    return scale, value("running_mean", 0.0), value("bias", 0.0)


def unchanged(dense: TrainableModule, smaller: TrainableModule) -> dict[fx.Node, fx.Node]:
    """The nodes of the smaller graph that compute the same as their twins for all inputs, with their twins."""
    twins = {node.name: node for node in dense.graph.nodes}
    pairs: dict[fx.Node, fx.Node] = {}
    for node in smaller.graph.nodes:
        twin = twins.get(node.name)
        if twin is None or twin.op != node.op or node.op == "output":
            continue
        if node.op == "get_attr":
            ours, other = fetch(smaller, str(node.target)), fetch(dense, str(twin.target))
            same = isinstance(ours, Tensor) and isinstance(other, Tensor) and ours.shape == other.shape
            same = same and ours.dtype == other.dtype and bool((ours == other.to(ours.device)).all())
        elif node.op == "placeholder":
            same = node.target == twin.target
        else:
            same = node.target == twin.target and _same_arguments(node, twin, pairs)
        if same:
            pairs[node] = twin
    return pairs


def choices(dense: TrainableModule, smaller: TrainableModule, same: dict[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """The nodes of the smaller graph with indices that an operator such as `topk` chose by their values, and their twins.

    The two networks choose different indices, or the same in another order. What is gathered by them can only be compared,
    row by row, if both take those of the dense network.
    """
    twins = {node.name: node for node in dense.graph.nodes}
    pairs = {}
    for node in smaller.graph.nodes:
        source = node.args[0] if op_name(node) == "getitem" else node
        value, twin = node.meta.get("val"), twins.get(node.name)
        if node in same or twin is None or not isinstance(source, fx.Node) or op_name(source) not in CHOICES:
            continue
        indices = isinstance(value, Tensor) and not value.is_floating_point()
        if indices and twin.target == node.target and shape(twin) == shape(node):
            pairs[node] = twin
    return pairs


def _same_arguments(node: fx.Node, twin: fx.Node, known: dict[fx.Node, fx.Node]) -> bool:
    leaves, shape = pytree.tree_flatten((node.args, dict(node.kwargs)), is_leaf=lambda v: isinstance(v, fx.Node))
    others, other_shape = pytree.tree_flatten((twin.args, dict(twin.kwargs)), is_leaf=lambda v: isinstance(v, fx.Node))
    if shape != other_shape:
        return False
    for a, b in zip(leaves, others, strict=True):
        if isinstance(a, fx.Node) or isinstance(b, fx.Node):
            if not isinstance(a, fx.Node) or known.get(a) is not b:
                return False
        elif type(a) is not type(b) or a != b:
            return False
    return True
