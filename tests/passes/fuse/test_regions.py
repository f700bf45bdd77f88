"""Affine regions: chains, sums of branches, skips and scales, in every spelling and in one precision."""

import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.passes.fuse.fuse import Fuse

from .toys import Branches, Residual, conv, fused_in_fp32, fused_in_fp64, norms, ops


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
    result = fused_in_fp64(nn.Sequential(*layers), *sizes)
    assert sum(ops(result).values()) == 1
    assert len(result.record["changed"]) == 1
    assert result.record["refused"] == result.record["gated"] == []


def test_depthwise_convolutions_in_a_row_stay_depthwise():
    result = fused_in_fp64(
        nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 1, groups=6)), 6, 7, 7
    )
    (_, weight), *_ = result.program.module().named_parameters()
    assert weight.shape == (6, 1, 3, 3)


def test_a_pad_first_chain_merges_with_its_border():
    """UPDP: when all padding of a chain is at its head, the merge is exact."""
    layers = [nn.Conv2d(4, 64, 1), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3, groups=64), nn.BatchNorm2d(64),
              nn.Conv2d(64, 4, 1), nn.BatchNorm2d(4)]  # fmt: skip
    result = fused_in_fp64(nn.Sequential(nn.ZeroPad2d(1), *layers), 4, 6, 6)
    assert ops(result) == {"conv2d": 1}
    (_, weight), *_ = result.program.module().named_parameters()
    assert weight.shape == (4, 4, 3, 3)


def test_a_merge_that_would_be_wrong_at_the_border_is_refused():
    result = fused_in_fp64(nn.Sequential(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 3, padding=1)), 4, 6, 6)
    assert ops(result) == {"conv2d": 2}
    assert result.record["refused"] == [
        {"what": "0 + 1", "why": "before a zero-padded convolution, so that the fold would be wrong at the border"}
    ]


def test_a_normalisation_of_tokens_folds_through_its_transposes():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.one, self.two = nn.BatchNorm1d(6), nn.Linear(6, 24), nn.Linear(24, 6)

        def forward(self, x):
            return x + self.two(self.one(self.norm(x.transpose(1, -1)).transpose(1, -1)))

    result = fused_in_fp64(Tokens(), 5, 6)
    assert ops(result) == {"linear": 1}


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
    assert sum(ops(fused_in_fp64(model, *sizes)).values()) == 1


def test_constants_are_part_of_a_region():
    class Affine(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.shift = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x):
            y = (1 - self.conv(x)) * 0.5 + self.shift
            return -(y / 4) - 2

    assert ops(fused_in_fp64(Affine(), 3, 5, 5)) == {"conv2d": 1}


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
    result = fused_in_fp64(model, *sizes)
    kept = {"conv2d", "linear"} & set(ops(result))
    assert len(kept) == 1
    if "batch_norm" not in ops(result):
        assert sum(ops(result).values()) <= 3  # crossing kernels and dilations may cost more merged


class Promoted(nn.Module):
    """A layer in half precision, whose output a scale in single precision widens."""

    def __init__(self, where):
        super().__init__()
        self.conv, self.where = nn.Conv2d(3, 4, 1).bfloat16(), where
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.side = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.conv(x.bfloat16())
        if self.where == "scale":
            return y * self.scale
        return y + self.side(x) if self.where == "sum" else y.float() * self.scale


@pytest.mark.parametrize("where", ["scale", "sum", "cast"])
def test_merges_do_not_cross_a_change_of_precision(where):
    torch.manual_seed(0)
    model, x = Promoted(where).eval(), torch.randn(2, 3, 5, 5)
    program = g.capture(model, (x,))
    result = Fuse()(program)
    found, expected = result.program.module()(x), model(x)
    assert found.dtype == expected.dtype == torch.float32
    assert result.record["changed"] == []
    torch.testing.assert_close(found, expected)


def test_a_scale_that_keeps_the_precision_still_merges():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 4, 1).bfloat16(), nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return self.conv(x) * self.scale  # of no dimension: the result stays in half precision

    result = Fuse()(g.capture(Scaled().eval(), (torch.randn(2, 3, 5, 5, dtype=torch.bfloat16),)))
    assert len(result.record["changed"]) == 1
    assert result.program.module()(torch.randn(2, 3, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


class Tokens(nn.Module):
    """A layer of tokens whose normalisation folds batch and tokens into one dimension, in several spellings."""

    def __init__(self, spelling):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.spelling = spelling

    def forward(self, x):
        x = self.one(x)
        match self.spelling:
            case "reshape_as":
                x = self.norm(x.flatten(0, 1)).reshape_as(x)
            case "view":
                x = self.norm(x.reshape(-1, 8)).view(x.shape)
            case "unflatten":
                x = self.norm(x.flatten(0, 1)).unflatten(0, (-1, 5))
            case "other tokens":
                x = self.norm(x.flatten(0, 1)).view(x.shape[0], -1, 4)
                return x
        return self.two(x.relu())


@pytest.mark.parametrize("dynamic", ["batch", None])
@pytest.mark.parametrize("spelling", ["reshape_as", "view", "unflatten"])
def test_a_normalisation_of_folded_tokens_merges_with_their_layer(spelling, dynamic):
    result = fused_in_fp32(Tokens(spelling), (5, 6), dynamic)
    assert norms(result) == 0
    assert [c["into"] for c in result.record["changed"]] == ["one.weight"]
    x = torch.randn(2, 5, 6)
    assert result.program.module()(x).shape == (2, 5, 4)


def test_a_normalisation_of_tokens_that_are_cut_otherwise_afterwards_stays():
    assert norms(fused_in_fp32(Tokens("other tokens"), (5, 6))) == 1
