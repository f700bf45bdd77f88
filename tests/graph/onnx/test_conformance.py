"""The operators against ONNX's own node tests."""

import importlib
import warnings
from collections import Counter

import pytest

from .conformance import MODES, cases, outcome

# Where PyTorch and ONNX Runtime agree with each other and not with the specification's own figures.
KNOWN = {
    "test_resize_downsample_scales_linear_align_corners",  # corners of the rounded size, not of the scaled one
    "test_resize_downsample_scales_cubic_align_corners",
    "test_top_k_same_values",  # which of equal values comes first is open in PyTorch
    "test_top_k_same_values_2d",
    "test_top_k_same_values_largest",
}
QUICK = """
add and_ argmax averagepool batch_normalization clip concat constantofshape conv convtranspose cumsum depthtospace div
dropout einsum expand flatten gather gatherelements gathernd gelu gemm globalaveragepool gridsample groupnormalization
gru hardsigmoid hardswish instance_normalization layernormalization leakyrelu lrn lstm matmul max maxpool mod mul
onehot pad pow prelu rangeop reduce_log_sum_exp reducel2 reducemax reducemean reducesum reshape resize scatterelements
scatternd shape slice softmax softplus spacetodepth split squeeze sub tile topk transpose trilu unsqueeze upsample
where
""".split()


def judge(found: dict) -> Counter:
    """How often each outcome came; what is wrong and not known fails."""
    counts: Counter = Counter()
    for name, case in found.items():
        for mode in MODES:
            said = outcome(case, mode)
            counts[mode, said.partition(":")[0]] += 1
            assert not said.startswith("wrong") or name in KNOWN, f"{name} ({mode} inputs live): {said}"
    return counts


def test_common_operators_compute_what_the_specification_says() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in QUICK:
            importlib.import_module(f"onnx.backend.test.case.node.{module}")
    counts = judge({n: c for n, c in cases(load=False).items() if not n.endswith(("_expanded", "_expanded_ver18"))})
    passed = counts["none", "passed"], counts["first", "passed"], counts["all", "passed"]
    assert passed >= (380, 360, 220), counts


@pytest.mark.slow
def test_all_operators_compute_what_the_specification_says() -> None:
    counts = judge(cases())
    assert counts["none", "passed"] >= 1150, counts
    assert counts["first", "passed"] >= 1100, counts
