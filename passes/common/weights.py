"""The weights of linear layers and convolutions: which there are, and how options name them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import fx

from ...graph.errors import BadInput
from ...graph.nodes import arguments, fetch, op_name, shape
from ...graph.program import Program
from ..base import Pass, Refusal


@dataclass(frozen=True)
class Layer:
    """A linear or convolution weight `(out, in / groups, *kernel)`, the nodes that use it and all names that it goes by
    (several where tied)."""

    name: str
    nodes: tuple[fx.Node, ...]
    shape: tuple[int, ...]
    groups: int
    names: tuple[str, ...]

    @property
    def kind(self) -> str:
        """What it is of: "linear", "depthwise" or "conv"."""
        return "linear" if len(self.shape) == 2 else "depthwise" if self.shape[1] == 1 < self.groups else "conv"

    @property
    def size(self) -> int:
        """How many weights."""
        return torch.Size(self.shape).numel()

    def matches(self, patterns: Iterable[str]) -> bool:
        """Whether one of its names does."""
        return any(fnmatchcase(name, pattern) for name in self.names for pattern in patterns)


def layers(program: Program) -> tuple[list[Layer], list[Refusal]]:
    """The linear and convolution weights that are stored tensors, in the order they are used, and the others with the
    reason."""
    users: dict[int, tuple[str, list[fx.Node]]] = {}
    refused = []
    module = program.module()
    for node in program.graph.nodes:
        name = op_name(node)
        if name not in ("linear", "conv1d", "conv2d", "conv3d"):
            if name.startswith("conv_transpose"):
                what = str(arguments(node)["weight"].target)
                refused.append(Refusal(what, "the weights of a transposed convolution lie the other way round"))
            continue
        weight = arguments(node)["weight"]
        if weight.op != "get_attr" or not isinstance(fetch(module, str(weight.target)), torch.nn.Parameter):
            what, why = node.name, "its weight is computed, not a stored parameter"
            if op_name(weight).startswith("fake_quantize"):
                what, why = str(weight.all_input_nodes[0].target), "it is quantised; Quantize comes last"
            refused.append(Refusal(what, why))
            continue
        if name != "linear" and len(shape(arguments(node)["input"])) < len(shape(weight)):
            refused.append(Refusal(str(weight.target), "its inputs have no batch dimension"))
            continue
        tensor = fetch(module, str(weight.target))
        users.setdefault(id(tensor), (str(weight.target), []))[1].append(node)
    names: dict[int, list[str]] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return [
        Layer(
            name,
            tuple(nodes),
            shape(arguments(nodes[0])["weight"]),
            arguments(nodes[0]).get("groups", 1),
            tuple(names[key]),
        )
        for key, (name, nodes) in users.items()
    ], refused


def check_included(of: Pass, include: Sequence[str], found: Sequence[Layer], refused: Sequence[Refusal]) -> None:
    """Raise BadInput unless each pattern of a pass's `include` matches a weight, taken or refused."""
    names = [name for layer in found for name in layer.names] + [row.what for row in refused]
    for pattern in include:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise BadInput(f'{type(of).__name__}.include: "{pattern}" matches no weight; there are {some or "none"}')
