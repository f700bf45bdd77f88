"""Merging of linear regions: chains, sums of branches, skips and scales; exact, border included, and only where it pays."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch import nn

import graphcomb.graph as g
from graphcomb.graph.nodes import op_name
from graphcomb.passes.fuse.affine import Geometry, Inexact, Kernel
from graphcomb.passes.fuse.fuse import Fuse


def scramble(model, seed=0):
    """Every parameter and statistic away from its initial value, in float64: nothing can hide behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            positive = name.endswith("running_var") or "gamma" in name
            noise = torch.rand(tensor.shape, generator=generator) + 0.5 if positive else None
            scale = 1 if tensor.dim() < 2 else tensor[0].numel() ** -0.5
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * scale if noise is None else noise)
    return model


def fused(model, *sizes):
    """The fused program, after comparing it with the eager model in float64 at another batch size."""
    model = scramble(model)
    program = g.capture(model, torch.randn(2, *sizes, dtype=torch.float64), dynamic_shapes="batch")
    result = Fuse()(program)
    x = torch.randn(3, *sizes, dtype=torch.float64)
    with torch.no_grad():
        expected, found = model(x), result.program.module()(x)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    result.program.graph.lint()
    before, after = (result.record["cost"][key]["macs"] for key in ("before", "after"))
    assert after <= before
    return result


def ops(result):
    return Counter(op_name(n) for n in result.program.graph.nodes if n.op == "call_function")


class Residual(nn.Module):
    def __init__(self, *layers, scale=None):
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.gamma = None if scale is None else nn.Parameter(torch.full(scale, 1e-6))

    def forward(self, x):
        y = self.body(x)
        return x + (y if self.gamma is None else self.gamma * y)


# -------------------------------------------------------------------------------------------------------------- chains
@pytest.mark.parametrize(
    ("layers", "sizes"),
    [
        ([nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1)], (4, 5, 6)),
        ([nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1)], (4, 5, 6)),  # zeros stay zeros: exact
        ([nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 1)], (4, 7, 6)),
        ([nn.Conv2d(4, 32, 3, 2, padding=2), nn.Conv2d(32, 4, (2, 1))], (4, 9, 9)),
        ([nn.Conv2d(2, 32, 2, dilation=2, padding=2), nn.Conv2d(32, 2, 2)], (2, 9, 8)),
        ([nn.Conv2d(4, 16, 1, 2, bias=False), nn.Conv2d(16, 4, 3, 2, padding=1)], (4, 12, 11)),
        ([nn.Conv2d(4, 24, 3, padding=1, groups=2), nn.Conv2d(24, 4, 1, groups=2)], (4, 6, 6)),
        ([nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 8, 3, groups=8)], (8, 6, 6)),
        ([nn.Conv1d(4, 16, 3, padding=1), nn.Conv1d(16, 4, 1)], (4, 9)),
        ([nn.Conv3d(2, 16, 2, padding=1), nn.Conv3d(16, 2, 1)], (2, 4, 5, 3)),
        ([nn.Linear(8, 32), nn.Linear(32, 8)], (8,)),
        ([nn.Linear(8, 32), nn.Dropout(0.1), nn.Linear(32, 8, bias=False)], (5, 8)),
        ([nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3)], (4, 5, 5)),
    ],
)
def test_layers_in_a_row_become_one(layers, sizes):
    result = fused(nn.Sequential(*layers), *sizes)
    assert sum(ops(result).values()) == 1
    assert len(result.record["changed"]) == 1
    assert result.record["refused"] == result.record["gated"] == []


def test_depthwise_convolutions_in_a_row_stay_depthwise():
    result = fused(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 1, groups=6)), 6, 7, 7)
    (_, weight), *_ = result.program.module().named_parameters()
    assert weight.shape == (6, 1, 3, 3)


def test_a_pad_first_chain_merges_with_its_border():
    """UPDP: when all padding of a chain is at its head, the merge is exact."""
    layers = [nn.Conv2d(4, 64, 1), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3, groups=64), nn.BatchNorm2d(64),
              nn.Conv2d(64, 4, 1), nn.BatchNorm2d(4)]  # fmt: skip
    result = fused(nn.Sequential(nn.ZeroPad2d(1), *layers), 4, 6, 6)
    assert ops(result) == {"conv2d": 1}
    (_, weight), *_ = result.program.module().named_parameters()
    assert weight.shape == (4, 4, 3, 3)


