"""Constant folding: values that depend on no input and no parameter are computed once and stored as buffers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx

from ..edit import Editor, origin
from ..facts import FACTORIES, is_random
from ..nodes import arguments, fetch, op_name, writes
from ..trainable import STATISTICS

SPREAD = 4096  # a repetitive constant of at least this many elements is stored without repetitions and expanded


def fold_constants(module: fx.GraphModule) -> None:
    """Compute values that depend on no input and no parameter once, on their own device, and store them as buffers
    `_folded_k`.

    Values that draw random numbers, or read a buffer that the model itself changes, stay as they are.
    """
    value, edit, count = _constants(module), Editor(module), 0
    for node in list(module.graph.nodes):
        outside = [u for u in node.users if u not in value]
        if node in value and node.op == "call_function" and outside and isinstance(value[node], torch.Tensor):
            while hasattr(module, f"_folded_{count}"):
                count += 1
            stored = value[node].detach()
            compact = _compact(stored)
            with edit.before(node):
                folded = edit.store(f"_folded_{count}", compact.clone().contiguous())
                folded.meta |= origin(node)
                if compact.shape != stored.shape:
                    folded = edit.call(torch.ops.aten.expand.default, (folded, list(stored.shape)), like=node)
            for user in outside:
                user.replace_input_with(node, folded)


def _constants(module: fx.GraphModule) -> dict[fx.Node, Any]:
    changed = _changed_buffers(module)
    value: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            stored = fetch(module, str(node.target))
            if (
                isinstance(stored, torch.Tensor)
                and not isinstance(stored, torch.nn.Parameter)
                and id(stored) not in changed
            ):
                value[node] = stored
        elif node.op == "call_function" and not writes(node) and not is_random(node):
            inputs = node.all_input_nodes
            constant = all(i in value for i in inputs)
            like = node.args[:1] if op_name(node).startswith("new_") else ()  # only its dtype and device matter
            shaped = op_name(node) in FACTORIES and all(i in value or i in like or _static(i) for i in inputs)
            if (inputs and constant) or shaped:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _concrete(n, value))
                with torch.no_grad():
                    try:
                        result = copy.deepcopy(node.target(*args, **kwargs))
                    except (RuntimeError, TypeError, ValueError):
                        continue
                if isinstance(result, torch.Tensor) and result.device.type == "meta":
                    continue  # a meta tensor has no value
                unset = isinstance(result, torch.Tensor) and "empty" in op_name(node)
                value[node] = torch.zeros_like(result) if unset else result  # so that every capture gives the same
    return value


def _changed_buffers(module: fx.GraphModule) -> set[int]:
    """The ids of the tensors that running the graph changes, in either mode."""
    changed = set()
    for node in module.graph.nodes:
        written: list[Any] = []
        if op_name(node) in STATISTICS:
            written = [arguments(node)["running_mean"], arguments(node)["running_var"]]
        elif writes(node):
            written = list(node.args[:1])
        for at in written:
            if isinstance(at, fx.Node) and at.op == "get_attr":
                changed.add(id(fetch(module, str(at.target))))
    return changed


def _static(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and all(isinstance(s, int) for s in value.shape)


def _concrete(node: fx.Node, value: dict[fx.Node, Any]) -> Any:
    if node in value:
        return value[node]
    fake = node.meta["val"]
    sizes = tuple(s if isinstance(s, int) else 1 for s in fake.shape)
    return torch.empty(sizes, dtype=fake.dtype, device=fake.device)


def _compact(value: torch.Tensor) -> torch.Tensor:
    """The tensor without the repetitions that `expand` made, if it is large enough for that to pay."""
    if value.numel() < SPREAD:
        return value
    for d, stride in enumerate(value.stride()):
        if stride == 0 and value.shape[d] > 1:
            value = value.narrow(d, 0, 1)
    return value
