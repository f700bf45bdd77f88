"""`graphcomb build`: the report of a build, and the gate for CI."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

import graphcomb
from graphcomb.passes import RemoveChannels
from graphcomb.runtime.onnx import export_onnx


@pytest.fixture(autouse=True)
def _rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The same network with aligned widths, and with 61 channels in the middle, which pad."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(8, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 16, 3))
    program = graphcomb.capture(net.eval(), (torch.randn(3, 8, 12, 12),), dynamic_shapes="batch")
    odd = RemoveChannels(ratio=3 / 64, round_to=1)(program).program
    assert odd.module().get_parameter("0.weight").shape[0] == 61
    found = {"even": tmp_path / "even.onnx", "odd": tmp_path / "odd.onnx"}
    export_onnx(program, found["even"], "fp16")
    export_onnx(odd, found["odd"], "fp16")
    return found


def test_a_new_padding_kernel_fails_the_gate_and_names_pass_and_cure(cli, files, tmp_path: Path) -> None:
    outcome = cli("build", files["even"], "--target", "rtx-sm86", "--json", tmp_path / "base.json", "--batch", "1,2,4")
    assert outcome.code == 0
    assert "0 kernels only pad" in outcome.out
    base = json.loads((tmp_path / "base.json").read_text())
    assert base["target"] == "rtx-sm86"
    assert cli("build", files["even"], "--target", "rtx-sm86", "--gate", tmp_path / "base.json").code == 0

    outcome = cli("build", files["odd"], "--target", "rtx-sm86", "--gate", tmp_path / "base.json")
    assert outcome.code == 1
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith("gate: new padding kernel for 2/conv2d_1 (changed by RemoveChannels): axis 1 61 -> 62")
    assert "RemoveChannels" in outcome.out
    # What was accepted once is no news.
    assert cli("build", files["odd"], "--target", "rtx-sm86", "--json", tmp_path / "odd.json").code == 0
    assert cli("build", files["odd"], "--target", "rtx-sm86", "--gate", tmp_path / "odd.json").code == 0


def test_an_operator_that_cannot_be_parsed_fails_the_gate(cli, tmp_path: Path) -> None:
    square = helper.make_tensor_value_info("x", TensorProto.FLOAT, (4, 4))
    single = helper.make_tensor_value_info("y", TensorProto.FLOAT, ())
    graph = helper.make_graph([helper.make_node("Det", ["x"], ["y"], name="head/det")], "g", [square], [single])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "n.onnx")
    outcome = cli("build", tmp_path / "n.onnx", "--target", "rtx-sm86", "--gate", tmp_path / "base.json")
    assert outcome.code == 1
    assert "gate: " in outcome.err
    assert "head/det (Det)" in outcome.err
    assert cli("build", tmp_path / "n.onnx", "--target", "rtx-sm86").code == 2


def test_options_reach_the_library(cli, refused, files) -> None:
    assert cli("build", files["even"], "--target", "rtx-sm86", "--option", "sparse=true").code == 0
    assert "option wrong: not one of" in refused("build", files["even"], "--target", "rtx-sm86", "--option", "wrong=1")
    assert "--option sparse: expected name=value" in refused(
        "build", files["even"], "--target", "rtx-sm86", "--option", "sparse"
    )
    assert "--batch a: expected sizes" in refused("build", files["even"], "--target", "rtx-sm86", "--batch", "a")


def test_a_missing_baseline_is_bad_input(refused, files, tmp_path: Path) -> None:
    assert "cannot be read" in refused("build", files["even"], "--target", "rtx-sm86", "--gate", tmp_path / "no.json")
