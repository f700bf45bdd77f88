"""Repair after every event of pruning while training: against the network just before the event, exact where it can be."""

import pytest
import torch
from torch import nn

import graphcomb
from graphcomb.graph.nodes import fetch
from graphcomb.passes import Distill, RemoveChannels, Repair
from graphcomb.passes.channels import remove_channels

from ..toys import Cut, Stop, same, state


def batches(count: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 16, 12, dtype=torch.float64, generator=generator)
    return [(part, part[:, :3].argmax(1)) for part in x]


def capture(model: nn.Module) -> graphcomb.Program:
    return graphcomb.capture(model.double().eval(), torch.zeros(2, 12).double(), dynamic_shapes="batch")


def network() -> graphcomb.Program:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)))


def pruning(**options) -> RemoveChannels:
    train = options.pop("train", {})
    training = Distill(**{"steps": 8, "lr": 0.02, "warmup": 0.0, "schedule": "constant", **train})
    return RemoveChannels(**{"ratio": 0.5, "round_to": 1, "interval": 2, "repair": True, **options}, train=training)


def test_every_event_leaves_least_squares_to_the_network_just_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer against torch's own least squares on all images, and the network before against training alone."""
    seen = []

    class Watched(Repair):
        def apply(self, dense, smaller, removed, *rest):
            before, cut = dense.copy(), smaller.copy()
            record = super().apply(dense, smaller, removed, *rest)
            seen.append((before, cut, smaller.copy(), record))
            return record

    monkeypatch.setattr(remove_channels, "Repair", lambda: Watched(ridge=0.0))
    dense, data = network(), batches()
    result = pruning()(dense, data=data, seed=5)
    assert len(seen) == len(result.record["events"]) == 2
    x = torch.cat([images for images, _ in data])
    for before, cut, repaired, record in seen:
        (row,) = record["repaired"]
        assert row["after"] == pytest.approx(row["predicted"], rel=1e-9)
        module = repaired.module()
        hidden = (x @ fetch(module, "0.weight").T + fetch(module, "0.bias")).relu()
        full = torch.cat([hidden, torch.ones(len(x), 1)], 1)
        solution = torch.linalg.lstsq(full, before.module()(x)).solution.T
        torch.testing.assert_close(fetch(module, "2.weight").data, solution[:, :-1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fetch(module, "2.bias").data, solution[:, -1], rtol=1e-9, atol=1e-9)
        assert torch.equal(fetch(module, "0.weight"), fetch(cut.module(), "0.weight"))
    trained = Distill(steps=2, lr=0.02, warmup=0.0, schedule="constant")(dense, data=data, seed=5).program
    assert same(state(seen[0][0]), state(trained)), "images are taken without disturbing the order of the data"
    assert [row["repair"] for row in result.record["events"]] == [record for *_, record in seen]
    assert graphcomb.verify.surgery(dense, result) < 1e-10


def test_an_event_that_takes_dependent_channels_changes_nothing() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(12, 8), nn.Linear(8, 3)
    with torch.no_grad():
        first.weight[1::2], first.bias[1::2] = 0.25 * first.weight[::2], 0.25 * first.bias[::2]
    dense, x = capture(nn.Sequential(first, nn.ReLU(), last)), torch.cat([images for images, _ in batches()])
    still = {"steps": 1, "lr": 1e-300, "weight_decay": 0.0}
    for repair in (False, True):
        result = pruning(train=still, schedule="one-shot", importance="magnitude", repair=repair)(dense, data=batches())
        assert result.removed["0.weight"] == {0: [1, 3, 5, 7]}
        error = float((result.program.module()(x) - dense.module()(x)).detach().abs().max())
        assert error < 1e-10 if repair else error > 1e-3


@pytest.mark.parametrize("stop", [3, 6])
def test_a_resumed_run_ends_at_the_same_bits(stop: int, tmp_path) -> None:
    dense, data = network(), batches()
    pass_ = pruning(train={"checkpoint_every": 2}, interval=1)
    whole = pass_(dense, data=data, out=tmp_path / "whole")
    with pytest.raises(Stop):
        pass_(dense, data=Cut(data, len(data) + stop), out=tmp_path / "cut")  # one pass over all takes the images
    resumed = pass_(dense, data=data, out=tmp_path / "cut")
    assert resumed.record["resumed_at"] == stop // 2 * 2
    assert same(state(resumed.program), state(whole.program))
    assert resumed.record["events"] == whole.record["events"]
    assert resumed.removed == whole.removed
