"""Editing graphs: inserting, replacing and cleaning up nodes, and rebuilding a graph around other tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx

from . import compat
from .errors import BadInput
from .nodes import compute, fetch, writes
from .trainable import TrainableModule

ORIGIN = ("stack_trace", "nn_module_stack")  # metadata with the line of the user's model that an operator comes from


class Editor:
    """Edits the graph of one module in place; call `finish` at the end.

    New nodes are inserted where `before` or `after` point (`with edit.before(node): edit.call(...)`), and have the fake
    value of their result (`meta["val"]`) at once.
    """

    def __init__(self, module: fx.GraphModule):
        self.module, self.graph = module, module.graph
        self._mode: Any = None

    def before(self, node: fx.Node) -> AbstractContextManager:
        """A context in which new nodes are inserted before a node."""
        return self.graph.inserting_before(node)

    def after(self, node: fx.Node) -> AbstractContextManager:
        """A context in which new nodes are inserted after a node, in the order in which they are made."""
        return self.graph.inserting_before(node.next)

    def call(
        self,
        target: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any] | None = None,
        *,
        like: fx.Node | None = None,
        value: Any = None,
    ) -> fx.Node:
        """A new node that calls an operator.

        like: a node whose place in the user's model the new one takes over for messages. value: the new node's fake value,
        if it is known or cannot be inferred yet; by default the operator runs on the fake values of its inputs.
        """
        node = self.graph.call_function(target, tuple(args), kwargs or {})
        node.meta = {} if like is None else origin(like)
        if value is None:
            infer(node)
        else:
            node.meta["val"] = value
        return node

    def attribute(self, name: str) -> fx.Node:
        """A new node that reads the stored tensor at a dotted path."""
        node = self.graph.get_attr(name)
        self._mode = self._mode or compat.fake_mode([n.meta.get("val") for n in self.graph.nodes])
        node.meta["val"] = compat.fake(self._mode, fetch(self.module, name))
        return node

    def store(self, name: str, value: torch.Tensor) -> fx.Node:
        """Store a tensor at a dotted path, replacing one that is there, and return a new node that reads it."""
        place_tensor(self.module, name, value)
        return self.attribute(name)

    def overwrite(self, stored: fx.Node, value: torch.Tensor) -> None:
        """Replace the tensor that a node reads by another, perhaps of another shape."""
        place_tensor(self.module, str(stored.target), value)
        stored.meta["val"] = stored.meta["val"].new_empty(value.shape, dtype=value.dtype)

    def free_name(self, path: str) -> str:
        """The dotted path, with underscores appended until the module has nothing of that name."""
        owner, _, name = path.rpartition(".")
        try:
            holder = fetch(self.module, owner) if owner else self.module
        except (AttributeError, KeyError):
            return path
        while hasattr(holder, name):
            name += "_"
        return f"{owner}.{name}" if owner else name

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Make everything that reads a node read a new one, which may itself read the old; then erase the old node and what
        only it needed, if nothing reads it any more."""
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        if not node.users:
            self.erase(node)

    def erase(self, node: fx.Node) -> None:
        """Erase a node that nothing reads, and inputs that nothing else reads; inputs of the program stay."""
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        for i in inputs:
            if not i.users and _removable(i):
                self.erase(i)

    def finish(self) -> None:
        """Erase what no output needs and generate the module's code."""
        drop_dead(self.module)
        self.module.recompile()


def origin(node: fx.Node) -> dict[str, Any]:
    """The part of a node's metadata that says where in the user's model it comes from."""
    return {k: v for k, v in node.meta.items() if k in ORIGIN}


def _removable(node: fx.Node) -> bool:
    return node.op == "get_attr" or (node.op == "call_function" and not writes(node))


def drop_dead(module: fx.GraphModule) -> None:
    """Erase what no output needs. Further names of a live tensor stay, so that tied weights keep all names."""
    for node in reversed(list(module.graph.nodes)):
        if not node.users and node.op != "get_attr" and _removable(node):
            module.graph.erase_node(node)
    stored = list(attributes(module))
    live = {id(value) for node, value in stored if node.users}
    for node, value in stored:
        if not node.users and id(value) not in live:
            module.graph.erase_node(node)


