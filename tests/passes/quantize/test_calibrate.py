"""Scales of inputs, against sorted values and brute force."""

import numpy as np
import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.passes import Quantize
from graphcomb.passes.quantize.calibrate import BINS, Histogram


def histogram(*parts):
    made = Histogram()
    for part in parts:
        made.add(part)
    return made


def heavy(count, seed=0):
    """Values with a long tail."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("share", [50.0, 99.0, 99.9, 100.0])
def test_a_percentile_is_that_of_the_sorted_magnitudes_up_to_a_bin(share):
    parts = [heavy(5000, seed) * 2**seed for seed in range(4)]
    made = histogram(*parts)
    magnitudes = torch.cat(parts).abs().numpy()
    assert made.largest == pytest.approx(magnitudes.max())
    assert made.counts.sum() == magnitudes.size
    wanted = np.percentile(magnitudes, share, method="inverted_cdf")
    assert made.percentile(share) == pytest.approx(wanted, abs=2 * made.width / BINS)
    assert made.percentile(100.0) == pytest.approx(made.largest)


def test_the_least_error_is_that_of_trying_all_saturations():
    values = torch.cat([torch.randn(10**6, generator=torch.Generator().manual_seed(0)), torch.tensor([20.0])])
    made = histogram(values)

    def error(end):
        quantised = torch.fake_quantize_per_tensor_affine(values, end / 127, 0, -127, 127)
        return float((quantised - values).double().square().sum())

    tried = np.linspace(0.05, 1.0, 60) * made.largest
    assert error(made.least_error()) <= 1.02 * min(map(error, tried))
    assert error(made.least_error()) < 0.5 * error(made.largest)


def test_zeros_before_the_first_values_count():
    made = histogram(torch.zeros(300), torch.ones(100))
    assert made.percentile(70.0) < 2 / BINS
    assert made.largest == 1.0
    assert histogram(torch.zeros(4)).largest == 0.0


class Chain(nn.Module):
    """The first layer reads single large values that matter, the second one large values that its weights ignore."""

    def __init__(self):
        super().__init__()
        self.keep, self.drop = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        torch.nn.init.eye_(self.keep.weight)
        torch.nn.init.eye_(self.drop.weight)
        self.drop.weight.data[0] = 0.0

    def forward(self, x):
        return self.keep(x), self.drop(x * 1.0)


def outputs_error(program, x, which):
    with torch.no_grad():
        dense, quantised = (p.module()(x)[which] for p in program)
    return float((dense - quantised).double().square().sum())


def test_error_takes_for_each_input_the_scale_with_the_least_error_of_the_outputs():
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    x[:, 0] = 0.0
    x[0, 0] = 100.0
    program = g.capture(Chain().eval(), x[:2], dynamic_shapes="batch")
    found = {
        name: Quantize(include="*", calibration=name, samples=512, percentile=99.9)(program, data=[x])
        for name in ("minmax", "percentile", "histogram", "error")
    }
    scales = {name: [row["input_scales"][0] for row in result.record["changed"]] for name, result in found.items()}
    for which in (0, 1):
        errors = {name: outputs_error((program, result.program), x, which) for name, result in found.items()}
        assert errors["error"] == min(errors.values())
    assert scales["error"][0] > 10 * scales["error"][1], "only the first layer needs the large value"
