"""Train and eval mode: which arguments of an operator depend on the mode, and the live module that switches them.

A node that behaves differently in the two modes carries `node.meta["custom"]["graphcomb"]`, a JSON-able dict that survives
functionalisation, copies and `.pt2` files:

op          the operator that the entry is about (functionalisation may leave the metadata on helper nodes, too) modes
    {argument: [value in eval mode, value in train mode]} module      path of the module that called the operator, in the
    user's model ("" if it is not known) cumulative  batch_norm only: momentum is None, so the running statistics are plain
    averages over all batches batches     how many batches these averages already hold
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from .facts import DROPOUTS, SEQUENCES, is_random
from .nodes import arguments, fetch, op_name, set_argument

TAG = "graphcomb"
SWITCHES = {  # by operator, the argument for training, or for the amount of dropout
    **dict.fromkeys(DROPOUTS, "train"),
    **dict.fromkeys(SEQUENCES, "train"),
    "rrelu": "training",
    "batch_norm": "training",
    "instance_norm": "use_input_stats",
    "scaled_dot_product_attention": "dropout_p",
}
STATISTICS = ("batch_norm", "instance_norm")  # normalise by the batch in one mode, by running statistics in the other


def reserved(name: str) -> bool:
    """Whether a module or tensor of a program cannot have this name, since the class of the live module uses it."""
    return hasattr(_EMPTY, name.partition(".")[0])


def switch(node: fx.Node) -> str | None:
    """The argument that a mode may change, or None. A normalisation without running statistics has none, since it
    normalises by the batch in both modes."""
    name = op_name(node)
    if name in STATISTICS and arguments(node)["running_mean"] is None:
        return None
    return SWITCHES.get(name)


def values(node: fx.Node) -> dict[str, Any]:
    """The argument of a node that a mode may change, with its present value."""
    name = switch(node)
    return {} if name is None else {name: arguments(node)[name]}


def tag(node: fx.Node) -> dict[str, Any]:
    """The node's entry (see the module); empty for a node without one, such as one that a pass made."""
    entry = (node.meta.get("custom") or {}).get(TAG)
    return entry if isinstance(entry, dict) and entry.get("op") == op_name(node) else {}


