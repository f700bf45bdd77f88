"""What CONTRIBUTING says of a target and of a backend is true: its row and its file, taken from the text, work."""

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import graphcomb
from graphcomb.graph.errors import BadInput
from graphcomb.passes import RemoveChannels
from graphcomb.runtime import (
    TARGETS,
    bench,
    build_engine,
    export_onnx,
    get_target,
    load_engine,
    open_engine,
    predict,
    read_results,
    run_bundle,
    write_bundle,
)  # fmt: skip
from graphcomb.runtime.devices import table
from graphcomb.runtime.engines import backends

from .devices.test_table import test_every_type_of_a_device_has_alignment_and_peak as check_row

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
(ROW,) = re.findall(r"```python\n(.*?)```", TEXT[TEXT.index("## A target") : TEXT.index("## A backend")], re.DOTALL)
MODULE, BACKEND = re.findall(r"```python\n(.*?)```", TEXT[TEXT.index("## A backend") :], re.DOTALL)


@pytest.fixture
def program():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 8, 3))
    return graphcomb.capture(net.eval(), torch.randn(1, 3, 8, 8))


@pytest.fixture
def target(monkeypatch):
    """The row of the text, in the table."""
    row = eval(ROW, dict(vars(table)))
    monkeypatch.setitem(TARGETS, row.name, row)  # type: ignore[arg-type]
    return row


@pytest.fixture
def backend(monkeypatch):
    """The module and the row of the text; returns the backend's name."""
    ((name, row),) = eval(BACKEND, dict(vars(backends))).items()
    module = ModuleType(f"{backends.__package__}.{row.module}")
    module.__package__ = backends.__package__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(MODULE, f"runtime/engines/{row.module}.py", "exec"), vars(module))
    monkeypatch.setitem(backends.BACKENDS, name, row)
    return name


def test_a_row_is_all_that_a_target_takes(target, program, tmp_path) -> None:
    assert get_target(target.name) is target
    check_row(target.name)
    assert target.opset == 20  # of the oldest TensorRT that the row names
    result = RemoveChannels(ratio=0.4)(program, target=target, dtype="fp16")
    assert result.program.params < program.params
    found = predict({"before": program, "after": result.program}, target, "fp16")
    assert found["by"] == "roofline of Jetson Orin Nano 4GB, fp16"
    assert 0 < found["ms"]["after"] <= found["ms"]["before"]
    folder = write_bundle(tmp_path / "bundle", {"dense": program}, "fp16", target.name)
    quickly = ["--engine", "onnxruntime", "--rounds", "1", "--power-seconds", "0.1", "--idle-seconds", "0"]
    run_bundle(folder, tmp_path / "r.json", arguments=[*quickly, "--quiet"])
    assert read_results(tmp_path / "r.json")["bundle"]["target"] == target.name


def test_a_file_and_a_row_are_all_that_a_backend_takes(backend, program, tmp_path) -> None:
    path = export_onnx(program, tmp_path / "net.onnx").path
    report = build_engine(path, "cpu", backend=backend)
    assert [kernel.kind for kernel in report.kernels] == ["Conv", "Relu", "Conv"]
    with pytest.raises(BadInput, match=f"^option threads: not one of backend {backend}; it takes none$"):
        build_engine(path, "cpu", backend=backend, threads=2)
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8), np.float32)
    engine = open_engine(path, backend)
    np.testing.assert_allclose(engine.run([x])[0], load_engine(path).run([x])[0], atol=1e-5)
    with pytest.raises(BadInput, match=r"^input x: the engine takes float32, got float64|takes float32"):
        engine.run([x.astype(np.float64)])
    with pytest.raises(BadInput, match=r"option verbose: a whole number, not 'loud'"):
        load_engine(path, backend, verbose="loud")
    assert bench([path, path], engine=backend, names=["a", "b"], seconds=0.2, min_runs=1).timings[0].runs
