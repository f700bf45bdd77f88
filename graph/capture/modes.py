"""Which operators training changes, from two exports of the same model: one in eval mode, one in train mode.

The nodes of both graphs are paired; an operator with a training flag gets both values of its flag (see `trainable`).
Dropout that only the training graph has is inserted into the other one, switched off. Other nodes that only one graph has
cannot be switched, and are named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ..compat import BatchNorm
from ..edit import origin
from ..facts import DROPOUTS
from ..nodes import arguments, is_operator, module_paths, op_name, source, writes
from ..trainable import STATISTICS, set_tag, switch, switched, tag, values, walk

COUNTER = "num_batches_tracked"


@dataclass
class Lost:
    """What exists in training but not in the program: modules, source lines, parameters and buffers."""

    modules: dict[str, str] = field(default_factory=dict)  # class by path
    lines: list[str] = field(default_factory=list)  # source lines of nodes outside of such modules
    parameters: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    # By node with other inputs or numbers in training, the path of its module.
    rewired: dict[str, str] = field(default_factory=dict)
    outputs: bool = False  # whether the outputs are nested in another way
    without: set[str] = field(default_factory=set)  # modules that skip in eval mode what only training has
    unknown: bool = False  # whether there is no graph of the model in train mode

    @property
    def quiet(self) -> set[str]:
        """The modules that skip in eval mode anything of this."""
        return self.without | set(self.rewired.values())

    def __bool__(self) -> bool:
        known = self.modules or self.lines or self.rewired or self.parameters or self.buffers or self.outputs
        return bool(known) or self.unknown

    def __str__(self) -> str:
        parts = [f"{path} ({name})" for path, name in self.modules.items()]
        parts += self.lines[: max(1, 6 - len(parts))]
        text = [", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")] if parts else []
        if self.parameters:
            text.append(f"{len(self.parameters)} parameters ({', '.join(self.parameters[:3])}, …)")
        if self.buffers:
            text.append("updates of the buffers " + ", ".join([*self.buffers[:4], *["…"] * (len(self.buffers) > 4)]))
        if self.rewired:
            text.append(
                "other inputs or numbers of " + ", ".join([*list(self.rewired)[:3], *["…"] * (len(self.rewired) > 3)])
            )
        if self.outputs:
            text.append("other outputs")
        return "; ".join(text)


def read_modes(exported: ExportedProgram, training: ExportedProgram | None, model: torch.nn.Module) -> Lost:
    """Note both modes' arguments on every node that depends on the mode. Returns what only training has.

    training: the export in train mode, or None if there is none; then every flag that is off counts as on in training.
    """
    pairs: dict[fx.Node, fx.Node] = {}
    lost = Lost(unknown=training is None)
    if training is not None:
        pairs = _pair(exported.graph_module, training.graph_module)
        extra = _carry_dropout(exported.graph_module, training.graph_module, pairs)
        _wire_past_dropout(exported.graph_module, pairs)
        lost = _lost(exported, training, extra, pairs)
    theirs = {ours: other for other, ours in pairs.items()}
    for _, node in switched(exported.graph_module):
        if tag(node):
            continue
        now, then = values(node), values(theirs[node]) if node in theirs else {}
        modes = {k: [v, then.get(k, v if k == "dropout_p" else True)] for k, v in now.items()}
        set_tag(node, modes=modes, module=module_path(node), **_average(node, model))
    return lost


def guess_modes(exported: ExportedProgram) -> None:
    """Note both modes' arguments for a program that was exported elsewhere, in eval or in train mode. Which of the two is
    seen from the modules of torch.nn, whose flags follow the mode."""
    nodes = [node for _, node in switched(exported.graph_module)]
    if any(tag(node) for node in nodes):
        return  # a file of our own has the notes already
    plain = [node for node in nodes if switch(node) != "dropout_p"]
    follow = [node for node in plain if _module_class(node).startswith("torch.nn.modules.")] or plain
    train = bool(follow) and all(any(values(n).values()) for n in follow) and any(n in follow for n in plain)
    functions = follow is plain and not any(_module_class(n).startswith("torch.nn.modules.") for n in follow)
    always = functions or not any(_module_class(n) for n in follow)
    for node in nodes:
        now = values(node)
        if train and not always:
            modes = {k: [0.0 if k == "dropout_p" else False, v] for k, v in now.items()}
        else:
            modes = {k: [v, v if k == "dropout_p" else True] for k, v in now.items()}
        set_tag(node, modes=modes, module=module_path(node))


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    """The modules around an operator, outermost first: their paths ("" for the model itself) and classes."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [(str(p), c if isinstance(c, str) else f"{c.__module__}.{c.__qualname__}") for p, c in stack]


