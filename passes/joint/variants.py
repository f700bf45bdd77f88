"""Variants of layers: regions in INT8 or FP8 instead of floating point, and layers with 2:4 sparse weights.

A region is a set of layers between which values can stay quantised (`quantize.regions`); it pays for the conversions at its
borders. Each variant is one more axis of the problem with two places, the variant and the layer as it is, and layers have
their seconds at both. The loss is measured by changing one region, or one layer, of the dense network. So is the time of a
region where no model of the device predicts INT8 (`Trial`): the layers take the share of their time that the network with
this region in INT8 shows, conversions included, at every width. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from torch import fx

from ...graph.comb.solve import Comb
from ...graph.errors import BadInput, Contended, GraphcombError
from ...graph.facts import FAKE_PER_TENSOR, FAKE_QUANTISATION
from ...graph.nodes import op_name
from ...graph.program import Program
from ...graph.sparse import sparse_weights
from ...graph.workload.layer import Latency, Layer, rules_of
from ...graph.workload.layers import Layers
from ..channels.sizes.knapsack import Predictor
from ..common.scoring import bar
from ..common.weights import layers as weighted
from ..fuse.fuse import Fuse
from ..quantize.choose_layers import QUANTISED, Precision
from ..quantize.placement import passed_on, producer
from ..quantize.quantize import Quantize
from ..quantize.regions import quantised_alone, quantised_layers, regions
from ..sparse.sparsify import SPARSE_CAPABILITY, SPARSE_CHANNELS, Sparsify
from .losses import Losses
from .space import Space, weight_of

FLOAT, CHANGED = 1, 0  # places of a variant's axis: the layer as it is, and the variant
KINDS = dict.fromkeys(QUANTISED, "precision") | {"2:4": "sparsity"}
LEAST = 0.1  # smallest share of their time that layers may take in INT8; below, the table of layers is too low for them


@dataclass(frozen=True)
class Trial:
    """How regions in INT8 are timed on a device at hand. name: of the device and the library. faster(plain, changed): how
    many times as fast the second program runs; it raises Contended if the machine is too busy. latency: of single layers in
    floating point."""

    name: str
    faster: Callable[[Program, Program], float]
    latency: Latency


@dataclass(frozen=True)
class Variant:
    """A region that may become INT8 or FP8, or a layer that may become 2:4 sparse.

    option: "int8", "fp8" or "2:4". weights: the weights of its layers; the first names it. block: index of the block that
    has all of its layers, or None. loss: divergence from the dense network in nats. read, written: names of the nodes whose
    values are converted to the precision, and back. share: measured seconds of the layers in it, conversions included, as a
    share of those in floating point; None if a latency model predicts them.
    """

    option: str
    weights: tuple[str, ...]
    block: int | None = None
    loss: float = 0.0
    read: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    share: float | None = None

    @property
    def name(self) -> str:
        """The name of its axis."""
        return f"{self.option} {self.weights[0]}"


@dataclass(frozen=True)
class Variants:
    """The variants of a program's layers. quantised, sparse: the latency models of the same device for layers in INT8 or FP8
    (of one program all are the same), and with 2:4 sparse weights. refused: by "OPTION WEIGHT", why a layer has no
    such variant; by "OPTION", why no layer has."""

    offered: tuple[Variant, ...] = ()
    quantised: Latency | None = None
    sparse: Latency | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    def check(self, asked: Iterable[tuple[str, str]]) -> None:
        """Raise BadInput unless every variant that was decided by hand, as (option, weight), is offered."""
        for option, name in asked:
            if not any(option == v.option and name in v.weights for v in self.offered):
                why = self.refused.get(option) or self.refused.get(f"{option} {name}") or "it is no layer with a weight"
                raise BadInput(f"plan: {name} cannot be {option}: {why}")

    def of(self, node: fx.Node) -> list[int]:
        """The indices of the variants of a node's layer."""
        weight = weight_of(node)
        return [i for i, v in enumerate(self.offered) if weight in v.weights]

    def share(self, option: str, weight: str | None, layer: Layer, seconds: float) -> float:
        """The seconds of a layer with a variant, as a share of its seconds without."""
        measured = next((v.share for v in self.offered if v.option == option and weight in v.weights), None)
        if measured is not None:
            return measured
        model = self.quantised if option in QUANTISED else self.sparse
        return 1.0 if model is None else model.seconds(layer) / seconds


