"""Regions of layers between which values stay INT8."""

import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.passes import Quantize
from graphcomb.passes.common.weights import layers
from graphcomb.passes.quantize.regions import quantised_alone, quantised_layers, regions


class Net(nn.Module):
    """A stem, a residual block of three layers, a gate, and two heads that read the same value."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8, 8))
        self.gate = nn.Conv2d(8, 8, 1)
        self.left, self.right = nn.Linear(8, 5), nn.Linear(8, 2)

    def forward(self, x):
        x = torch.max_pool2d(self.stem(x).relu(), 2)
        x = (x + self.c(self.b(self.a(x).relu()).clamp(0, 6))).relu()
        x = (x * self.gate(x).sigmoid()).mean((2, 3))
        return self.left(x), self.right(x)


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return g.capture(Net().eval(), torch.randn(2, 3, 8, 8), dynamic_shapes="batch")


def test_regions_end_where_floating_point_begins(program):
    found = [[layer.name.removesuffix(".weight") for layer in region] for region in regions(layers(program)[0])]
    assert found == [["stem"], ["a", "b", "c"], ["gate"], ["left", "right"]], "the addition reads the stem's value, too"


def test_a_part_of_a_quantised_program_has_its_scales(program):
    x = torch.randn(8, 3, 8, 8)
    whole = Quantize(include="*", samples=8)(program, data=[x]).program
    for names in ({"a.weight", "b.weight", "c.weight"}, {"left.weight"}):
        part = quantised_alone(whole, names)
        assert {name for _, name in quantised_layers(part)} == names
        layers_ = {name.removesuffix(".weight"): "int8" for name in names} | {"*": "fp16"}
        wanted = Quantize(layers=layers_, samples=8)(program, data=[x]).program
        with torch.no_grad():
            for a, b in zip(part.module()(x), wanted.module()(x), strict=True):
                assert torch.equal(a, b)
    none = quantised_alone(whole, ())
    with torch.no_grad():
        assert torch.equal(none.module()(x)[0], program.module()(x)[0])