def module_path(node: fx.Node) -> str:
    """The path of the module that called the operator, "" for the model itself."""
    return next(reversed(module_paths(node)), "")


def _module_class(node: fx.Node) -> str:
    return next((name for _, name in _stack(node)[::-1]), "")


def _average(node: fx.Node, model: torch.nn.Module) -> dict[str, Any]:
    """For a batch_norm, whether its running statistics are plain averages, and over how many batches so far."""
    if op_name(node) != "batch_norm":
        return {}
    try:
        norm: Any = model.get_submodule(module_path(node))
    except AttributeError:
        return {}
    if not isinstance(norm, BatchNorm):
        return {}
    count = getattr(norm, COUNTER, None)
    known = isinstance(count, torch.Tensor) and count.device.type != "meta"
    return {"cumulative": norm.momentum is None, "batches": int(count) if known else 0}  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- pairing
def _pair(ours: fx.GraphModule, theirs: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Pairs of nodes, by node of the training graph: operators of the same name in the same module, in order, if both
    graphs have equally many of them; else if both have equally many from one source line; else from one line with inputs of
    one shape."""
    pairs: dict[fx.Node, fx.Node] = {}

    def match(left: list[fx.Node], right: list[fx.Node], keys: list[Callable[[fx.Node], Any]]) -> None:
        groups: dict[Any, tuple[list[fx.Node], list[fx.Node]]] = defaultdict(lambda: ([], []))
        for side, nodes in enumerate((left, right)):
            for node in nodes:
                groups[keys[0](node)][side].append(node)
        for mine, other in groups.values():
            if len(mine) == len(other):
                pairs.update(zip(other, mine, strict=True))
            elif mine and other and len(keys) > 1:
                match(mine, other, keys[1:])

    def sort(module: fx.GraphModule) -> list[fx.Node]:
        return [n for _, n in walk(module) if n.op in ("call_function", "placeholder")]

    def plain(node: fx.Node) -> tuple[Any, ...]:
        name = node.name if node.op == "placeholder" else op_name(node).rstrip("_")
        return node.op, name, module_path(node)

    def line(node: fx.Node) -> Any:
        return node.meta.get("stack_trace") or ""

    def shape(node: fx.Node) -> Any:
        inputs = [i.meta.get("val") for i in node.all_input_nodes]
        return [tuple(v.shape) if isinstance(v, torch.Tensor) else None for v in inputs].__repr__()

    match(sort(ours), sort(theirs), [plain, line, shape])
    return pairs


def _carry_dropout(ours: fx.GraphModule, theirs: fx.GraphModule, pairs: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """Insert dropout that only training has into the eval graph, switched off. Returns the training nodes that stay
    unpaired."""
    extra = [n for _, n in walk(theirs) if n.op == "call_function" and n not in pairs]
    for node in list(extra):
        x = node.args[0] if node.args else None
        if op_name(node) not in DROPOUTS or not isinstance(x, fx.Node) or x not in pairs:
            continue
        users = [(pairs[u], u) for u in node.users if u in pairs]
        mine = pairs[x]
        if not users or len(users) != len(node.users) or not all(mine in u.all_input_nodes for u, _ in users):
            continue
        graph = mine.graph
        first = min((u for u, _ in users), key=list(graph.nodes).index)
        with graph.inserting_before(first):
            new = graph.call_function(node.target, (mine, node.args[1], False))  # type: ignore[arg-type]
        new.meta = {**origin(node), "val": mine.meta["val"]}
        for user, _ in users:
            user.replace_input_with(mine, new)
        pairs[node] = new
        extra.remove(node)
    return extra


def _wire_past_dropout(ours: fx.GraphModule, pairs: dict[fx.Node, fx.Node]) -> None:
    """Give every node the inputs that it has in training, where these differ by a dropout only.

    Dropout in eval mode returns its input itself, and the trace takes later readers of that input for readers of the
    dropout: `h + dropout(h)` becomes `dropout(h) + dropout(h)`.
    """
    position = {node: i for i, (_, node) in enumerate(walk(ours))}

    def wired(theirs: Any, mine: Any, user: fx.Node) -> Any:
        if isinstance(theirs, fx.Node) and isinstance(mine, fx.Node):
            wanted = pairs.get(theirs, mine)
            same = _before_dropout(wanted) is _before_dropout(mine)
            return wanted if same and position.get(wanted, -1) < position.get(user, -1) else mine
        if isinstance(theirs, (list, tuple)) and isinstance(mine, (list, tuple)) and len(theirs) == len(mine):
            return type(mine)(wired(a, b, user) for a, b in zip(theirs, mine, strict=True))
        return mine

    for theirs, mine in pairs.items():
        if is_operator(mine) and mine.target is theirs.target:
            mine.args = wired(theirs.args, mine.args, mine)
            mine.kwargs = {k: wired(theirs.kwargs.get(k), v, mine) for k, v in mine.kwargs.items()}


def _before_dropout(node: fx.Node) -> fx.Node:
    """The value before a chain of dropouts that are off."""
    while op_name(node) in DROPOUTS and not arguments(node)["train"]:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _lost(
    exported: ExportedProgram, training: ExportedProgram, extra: list[fx.Node], pairs: dict[fx.Node, fx.Node]
) -> Lost:
    lost = Lost()
    known = {module_path(n) for _, n in walk(exported.graph_module) if n.op == "call_function"}
    buffers = _names(training, InputKind.BUFFER)
    for node in extra:
        written = node.args[0] if node.args and writes(node) else None
        while isinstance(written, fx.Node) and written.args and writes(written):  # the buffer behind earlier writes
            written = written.args[0]
        if isinstance(written, fx.Node) and written.name in buffers:
            if not buffers[written.name].endswith(COUNTER):
                lost.buffers.append(buffers[written.name])
            continue
        if (not node.users and not writes(node)) or op_name(node) in ("sym_size", "getitem"):
            continue
        path = _outermost_unknown(node, known)
        lost.without |= {*(path or ())[:1], _caller(node, path)}
        if path:
            lost.modules.setdefault(*path)
        elif (at := source(node)) not in lost.lines:
            lost.lines.append(at)
    lost.lines = [line for line in lost.lines if "num_batches_tracked" not in line]
    lost.buffers += _unread_statistics(training)
    for node, mine in pairs.items():
        if node.op == "call_function" and not _same_inputs(node, mine, pairs):
            lost.rewired[source(mine)] = module_path(node)
    lost.parameters = sorted(_used(training) - _used(exported))
    lost.outputs = training.call_spec.out_spec != exported.call_spec.out_spec
    return lost


def _unread_statistics(training: ExportedProgram) -> list[str]:
    """The running statistics of norms whose results no output needs; the program leaves out these norms' calls."""
    buffers = _names(training, InputKind.BUFFER)
    dead: set[fx.Node] = set()
    names: dict[str, None] = {}
    for node in reversed(training.graph.nodes):
        if node.op == "call_function" and not writes(node) and dead.issuperset(node.users):
            dead.add(node)
            if op_name(node) in STATISTICS and any(values(node).values()):
                statistics = [arguments(node)[k] for k in ("running_mean", "running_var")]
                names |= {buffers[n.name]: None for n in statistics if isinstance(n, fx.Node) and n.name in buffers}
    return list(names)


def _same_inputs(theirs: fx.Node, ours: fx.Node, pairs: dict[fx.Node, fx.Node]) -> bool:
    """Whether a pair of nodes has the same inputs and numbers, except for training flags. Inputs that only training has
    count as the same, since they are named themselves."""
    if not is_operator(ours) or ours.target is not theirs.target:
        return True
    free = {*values(ours), "momentum"} if switch(ours) else set()
    left, right = arguments(theirs), arguments(ours)

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) or isinstance(b, fx.Node):
            return a not in pairs or a.op == "get_attr" or pairs[a] is b
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(map(same, a, b))
        return bool(a == b) or not isinstance(a, (bool, int, float, str))

    return all(same(left[k], right[k]) for k in left if k not in free)


def _outermost_unknown(node: fx.Node, known: set[str]) -> tuple[str, str] | None:
    """Path and class of the outermost module around a node that does nothing in eval mode, or None."""
    for path, name in _stack(node):
        if path and not any(k == path or k.startswith(f"{path}.") for k in known):
            return path, name.rpartition(".")[2]
    return None


def _caller(node: fx.Node, path: tuple[str, str] | None) -> str:
    """The path of the module whose code decides whether the node, or the module around it, runs."""
    if path is None:
        return module_path(node)
    stack = [p for p, _ in _stack(node)]
    return stack[max(stack.index(path[0]) - 1, 0)]


def _names(exported: ExportedProgram, kind: InputKind) -> dict[str, str]:
    """Names in the model by placeholder, for the inputs of a kind."""
    specs = exported.graph_signature.input_specs
    return {str(i.arg.name): str(i.target) for i in specs if i.kind is kind}


def _used(exported: ExportedProgram) -> set[str]:
    """The names of the parameters that the graph reads."""
    names = _names(exported, InputKind.PARAMETER)
    return {names[n.name] for n in exported.graph.nodes if n.op == "placeholder" and n.users and n.name in names}
