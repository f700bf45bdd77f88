"""Find a submodule of a larger model, and the arguments that it is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..graph.compat import pytree
from ..graph.errors import BadInput, nearest
from ..passes.common.scoring import evaluating


def part_of(model: nn.Module, path: str) -> nn.Module:
    """Return the submodule at a dotted path. Raises BadInput if there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if name]
        raise BadInput(f"attach: submodule: the model has no {path!r}; {nearest(path, names)}") from None


def inputs_of(part: nn.Module, path: str, model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Run a model in eval mode and return (args, kwargs) of the first call of a submodule.

    part, path: the submodule and its path, for the message. Raises BadInput if the model does not call it.
    """
    calls: list[tuple[Any, Any]] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        if not calls:
            calls.append(pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs)))

    hook = part.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with evaluating(model), torch.no_grad():
            model(*args, **kwargs)
    finally:
        hook.remove()
    if not calls:
        raise BadInput(f"attach: submodule: the model does not call the forward of {path!r} with this example")
    return calls[0]
