"""The pass that quantises to INT8 in the graph: symmetric fake quantisation that exports as Q/DQ, calibrated on data."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ...graph.edit import Editor
from ...graph.errors import BadInput, MissingBackend
from ...graph.nodes import arguments, fetch, op_name, set_argument
from ...graph.program import Program
from ..base import Change, Context, Pass, PassResult, Refusal, check_field
from ..common.feed import Feed
from ..common.observe import Observer
from ..common.processes import accelerator, placed
from ..common.repeat import seeded
from ..common.samples import sample_batches
from ..common.weights import WeightedLayer, check_included
from ..common.weights import layers as find_layers
from .which import Precision, check_named, precisions

RANGE = (-128, 127)  # the one signed range that ONNX's QuantizeLinear has


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantise the inputs and weights of linear layers and convolutions to INT8, symmetrically.

    `x -> s * clamp(round(x / s), -128, 127)`, with one scale `s` for each input, and one for each output channel of a
    weight, such that the channel's largest entry becomes 127. Biases, normalisations, additions and attention scores
    stay in floating point. The zero point is 0, so zeros of a sparse weight stay exactly zero. The nodes are ATen's
    fake quantisation: they export as QuantizeLinear and DequantizeLinear, which TensorRT and TensorRT-RTX build INT8
    kernels from. Their gradients pass straight through, so that a `Distill` after this pass is quantisation-aware
    training (with these scales, masks held).

    samples: number of samples of the data that the scales of inputs are calibrated on. calibration: how an input's
    scale is chosen: "histogram" (torchao's observer, least squared error) or "minmax" (the largest
        value becomes 127).
    include, exclude: patterns over weight names; any of the names of a tied weight may match. By default all layers are
        quantised but the first ones, which read the network's inputs, and the last ones before each output, box decoding
        included; `include=("*",)` quantises these, too.
    layers: precisions by pattern over names of weights or of their modules, as in `{"features.3*": "fp16", "head": "int8"}`.
        The first pattern that matches a layer decides, whatever `include` and `exclude` say: "int8" quantises it; "fp16"
        leaves it in the floating point of the export; "fp32" keeps it in fp32 in fp16 exports, too.

    Run this pass last: after `Sparsify`, and after `Fuse`, without which normalisations stay in floating point (the
    record names them). Raises BadInput without finite data, MissingBackend without torchao. Refused, and named in the
    record: computed weights, transposed convolutions, layers whose inputs are all zero.
    """

    samples: int = 256
    calibration: Literal["histogram", "minmax"] = "histogram"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: Mapping[str, Precision] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_field(self, "samples", self.samples >= 1, "a whole number of at least 1")

    def run(self, program: Program, context: Context) -> PassResult:
        new = program.copy()
        known, refused = find_layers(new)
        check_included(self, self.include, known, refused)
        check_named(self.layers, known, refused)
        chosen, left, single = precisions(new, known, self.include, self.exclude, self.layers)
        refused += left
        for node in new.graph.nodes:
            if op_name(node) == "batch_norm":
                why = "a normalisation that is not folded stays in floating point; run Fuse before Quantize"
                refused.append(Refusal(node.name, why))
        scales = self._calibrated(new, chosen, context) if chosen else {}
        writer, changed = _Writer(new), []
        for layer in chosen:
            inputs = [scales[node.args[0]] for node in layer.nodes]  # type: ignore[index]
            if not all(inputs):
                refused.append(Refusal(layer.name, "its inputs are all zero in the calibration data"))
                continue
            for node, scale in zip(layer.nodes, inputs, strict=True):
                writer.quantise_input(node, scale)
            spread = writer.quantise_weight(layer)
            largest = float(spread.max())
            changed.append(Change(layer.name, {"input_scales": inputs, "largest_weight_scale": largest}))
        writer.edit.finish()
        return PassResult(new, {"changed": changed, "refused": refused, "fp32": single})

    def _calibrated(self, program: Program, chosen: Sequence[WeightedLayer], context: Context) -> dict[fx.Node, float]:
        """The scale of each input; 0 for an input that was zero throughout."""
        if context.data is None:
            raise BadInput("Quantize: needs data to calibrate on; pass data=")
        make = _observer(self.calibration)
        watched: dict[fx.Node, Any] = {
            node.args[0]: make()  # type: ignore[misc]
            for layer in chosen
            for node in layer.nodes
        }
        module = program.module().eval()
        readers = {node.args[0]: layer.name for layer in reversed(chosen) for node in layer.nodes}
        largest = dict.fromkeys(watched, 0.0)

        def see(node: fx.Node, value: Tensor, values: dict[fx.Node, Any]) -> None:
            if not bool(value.isfinite().all()):
                raise BadInput(f"Quantize: the inputs of {readers[node]} are not finite; check the data")
            watched[node](value.float().cpu())
            largest[node] = max(largest[node], float(value.abs().max()))

        show = Observer(module, watched, see)
        with seeded(context.seed, context.data), placed(module, accelerator().device), torch.no_grad():
            for batch, _ in sample_batches(Feed(program), context, self.samples, "Quantize"):
                show(batch)
        # The observer's own scale is for 127.5 steps, which saturates the largest value.
        if self.calibration == "minmax":
            return {node: largest[node] / RANGE[1] for node in watched}
        return {
            node: float(observer.calculate_qparams()[0]) if largest[node] > 0 else 0.0
            for node, observer in watched.items()
        }


def _observer(calibration: str) -> Callable[[], Any]:
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))  # warnings that torchao logs at import are for its own developers
    try:
        from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver
    except ImportError:
        raise MissingBackend("Quantize: needs torchao; pip install graphcomb[quantize]") from None
    finally:
        logging.disable(before)
    kind = HistogramObserver if calibration == "histogram" else MinMaxObserver
    low, high = RANGE
    return lambda: kind(dtype=torch.int8, qscheme=torch.per_tensor_symmetric, quant_min=low, quant_max=high)


class _Writer:
    """Inserts fake quantisation into a graph; a value that several layers read is quantised once."""

    def __init__(self, program: Program):
        self.module, self.edit = program.module(), Editor(program.module())
        self.inputs: dict[fx.Node, fx.Node] = {}

    def quantise_input(self, node: fx.Node, scale: float) -> None:
        """Make a layer read its input quantised. scale: the size of one quantisation step."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source not in self.inputs:
            with self.edit.after(source):
                target = torch.ops.aten.fake_quantize_per_tensor_affine.default
                self.inputs[source] = self.edit.call(target, (source, scale, 0, *RANGE), like=source)
        set_argument(node, next(iter(arguments(node))), self.inputs[source])

    def quantise_weight(self, layer: WeightedLayer) -> Tensor:
        """Make a layer read its weight quantised; returns the scales `(out,)`."""
        weight = fetch(self.module, layer.name).detach()
        largest = weight.abs().flatten(1).amax(1).float()
        scales = torch.where(largest > 0, largest, torch.ones_like(largest)) / RANGE[1]
        stored = arguments(layer.nodes[0])["weight"]
        with self.edit.before(layer.nodes[0]):
            zero = self.edit.store(f"{layer.name}_zero", torch.zeros_like(scales, dtype=torch.int32))
            scale = self.edit.store(f"{layer.name}_scale", scales)
            target = torch.ops.aten.fake_quantize_per_channel_affine.default
            fake = self.edit.call(target, (stored, scale, zero, 0, *RANGE), like=layer.nodes[0])
        for node in layer.nodes:
            set_argument(node, "weight", fake)
        return scales
