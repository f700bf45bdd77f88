"""Statistics with gates: index i counts `gate[i]` times in means, variances, sums and softmax.

Each function computes its operator from the arguments (by schema name) and `{dimension: gates}`. With gates of 1 it is the
operator itself; that is where its derivative with respect to the gates is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _spread(x: Tensor, gates: dict[int, Tensor]) -> Tensor:
    """The product of the gates that apply to each entry of x."""
    weight = torch.ones_like(x)
    for d, gate in gates.items():
        weight = weight * gate.view([-1 if k == d else 1 for k in range(x.dim())])
    return weight


def _mean(x: Tensor, weight: Tensor, dims: list[int]) -> Tensor:
    return (x * weight).sum(dims, keepdim=True) / weight.sum(dims, keepdim=True)


def _variance(x: Tensor, weight: Tensor, dims: list[int]) -> Tensor:
    return _mean((x - _mean(x, weight, dims)).square(), weight, dims)


def _standardised(x: Tensor, weight: Tensor, dims: list[int], eps: float) -> Tensor:
    return (x - _mean(x, weight, dims)) * (_variance(x, weight, dims) + eps).rsqrt()


def _per_channel(y: Tensor, a: dict[str, Any]) -> Tensor:
    form = [1, -1, *[1] * (y.dim() - 2)]
    y = y if a.get("weight") is None else y * a["weight"].view(form)
    return y if a.get("bias") is None else y + a["bias"].view(form)


def _layer_norm(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    x = a["input"]
    weight, dims = _spread(x, gates), list(range(x.dim() - len(a["normalized_shape"]), x.dim()))
    y = _standardised(x, weight, dims, a["eps"])
    y = y if a.get("weight") is None else y * a["weight"]
    return y if a.get("bias") is None else y + a["bias"]


def _rms_norm(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    x = a["input"]
    weight, dims = _spread(x, gates), list(range(x.dim() - len(a["normalized_shape"]), x.dim()))
    eps = torch.finfo(x.dtype).eps if a.get("eps") is None else a["eps"]
    y = x * (_mean(x.square(), weight, dims) + eps).rsqrt()
    return y if a.get("weight") is None else y * a["weight"]


def _group_norm(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    x = a["input"]
    grouped = (len(x), a["num_groups"], -1)
    rows, weight = x.reshape(grouped), _spread(x, gates).reshape(grouped)
    return _per_channel(_standardised(rows, weight, [2], a["eps"]).reshape(x.shape), a)


def _batch_norm(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    """Batch normalisation by the statistics of the batch, as weight standardisation uses it."""
    x = a["input"]
    dims = [d for d in range(x.dim()) if d != 1]
    return _per_channel(_standardised(x, _spread(x, gates), dims, a["eps"]), a)


def _instance_norm(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    x = a["input"]
    return _per_channel(_standardised(x, _spread(x, gates), list(range(2, x.dim())), a["eps"]), a)


def _softmax(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    x = a["self"] if "self" in a else a["input"]
    return (x - (_spread(x, gates).log() + x).logsumexp(a["dim"], keepdim=True)).exp()


def _log_softmax(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    return _softmax(a, gates).log()


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """A reduction like torch's, made from a `function(x, weight, dims, arguments)` that keeps dimensions."""

    def reduce(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
        x = a["self"]
        dims = _reduced_dims(a, x.dim())
        y = function(x, _spread(x, gates), dims, a)
        return y if a.get("keepdim") else y.squeeze(dims)

    return reduce


def _unbiased(x: Tensor, weight: Tensor, dims: list[int], a: dict[str, Any]) -> Tensor:
    correction = a.get("correction", 1) if "unbiased" not in a else int(a["unbiased"])
    count = weight.sum(dims, keepdim=True)
    return _variance(x, weight, dims) * count / (count - (1 if correction is None else correction))


def _both(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, gates: (function(a, gates), STATISTICS["mean"](a, gates))


def _pool(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    """Adaptive average pooling to size 1 along the gated dimensions."""
    x, dims = a["self"], list(gates)
    mean = _mean(x, _spread(x, gates), dims).expand_as(x)
    sizes = a["output_size"]
    return getattr(torch.nn.functional, f"adaptive_avg_pool{len(sizes)}d")(mean, sizes)


def gated_attention(a: dict[str, Any], gates: dict[int, Tensor]) -> Tensor:
    """Attention with gates on the keys: a key's gate multiplies the exponential of its logits in the softmax."""
    mask, (gate,) = a.get("attn_mask"), gates.values()
    n, m = a["query"].shape[-2], a["key"].shape[-2]
    if a.get("is_causal"):
        mask = torch.ones(n, m, dtype=torch.bool, device=gate.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=gate.dtype, device=gate.device).masked_fill(~mask, -math.inf)
    mask = gate.log().expand(n, m) if mask is None else mask.to(gate.dtype) + gate.log()
    options = {"attn_mask": mask, "scale": a.get("scale"), "enable_gqa": a.get("enable_gqa", False)}
    return torch.nn.functional.scaled_dot_product_attention(a["query"], a["key"], a["value"], **options)


STATISTICS: dict[str, Callable[[dict[str, Any], dict[int, Tensor]], Any]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "mean": _reduced(lambda x, w, dims, a: _mean(x, w, dims)),
    "sum": _reduced(lambda x, w, dims, a: (x * w).sum(dims, keepdim=True)),
    "var": _reduced(_unbiased),
    "std": _reduced(lambda *args: _unbiased(*args).sqrt()),
    "logsumexp": _reduced(lambda x, w, dims, a: (x + w.log()).logsumexp(dims, keepdim=True)),
}
STATISTICS |= {"var_mean": _both(STATISTICS["var"]), "std_mean": _both(STATISTICS["std"])}
STATISTICS |= dict.fromkeys(("softmax", "_softmax", "_safe_softmax"), _softmax)
STATISTICS |= dict.fromkeys(("log_softmax", "_log_softmax"), _log_softmax)
STATISTICS |= {f"adaptive_avg_pool{n}d": _pool for n in (1, 2, 3)}


def _reduced_dims(a: dict[str, Any], rank: int) -> list[int]:
    dim = a.get("dim")
    dims = range(rank) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return [d % rank for d in dims]


def statistics_dims(name: str, a: dict[str, Any], rank: int) -> list[int]:
    """The dimensions over which a node takes its statistics."""
    if name in ("layer_norm", "rms_norm"):
        return list(range(rank - len(a["normalized_shape"]), rank))
    if name == "group_norm":
        return list(range(1, rank))
    if name == "batch_norm":
        return [d for d in range(rank) if d != 1] if a["running_mean"] is None else []
    if name == "instance_norm":
        return list(range(2, rank))
    if name.startswith("adaptive_avg_pool"):
        return [rank - k for k in range(1, len(a["output_size"]) + 1) if a["output_size"][-k] == 1]
    return _reduced_dims(a, rank)
