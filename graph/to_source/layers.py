"""Which operators of a program are exactly a layer of torch.nn, and the constructors of these layers. Source: ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..compat import pytree
from ..facts import CONVS, TRANSPOSED_CONVS
from ..nodes import arguments, fetch, op_name, shape
from ..trainable import TrainableModule, tag, wanted

CONVOLUTIONS = {
    name: f"Conv{'Transpose' if 't' in name[4:] else ''}{name[-2]}d" for name in (*CONVS, *TRANSPOSED_CONVS)
}
TENSORS = {  # for each operator, the arguments that its layer of torch.nn stores, with the names that it gives them
    **{name: {"weight": "weight", "bias": "bias"} for name in CONVOLUTIONS},
    "linear": {"weight": "weight", "bias": "bias"},
    "batch_norm": {k: k for k in ("weight", "bias", "running_mean", "running_var")},
    "layer_norm": {"weight": "weight", "bias": "bias"},
    "group_norm": {"weight": "weight", "bias": "bias"},
    "embedding": {"weight": "weight"},
}


@dataclass(frozen=True)
class Layer:
    """A layer of torch.nn: its path, the expression of its constructor, and the operator's argument that is its input."""

    path: str
    made: str
    operand: str


def layers_of(module: TrainableModule) -> dict[fx.Node, Layer]:
    """The operators that are exactly a layer, by node: their path has no other tensors than the layer's, no other node
    reads these, and all operators that read them are the same layer."""
    layers: dict[str, dict[fx.Node, Layer]] = {}
    names = [str(n.target) for n in module.graph.nodes if n.op == "get_attr"]
    ids = [id(fetch(module, name)) for name in names]
    for node in module.graph.nodes:
        layer = _layer(module, node) if node.op == "call_function" else None
        if layer is not None:
            layers.setdefault(layer.path, {})[node] = layer
    result: dict[fx.Node, Layer] = {}
    for path, users in layers.items():
        kept = [n for n in names if n.startswith(f"{path}.")]
        readers = {u for n in module.graph.nodes if n.op == "get_attr" and str(n.target) in kept for u in n.users}
        tied = any(ids.count(id(fetch(module, n))) > 1 for n in kept)
        keeps = {f"{path}.{k}" for node in users for k in _held(node)}
        if set(kept) == keeps and readers == set(users) and len({lay.made for lay in users.values()}) == 1 and not tied:
            result |= users
    return result


def _held(node: fx.Node) -> dict[str, Any]:
    a = arguments(node)
    return {name: a[key] for key, name in TENSORS[op_name(node)].items() if a.get(key) is not None}


def _layer(module: TrainableModule, node: fx.Node) -> Layer | None:
    name = op_name(node)
    if name not in TENSORS:
        return None
    held = _held(node)
    if "weight" not in held and "running_mean" not in held:
        return None
    if any(not isinstance(v, fx.Node) or v.op != "get_attr" for v in held.values()):
        return None
    paths = {str(v.target).rpartition(".")[0] for v in held.values()}
    if len(paths) != 1 or not (path := paths.pop()) or any(str(v.target) != f"{path}.{k}" for k, v in held.items()):
        return None
    made = _constructor(module, node, held)
    return None if made is None else Layer(path, made, "indices" if name == "embedding" else "input")


def _constructor(module: TrainableModule, node: fx.Node, held: dict[str, fx.Node]) -> str | None:
    """The call of the constructor, or None if no layer does what the operator does."""
    name, a = op_name(node), arguments(node)
    computed = [
        k for k, v in a.items() if k not in TENSORS[name] and any(isinstance(x, fx.Node) for x in pytree.tree_leaves(v))
    ]
    if computed != ["indices" if name == "embedding" else "input"]:
        return None
    weight = fetch(module, str(held["weight"].target)) if "weight" in held else None
    dtype = next((fetch(module, str(v.target)).dtype for v in held.values()), torch.float32)
    if any(fetch(module, str(v.target)).dtype != dtype for v in held.values()):
        return None
    options: dict[str, Any] = {}
    if name in CONVOLUTIONS:
        return _convolution(CONVOLUTIONS[name], a, weight, dtype)
    if name == "linear":
        if weight is None or weight.dim() != 2:
            return None
        sizes, kind, options = [weight.shape[1], weight.shape[0]], "Linear", {"bias": (a["bias"] is not None, True)}
    elif name == "batch_norm":
        modes = tuple(wanted(node, mode).get("training") for mode in (False, True))
        known = tag(node)
        if modes != (False, True) or ("weight" in held) != ("bias" in held) or "running_var" not in held:
            return None
        if known.get("cumulative", False) or node.meta.get("cumulative"):
            return None
        rank = len(shape(a["input"]))
        sizes, kind = [len(fetch(module, str(held["running_mean"].target)))], f"BatchNorm{max(rank - 2, 1)}d"
        options = {"eps": (a["eps"], 1e-5), "momentum": (a["momentum"], 0.1), "affine": ("weight" in held, True)}
    elif name == "layer_norm":
        kept = [*a["normalized_shape"]]
        sizes, kind = [kept[0] if len(kept) == 1 else tuple(kept)], "LayerNorm"
        options = {"eps": (a["eps"], 1e-5), "bias": (a["bias"] is not None, True)}
    elif name == "group_norm":
        if ("weight" in held) != ("bias" in held) or weight is None:
            return None
        sizes, kind, options = [a["num_groups"], len(weight)], "GroupNorm", {"eps": (a["eps"], 1e-5)}
    else:
        if a.get("scale_grad_by_freq") or a.get("sparse") or weight is None:
            return None
        sizes, kind = [*weight.shape], "Embedding"
        options = {"padding_idx": (a["padding_idx"] if a["padding_idx"] >= 0 else None, None)}
    return _call(kind, sizes, options | {"dtype": (dtype, torch.float32)})


def _convolution(kind: str, a: dict[str, Any], weight: Any, dtype: torch.dtype) -> str:
    groups, transposed = a["groups"], "Transpose" in kind
    rank = weight.dim() - 2
    ends = [weight.shape[1] * groups, weight.shape[0]]
    sizes = [weight.shape[0], weight.shape[1] * groups] if transposed else ends

    def short(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            value = tuple(value) * (rank if len(value) == 1 else 1)
            return value[0] if len(set(value)) == 1 else value
        return value

    options = {"stride": (short(a["stride"]), 1), "padding": (short(a["padding"]), 0)}
    if transposed:
        options["output_padding"] = (short(a["output_padding"]), 0)
    options |= {"dilation": (short(a["dilation"]), 1), "groups": (groups, 1), "bias": (a["bias"] is not None, True)}
    kernel = short(tuple(weight.shape[2:]))
    return _call(kind, [*sizes, kernel], options | {"dtype": (dtype, torch.float32)})


def _call(kind: str, sizes: list[Any], options: dict[str, tuple[Any, Any]]) -> str:
    """The call with those options that differ from their defaults."""
    parts = [repr(s) for s in sizes] + [f"{k}={v!r}" for k, (v, default) in options.items() if v != default]
    return f"nn.{kind}({', '.join(parts)})"