def find_variants(
    space: Space,
    losses: Losses,
    quantised: Latency | Trial | str | None = None,
    sparse: Latency | str | None = None,
    wanted: Collection[str] = (),
    progress: bool = False,
    precision: Precision = "int8",
) -> Variants:
    """The variants of a space's program, with their measured losses.

    quantised, sparse: latency models, or why the target has none; None if that is not asked for. precision: "int8" or "fp8",
    that of `quantised`. For INT8 a trial is as good. wanted: weights of layers that are quantised even where the default is
    floating point, since that was decided by hand.
    Raises Contended if the machine is too busy for a trial.
    """
    offered: list[Variant] = []
    refused = {option: why for option, why in ((precision, quantised), ("2:4", sparse)) if isinstance(why, str)}
    if quantised is not None and not isinstance(quantised, str):
        trial = quantised if isinstance(quantised, Trial) else None
        regions_, why = _quantised_regions(space, losses, precision, set(wanted), progress, trial)
        offered += regions_
        refused |= why
    if sparse is not None and not isinstance(sparse, str):
        layers, why = _sparse_layers(space, losses, progress)
        offered += layers
        refused |= why
    model = None if isinstance(quantised, (str, Trial)) else quantised
    return Variants(tuple(offered), model, None if isinstance(sparse, str) else sparse, refused)


def _quantised_regions(
    space: Space,
    losses: Losses,
    precision: Precision,
    wanted: set[str],
    progress: bool,
    trial: Trial | None,
) -> tuple[list[Variant], dict[str, str]]:
    folded = Fuse()(space.program, losses.context).program
    asked = dict.fromkeys(sorted(wanted), precision)
    pass_ = Quantize(samples=losses.samples, layers=asked, precision=precision)  # type: ignore[arg-type]
    result = pass_(folded, losses.context)
    refused = {f"{precision} {row['what']}": row["why"] for row in result.record["refused"]}
    kind = f"{precision} for {result.record['placement']}"  # of which the losses are, since it places Q/DQ its own way
    free = {name for _, name in quantised_layers(result.program)}
    groups = regions([layer for layer in weighted(folded)[0] if layer.name in free])
    offered, dense = [], None if trial is None else Predictor(space.comb, trial.latency)
    with bar(progress, f"losses in {precision.upper()}", len(groups)) as update:
        for i, group in enumerate(groups):
            names = tuple(layer.name for layer in group)
            update(i + 1, names[0])
            if missing := [name for name in names if name not in space.owner]:
                refused |= {f"{precision} {name}": f"{missing[0]} is merged with another layer" for name in names}
                continue

            alone, key = quantised_alone(result.program, names), f"{kind} {' '.join(names)}"
            inside = {space.owner[name] for name in names}
            block = inside.pop() if len(inside) == 1 else None
            variant = Variant(precision, names, block, losses.kept(key, partial(losses.divergence, alone)))
            if trial is None or dense is None:
                read, written = _borders(alone)
                offered.append(replace(variant, read=read, written=written))
                continue
            try:
                faster = losses.kept(f"{key}: {trial.name}", partial(trial.faster, folded, alone))
            except Contended:
                raise
            except GraphcombError as error:
                refused |= {f"{precision} {name}": str(error) for name in names}
                continue
            offered.append(replace(variant, share=_share(dense, names, faster)))
    return offered, refused


def _share(dense: Predictor, names: Sequence[str], faster: float) -> float:
    """The share of their time that layers take in INT8, if the whole network becomes so many times as fast. dense: predicts
    the network in floating point."""
    seconds = sum(dense.node(i, {}) for i, node in enumerate(dense.layers.nodes) if weight_of(node) in names)
    return max(LEAST, 1.0 - (1.0 - 1.0 / faster) * dense.total({}) / seconds) if seconds > 0 else 1.0


