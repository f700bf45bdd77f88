"""The live module of a program: a graph that `train()` and `eval()` switch as they switch the user's model."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .flags import STATISTICS, switched, tag, wanted
from .nodes import arguments, fetch, op_name, set_argument


class _Generated:
    """The `forward` of a graph whose code nobody has asked for yet: asking generates it.

    Generating code takes as long as cutting the weights of a small network, and programs between two passes never run.
    """

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        fx.GraphModule.recompile(module)  # replaces this attribute in the module's own class
        return module.forward


class TrainableModule(fx.GraphModule):
    """A graph in which every operator with a training flag follows the `training` flag of its submodule.

    What the two modes mean for a node was read from the user's model at capture (`flags`): dropout that is always on
    stays on, a BatchNorm that the model's own `train()` keeps frozen stays frozen, attention has its dropout in training
    alone. `train()` and `eval()` of the whole or of a submodule work as they do on the user's model. What exists in training
    alone (auxiliary heads, stochastic depth) is not in the graph; `capture` names it.

    A batch_norm with momentum None is captured with momentum 0; in training its running statistics become, as in eager
    mode, the plain average over the batches seen, counted in `meta["batches"]` on top of those before the capture.
    """

    forward = _Generated()
    _seen: tuple[bool, ...] | None = None  # the flags of all submodules when the nodes were last switched
    _cumulative: tuple[tuple[fx.GraphModule, fx.Node], ...] = ()

    def recompile(self) -> Any:
        """Generate the code anew, unless nobody has asked for any yet."""
        return super().recompile() if "forward" in vars(type(self)) else None

    @property
    def code(self) -> str:
        """The graph as Python code."""
        _ = self.forward
        return super().code

    def train(self, mode: bool = True, batch_norm: bool = True) -> TrainableModule:
        """Set the training mode; with `batch_norm` False the running statistics are used and stay as they are."""
        super().train(mode)
        self.meta["batch_norm"] = batch_norm
        self._switch()
        return self

    def _switch(self) -> None:
        """Give every node the arguments that the flags of the submodules ask for."""
        changed, cumulative = set(), []
        for owner, node in switched(self):
            known = tag(node)
            training = self._at(known.get("module") or _home(node)).training
            if op_name(node) in STATISTICS:
                training &= self.meta.get("batch_norm", True)
            arguments_ = wanted(node, training)
            if op_name(node) == "batch_norm" and arguments(node)["running_mean"] is not None:
                zero = node.meta.setdefault("cumulative", known.get("cumulative", arguments(node)["momentum"] == 0))
                if zero and arguments_["training"]:
                    cumulative.append((owner, node))
                if zero:
                    arguments_["momentum"] = float(arguments_["training"])  # 1 leaves the batch's own statistics behind
            for key, value in arguments_.items():
                if arguments(node)[key] != value:
                    set_argument(node, key, value)
                    changed.add(owner)
        for owner in changed:
            owner.recompile()
        self._cumulative = tuple(cumulative)
        self._seen = tuple(m.training for m in self.modules())

    def _at(self, path: str) -> torch.nn.Module:
        """The module at a path of the user's model; one without tensors is made, so that it can be switched."""
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
        before = [tensor.clone() for tensor, _ in averaged]
        result = super().__call__(*args, **kwargs)
        count = self.meta["batches"] = self.meta.get("batches", 0) + bool(averaged)
        for (tensor, known), old in zip(averaged, before, strict=True):
            tensor.data.lerp_(old, 1 - 1 / (count + known))  # .data: autograd holds these but never reads them
        return result

    def _averaged(self) -> list[tuple[torch.Tensor, int]]:
        """The running statistics that are plain averages, with the number of batches before the capture."""
        return [
            (fetch(owner, str(arguments(n)[key].target)), tag(n).get("batches", 0))
            for owner, n in self._cumulative
            for key in ("running_mean", "running_var")
        ]

    def _apply(self, fn: Any, recurse: bool = True) -> TrainableModule:
        """Move or cast the tensors; nodes that make tensors on the old device make them on the new one."""
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
    """The path of the module whose tensors an operator without an entry uses."""
    found = next((a for a in node.all_input_nodes if a.op == "get_attr"), None)
    return str(found.target).rpartition(".")[0] if found is not None else ""
