"""RemoveChannels with a predicted latency as its target."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import pytest
import torch
from torch import nn

from graphcomb import capture, verify
from graphcomb.graph.comb.solve import Comb
from graphcomb.graph.errors import BadInput, Unreachable
from graphcomb.graph.workload.layer import Layer
from graphcomb.graph.workload.layers import Layers
from graphcomb.passes import Distill, RemoveChannels
from graphcomb.runtime.summary import Uncertainty


class PerMac:
    """A device that pads channels to 4 and takes a nanosecond per multiply-accumulate."""

    per_run = 0.0

    def __init__(self) -> None:
        self.prepared: set[str] = set()
        self.asked: set[str] = set()

    def __str__(self) -> str:
        return "one nanosecond per MAC"

    def prepare(self, layers: Iterable[Layer], progress: bool = False) -> None:
        self.prepared |= {str(layer) for layer in layers}

    def seconds(self, layer: Layer) -> float:
        self.asked.add(str(layer))
        return 1e-9 * layer.macs(4)


@functools.cache
def program(silent: int = 0):
    """silent: how many channels of the middle convolution hardly compute anything."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(24, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    with torch.no_grad():
        for tensor in (model[3].weight, model[3].bias, model[5].weight.transpose(0, 1)):
            tensor[:silent] *= 1e-6
    return capture(model, torch.randn(2, 1, 8, 8), dynamic_shapes="batch")


def batches(count: int = 4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 8, 1, 8, 8, generator=generator)
    return [(x, torch.randint(4, (8,), generator=generator)) for x in images]


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("importance", ["magnitude", "fisher"])
def test_the_prediction_is_within_the_share_and_the_surgery_exact(share: float, importance: str) -> None:
    dense = program()
    latency = PerMac()
    result = RemoveChannels(latency=share, importance=importance, round_to=4)(dense, data=batches(), latency=latency)
    found = result.record["latency"]
    assert found["by"] == "one nanosecond per MAC"
    assert 0.5 * share < found["predicted"]["after"] / found["predicted"]["before"] <= share
    sliced = [layer for _, layer in Layers(Comb(result.program)).at({})]
    assert found["predicted"]["after"] == pytest.approx(sum(map(latency.seconds, sliced)))
    assert latency.asked <= latency.prepared
    assert verify.surgery(dense, result) < 1e-12


def test_a_time_is_taken_as_it_is() -> None:
    result = RemoveChannels(latency="120 us", round_to=4)(program(), latency=PerMac())
    assert 60e-6 < result.record["latency"]["predicted"]["after"] <= 120e-6


def test_pruning_while_training_ends_within_the_latency() -> None:
    pass_ = RemoveChannels(latency=0.4, round_to=4, interval=2, train=Distill(steps=12, alpha=0.0))
    result = pass_(program(), data=batches(12), latency=PerMac())
    predicted = result.record["latency"]["predicted"]
    assert predicted["after"] <= 0.4 * predicted["before"]
    assert len([e for e in result.record["events"] if e["removed"]]) > 1


def test_a_plan_is_within_the_latency_and_what_it_fixes_stays() -> None:
    dense, pass_ = program(), RemoveChannels(latency=0.5, round_to=4)
    rows = pass_.plan(dense, _context())
    kept = {r["name"]: r["keep"] for r in rows if "frozen" not in r}
    assert any(r["keep"] < r["size"] for r in rows)
    name = next(iter(kept))
    result = pass_(dense, latency=PerMac(), plan={"groups": [{"name": name, "keep": 15}]})
    assert next(c for c in result.record["changed"] if c["what"] == name)["after"] == 15
    assert result.record["latency"]["predicted"]["after"] <= 0.5 * result.record["latency"]["predicted"]["before"]


def _context():
    from graphcomb.passes import Context

    return Context(latency=PerMac())


