"""The benchmark on a GPU, as far as it runs without one."""

from pathlib import Path

import numpy as np
import pytest
import torch

import graphcomb
from graphcomb.runtime.onnx_file import TensorSpec

with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    gpu = pytest.importorskip("gpu")


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(1), torch.nn.Linear(288, 4))
    return graphcomb.capture(net.eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes="batch")


class Half:
    """An engine in fp16, to whose outputs something happens."""

    def __init__(self, program, change=lambda out: out):
        self.module, self.change, self.closed = program.copy().module().eval(), change, False
        self.inputs = [TensorSpec("x", "float16", (None, 3, 8, 8))]

    def run(self, inputs):
        with torch.no_grad():
            return [self.change(self.module(torch.from_numpy(inputs[0]).float()).half().numpy())]

    def close(self):
        self.closed = True


def test_the_error_of_an_engine_is_kept(program, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "opened", lambda *arguments: Half(program))
    built, errors, failed = gpu.engines("tensorrt", {"dense": program}, [4, 8], tmp_path)
    assert (built.keys(), failed) == ({"dense"}, {})
    assert 0 < errors["dense"] < 2e-3


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda out: out * np.nan, "wrong outputs: not finite"),
        (lambda out: out + np.float16(np.inf), "wrong outputs: not finite"),
        (lambda out: 1.2 * out, "wrong outputs: error 0.2"),
        (lambda out: out[:, :2], "gives shape"),
    ],
)
def test_an_engine_that_computes_something_else_is_not_measured(program, monkeypatch, change, why):
    engine = Half(program, change)
    monkeypatch.setattr(gpu, "opened", lambda *arguments: engine)
    row = gpu.measure("net", "tensorrt", [2], 0.1, {"dense": program})
    assert why in row["failed"]["dense"]
    assert row["batches"] == row["errors"] == {}
    assert engine.closed
