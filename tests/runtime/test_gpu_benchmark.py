"""The benchmark on a GPU, as far as it runs without one: all of it, with small networks on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphcomb
from graphcomb.runtime.onnx_file import TensorSpec

with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    gpu = pytest.importorskip("gpu")

SMALL = ["--batches", "1", "2", "--precisions", "fp16", "--seconds", "0.3", "--engines", "eager", "onnxruntime"]
TOO_LONG = """
import sys, time
sys.path.insert(0, sys.argv[1])
import gpu

def measure(bench, step):
    try:
        time.sleep(5)
    except Exception:
        return {"why": "a library took it for an error of its own"}

gpu.Bench.measure, gpu.NETWORKS = measure, ("resnet50",)
sys.exit(gpu.main(sys.argv[2:]))
"""
STEP = gpu.Step("net", "tensorrt", "fp16", "channels 2x")


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(288, 4))
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


def test_the_error_of_an_engine_is_small(program):
    assert 0 < gpu.checked(program, Half(program), 4, 0.05) < 2e-3


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda out: out * np.nan, "wrong outputs: not finite"),
        (lambda out: out + np.float16(np.inf), "wrong outputs: not finite"),
        (lambda out: 1.2 * out, "wrong outputs: error 0.2"),
        (lambda out: out[:, :2], "gives shape"),
    ],
)
def test_an_engine_that_computes_something_else_is_not_measured(program, monkeypatch, tmp_path, change, why):
    engine = Half(program, change)
    monkeypatch.setattr(gpu, "opened", lambda *arguments: engine)
    bench = gpu.Bench([2], 0.1, tmp_path)
    monkeypatch.setattr(gpu, "Programs", lambda name: {"dense": program, STEP.variant: program})
    row = bench.measure(STEP)
    assert why in row["why"]
    assert "batches" not in row
    assert engine.closed


# ------------------------------------------------------------------------------------------------- the whole script
def small(name):
    """A stand-in for each network."""
    torch.manual_seed(0)
    if name == gpu.FIRST:
        timm = pytest.importorskip("timm.models.vision_transformer")
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
        return timm.VisionTransformer(**sizes).eval(), (3, 32, 32)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(32, 5)).eval(), (3, 16, 16)


@pytest.fixture
def rehearse(tmp_path, monkeypatch):
    """Run the script with small networks: `rehearse(*arguments)` returns its results and its table."""
    monkeypatch.setattr(gpu, "network", small)
    monkeypatch.setattr(gpu, "NETWORKS", ("resnet50",))
    results = tmp_path / "gpu.json"

    def run(*arguments):
        assert gpu.main([*SMALL, "--results", str(results), *arguments]) == 0
        return json.loads(results.read_text()), results.with_suffix(".md").read_text()

    return run


@pytest.mark.slow
def test_the_whole_script_on_a_cpu(rehearse, monkeypatch, capsys):
    pytest.importorskip("torch_pruning")
    data, table = rehearse()
    rows = data["rows"]
    assert len(rows) == 3 + 3 + 4
    assert {row["why"] for row in rows.values() if "why" in row} == set()
    first = [row for row in rows.values() if row["engine"] == "eager"]
    assert [row["variant"] for row in first] == ["torch-pruning", "channels", "depth"]
    assert all(row["macs"][1] < 0.5 * row["macs"][0] for row in first)
    assert all(set(row["batches"]) == {"1", "2"} and row["errors"][1] < 0.05 for row in rows.values())
    assert data["environment"]["cpu"]
    assert data["begun"] == {}
    lines = table[table.index("| --- ") :].splitlines()
    assert "published for an A5000 | 17.6 to 4.61 | 5.21 to 3.99 | 1.31 |" in lines[1]
    assert len(lines) == 2 + 2 * len(rows)
    # A second run has nothing to do, and one that is asked again does the steps that are named.
    monkeypatch.setattr(gpu.Bench, "measure", lambda bench, step: {"why": "asked again"})
    assert rehearse()[0]["rows"] == rows
    again = rehearse("--again", "--only", "resnet50")[0]["rows"]
    assert [row["why"] for row in again.values() if "why" in row] == ["asked again"] * 4
    assert "see " in capsys.readouterr().out


def test_a_run_resumes_and_says_what_is_left(rehearse, monkeypatch, capsys):
    done = []

    def measure(bench, step):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(step.key)
        return {"why": "measured"}

    monkeypatch.setattr(gpu.Bench, "measure", measure)
    for _ in range(2):  # the process ends twice in the third step
        with pytest.raises(KeyboardInterrupt):
            rehearse()
    monkeypatch.setattr(gpu.Bench, "measure", lambda bench, step: done.append(step.key) or {"why": "measured"})
    rows = rehearse()[0]["rows"]
    assert [row["why"] for row in rows.values()].index("the process ended 2 times in this step") == 2
    assert len(done) == len(set(done)) == len(rows) - 1
    rehearse("--again", "--minutes", "0")
    assert "steps are left; run it again" in capsys.readouterr().out


def test_a_step_that_takes_too_long_is_given_up(tmp_path):
    """In a process of its own, since an alarm interrupts whatever a process does."""
    results, folder = tmp_path / "gpu.json", str(Path(gpu.__file__).parent)
    command = [sys.executable, "-c", TOO_LONG, folder, *SMALL, "--results", str(results), "--step-seconds", "0.02"]
    subprocess.run(command, check=True)
    rows = json.loads(results.read_text())["rows"]
    assert {row["why"] for row in rows.values()} == {"it took more than 0.02 s"}


def test_results_of_another_machine_are_kept(rehearse, monkeypatch):
    monkeypatch.setattr(gpu.Bench, "measure", lambda bench, step: {"why": "measured"})
    rehearse()
    monkeypatch.setattr("graphcomb.runtime.measure.environment._cpu", lambda: "another one")
    with pytest.raises(SystemExit, match="give --results"):
        rehearse()
