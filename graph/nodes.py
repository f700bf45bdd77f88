"""Functions that read and write the nodes of an ATen graph, by argument name."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import compat


def op_name(node: fx.Node) -> str:
    """Name of the node's operator without namespace or overload, such as "conv2d" or "getitem"; for custom operators
    "space::name". For a node that calls nothing, its `op`."""
    if node.op != "call_function":
        return node.op
    if node.target is operator.getitem:
        return "getitem"
    schema = compat.schema(node.target)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    return schema.name.removeprefix("aten::")


def is_operator(node: fx.Node) -> bool:
    """Whether the node calls an ATen or custom operator, which has a schema (a Python function or a higher-order operator
    has none)."""
    return compat.schema(node.target) is not None


def writes(node: fx.Node) -> bool:
    """Whether the node's operator writes to one of its arguments."""
    return compat.writes(node.target)


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator node by schema name, defaults filled in."""
    values = {}
    for i, a in enumerate(compat.schema(node.target).arguments):
        default = a.default_value if a.has_default_value() else None
        values[a.name] = node.args[i] if i < len(node.args) else node.kwargs.get(a.name, default)
    return values


def compute(node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    """The result of the node's operator, given the value of each node that it reads."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set one argument by schema name, whether it was given by position, keyword or default."""
    for i, a in enumerate(compat.schema(node.target).arguments):
        if a.name == name:
            if i < len(node.args) and not a.kwarg_only:
                node.update_arg(i, value)
            else:
                node.update_kwarg(name, value)
            return
    raise KeyError(name)


def permutation(node: Any) -> list[int] | None:
    """For a transpose or permute, the order that it gives the dimensions of its input; None for other nodes."""
    return moved(node) if isinstance(node, fx.Node) and op_name(node) in ("transpose", "permute") else None


def moved(node: fx.Node) -> list[int]:
    """The order that a node gives the dimensions of its input, for an operator that only reorders dimensions.

    It is found by running the operator on a tensor whose dimension d has size d.
    """
    a = arguments(node)
    probe = torch.empty([*range(len(shape(a["self"])))], device="meta")
    return list(node.target(**{**a, "self": probe}).shape)  # type: ignore[operator]


def per_dim(value: Any, dims: int) -> tuple[int, ...]:
    """An argument of a convolution or pooling as one number for each of `dims` spatial dimensions."""
    return tuple(value) * dims if len(value) == 1 else tuple(value)


def conv_padding(conv: fx.Node) -> list[tuple[int, int]]:
    """For each spatial dimension, the zeros that a convolution puts before and after its input."""
    a, extent = arguments(conv), shape(arguments(conv)["weight"])[2:]
    if a["padding"] == "same":
        dilation = per_dim(a["dilation"], len(extent))
        spans = [(k - 1) * d for k, d in zip(extent, dilation, strict=True)]
        return [(s // 2, s - s // 2) for s in spans]
    return [(p, p) for p in per_dim([0] if a["padding"] == "valid" else a["padding"], len(extent))]


DATA_DEPENDENT = 97  # example of a size that depends on data; prime, so that it divides nothing by accident


@dataclass(frozen=True)
class Recurrence:
    """What an LSTM, GRU, RNN or cell is made of. parts: for each layer and direction, the weights of inputs and of hidden
    units, and both biases if there are any."""

    layers: int
    directions: int
    parts: list[Sequence[fx.Node]]


def recurrence(node: fx.Node) -> Recurrence | str:
    """What the node of a recurrence is made of, or the reason why that is not known."""
    a = arguments(node)
    if "w_hh" in a:
        return Recurrence(1, 1, [[a[key] for key in ("w_ih", "w_hh", "b_ih", "b_hh") if a[key] is not None]])
    if "data" in a:
        return "packed sequences"
    directions, each = 1 + int(a["bidirectional"]), 4 if a["has_biases"] else 2
    if len(a["params"]) != each * a["num_layers"] * directions:
        return "a projection of the hidden units"
    parts = [a["params"][i : i + each] for i in range(0, len(a["params"]), each)]
    return Recurrence(a["num_layers"], directions, parts)


def hint(size: Any) -> int:
    """The example value of a static or symbolic size; a size that depends on data gives `DATA_DEPENDENT`."""
    if isinstance(size, int):
        return int(size)
    if isinstance(size, fx.Node):
        return hint(size.meta["val"])
    return compat.example_of(size, DATA_DEPENDENT)


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a tensor node for the example inputs."""
    return tuple(hint(s) for s in node.meta["val"].shape)


def continuous(value: Any) -> bool:
    """Whether the value can have a gradient: it is a floating-point or complex tensor."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def fetch(module: torch.nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    *parents, name = path.split(".")
    for part in parents:
        module = module._modules[part]  # type: ignore[assignment]  # many times faster than getattr
    return getattr(module, name)


def source(node: fx.Node) -> str:
    """`node (file:line: code)` of the user's model, as far as the export recorded it: the innermost frame outside of torch,
    or else the module's path."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    frames = [(i, line) for i, line in enumerate(lines) if line.startswith('File "')]
    user_frames = [(i, line) for i, line in frames if "/torch/" not in line] or frames
    if user_frames:
        i, line = user_frames[-1]
        path, number = line.removeprefix('File "').split('", line ')
        code = lines[i + 1] if i + 1 < len(lines) and not lines[i + 1].startswith('File "') else ""
        place = f"{'/'.join(path.split('/')[-2:])}:{number.split(',')[0]}"
        return f"{node.name} ({place}: {code})" if code else f"{node.name} ({place})"
    path = next((p for p in reversed(module_paths(node)) if p), "")
    return f"{node.name} ({path})" if path else node.name


def module_paths(node: fx.Node) -> list[str]:
    """The paths of the modules around an operator, outermost first, "" for the model itself, as the export writes them: a
    module's second call has "@1" after its path."""
    return [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def module_path(node: fx.Node) -> str:
    """The path of the module whose forward calls the operator, "" for the model itself; all calls of a module have the same
    path."""
    return next(reversed(module_paths(node)), "").split("@")[0]


def spelled_out(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The letters of each operand and of the result of an einsum; digits stand for the dimensions of an ellipsis, counted
    from the last. Without an arrow, the result has the letters that occur once, in alphabetical order, after the ellipsis.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms, most = [], 0
    for term, rank in zip(left.split(","), ranks, strict=True):
        extra = rank - len(term.replace("...", ""))
        most = max(most, extra)
        terms.append(term.replace("...", "".join(str(k) for k in reversed(range(extra)))))
    dots = "".join(str(k) for k in reversed(range(most)))
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = "..." + "".join(c for c in sorted(set(letters)) if letters.count(c) == 1)
    return terms, right.replace("...", dots)