def test_what_cannot_be_reached_is_said_before_training() -> None:
    for pass_ in (RemoveChannels(latency="1 us"), RemoveChannels(latency=0.001, train=Distill(steps=2))):
        with pytest.raises(Unreachable, match=r"RemoveChannels.latency: .* ms of .* ms cannot be reached; .* ms can"):
            pass_(program(), latency=PerMac(), data=batches())


def test_a_latency_needs_something_that_predicts_it() -> None:
    with pytest.raises(BadInput, match="nothing predicts latencies here"):
        RemoveChannels(latency=0.5)(program())


@pytest.mark.parametrize("wrong", [0, -0.5, 1.5, "fast", "3", "3 hours", "-1 ms", float("nan"), "inf ms"])
def test_wrong_latencies_are_named(wrong) -> None:
    with pytest.raises(BadInput, match=r"RemoveChannels\.latency: (a share|a finite number, not nan)"):
        RemoveChannels(latency=wrong)


def test_only_one_target() -> None:
    with pytest.raises(BadInput, match="macs and latency"):
        RemoveChannels(latency=0.5, macs=0.5)


class Sheet(PerMac):
    """The same, of which nothing was measured."""

    measured, error = False, Uncertainty(factor=2.0, source="nothing was measured")

    def __str__(self) -> str:
        return "a data sheet"


def test_a_prediction_without_measurements_leaves_a_quarter_of_the_macs() -> None:
    for pass_ in (
        RemoveChannels(latency=0.15, round_to=4),
        RemoveChannels(latency=0.15, round_to=4, train=Distill(steps=2)),
    ):
        with pytest.raises(
            Unreachable, match=r"a data sheet predicts \(off by up to 2 times.*and least_macs is 25%; calib"
        ):
            pass_(program(), latency=Sheet(), data=batches())
    lower = RemoveChannels(latency=0.15, round_to=4, least_macs=0.05)(program(), latency=Sheet())
    assert lower.program.macs < 0.15 * program().macs
    measured = RemoveChannels(latency=0.15, round_to=4)(program(), latency=PerMac())
    assert measured.program.macs == lower.program.macs
    with pytest.raises(Unreachable, match=r"leaves .* of the MACs, and least_macs is 50%; ask for a higher latency"):
        RemoveChannels(latency=0.3, round_to=4, least_macs=0.5)(program(), latency=PerMac())


class PerWidth(PerMac):
    """A device that takes a microsecond for every channel that a layer computes, however much arithmetic that is."""

    def seconds(self, layer: Layer) -> float:
        return 1e-6 * dict(layer.sizes).get("outputs", 0)


@pytest.mark.parametrize("train", [None, {"schedule": "one-shot"}, {"interval": 2}])
def test_what_the_scores_choose_leaves_the_least_macs_too(train: dict | None) -> None:
    """Scores that all but the middle group deserves lead to few MACs, where those of before training lead to more."""
    dense = program(silent=20)
    options: dict = {} if train is None else {"train": Distill(steps=8, lr=1e-9), **train}
    pass_ = RemoveChannels(latency=0.6, round_to=4, importance="magnitude", **options)
    free = pass_(dense, data=batches(8), latency=PerWidth())
    assert free.program.macs < 0.2 * dense.macs
    held = dataclasses.replace(pass_, least_macs=0.2)(dense, data=batches(8), latency=PerWidth())
    assert held.program.macs >= 0.2 * dense.macs
    predicted = held.record["latency"]["predicted"]
    assert predicted["after"] <= 0.6 * predicted["before"]
    with pytest.raises(Unreachable, match=r"leaves \d+\.\d% of the MACs, and least_macs is 90%"):
        dataclasses.replace(pass_, least_macs=0.9)(dense, data=batches(8), latency=PerWidth())


def test_least_macs_is_a_share_and_for_latency_targets() -> None:
    for wrong in ({"latency": 0.5, "least_macs": 1.5}, {"macs": 0.5, "least_macs": 0.1}):
        with pytest.raises(BadInput, match=r"RemoveChannels\.least_macs"):
            RemoveChannels(**wrong)
