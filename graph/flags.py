"""Which arguments of an operator depend on train/eval mode, and what each mode gives them.

A node that behaves differently in the two modes carries `node.meta["custom"]["graphcomb"]`, a JSON-able dict that
survives functionalisation, copies and `.pt2` files:

    op          the operator the entry is about (functionalisation may leave the metadata on helper nodes, too)
    modes       {argument: [value in eval mode, value in train mode]}
    module      path of the module that called the operator, in the user's model ("" when it is not known)
    cumulative  batch_norm alone: momentum is None, so that the running statistics are plain averages over all batches
    batches     how many batches those averages already hold
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from .facts import DROPOUTS, is_random
from .nodes import arguments, fetch, op_name

TAG = "graphcomb"
SWITCHES = {  # the boolean argument that says "training"
    **dict.fromkeys(DROPOUTS, "train"),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), "train"),
    "rrelu": "training",
    "batch_norm": "training",
    "instance_norm": "use_input_stats",
}
STATISTICS = ("batch_norm", "instance_norm")  # by the batch in one mode and by their running statistics in the other


def switch(node: fx.Node) -> str | None:
    """The argument by which an operator knows that it is in training, if it has one; a normalisation without running
    statistics normalises by the batch in both modes and has none."""
    name = op_name(node)
    if name in STATISTICS and arguments(node)["running_mean"] is None:
        return None
    return SWITCHES.get(name)


def depends(node: fx.Node) -> bool:
    """Whether an operator has any argument that a mode may change."""
    return switch(node) is not None or op_name(node) == "scaled_dot_product_attention"


def values(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node that a mode may change, as they are."""
    name = "dropout_p" if op_name(node) == "scaled_dot_product_attention" else switch(node)
    return {} if name is None else {name: arguments(node)[name]}


def tag(node: fx.Node) -> dict[str, Any]:
    """What is known about the node's modes (see above); empty for a node that a pass made."""
    entry = (node.meta.get("custom") or {}).get(TAG)
    return entry if isinstance(entry, dict) and entry.get("op") == op_name(node) else {}


def set_tag(node: fx.Node, **entry: Any) -> None:
    """Note what is known about the node's modes, in place of what was."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), TAG: {"op": op_name(node), **entry}}


def wanted(node: fx.Node, training: bool) -> dict[str, Any]:
    """The arguments a node has in a mode. A node without an entry (made by a pass) simply follows the mode."""
    if modes := tag(node).get("modes"):
        return {name: pair[training] for name, pair in modes.items()}
    name = switch(node)
    return {} if name is None else {name: training}


def walk(module: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, fx.Node]]:
    """All nodes in order, those of the bodies of higher-order operators (`torch.cond`) included, with their module."""
    for node in module.graph.nodes:
        body = fetch(module, str(node.target)) if node.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            yield from walk(body)
        yield module, node


def switched(module: fx.GraphModule) -> list[tuple[fx.GraphModule, fx.Node]]:
    """The nodes that differ between the modes, in order, with the module they are in."""
    return [(owner, n) for owner, n in walk(module) if n.op == "call_function" and depends(n)]


def draws(node: fx.Node) -> bool:
    """Whether the operator draws random numbers, as its node is now."""
    if node.op != "call_function" or not is_random(node):
        return False
    return any(values(node).values()) if depends(node) else True
