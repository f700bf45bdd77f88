"""The tensors that a model returns, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from .compat import output_spec, pytree
from .errors import BadInput, nearest


def named_outputs(outputs: Any) -> dict[str, Any]:
    """The entries of a model's output by name, flat: keys and indices joined by dots ("logits", "0", "boxes.1"). A model
    that returns only a tensor has one output, "out"."""
    named = {}
    for path, value in pytree.tree_flatten_with_path(outputs)[0]:
        keys = (next(getattr(k, a) for a in ("key", "idx", "name") if hasattr(k, a)) for k in path)
        named[".".join(map(str, keys)) or "out"] = value
    return named


def output_nodes(graph: fx.Graph) -> dict[str, Any]:
    """The outputs of a program's graph by the same names: nodes, or numbers and None."""
    leaves = pytree.tree_leaves(graph.output_node().args)
    return named_outputs(pytree.tree_unflatten(leaves, output_spec(graph)))


def pick(outputs: Any, names: Sequence[str], what: str) -> dict[str, Any]:
    """The outputs of these names. Raises BadInput for a name that is not there; `what` starts its message."""
    named = named_outputs(outputs)
    for name in names:
        if name not in named:
            raise BadInput(f"{what}: the model has no output {name}; {nearest(name, list(named))}")
    return {name: named[name] for name in names}


@contextmanager
def only_outputs(model: nn.Module, names: Sequence[str] | None) -> Iterator[None]:
    """A context in which the model returns only these of its outputs: one as the tensor itself, several as a dict by name.

    names: None for all. Raises BadInput unless it is a list of different names that the model has.
    """
    if names is None:
        yield
        return
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise BadInput(f"outputs: takes a list of different names, not {names!r}")

    def select(module: nn.Module, args: Any, outputs: Any) -> Any:
        picked = pick(outputs, names, "outputs")
        return picked if len(names) > 1 else picked[names[0]]

    handle = model.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()
