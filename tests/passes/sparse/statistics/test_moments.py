"""Second moments of the inputs of layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphcomb as g
from graphcomb.passes import Sparsify
from graphcomb.passes.base import Context
from graphcomb.passes.common.weights import layers
from graphcomb.passes.sparse.statistics.moments import input_moments

from ..toys import weights


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(4, 6, 3, 2, 1, groups=2), (4, 9, 8)),
        (nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2), (4, 7, 8)),
        (nn.Conv1d(4, 6, 3, padding=2), (4, 9)),
        (nn.Conv3d(2, 4, 2, (1, 2, 1)), (2, 4, 5, 3)),
        (nn.Linear(4, 6), (5, 4)),
    ],
)
def test_second_moments_of_inputs_give_the_output_energy(layer, size):
    """`sum |W x|^2` over the outputs is `tr(W (X X^T) W^T)`."""
    torch.manual_seed(0)
    layer.bias = None
    program = g.capture(nn.Sequential(layer, nn.ReLU()), torch.randn(2, *size), dynamic_shapes="batch")
    [found], _ = layers(program)
    x = torch.randn(6, *size)
    every, seen = input_moments(program.copy(), [found.name], Context(data=x.split(2)), 9)
    assert seen == 6
    moments = every[found.name].double()
    rows = layer.weight.detach().double().flatten(1).view(found.groups, -1, moments.shape[1])
    energy = torch.einsum("gri,gij,grj->", rows, moments, rows)
    out = layer(x).detach().double()
    positions = out.numel() / out.shape[-1 if layer.__class__ is nn.Linear else 1]
    torch.testing.assert_close(energy, out.square().sum() / positions, rtol=1e-5, atol=0)
    squares, _ = input_moments(program.copy(), [found.name], Context(data=x.split(2)), 6, full=False)
    diagonal = squares[found.name]
    torch.testing.assert_close(diagonal.double(), moments.diagonal(dim1=1, dim2=2), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_narrow_numbers_are_summed_in_wide_ones(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)).to(dtype)
    data = [(30 * torch.randn(8, 16).to(dtype), torch.randint(5, (8,))) for _ in range(64)]
    program = g.capture(net, data[0][0], dynamic_shapes="batch")
    moments = input_moments(program.copy(), ["2.weight"], Context(data=data), 512)[0]["2.weight"][0]
    inputs = torch.cat([net[:2](x).float() for x, _ in data])
    torch.testing.assert_close(moments, inputs.T @ inputs / 512, rtol=1e-3, atol=1e-3)
    result = Sparsify(method="fastcap", gradients=64)(
        program, data=data, loss=lambda out, y: 3e-3 * F.cross_entropy(out.float(), y)
    )
    assert int((weights(result.program)["2.weight"] == 0).sum()) == 128