# --------------------------------------------------------------------------------------------------------- fake values
def infer(node: fx.Node) -> None:
    """Give a new node its fake value by running its operator on the fake values of its inputs; dynamic dimensions stay
    symbolic. Raises BadInput for a node without an input tensor."""
    mode = compat.fake_mode([i.meta.get("val") for i in node.all_input_nodes])
    if mode is None:
        raise BadInput(f"{node.name}: it has no tensor input to infer its shape from")
    with compat.faking(mode):
        node.meta["val"] = compute(node, lambda n: n.meta["val"])


def propagate(module: fx.GraphModule) -> None:
    """Recompute the fake value of every node by one fake run from the inputs; dynamic dimensions stay symbolic. Raises
    BadInput for a graph without an input tensor."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    env: dict[fx.Node, Any] = {n: n.meta["val"] for n in placeholders}
    mode = compat.fake_mode(list(env.values()))
    if mode is None:
        raise BadInput("the graph has no tensor input to propagate shapes from")
    with compat.faking(mode):
        for node in module.graph.nodes:
            if node.op == "get_attr":
                stored = fetch(module, str(node.target))
                env[node] = compat.fake(mode, stored) if isinstance(stored, torch.Tensor) else stored
            elif node.op == "call_function":
                env[node] = compute(node, env.__getitem__)
    for node, value in env.items():
        node.meta["val"] = value


# ------------------------------------------------------------------------------------------------------- stored tensors
def attributes(module: fx.GraphModule) -> Iterator[tuple[fx.Node, Any]]:
    """Yield the nodes that read an attribute, each with its present value."""
    for node in module.graph.nodes:
        if node.op == "get_attr":
            yield node, fetch(module, str(node.target))


def tensor_at(root: torch.nn.Module, path: str) -> torch.Tensor | None:
    """The parameter or buffer at a dotted path, or None."""
    parent, _, last = path.rpartition(".")
    try:
        module = root.get_submodule(parent)
    except AttributeError:
        return None
    tensor = module._parameters.get(last, module._buffers.get(last))
    return tensor if isinstance(tensor, torch.Tensor) else None


def place_tensor(root: torch.nn.Module, path: str, value: Any) -> None:
    """Set a parameter, buffer, module or other attribute at a dotted path; missing modules on the way are created."""
    *parents, name = path.split(".")
    for part in parents:
        if part not in root._modules:
            root._modules[part] = torch.nn.Module().train(root.training)
        root = root._modules[part]  # type: ignore[assignment]
    if isinstance(value, torch.Tensor):  # register_buffer and setattr are many times slower than these dictionaries
        tensors: Any = root._buffers
        other: Any = root._parameters
        if isinstance(value, torch.nn.Parameter):
            tensors, other = other, tensors
        other.pop(name, None)
        tensors[name] = value
    else:
        setattr(root, name, value)


def like(old: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """The data, as a parameter if the old tensor is one."""
    return torch.nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, torch.nn.Parameter) else data


def copy_tensor(name: str, value: Any) -> Any:
    """A copy of an attribute, for `rebuild`; a parameter stays a parameter."""
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    return like(value, value.detach().clone())


def rebuild(
    module: TrainableModule,
    take: Callable[[str, Any], Any] = lambda name, value: value,
    edit: Callable[[dict[fx.Node, fx.Node]], None] | None = None,
) -> TrainableModule:
    """The same graph in a new module, around the same tensors or others; tensors that no node reads are left out.

    take: `take(name, value)` returns the new value of an attribute. It is called once for a tensor with several names, so
    tied weights stay tied. edit: `edit(nodes)` may change the new graph, given the new node for every old one.
    """
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, nodes))
    compat.share_codegen(graph, module.graph)
    new, new_values = TrainableModule(torch.nn.Module(), fx.Graph()), {}
    for node, old in attributes(module):
        name = str(node.target)
        if id(old) not in new_values:
            new_values[id(old)] = take(name, old)
        place_tensor(new, name, new_values[id(old)])
    if edit is not None:
        edit(nodes)
    new.graph = graph
    flags = {path: part.training for path, part in module.named_modules(remove_duplicate=False)}
    for path, part in new.named_modules():  # a module that the old one lacks follows its parent
        part.training = flags[path] = flags.get(path, flags[path.rpartition(".")[0]])
    if "batch_norm" in module.meta:
        new.meta["batch_norm"] = module.meta["batch_norm"]
    compat.copy_specs(module, new)
    return new