def test_a_merge_that_would_be_wrong_at_the_border_is_refused():
    result = fused(nn.Sequential(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 3, padding=1)), 4, 6, 6)
    assert ops(result) == {"conv2d": 2}
    assert result.record["refused"] == [
        {"what": "0 + 1", "why": "before a zero-padded convolution, so that the fold would be wrong at the border"}
    ]


def test_a_merge_that_costs_more_is_not_done():
    result = fused(nn.Sequential(nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.Conv2d(8, 8, 1)), 8, 9, 9)
    assert ops(result) == {"conv2d": 2}
    (gated,) = result.record["gated"]
    assert gated == {"what": "0 + 1", "why": "merged they take 508,032 MACs instead of 73,872"}
    assert result.record["refused"] == []


def test_the_cheapest_cut_of_a_chain_is_found():
    """Narrow in the middle: the pieces left and right of the bottleneck merge, the whole does not."""
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 2), nn.Linear(2, 64), nn.Linear(64, 16))
    result = fused(model, 16)
    assert ops(result) == {"linear": 2}
    assert result.program.macs == 2 * (2 * 16 + 2 * 16)


def test_a_normalisation_of_tokens_folds_through_its_transposes():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.one, self.two = nn.BatchNorm1d(6), nn.Linear(6, 24), nn.Linear(24, 6)

        def forward(self, x):
            return x + self.two(self.one(self.norm(x.transpose(1, -1)).transpose(1, -1)))

    result = fused(Tokens(), 5, 6)
    assert ops(result) == {"linear": 1}


# ---------------------------------------------------------------------------------------------------- skips and scales
@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (Residual(nn.Conv2d(4, 4, 3, padding=1)), (4, 6, 5)),
        (Residual(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4)), (4, 6, 5)),
        (Residual(nn.Conv2d(4, 4, 3, padding=2, dilation=2)), (4, 7, 7)),
        (Residual(nn.Conv2d(4, 4, 1), scale=(4, 1, 1)), (4, 3, 5)),
        (Residual(nn.Linear(6, 24), nn.Linear(24, 6), scale=(6,)), (3, 6)),
        (Residual(nn.Linear(6, 24), nn.Linear(24, 6), scale=()), (6,)),
        (nn.Sequential(Residual(nn.Conv1d(4, 4, 3, padding=1)), nn.Conv1d(4, 4, 1)), (4, 8)),
    ],
)
def test_a_skip_and_a_layer_scale_merge_into_the_layer(model, sizes):
    assert sum(ops(fused(model, *sizes)).values()) == 1


def test_an_inverted_residual_without_activations_becomes_one_dense_convolution():
    """Padding at the head, no activations: 12 C^2 + 54 C MACs a pixel become 9 C^2, the skip included."""
    c = 32
    layers = [nn.Conv2d(c, 6 * c, 1, padding=1), nn.BatchNorm2d(6 * c), nn.Conv2d(6 * c, 6 * c, 3, groups=6 * c),
              nn.BatchNorm2d(6 * c), nn.Conv2d(6 * c, c, 1), nn.BatchNorm2d(c)]  # fmt: skip
    result = fused(Residual(*layers), c, 5, 5)
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
    result = fused(Residual(*layers, scale=(c, 1, 1)), c, 8, 8)
    assert ops(result) == {"conv2d": 2, "add": 1}
    assert result.program.macs == 2 * 64 * (49 * c + c * c)
    assert "MACs instead of" in result.record["gated"][0]["why"]


def test_constants_are_part_of_a_region():
    class Affine(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.shift = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x):
            y = (1 - self.conv(x)) * 0.5 + self.shift
            return -(y / 4) - 2

    assert ops(fused(Affine(), 3, 5, 5)) == {"conv2d": 1}


