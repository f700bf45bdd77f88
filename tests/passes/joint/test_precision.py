"""Which regions become INT8: those that save time, the cheapest ones first, within the allowed divergence."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.passes import Context, Quantize
from graphcomb.passes.common.divergence import Divergence
from graphcomb.passes.joint.losses import take
from graphcomb.passes.joint.precision import choose_precisions, predicted_seconds
from graphcomb.passes.quantize.regions import quantised_alone, quantised_layers


class Net(nn.Module):
    """A residual network of three blocks, of which the second one has channels of very unlike scales."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)) for _ in range(3)
        )
        scale = torch.logspace(-2, 1.5, 16)
        self.blocks[1][0].weight.data *= scale.view(-1, 1, 1, 1)
        self.blocks[1][0].bias.data *= scale
        self.blocks[1][2].weight.data /= scale.view(1, -1, 1, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class PerMac:
    """A device with a price per multiply-accumulate and per copied entry."""

    per_run = 1e-6

    def __init__(self, mac, entry):
        self.mac, self.entry = mac, entry

    def prepare(self, layers, progress=False):
        pass

    def seconds(self, layer):
        return self.entry * layer["entries"] if layer.op == "copy" else self.mac * layer.macs()


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return g.capture(Net().eval(), torch.randn(2, 3, 8, 8), dynamic_shapes="batch")


@pytest.fixture(scope="module")
def context():
    generator = torch.Generator().manual_seed(1)
    return Context(data=[2 * torch.randn(16, 3, 8, 8, generator=generator) for _ in range(4)])


def integer(program):
    return {name.split(".")[1] for _, name in quantised_layers(program) if name.startswith("blocks")}


def seconds_by_block(programs):
    """Every block saves a second, but the last one loses one; conversions are free."""
    return [10.0 - sum(-1 if b == "2" else 1 for b in integer(p)) for p in programs]


def test_the_cheapest_regions_come_first_and_the_measured_divergence_is_within_the_limit(program, context):
    dense = Divergence(program, take(program, context, 32).judge)
    how = Quantize(samples=32)
    free = choose_precisions(program, context, seconds_by_block, 10.0, how, samples=32)
    assert integer(free.program) == {"0", "1"}, "the last block would be slower"
    losses = {o.weights[0].split(".")[1]: o.loss for o in free.options}
    assert losses["1"] > 5 * losses["0"]
    assert [o.gain for o in free.options] == [1.0, 1.0, -1.0]
    limit = (losses["0"] + losses["1"]) / 2
    found = choose_precisions(program, context, seconds_by_block, limit, how, samples=32)
    assert integer(found.program) == {"0"}
    assert [o.chosen for o in found.options] == [True, False, False]
    assert found.loss == pytest.approx(dense(found.program))
    assert found.loss <= limit
    assert found.seconds == {"plain": 10.0, "all": 9.0, "chosen": 9.0}
    again = replace(how, layers=found.layers)(program, data=take(program, context, 32).repair).program
    assert dense(again) == pytest.approx(found.loss)


def test_a_choice_that_is_not_faster_is_none(program, context):
    slower = choose_precisions(program, context, lambda ps: [1.0 + len(integer(p)) for p in ps], loss=1.0, samples=16)
    assert integer(slower.program) == set()
    assert slower.note == "no region is faster in INT8 with its conversions"

    def together(programs):  # alone each block is faster, but not together
        return [1.0 - (0.1 if len(integer(p)) == 1 else -0.1 * len(integer(p))) for p in programs]

    found = choose_precisions(program, context, together, loss=10.0, samples=16)
    assert integer(found.program) == set()
    assert found.note.startswith("the chosen regions together take 1.3e+03 ms")
    assert found.seconds["chosen"] <= found.seconds["plain"]
    strict = choose_precisions(program, context, seconds_by_block, loss=1e-12, samples=16)
    assert strict.note.startswith("every region that is faster in INT8 diverges by more than 1e-12")


@pytest.mark.parametrize("name", ["head", "head.weight"])
def test_layers_that_the_caller_names_stay_as_asked(program, context, name):
    """The exact name of a weight once lost to the choice of its region, which is the last layer's alone here."""
    found = choose_precisions(
        program, context, seconds_by_block, 1e-12, Quantize(samples=16, layers={name: "int8"}), 16
    )
    assert [name for _, name in quantised_layers(found.program)] == ["head.weight"]


def test_values_beyond_the_range_of_fp16_stay_in_fp32(context):
    torch.manual_seed(0)
    net = Net().eval()
    net.blocks[0][0].weight.data *= 5e4
    net.blocks[0][2].weight.data /= 5e4
    program = g.capture(net, torch.randn(2, 3, 8, 8), dynamic_shapes="batch")
    found = choose_precisions(program, context, seconds_by_block, loss=10.0, samples=16)
    assert found.layers["blocks.0.0.weight"] == found.layers["blocks.0.2.weight"] == "fp32"
    assert integer(found.program) == {"1"}


def test_predicted_seconds_count_layers_and_conversions(program, context):
    """By hand: a block has 2 x 8 x 16 x 64 multiply-accumulates; its input and output have 8 x 64 entries."""
    latencies = {"fp16": PerMac(4e-9, 1e-9), "int8": PerMac(1e-9, 2e-9)}
    everything = Quantize(samples=16)(program, context).program
    plain, one = predicted_seconds(latencies)(
        [program, quantised_alone(everything, {"blocks.0.0.weight", "blocks.0.2.weight"})]
    )
    macs, entries = 2 * 8 * 16 * 64, 8 * 64
    assert plain - one == pytest.approx(3e-9 * macs - 2e-9 * entries - 1e-9 * entries)
    (half,) = predicted_seconds(latencies)([quantised_alone(everything, {"blocks.0.0.weight"})])
    assert plain - half == pytest.approx(3e-9 * macs / 2 - 2e-9 * entries - 1e-9 * 2 * entries), (
        "the inner value leaves"
    )
