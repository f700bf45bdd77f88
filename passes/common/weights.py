"""The weights of linear layers and convolutions: finding them, and selecting them by name."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...graph.errors import BadInput
from ...graph.facts import FAKE_QUANTISATION
from ...graph.nodes import arguments, conv_padding, fetch, op_name, per_dim, shape
from ...graph.program import Program
from ..base import Pass, Refusal


@dataclass(frozen=True)
class WeightedLayer:
    """A linear or convolution weight.

    name: the first name that the graph uses. nodes: the layers that use the weight. shape: `(out, in / groups,
    *kernel)`. names: all names of the weight, several if it is tied.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    shape: tuple[int, ...]
    groups: int
    names: tuple[str, ...]

    @property
    def kind(self) -> str:
        """Type of the layer: "linear", "depthwise" or "conv"."""
        return "linear" if len(self.shape) == 2 else "depthwise" if self.shape[1] == 1 < self.groups else "conv"

    @property
    def size(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()

    def matches(self, patterns: Iterable[str]) -> bool:
        """Whether a pattern matches one of the weight's names."""
        return _match(self.names, patterns)


def layers(program: Program) -> tuple[list[WeightedLayer], list[Refusal]]:
    """The linear and convolution weights that are stored parameters, in the order of their first use; and refusals for
    the others.
    """
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
            if op_name(weight) in FAKE_QUANTISATION:
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
    weighted = []
    for key, (name, nodes) in users.items():
        a = arguments(nodes[0])
        weighted.append(WeightedLayer(name, tuple(nodes), shape(a["weight"]), a.get("groups", 1), tuple(names[key])))
    return weighted, refused


def named_layers(program: Program, names: Container[str]) -> list[WeightedLayer]:
    """Those of the program's `layers` that have these names."""
    return [layer for layer in layers(program)[0] if layer.name in names]


def selected(names: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether patterns select a weight of these names: `include` is empty or matches a name, and `exclude` matches
    none.
    """
    names = tuple(names)
    return (not include or _match(names, include)) and not _match(names, exclude)


def _match(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether a pattern matches one of the names."""
    patterns = tuple(patterns)
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def windows(node: fx.Node, x: Tensor) -> Tensor:
    """What each output value of a linear layer or convolution is computed from, as a view `(groups, samples,
    *positions, c...)` of its input: `c...` are the input channels of a group and the kernel's positions.

    For a linear layer `(1, samples times positions, in)`.
    """
    a, kernel = arguments(node), shape(arguments(node)["weight"])[2:]
    if op_name(node) == "linear":
        return x.reshape(1, -1, x.shape[-1])
    strides, dilations = (per_dim(a[key], len(kernel)) for key in ("stride", "dilation"))
    padding = [p for pair in reversed(conv_padding(node)) for p in pair]
    if any(padding):  # it copies, even by zero
        x = F.pad(x, padding)
    for d, (k, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        x = x.unfold(2 + d, dilation * (k - 1) + 1, stride)[..., ::dilation]
    x = x.unflatten(1, (a["groups"], -1))  # (N, groups, channels, *out, *kernel)
    rank = len(kernel)
    return x.permute(1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))


def check_included(of: Pass, include: Sequence[str], able: Sequence[WeightedLayer], refused: Sequence[Refusal]) -> None:
    """Raise BadInput unless each pattern of `include` matches the name of a weight, be it in `able` or in `refused`."""
    names = [name for layer in able for name in layer.names] + [row.what for row in refused]
    for pattern in include:
        if not _match(names, [pattern]):
            some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise BadInput(f'{type(of).__name__}.include: "{pattern}" matches no weight; there are {some or "none"}')
