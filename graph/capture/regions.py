"""Inlining of regions of the user's code: `torch.no_grad()` becomes detach, `torch.autocast` becomes casts."""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
from torch import fx

from ..compat import FAKE_TENSOR_LOG, TorchDispatchMode, is_guard, pytree
from ..errors import CaptureError
from ..facts import DROPOUTS, names
from ..nodes import continuous, fetch, is_operator, op_name, source
from ..trainable import graphs
from .export import silenced

LITTER = names("_assert_tensor_metadata _assert_scalar _assert_async sym_constrain_range_for_size sym_constrain_range")
GRADIENTS, AUTOCAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"
IN_PLACE: dict[Any, Any] = {
    getattr(torch.ops.aten, f"{name}_").default: getattr(torch.ops.aten, name).default
    for name in (*sorted(DROPOUTS), "rrelu")
}
QUIET = "graphcomb_no_grad"  # key of a node's metadata: whether the node ran without gradients


def flatten_regions(module: fx.GraphModule) -> None:
    """Drop the trace's assertions and inline its regions; the graph then has operators with the regions' effects."""
    drop_litter(module.graph)
    while any(_inline(module, node) for node in list(module.graph.nodes) if _is_region(node)):
        drop_litter(module.graph)
    _detach(module.graph)
    for part in graphs(module):
        for node in [n for n in part.graph.nodes if n.target in IN_PLACE]:
            _out_of_place(part.graph, node)


def drop_litter(graph: fx.Graph) -> None:
    """Erase the nodes that only check sizes and types; nothing reads them."""
    for node in reversed(list(graph.nodes)):
        if is_guard(node) or op_name(node) in LITTER:
            graph.erase_node(node)


def _is_region(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target) in (GRADIENTS, AUTOCAST)


def _inline(module: fx.GraphModule, node: fx.Node) -> bool:
    at = next(i for i, a in enumerate(node.args) if _is_body(module, a))
    settings, body_attr, inputs = node.args[:at], node.args[at], node.args[at + 1 :]
    assert isinstance(body_attr, fx.Node)
    body = fetch(module, str(body_attr.target))
    autocast = str(node.target) == AUTOCAST and bool(settings[2])
    env: dict[fx.Node, Any] = dict(zip([n for n in body.graph.nodes if n.op == "placeholder"], inputs, strict=True))
    results: Any = None
    with module.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder" or op_name(inner) in LITTER:
                continue
            if inner.op == "output":
                results = fx.node.map_arg(inner.args[0], env.__getitem__)
                continue
            if inner.op == "get_attr":
                env[inner] = module.graph.get_attr(f"{body_attr.target}.{inner.target}")
                env[inner].meta = dict(inner.meta)
            else:
                env[inner] = module.graph.node_copy(inner, env.__getitem__)
                if autocast and inner.op == "call_function" and is_operator(inner):
                    _cast_inputs(env[inner], *settings[:2])
            if str(node.target) == GRADIENTS:
                env[inner].meta.setdefault(QUIET, not settings[0])
            elif QUIET in node.meta:
                env[inner].meta.setdefault(QUIET, node.meta[QUIET])
    results = results if isinstance(results, (tuple, list)) else [results]
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(results[0])
    module.graph.erase_node(node)
    if not body_attr.users:
        module.graph.erase_node(body_attr)
    return True


def _is_body(module: fx.GraphModule, value: Any) -> bool:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return False
    return isinstance(fetch(module, str(value.target)), fx.GraphModule)


def _out_of_place(graph: fx.Graph, node: fx.Node) -> None:
    """Replace `dropout_(x)` by `copy_(x, dropout(x))`."""
    with graph.inserting_before(node):
        new = graph.call_function(IN_PLACE[node.target], node.args, dict(node.kwargs))
        new.meta = dict(node.meta)
        with node.meta["val"].fake_mode:
            new.meta["val"] = torch.empty_like(node.meta["val"])  # a value that shares no memory
        written = graph.call_function(torch.ops.aten.copy_.default, (node.args[0], new))
        written.meta = {k: v for k, v in node.meta.items() if k != "custom"}
    node.replace_all_uses_with(written)
    graph.erase_node(node)


def _detach(graph: fx.Graph) -> None:
    """Insert `detach` where a tensor that was computed without gradients is used with them."""
    for node in list(graph.nodes):
        if not node.meta.get(QUIET) or not continuous(node.meta.get("val")):
            continue
        users = [u for u in node.users if not u.meta.get(QUIET)]
        if users:
            with graph.inserting_before(node.next):
                cut = graph.call_function(torch.ops.aten.detach.default, (node,))
            cut.meta = {k: v for k, v in node.meta.items() if k != QUIET}
            for user in users:
                user.replace_input_with(node, cut)


# ------------------------------------------------------------------------------------------------------------ autocast
def _cast_inputs(node: fx.Node, device: Any, dtype: Any) -> None:
    """Cast the inputs of a node of an autocast region as autocast does, found by running the operator on fake tensors.

    Raises CaptureError where autocast casts inside of the operator, so that no casts around it mean the same.
    """
    values = {n: n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    if not values:
        return
    fresh = {n: v.detach() for n, v in values.items()}  # copies, since autocast caches casts of leaves
    mode, seen = next(iter(values.values())).fake_mode, _CastsSeen({id(v): n for n, v in fresh.items()})

    def run(env: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env.get(n, n.meta.get("val")))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with mode, torch.no_grad(), silenced(FAKE_TENSOR_LOG):
        with torch.autocast(device, dtype=dtype, cache_enabled=False), seen:
            expected = run(fresh)
        around = {n: v.to(seen.dtypes[n]) if n in seen.dtypes else v for n, v in fresh.items()}
        within = {n: v.to(dtype) if v.dtype is torch.float32 else v for n, v in fresh.items()}
        with torch.autocast(device, enabled=False):
            for env in (around, within):  # the second one for casts inside of composite operators (einsum)
                with contextlib.suppress(RuntimeError):
                    outputs = run(env)
                    if _types(outputs) == _types(expected):
                        break
            else:
                raise CaptureError(
                    f"{source(node)}: autocast casts inside the operator {op_name(node)}, which no graph can say; "
                    "capture the model without autocast (enabled=False, or its own dtype with model.to(...))"
                )
    for x, value in env.items():
        if value.dtype != fresh[x].dtype:
            with node.graph.inserting_before(node):
                cast = node.graph.call_function(torch.ops.aten.to.dtype, (x, value.dtype))
            cast.meta = {k: v for k, v in node.meta.items() if k != "custom"} | {"val": value}
            node.replace_input_with(x, cast)
    node.meta["val"] = outputs


class _CastsSeen(TorchDispatchMode):
    """Records which of the watched tensors are cast, and to what dtype."""

    def __init__(self, watched: dict[int, fx.Node]):
        super().__init__()
        self.watched, self.dtypes = watched, dict[fx.Node, torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and id(args[0]) in self.watched and kwargs.get("dtype"):
            self.dtypes[self.watched[id(args[0])]] = kwargs["dtype"]
        return func(*args, **kwargs)


def _types(value: Any) -> list[torch.dtype]:
    return [t.dtype for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
