"""Corrected biases: the means of quantised layers on the calibration data are those of the network in floating point."""

import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.passes import Quantize

DATA = [torch.rand(6, 3, 9, 9, generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Net(nn.Module):
    """Without a bias, depthwise with one, a shared bias, and linear over several positions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.depthwise, self.other = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)
        self.other.bias = self.depthwise.bias
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.depthwise(x).relu()
        y = y + self.other(y)
        return self.head(y.flatten(2).transpose(1, 2))


def outputs(program, names, data=DATA):
    """Means of the outputs of the layers that read these weights, over the data."""
    seen = {}

    class See(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.name in names:
                seen.setdefault(n.name, []).append(value)
            return value

    with torch.no_grad():
        for x in data:
            See(program.module()).run(x, enable_io_processing=False)
    return {name: torch.cat(v).movedim(-1 if name == "linear" else 1, 0).flatten(1).mean(1) for name, v in seen.items()}


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return g.capture(Net().eval(), DATA[0], dynamic_shapes="batch")


def test_means_are_exact_on_the_calibration_data(program):
    result = Quantize(include="*", samples=18, bias_correction=True)(program, data=DATA)
    plain = Quantize(include="*", samples=18)(program, data=DATA)
    names = ("conv2d", "conv2d_1", "conv2d_2", "linear")
    wanted, found, before = (outputs(p, names) for p in (program, result.program, plain.program))
    assert set(found) == set(names)
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)
        assert (before[name] - wanted[name]).abs().max() > 1e-4
    shifts = {row["what"]: row["largest_bias_shift"] for row in result.record["changed"]}
    assert all(shift > 0 for shift in shifts.values())
    assert "largest_bias_shift" not in plain.record["changed"][0]


def test_biases_that_were_missing_or_shared_become_parameters_of_their_own(program):
    state = Quantize(include="*", samples=18, bias_correction=True)(program, data=DATA).program.module().state_dict()
    assert state["stem.bias"].shape == (8,)
    assert not torch.equal(
        state["depthwise.bias"], state["other.bias_"] if "other.bias_" in state else state["other.bias"]
    )
    assert not any(k.startswith("stem.bias") for k in program.module().state_dict())


def test_a_layer_that_is_called_twice_keeps_its_bias():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(self.a(x).relu())

    program = g.capture(Twice(), torch.randn(2, 4), dynamic_shapes="batch")
    result = Quantize(include="*", bias_correction=True)(program, data=[torch.randn(8, 4)])
    module = result.program.module()
    assert torch.equal(module.get_parameter("a.bias"), program.module().get_parameter("a.bias"))
    assert "largest_bias_shift" not in result.record["changed"][0]


def test_only_the_samples_asked_for_count(program):
    """Four samples of a batch of six."""
    result = Quantize(include="*", samples=4, bias_correction=True)(program, data=DATA)
    for rows, exact in ((slice(0, 4), True), (slice(0, 6), False)):
        wanted, found = (outputs(p, ("linear",), [DATA[0][rows]])["linear"] for p in (program, result.program))
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6) is exact
