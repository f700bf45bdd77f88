"""Which layers are quantised, and why the others stay in floating point. Source: ours."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import fx

from ...graph.compat import pytree
from ...graph.errors import BadInput
from ...graph.facts import MAPS, MATRIX_PRODUCTS, SOFTMAXES
from ...graph.nodes import arguments, op_name
from ...graph.program import Program
from ..base import Refusal
from ..common.weights import WeightedLayer

Precision = Literal["int8", "fp8", "fp16", "fp32"]
QUANTISED = ("int8", "fp8")

FIRST = "it reads the network's inputs, so it stays in floating point; include it by name"
LAST = "it computes an output, so it stays in floating point; include it by name"
PRODUCTS = frozenset((*MAPS, *MATRIX_PRODUCTS, "scaled_dot_product_attention"))


def precisions(
    program: Program,
    known: Sequence[WeightedLayer],
    include: Sequence[str],
    exclude: Sequence[str],
    layers: Mapping[str, Precision],
    precision: str = "int8",
) -> tuple[list[WeightedLayer], list[Refusal], list[str]]:
    """The layers that are quantised, refusals for the others, and the names of the weights whose layers stay in fp32.

    The first pattern of `layers` that matches decides; then `exclude`, then `include`; without any, all layers are quantised
    but the first and the last ones (`ends`).
    """
    chosen: list[WeightedLayer] = []
    refused: list[Refusal] = []
    single: list[str] = []
    kept = ends(program, known)
    for layer in known:
        asked = next((p for pattern, p in layers.items() if named(layer.names, pattern)), None)
        why = f"{asked} was asked for" if asked not in (None, precision) else ""
        if asked is None:
            if layer.matches(exclude):
                why = "excluded"
            elif include:
                why = "" if layer.matches(include) else "not included"
            else:
                why = kept.get(layer.name, "")
        if asked == "fp32":
            single += layer.names
        if why:
            refused.append(Refusal(layer.name, why))
        else:
            chosen.append(layer)
    return chosen, refused, single


def check_named(layers: Mapping[str, Precision], known: Sequence[WeightedLayer], refused: Sequence[Refusal]) -> None:
    """Raise BadInput unless each pattern of `layers` matches a weight or its module, be it in `known` or `refused`."""
    names = [name for layer in known for name in layer.names] + [row.what for row in refused]
    for pattern in layers:
        if not named(names, pattern):
            some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise BadInput(f'Quantize.layers: "{pattern}" matches no layer; there are {some or "none"}')


def named(names: Sequence[str], pattern: str) -> bool:
    """Whether a pattern matches one of the weights' names or the name of its module."""
    return any(fnmatchcase(text, pattern) for name in names for text in (name, name.rpartition(".")[0]))


def ends(program: Program, known: Sequence[WeightedLayer]) -> dict[str, str]:
    """By weight, why its layer stays in floating point by default: it is one of the first, or one of the last before an
    output.

    No product comes before a first layer, and none after a last one. A layer that reads a softmax directly, such as the
    expectation over a distribution of box edges, decodes an output; the layers before it are last ones, too. Of a
    residual addition before an output only the branch computed last counts: the other one ends in earlier blocks.
    """
    layer_of = {node: layer.name for layer in known for node in layer.nodes}
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    fed: set[fx.Node] = set()  # nodes with a product before them
    after_softmax: set[fx.Node] = set()  # and those with a softmax but no product since
    why: dict[str, str] = {}
    for node in program.graph.nodes:
        product = op_name(node) in PRODUCTS
        if product and node in layer_of and not fed.intersection(node.all_input_nodes):
            why[layer_of[node]] = FIRST
        if product or fed.intersection(node.all_input_nodes):
            fed.add(node)
        if op_name(node) in SOFTMAXES or (not product and after_softmax.intersection(node.all_input_nodes)):
            after_softmax.add(node)
    stack = [n for n in pytree.tree_leaves(program.graph.output_node().args) if isinstance(n, fx.Node)]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if op_name(node) in PRODUCTS:
            if node in layer_of:
                why.setdefault(layer_of[node], LAST)
                data = arguments(node)["input"]
                if data in after_softmax:
                    stack.append(data)
            continue
        inputs = [n for n in node.all_input_nodes if n in fed]
        stack += [max(inputs, key=place.__getitem__)] if op_name(node) == "add" and inputs else inputs
    return why
