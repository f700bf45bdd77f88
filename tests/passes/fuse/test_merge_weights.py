"""The algebra of affine maps: composition and sums, against running the operators."""

import dataclasses

import pytest
import torch
from torch import nn

from graphcomb.passes.fuse.merge_weights import Geometry, Inexact, Kernel

from .toys import Branches, fused_in_fp64, ops


def test_branches_that_do_not_lie_at_the_same_positions_are_refused():
    even = Branches(nn.Conv2d(4, 4, 2, padding=1), nn.Conv2d(4, 4, 4, padding=2))
    result = fused_in_fp64(even, 4, 6, 6)
    assert ops(result) == {"conv2d": 1}  # both reach one further to the right
    one, two = Geometry(4, 4, (3,), (1,), ((1, 1),), (1,)), Geometry(4, 4, (3,), (1,), ((0, 2),), (1,))
    assert one.plus(two).padding == ((1, 2),)
    assert one.plus(two).convolution_padding() == "same"
    with pytest.raises(Inexact, match="unevenly"):
        two.convolution_padding()
    with pytest.raises(Inexact, match="padded differently"):
        one.plus(dataclasses.replace(two, padding=((2, 2),)))
    with pytest.raises(Inexact, match="strides"):
        one.plus(dataclasses.replace(two, stride=(2,)))


@pytest.mark.parametrize("seed", range(30))
def test_random_kernels_compose_and_add(seed):
    """Composition and sums against running the operators, over strides, dilations, groups and paddings."""
    draw = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=draw))]

    def kernel(inputs, outputs, stride, padded):
        groups, k, d = pick(1, 2, 4), pick(1, 2, 3), pick(1, 2)
        left, biased = pick(0, 1, 2) if padded else 0, pick(True, False)
        geometry = Geometry(outputs, inputs, (k, 1), (stride, 1), ((left, left), (0, 0)), (d, 1), groups, biased)
        weight = torch.randn(outputs, inputs // groups, k, 1, generator=draw, dtype=torch.float64)
        return Kernel(geometry, weight, torch.randn(outputs, generator=draw, dtype=torch.float64) if biased else None)

    def run(m, x):
        q = m.geometry
        x = nn.functional.pad(x, (0, 0, *q.padding[0]))
        return nn.functional.conv2d(x, m.weight, m.bias, q.stride, 0, q.dilation, q.groups)

    x = torch.randn(2, 8, 17, 2, generator=draw, dtype=torch.float64)
    one, two = kernel(8, 8, pick(1, 2), True), kernel(8, 4, pick(1, 2, 3), False)
    torch.testing.assert_close(run(one.then(two), x), run(two, run(one, x)))
    side = kernel(8, 8, one.geometry.stride[0], True)
    try:
        total = one.plus(side)
    except Inexact:
        return
    torch.testing.assert_close(run(total, x), run(one, x) + run(side, x))
