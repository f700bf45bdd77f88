"""Facts about operators, each in one place: from PyTorch's own tags if it has them, else by ATen name.

The absence oracle (`verify`) has lists of its own, on purpose.
"""

from __future__ import annotations

import torch
from torch import fx


def is_pointwise(node: fx.Node) -> bool:
    """Whether PyTorch tags the operator as treating each entry by itself."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_random(node: fx.Node) -> bool:
    """Whether PyTorch tags the operator as drawing random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def names(text: str) -> frozenset[str]:
    """The names in a text, separated by spaces."""
    return frozenset(text.split())


# ------------------------------------------------------------------------------------- each entry by itself, not tagged
DROPOUTS = names("dropout feature_dropout alpha_dropout feature_alpha_dropout")
ALIASES = names(  # other names of operators that are tagged
    "special_expit absolute negative fix arccos arccosh arcsin arcsinh arctan arctanh arctan2 special_exp2 special_expm1 "
    "special_log1p special_erf special_erfc special_erfinv special_sinc special_logit special_round special_xlogy greater "
    "less greater_equal less_equal not_equal subtract multiply divide true_divide"
)
CASTS = names("to _to_copy")  # to another dtype or device
COPIES = CASTS | names("contiguous alias detach lift_fresh_copy type_as native_dropout") | DROPOUTS
FILLS = names("zeros_like ones_like full_like empty_like rand_like randn_like bernoulli fill zero")
UNTAGGED_UNARY = COPIES | FILLS | names("hardswish log_sigmoid conj real view_as_complex_copy") | ALIASES
UNTAGGED_BINARY = names("rsub floor_divide where masked_fill copy __and__ __or__ complex polar")

# ------------------------------------------------------------------------------------------------------ fake quantisation
FAKE_PER_TENSOR = names("fake_quantize_per_tensor_affine graphcomb::fake_quantize_per_tensor_e4m3")
FAKE_PER_CHANNEL = names("fake_quantize_per_channel_affine graphcomb::fake_quantize_per_channel_e4m3")
FAKE_QUANTISATION = FAKE_PER_TENSOR | FAKE_PER_CHANNEL

# -------------------------------------------------------------------------------------------------------------- products
CONVS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED_CONVS = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
MAPS = (*CONVS, *TRANSPOSED_CONVS, "linear")  # affine maps of channels
MATRIX_PRODUCTS = {  # by operator, the arguments that are multiplied
    "matmul": ("self", "other"), "linalg_matmul": ("self", "other"), "bmm": ("self", "mat2"), "mm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"),
}  # fmt: skip
SEQUENCES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}  # by operator, the number of gates
CELLS = {f"{name}_cell": gates for name, gates in SEQUENCES.items()}
RECURRENT = SEQUENCES | CELLS
VECTOR_PRODUCTS = {
    "mv": ("self", "vec"), "addmv": ("mat", "vec"), "dot": ("self", "tensor"), "vdot": ("self", "other"),
}  # fmt: skip

# ------------------------------------------------------------------------------------------ normalisations and reductions
NORMS = names("layer_norm group_norm instance_norm rms_norm")  # normalise by moments of their own input
SOFTMAXES = names("softmax log_softmax _softmax _log_softmax _safe_softmax")
DEVIATIONS = names("var std var_mean std_mean")  # undefined for too few entries
REDUCTIONS = DEVIATIONS | names(
    "mean sum nansum amax amin linalg_vector_norm norm logsumexp prod all any aminmax frobenius_norm count_nonzero"
)
POOLS = names(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_max_pool2d max_pool2d_with_indices"
)
ADAPTIVE_MEANS = names("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d")

# -------------------------------------------------------------------------------------------------------------- movement
VIEWS = names("view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as")
JOINS = names("cat concat")
PARTS = names("slice select split split_with_sizes chunk unbind narrow tensor_split")
PADS = ("constant_pad_nd", "pad")
FACTORIES = names(  # tensors from sizes and numbers alone
    "new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like arange zeros ones full empty linspace "
    "eye scalar_tensor tril_indices triu_indices"
)
