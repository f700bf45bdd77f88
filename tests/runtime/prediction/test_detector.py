"""A one-stage detector's predicted latency: against a public figure, and as a target."""

from pathlib import Path

import pytest
import torch

import graphcomb
from graphcomb.passes import RemoveChannels
from graphcomb.runtime import Roofline, get_target
from graphcomb.runtime.prediction.layer_report import predict

with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    kernel_networks = pytest.importorskip("kernel_networks")


@pytest.fixture(scope="module")
def detector():
    """3.2 M parameters, and the MACs of a YOLOv8n at 640 x 640."""
    program = graphcomb.capture(kernel_networks.make("own/yolo_n"), (torch.randn(1, 3, 640, 640),))
    assert program.params == 3_157_184
    assert program.macs / 2 == pytest.approx(4.37e9 / 2, rel=0.01)
    return program


def test_the_public_figure_is_within_the_error_that_is_told(detector):
    """A YOLOv8n in INT8 takes 3.49 ms on an Orin Nano."""
    found = predict({"before": detector}, get_target("orin-nano"), "int8")
    factor = 3.49 / found["ms"]["before"]
    assert 1 < factor < found["uncertainty"]["factor"]
    assert f"on Orin take 0.8 and {factor:.1f} times as long as predicted" in found["uncertainty"]["source"]


def test_a_latency_target_takes_what_is_slow_and_not_the_network(detector):
    """When activations and concatenations counted as kernels, this target left 6 % of the parameters."""
    target = get_target("orin-nx")
    result = RemoveChannels(latency=0.6)(detector, target=target, latency=Roofline(target, "fp16"))
    found = result.record["latency"]["predicted"]
    assert found["after"] <= 0.6 * found["before"]
    assert result.program.params > 0.5 * detector.params
    assert result.program.macs > 0.3 * detector.macs