def _borders(program: Program) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the nodes whose values are converted to INT8 or FP8 in a partly quantised program, and back."""
    changed = {node for node, _ in quantised_layers(program)}
    read = [
        node.args[0].name
        for node in program.graph.nodes
        if op_name(node) in FAKE_PER_TENSOR and producer(node.args[0]) not in changed
    ]
    written = [
        node.name
        for node in program.graph.nodes
        if producer(node) in changed
        and op_name(node) not in FAKE_QUANTISATION
        and any(op_name(u) not in FAKE_QUANTISATION and passed_on(u) is not node for u in node.users)
    ]
    return tuple(read), tuple(written)


def _sparse_layers(space: Space, losses: Losses, progress: bool) -> tuple[list[Variant], dict[str, str]]:
    known, _ = weighted(space.program)
    offered, refused = [], {}
    with bar(progress, "losses of 2:4", len(known)) as update:
        for i, layer in enumerate(known):
            update(i + 1, layer.name)
            shape = tuple(space.program.module().state_dict()[layer.name].shape)
            if min(shape[:2]) < SPARSE_CHANNELS:
                refused[f"2:4 {layer.name}"] = f"under {SPARSE_CHANNELS} channels a sparse kernel is hardly faster"
                continue

            def loss(name: str = layer.name) -> float:
                pass_ = sparsify((name,), losses.samples)
                return losses.divergence(pass_(space.program, losses.context).program)

            try:
                measured = losses.kept(f"2:4 {layer.name}", loss)
            except GraphcombError as error:
                refused[f"2:4 {layer.name}"] = str(error)
                continue
            offered.append(Variant("2:4", (layer.name,), space.owner.get(layer.name), measured))
    return offered, refused


def sparsify(weights: Sequence[str], samples: int) -> Sparsify:
    """The pass that makes weights 2:4 sparse from unlabelled images, and adapts the weights that stay."""
    return Sparsify(
        pattern="2:4", method="sparsegpt", gradients=samples, include=tuple(weights), where="all", scope="uniform"
    )


def no_sparse_kernels(name: str, capability: tuple[int, int] | None) -> str | None:
    """Why a target computes no faster with 2:4 sparse weights; None if it does."""
    if capability is None:
        return f"{name} has no kernels for sparse weights"
    return None if capability >= SPARSE_CAPABILITY else f"{name} has no sparse tensor cores; they began with SM80"


def is_changed(program: Program) -> bool:
    """Whether some layers of a program are quantised, or have 2:4 sparse weights."""
    return any(True for _ in quantised_layers(program)) or bool(_sparse(program))


def _sparse(program: Program) -> set[str]:
    return {name for name, pattern in sparse_weights(program).items() if pattern == "2:4"}


def seconds_of_variants(program: Program, variants: Variants, latency: Latency) -> float:
    """Predicted seconds of a program that is quantised in part, or has 2:4 sparse weights, layer by layer.

    Values that a quantised layer reads or makes are converted by kernels of their own where the other side is in floating
    point.
    """
    layers = Layers(Comb(program), rules=rules_of(latency))
    quantised = {node for node, _ in quantised_layers(program)}
    option = next((v.option for v in variants.offered if v.option in QUANTISED), "int8")
    read, written = _borders(program)
    sparse, size, total = _sparse(program), layers.sizer({}), latency.per_run
    for node, layer in layers.at({}):
        if op_name(node) in FAKE_QUANTISATION:
            continue
        seconds, weight = latency.seconds(layer), weight_of(node)
        for kind, changed in ((option, node in quantised), ("2:4", weight in sparse)):
            seconds *= variants.share(kind, weight, layer, seconds) if changed and seconds > 0 else 1.0
        total += seconds
    nodes = {node.name: node for node in program.graph.nodes}
    for names, model in ((read, variants.quantised), (written, latency if variants.quantised else None)):
        for name in names:
            if model is not None:
                total += model.seconds(Layer("copy", (("entries", layers.entries(nodes[name], size)),)))
    return total


def quantise(asked: Mapping[str, str], samples: int) -> list[Fuse | Quantize]:
    """The passes that give layers their precisions, by the names of weights; all others stay in floating point."""
    if unknown := [p for p in asked.values() if p not in (*QUANTISED, "fp16", "fp32")]:
        raise BadInput(f"plan: precision must be int8, fp8, fp16 or fp32, not {unknown[0]!r}")
    precision = only_precision(asked.values()) or "int8"
    return [Fuse(), Quantize(samples=samples, layers=dict(asked), exclude=("*",), precision=precision)]  # type: ignore[arg-type]


def only_precision(asked: Iterable[str], name: str = "plan") -> Literal["int8", "fp8"] | None:
    """INT8 or FP8, if one of them is among some precisions; None if neither is. Raises BadInput, which starts with the name,
    if both are."""
    found = sorted({p for p in asked if p in QUANTISED})
    if len(found) > 1:
        raise BadInput(f"{name}: both {found[0]} and {found[1]}; one network has one of them")
    return found[0] if found else None  # type: ignore[return-value]