def set_tag(node: fx.Node, **entry: Any) -> None:
    """Set the node's entry (see the module), replacing an earlier one."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), TAG: {**entry, "op": op_name(node)}}


def wanted(node: fx.Node, training: bool) -> dict[str, Any]:
    """The arguments that a node should have in a mode. A node without an entry (made by a pass) follows the mode."""
    if modes := tag(node).get("modes"):
        return {name: pair[training] for name, pair in modes.items()}
    name = switch(node)
    return {} if name in (None, "dropout_p") else {name: training}


def walk(module: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, fx.Node]]:
    """Yield all nodes in order, each with its module, including those in the bodies of higher-order operators
    (`torch.cond`)."""
    for node in module.graph.nodes:
        body = fetch(module, str(node.target)) if node.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            yield from walk(body)
        yield module, node


def graphs(module: fx.GraphModule) -> list[fx.GraphModule]:
    """A module and the bodies of its higher-order operators, each once."""
    return list({id(owner): owner for owner, _ in walk(module)}.values())


def switched(module: fx.GraphModule) -> list[tuple[fx.GraphModule, fx.Node]]:
    """The nodes that may differ between the modes, in order, each with its module."""
    return [(owner, n) for owner, n in walk(module) if n.op == "call_function" and switch(n)]


def draws(node: fx.Node) -> bool:
    """Whether the operator, with its present arguments, draws random numbers."""
    if node.op != "call_function" or not is_random(node):
        return False
    return switch(node) is None or any(values(node).values())


# ----------------------------------------------------------------------------------------------------- the live module
class _Generated:
    """The `forward` of a graph whose code is generated on first use. Generating code takes as long as cutting the weights
    of a small network, and programs between two passes never run."""

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        fx.GraphModule.recompile(module)  # sets `forward` in the module's own class, in place of this descriptor
        return module.forward


class TrainableModule(fx.GraphModule):
    """A graph in which every operator with a training flag follows the `training` flag of its submodule.

    The arguments of a node in both modes were read from the user's model at capture (`capture.modes`): dropout that is
    always on stays on, a BatchNorm that the model's own `train()` keeps frozen stays frozen, attention has its dropout only
    in training. `train()` and `eval()` of the whole or of a submodule work as they do on the user's model. What exists only
    in training (auxiliary heads, stochastic depth) is not in the graph; `capture` names it.

    A batch_norm with momentum None is captured with momentum 0. In training its running statistics become, as in eager
    mode, the plain average over the batches seen; `meta["batches"]` counts them, besides those before the capture.
    """

    forward = _Generated()
    _seen: tuple[bool, ...] | None = None  # flags of all submodules when the nodes were last switched
    _cumulative: tuple[tuple[fx.GraphModule, fx.Node], ...] = ()

    def recompile(self) -> Any:
        """Generate the code again, if it has been generated before."""
        return super().recompile() if "forward" in vars(type(self)) else None

    @property
    def code(self) -> str:
        """The graph as Python code."""
        _ = self.forward
        return super().code

    def train(self, mode: bool = True, batch_norm: bool = True) -> TrainableModule:
        """Set the training mode; without `batch_norm`, the running statistics are used and do not change."""
        super().train(mode)
        self.meta["batch_norm"] = batch_norm
        self._switch()
        return self

    def _switch(self) -> None:
        """Give every node the arguments that the flags of the submodules require."""
        changed, cumulative = set(), []
        calls: Counter[int] = Counter()  # by norm, its calls in a forward pass
        for owner, node in switched(self):
            known = tag(node)
            training = self._at(known.get("module") or _home(node)).training
            if op_name(node) in STATISTICS:
                training &= self.meta.get("batch_norm", True)
            arguments_ = wanted(node, training)
            if op_name(node) == "batch_norm" and arguments(node)["running_mean"] is not None:
                zero = node.meta.setdefault("cumulative", known.get("cumulative", arguments(node)["momentum"] == 0))
                if zero:
                    arguments_["momentum"] = 0.0
                if zero and arguments_["training"]:
                    cumulative.append((owner, node))
                    norm = id(fetch(owner, str(arguments(node)["running_mean"].target)))
                    calls[norm] += 1
                    # The running statistics become the mean over the norm's calls in this pass; k calls so far.
                    arguments_["momentum"] = 1 / calls[norm]
            for key, value in arguments_.items():
                if arguments(node)[key] != value:
                    set_argument(node, key, value)
                    changed.add(owner)
        for owner in changed:
            owner.recompile()
        self._cumulative = tuple(cumulative)
        self._seen = tuple(m.training for m in self.modules())

    def _at(self, path: str) -> torch.nn.Module:
        """The module at a path of the user's model; one without tensors is created, so that it can be switched."""
        module: torch.nn.Module = self
        for part in path.split(".") if path else ():
            if part not in module._modules:
                if hasattr(module, part):
                    break
                module.add_module(part, torch.nn.Module().train(module.training))
            module = module._modules[part]  # type: ignore[assignment]
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._seen != tuple(m.training for m in self.modules()):
            self._switch()
        averaged = self._averaged()
        before = [tensor.clone() for tensor, _, _ in averaged]
        result = super().__call__(*args, **kwargs)
        count = self.meta["batches"] = self.meta.get("batches", 0) + bool(averaged)
        for (tensor, known, calls), old in zip(averaged, before, strict=True):
            share = calls / (count * calls + known)
            tensor.data.lerp_(old, 1 - share)  # .data, since autograd saved the tensor (and never reads it)
        return result

    def _averaged(self) -> list[tuple[torch.Tensor, int, int]]:
        """The running statistics that are plain averages, each with the number of batches before the capture and of calls
        in a forward pass."""
        uses = [
            (fetch(owner, str(arguments(n)[key].target)), tag(n).get("batches", 0))
            for owner, n in self._cumulative
            for key in ("running_mean", "running_var")
        ]
        calls = Counter(id(tensor) for tensor, _ in uses)
        return [(tensor, known, calls[id(tensor)]) for tensor, known in {id(t): (t, k) for t, k in uses}.values()]

    def become(self, other: TrainableModule) -> None:
        """Take over the graph, tensors and flags of another module, which must not be used any more."""
        self._parameters, self._buffers, self._modules = other._parameters, other._buffers, other._modules
        for name in [k for k, v in vars(self).items() if isinstance(v, torch.Tensor)]:
            delattr(self, name)
        self.training, self._seen, self._cumulative = other.training, None, ()
        self.meta.update(other.meta)
        self.graph = other.graph

    def _apply(self, fn: Any, recurse: bool = True) -> TrainableModule:
        """Move or cast the tensors; nodes that create tensors on the old device then create them on the new one."""
        old = self._device()
        super()._apply(fn, recurse)
        new = self._device()
        if old is not None and new is not None and old != new:
            self._replace_device(old, new)
        return self

    def _device(self) -> torch.device | None:
        return next((t.device for t in [*self.parameters(), *self.buffers()]), None)

    def _replace_device(self, old: torch.device, new: torch.device) -> None:
        for module in [m for m in self.modules() if isinstance(m, fx.GraphModule)]:
            changed = False
            for node in module.graph.nodes:
                args = fx.node.map_aggregate(node.args, lambda a: new if _same(a, old) else a)
                kwargs = fx.node.map_aggregate(node.kwargs, lambda a: new if _same(a, old) else a)
                if args != node.args or kwargs != node.kwargs:
                    node.args, node.kwargs = args, kwargs
                    changed = True
            if changed:
                module.recompile()


def _same(value: Any, device: torch.device) -> bool:
    return isinstance(value, torch.device) and value.type == device.type and value.index in (None, device.index)


def _home(node: fx.Node) -> str:
    """The path of the module whose tensors an operator reads, for an operator without an entry."""
    parameter = next((a for a in node.all_input_nodes if a.op == "get_attr"), None)
    return str(parameter.target).rpartition(".")[0] if parameter is not None else ""


_EMPTY = TrainableModule(torch.nn.Module(), fx.Graph())  # for `reserved`
