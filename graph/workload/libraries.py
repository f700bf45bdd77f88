"""Which operators an inference library computes in one kernel: rules by class of operator, as data.

The rules for TensorRT were derived from engines that TensorRT-RTX built (`benchmarks/kernels.py` has the remaining errors),
those for ONNX Runtime from its optimised graphs. Source: ours.

- free (views, dropout, fake quantisation): nothing.
- product (convolution, linear layer, matmul): a kernel, with its epilogue.
- depthwise (a convolution with one channel a group): a kernel; its epilogue is short.
- attention (one operator, or written out): a kernel, and a copy each of queries, keys and values.
- recurrent (LSTM, GRU, RNN) and pool (maximum, average): a kernel.
- move (permute, cat, slice, ...): part of a generated kernel; a concatenation of products is written in place.
- norm, reduce (LayerNorm, softmax, mean): part of a generated kernel.
- pointwise (add, silu, batch_norm, ...): part of its producer's epilogue, else of a generated kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..facts import (
    ADAPTIVE_MEANS,
    FAKE_QUANTISATION,
    JOINS,
    MATRIX_PRODUCTS,
    NORMS,
    PARTS,
    POOLS,
    RECURRENT,
    SOFTMAXES,
    VECTOR_PRODUCTS,
    VIEWS,
    is_pointwise,
    names,
)
from ..nodes import arguments, op_name, shape

Shape = Callable[[fx.Node], tuple[int, ...]]

FREE = (
    VIEWS
    | FAKE_QUANTISATION
    | names(
        "expand expand_as getitem detach alias contiguous clone to _to_copy lift_fresh_copy sym_size dropout native_dropout "
        "feature_dropout alpha_dropout"
    )
)
MATRIX = frozenset({*MATRIX_PRODUCTS, *VECTOR_PRODUCTS, "linear", "inner", "tensordot", "einsum"})
MOVES = JOINS | PARTS | frozenset(
    "permute transpose movedim t numpy_T swapaxes stack unfold im2col col2im roll flip pixel_shuffle pixel_unshuffle "
    "channel_shuffle pad constant_pad_nd reflection_pad2d replication_pad2d repeat repeat_interleave tile index "
    "index_select gather slice_scatter select_scatter index_put scatter embedding grid_sampler hsplit vsplit "
    "grid_sampler_2d upsample_nearest1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d "
    "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d".split()
)  # fmt: skip
MOMENTS = NORMS | {"native_layer_norm"}
REDUCED = SOFTMAXES | ADAPTIVE_MEANS | names(
    "mean sum amax amin var std var_mean logsumexp norm linalg_vector_norm prod all any max min cumsum"
)  # fmt: skip
POINTWISE = names(
    "batch_norm _native_batch_norm_legit_no_training prelu where masked_fill hardswish log_sigmoid"
)  # besides those that torch tags
CLASSES = (
    ("free", FREE), ("product", MATRIX), ("attention", frozenset({"scaled_dot_product_attention"})),
    ("recurrent", frozenset(RECURRENT)), ("pool", POOLS), ("move", MOVES), ("norm", MOMENTS), ("reduce", REDUCED),
    ("pointwise", POINTWISE),
)  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """How one library makes kernels.

    epilogues: by kind of product ("conv", "depthwise", "linear", "matmul"), the pointwise operators that its kernel also
    computes; "*" stands for all but those after a minus ("-silu"). residual: kinds whose kernel also adds or multiplies by
    a tensor of the result's shape. generated: classes that are joined into generated kernels; nodes of other classes are
    kernels by themselves. free: operators without cost, besides those of class "free". attention: whether attention is one
    kernel. together: whether linear layers of the same input are one. layouts: whether tensors are copied between kernels
    of different layouts. grain: convolutions and products pad channel counts that are no multiple of it, in a kernel of its
    own. single: whether nothing is joined with a reduction over a single entry, which pruning may leave (a reduction over a
    few entries is unrolled into its kernel; one over a single entry is not). requantises: whether a product writes
    floating point, and a second kernel applies its epilogue and quantises the result.
    """

    name: str
    epilogues: Mapping[str, frozenset[str]]
    residual: frozenset[str] = frozenset()
    generated: frozenset[str] = frozenset()
    free: frozenset[str] = frozenset()
    attention: bool = False
    together: bool = False
    layouts: bool = False
    grain: int = 1
    single: bool = False
    requantises: bool = False

    def __str__(self) -> str:
        return self.name

    def joins(self, kind: str, name: str) -> bool:
        """Whether an operator is computed by the kernel of the product before it."""
        allowed = self.epilogues.get(kind, frozenset())
        return name in allowed or ("*" in allowed and f"-{name}" not in allowed)


CLIPS = frozenset("batch_norm relu relu6 hardtanh clamp clamp_min clamp_max leaky_relu".split())
TENSORRT = Rules(
    "TensorRT",
    epilogues={
        "conv": frozenset({"*"}),
        "depthwise": CLIPS | {"sigmoid"},
        "linear": frozenset({"*", "-silu", "-batch_norm"}),
        "matmul": frozenset({"mul", "div"}),
    },
    residual=frozenset({"conv", "depthwise", "linear"}),
    generated=frozenset({"pointwise", "move", "norm", "reduce"}),
    attention=True,
    together=True,
    layouts=True,
    grain=2,
    single=True,
)
ONNXRUNTIME = Rules(
    "ONNX Runtime",
    epilogues={"conv": CLIPS, "depthwise": CLIPS},
    residual=frozenset({"conv", "depthwise"}),
    free=frozenset({"unbind", "select"}),
)
# As in the runtime graphs of OpenVINO 2026.4 on a CPU: ResNet-18 and EfficientNet-B0 have one kernel more than these rules
# count; networks with layer norms have up to twice as many, since these are computed in parts.
OPENVINO = Rules(
    "OpenVINO",
    epilogues=dict.fromkeys(("conv", "depthwise", "linear"), frozenset({"*"})),
    residual=frozenset({"conv", "depthwise"}),
    free=frozenset({"unbind", "select"}),
)
PROCESSORS = {"onnxruntime": ONNXRUNTIME, "openvino": OPENVINO}


GRAINS = {"fp32": 1, "tf32": 1, "fp16": 2, "bf16": 2, "int8": 4, "fp8": 4}  # by precision, channels in four bytes


def library(backend: str | None, precision: str) -> Rules:
    """The rules of a runtime backend in a precision; TensorRT's for every backend that is for no processor.

    TensorRT-RTX (1.7, for compute capabilities 8.6, 8.9 and 12.0) fuses nothing into a product in INT8 or FP8.
    """
    if backend in PROCESSORS:
        return PROCESSORS[backend]
    eight_bits = backend == "tensorrt_rtx" and precision in ("int8", "fp8")
    return replace(TENSORRT, grain=GRAINS.get(precision, 1), requantises=eight_bits)


def classify(node: fx.Node, shape: Shape = shape) -> str:
    """The class of an operator (see the table above), or "other"."""
    name = op_name(node)
    if name.startswith("conv") and name[4:5] in "123_":
        a = arguments(node)
        deep = a["groups"] > 1 and shape(a["weight"])[1] == 1 and "transpose" not in name
        return "depthwise" if deep else "product"
    kind_of_op = next((kind for kind, names in CLASSES if name in names), None)
    return kind_of_op or ("pointwise" if is_pointwise(node) else "other")


def single(node: fx.Node, shape: Shape = shape) -> bool:
    """Whether the node is a reduction over a single entry."""
    if classify(node) != "reduce" or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    a, read = arguments(node), shape(node.all_input_nodes[0])
    dims = a.get("dim") if "dim" in a else a.get("dims")
    dims = range(len(read)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return "adaptive" not in op_name(node) and math.prod(read[d] for d in dims) == 1