# ------------------------------------------------------------------------------------------------------------ branches
class Branches(nn.Module):
    def __init__(self, *branches, minus=()):
        super().__init__()
        self.plus, self.minus = nn.ModuleList(branches), nn.ModuleList(minus)

    def forward(self, x):
        total = self.plus[0](x)
        for branch in self.plus[1:]:
            total = total + branch(x)
        for branch in self.minus:
            total = torch.sub(total, branch(x), alpha=2)
        return total


def conv(a, b, k, **more):
    return nn.Sequential(nn.Conv2d(a, b, k, bias=False, **more), nn.BatchNorm2d(b))


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (Branches(conv(4, 4, 3, padding=1), conv(4, 4, 1), nn.BatchNorm2d(4)), (4, 6, 6)),
        (Branches(conv(4, 6, 3, padding=1, stride=2), conv(4, 6, 1, stride=2)), (4, 7, 6)),
        (Branches(nn.BatchNorm2d(4), *(conv(4, 4, 3, padding=1, groups=4) for _ in range(3))), (4, 6, 6)),
        (Branches(conv(4, 4, 3, padding=2, dilation=2), conv(4, 4, 3, padding=1), nn.Identity()), (4, 7, 7)),
        (Branches(conv(4, 4, (1, 3), padding=(0, 1)), conv(4, 4, (3, 1), padding=(1, 0))), (4, 5, 6)),
        (Branches(conv(4, 4, 3, padding=1), nn.Identity(), minus=[nn.BatchNorm2d(4)]), (4, 6, 6)),
        (Branches(nn.Linear(5, 7), nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 7))), (5,)),
        (Branches(conv(4, 4, 3, padding=1), nn.Sequential(conv(4, 8, 1), conv(8, 4, 1))), (4, 6, 6)),
    ],
)
def test_parallel_branches_become_one_layer(model, sizes):
    result = fused(model, *sizes)
    kept = {"conv2d", "linear"} & set(ops(result))
    assert len(kept) == 1
    if "batch_norm" not in ops(result):
        assert sum(ops(result).values()) <= 3  # crossing kernels and dilations may cost more merged


def test_branches_that_do_not_lie_at_the_same_positions_are_refused():
    even = Branches(nn.Conv2d(4, 4, 2, padding=1), nn.Conv2d(4, 4, 4, padding=2))
    result = fused(even, 4, 6, 6)
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


def test_part_of_a_sum_merges_when_the_rest_cannot_pay():
    """A dense 7x7 would cost more than its depthwise and pointwise layers; the other branches merge without it."""
    c = 8
    wide = nn.Sequential(nn.Conv2d(c, c, 7, padding=3, groups=c), nn.Conv2d(c, c, 1))
    result = fused(Branches(wide, conv(c, c, 1), nn.BatchNorm2d(c)), c, 9, 9)
    assert ops(result) == {"conv2d": 3, "add": 1}


@pytest.mark.parametrize(
    ("name", "size"), [("repvgg_a0", 64), ("mobileone_s0", 64), ("repvit_m1", 64), ("fastvit_t8", 64)]
)
def test_reparameterisable_networks_match_the_librarys_own_fused_model(name, size):
    timm = pytest.importorskip("timm")
    from timm.utils.model import reparameterize_model

    torch.set_default_dtype(torch.float64)
    try:
        model = timm.create_model(name, num_classes=7)
        model = scramble(model)
        x = torch.randn(2, 3, size, size)
        program = g.capture(model, x, dynamic_shapes="batch")
        library = g.capture(reparameterize_model(model), x, dynamic_shapes="batch")
    finally:
        torch.set_default_dtype(torch.float32)
    result = Fuse()(program)
    with torch.no_grad():
        expected, found = library.module()(x), result.program.module()(x)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    ours, theirs = ops(result), Counter(op_name(n) for n in library.graph.nodes if n.op == "call_function")
    for kind in ("conv2d", "linear", "batch_norm", "add", "mul", "sub"):
        assert ours[kind] <= theirs[kind], kind
    assert result.program.params <= library.params  # fewer where layer scales were folded too
    assert result.program.macs <= library.macs
    assert all("border" in r["why"] for r in result.record["refused"])  # layers only, no normalisation is left


# -------------------------------------------------------------------------------------------------------------- algebra
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
