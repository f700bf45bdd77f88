"""Merges are done where they pay, and only there."""

from torch import nn

from .toys import Branches, Residual, conv, fused_in_fp64, ops


def test_a_merge_that_costs_more_is_not_done():
    result = fused_in_fp64(nn.Sequential(nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.Conv2d(8, 8, 1)), 8, 9, 9)
    assert ops(result) == {"conv2d": 2}
    (gated,) = result.record["gated"]
    assert gated == {"what": "0 + 1", "why": "merged they take 508,032 MACs instead of 73,872"}
    assert result.record["refused"] == []


def test_the_cheapest_cut_of_a_chain_is_found():
    """Narrow in the middle: the pieces left and right of the bottleneck merge, the whole does not."""
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 2), nn.Linear(2, 64), nn.Linear(64, 16))
    result = fused_in_fp64(model, 16)
    assert ops(result) == {"linear": 2}
    assert result.program.macs == 2 * (2 * 16 + 2 * 16)


def test_an_inverted_residual_without_activations_becomes_one_dense_convolution():
    """Padding at the head, no activations: 12 C^2 + 54 C MACs a pixel become 9 C^2, the skip included."""
    c = 32
    layers = [nn.Conv2d(c, 6 * c, 1, padding=1), nn.BatchNorm2d(6 * c), nn.Conv2d(6 * c, 6 * c, 3, groups=6 * c),
              nn.BatchNorm2d(6 * c), nn.Conv2d(6 * c, c, 1), nn.BatchNorm2d(c)]  # fmt: skip
    result = fused_in_fp64(Residual(*layers), c, 5, 5)
    assert ops(result) == {"conv2d": 1}
    assert result.program.macs == 2 * 25 * 9 * c * c


def test_a_convnext_block_merges_its_pointwise_layers_only():
    c = 16
    layers = [
        nn.Conv2d(c, c, 7, padding=3, groups=c),
        nn.BatchNorm2d(c),
        nn.Conv2d(c, 4 * c, 1),
        nn.Conv2d(4 * c, c, 1),
    ]
    result = fused_in_fp64(Residual(*layers, scale=(c, 1, 1)), c, 8, 8)
    assert ops(result) == {"conv2d": 2, "add": 1}
    assert result.program.macs == 2 * 64 * (49 * c + c * c)
    assert "MACs instead of" in result.record["gated"][0]["why"]


def test_part_of_a_sum_merges_when_the_rest_cannot_pay():
    """A dense 7x7 would cost more than its depthwise and pointwise layers; the other branches merge without it."""
    c = 8
    wide = nn.Sequential(nn.Conv2d(c, c, 7, padding=3, groups=c), nn.Conv2d(c, c, 1))
    result = fused_in_fp64(Branches(wide, conv(c, c, 1), nn.BatchNorm2d(c)), c, 9, 9)
    assert ops(result) == {"conv2d": 3, "add": 1}
