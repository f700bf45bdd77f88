"""The pass that quantises to INT8 or FP8: symmetric fake quantisation in the graph, calibrated on data, exported as Q/DQ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...graph.edit import Editor
from ...graph.errors import BadInput
from ...graph.nodes import arguments, fetch, op_name, set_argument
from ...graph.program import Program
from ..base import Change, Context, Pass, PassResult, Refusal, check_field
from ..common.feed import Batch, Feed
from ..common.processes import accelerator, placed
from ..common.repeat import seeded
from ..common.samples import sample_batches
from ..common.weights import WeightedLayer, check_included
from ..common.weights import layers as find_layers
from .bias import Means, correctable
from .calibrate import FP8, INT8, Format, input_scales, weight_scales
from .choose_layers import QUANTISED, Precision, check_named, precisions
from .placement import grid, is_nonnegative, origin, place, quantised_reads


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantise the inputs and weights of linear layers and convolutions to INT8 or FP8, symmetrically.

    `x -> s * clamp(round(x / s), -128, 127)`, with one scale `s` for each input, and one for each output channel of a
    weight, such that the channel's largest entry becomes 127. Biases, normalisations and attention scores stay in floating
    point. The zero point is 0, so zeros of a sparse weight stay exactly zero. The nodes are ATen's fake quantisation: they
    export as QuantizeLinear and DequantizeLinear, which TensorRT and TensorRT-RTX build INT8 kernels from. Their gradients
    pass straight through, so that a `Distill` after this pass is quantisation-aware training (with these scales, masks
    held).

    precision: "int8", or "fp8" for devices that compute in it (`graphcomb targets`): `x -> s * e4m3(x / s)`, where e4m3
        rounds to 4 bits of exponent and 3 of mantissa and saturates at 448, which the largest entries become. ATen has no
        such node; graphcomb's own (`graph/fp8.py`) exports as Q/DQ with FLOAT8E4M3FN, from opset 19 on. Steps are relative
        to a value: small values lose less than in INT8, large ones more. Values are placed as for TensorRT. Raises BadInput
        for a target without FP8.
    samples: number of samples of the data that scales and biases are calibrated on, in whole batches where the program's
        batch size is fixed.
    calibration: how an input's scale is chosen (`calibrate`): "histogram" (least squared error of the entries), "minmax"
        (the largest value becomes 127, or 448), "percentile", or "error" (that of the three with the least squared error of
        the outputs of the layers that read the input).
    percentile: the percentage of an input's entries that do not saturate, for "percentile" and "error".
    bias_correction: whether biases are shifted such that the mean of each output channel on the calibration data is that
        of the network in floating point (`bias`). A layer without a bias gets one, unless it is called several times. It
        can help or hurt: with 64 photographs the divergence fell from 0.020 to 0.015 nats for EfficientNet-Lite0, and rose
        from 0.10 to 0.18 for MobileNetV2, so compare.
    placement: for whose kernels values are quantised: "tensorrt" or "cpu" (ONNX Runtime and OpenVINO), by default the
        context's target's, without one TensorRT's. Residual additions of what layers in INT8 compute or read add quantised
        values: for TensorRT the one that is computed first, for a CPU both. For a CPU, what layers write is quantised, too,
        behind a ReLU if there is one, and all values are UINT8: those that are never negative from 0 on, the others around
        128. Otherwise ONNX Runtime has no INT8 kernels for most layers, and is slower than without INT8. TensorRT has no
        UINT8, so such a program is refused for its targets.
    include, exclude: patterns over weight names; any of the names of a tied weight may match. By default all layers are
        quantised but the first ones, which read the network's inputs, and the last ones before each output, box decoding
        included; `include=("*",)` quantises these, too.
    layers: precisions by pattern over names of weights or of their modules, as in `{"features.3*": "fp16", "head": "int8"}`.
        The first pattern that matches a layer decides, whatever `include` and `exclude` say: "int8", or
        "fp8" with `precision="fp8"`, quantises it; "fp16" leaves it in the floating point of the export; "fp32" keeps it in
        fp32 in fp16 exports, too.

    Run this pass last: after `Sparsify`, and after `Fuse`, without which normalisations stay in floating point (the
    record names them). Raises BadInput without finite data. Refused, and named in the record: computed weights, transposed
    convolutions, layers whose inputs are all zero.
    """

    samples: int = 256
    calibration: Literal["histogram", "minmax", "percentile", "error"] = "histogram"
    percentile: float = 99.99
    bias_correction: bool = False
    placement: Literal["target", "tensorrt", "cpu"] = "target"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: Mapping[str, Precision] = field(default_factory=dict)
    precision: Literal["int8", "fp8"] = "int8"

    def __post_init__(self) -> None:
        check_field(self, "samples", self.samples >= 1, "a whole number of at least 1")
        check_field(self, "percentile", 0 < self.percentile <= 100, "above 0 and at most 100")
        fp8 = self.precision == "fp8"
        check_field(
            self, "placement", not (fp8 and self.placement == "cpu"), '"tensorrt" for FP8, which no CPU computes in'
        )
        for pattern, asked in self.layers.items():
            if asked in QUANTISED and asked != self.precision:
                raise BadInput(
                    f'Quantize.layers: "{pattern}" is {asked}, and the pass makes {self.precision} (`precision`)'
                )

    def run(self, program: Program, context: Context) -> PassResult:
        if self.precision == "fp8" and context.target is not None:
            context.target.alignment("fp8")
        new = program.copy()
        known, refused = find_layers(new)
        check_included(self, self.include, known, refused)
        check_named(self.layers, known, refused)
        chosen, left, single = precisions(new, known, self.include, self.exclude, self.layers, self.precision)
        refused += left
        for node in new.graph.nodes:
            if op_name(node) == "batch_norm":
                why = "a normalisation that is not folded stays in floating point; run Fuse before Quantize"
                refused.append(Refusal(node.name, why))
        changed: list[Change] = []
        cpu = self._for_cpu(context)
        if chosen:
            with seeded(context.seed, context.data), placed(new.module(), accelerator().device), torch.no_grad():
                changed, silent = self._quantise(new, chosen, self._batches(new, context), cpu)
                refused += silent
        placement = "cpu" if cpu else "tensorrt"
        record = {"changed": changed, "refused": refused, "fp32": single, "placement": placement}
        return PassResult(new, record | {"precision": self.precision})

    def _for_cpu(self, context: Context) -> bool:
        backend = getattr(context.target, "backend", "tensorrt") if self.placement == "target" else self.placement
        return not backend.startswith("tensorrt")

    def _batches(self, program: Program, context: Context) -> list[tuple[Batch, int]]:
        if context.data is None:
            raise BadInput("Quantize: needs data to calibrate on; pass data=")
        feed = Feed(program)
        batches = sample_batches(feed, context, self.samples, "Quantize")
        return [(feed.first(batch, count), count) for batch, count in batches]

    def _quantise(
        self, program: Program, chosen: Sequence[WeightedLayer], batches: Sequence[tuple[Batch, int]], cpu: bool
    ) -> tuple[list[Change], list[Refusal]]:
        """Quantise layers in place; returns what changed, and refusals for layers whose inputs are all zero."""
        module, form = program.module().eval(), FP8 if self.precision == "fp8" else INT8
        integer = {node for layer in chosen for node in layer.nodes}
        values = dict.fromkeys(value for _, value in quantised_reads(program.graph, integer, cpu))
        unsigned = {value for value in values if cpu and is_nonnegative(value)}
        scales = input_scales(module, chosen, batches, self.calibration, self.percentile, list(values), unsigned, form)
        if cpu:
            scales = {value: scales[origin(value, values)] for value in scales}
        known = {layer.name: [scales[node.args[0]] for node in layer.nodes] for layer in chosen}  # type: ignore[index]
        silent = [name for name, steps in known.items() if not all(steps)]
        layers = [layer for layer in chosen if layer.name not in silent]
        integer = {node for layer in layers for node in layer.nodes}
        reads = quantised_reads(program.graph, integer, cpu)
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        shifted = [layer for layer in layers if correctable(layer)] if self.bias_correction else []
        shifted.sort(key=lambda layer: order[layer.nodes[0]])
        means = Means(batches)
        wanted = means.of(module, [layer.nodes[0] for layer in shifted])
        edit = Editor(program.module())
        place(edit, reads, {value: grid(value, scale, cpu, form) for value, scale in scales.items() if scale})
        largest = {layer.name: float(_quantise_weight(edit, layer, form).max()) for layer in layers}
        edit.finish()
        shifts = means.correct(module, shifted, wanted)
        changed = []
        for layer in layers:
            row = {"input_scales": known[layer.name], "largest_weight_scale": largest[layer.name]}
            row |= {"largest_bias_shift": shifts[layer.name]} if layer.name in shifts else {}
            changed.append(Change(layer.name, row))
        return changed, [Refusal(name, "its inputs are all zero in the calibration data") for name in silent]


def _quantise_weight(edit: Editor, layer: WeightedLayer, form: Format) -> Tensor:
    """Make a layer read its weight quantised; returns the scales `(out,)`."""
    scales = weight_scales(fetch(edit.module, layer.name), form)
    stored = arguments(layer.nodes[0])["weight"]
    with edit.before(layer.nodes[0]):
        zero = None if form.e4m3 else edit.store(f"{layer.name}_zero", torch.zeros_like(scales, dtype=torch.int32))
        scale = edit.store(f"{layer.name}_scale", scales)
        fake = edit.call(*form.of_channels(stored, scale, zero), like=layer.nodes[0])
    for node in layer.nodes:
        set_argument(node, "weight", fake)
    return scales
