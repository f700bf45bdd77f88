"""`graphcomb build`: the report of a build, and the gate for CI."""

import importlib.util
import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

import graphcomb
from graphcomb.passes import RemoveChannels
from graphcomb.runtime.export.to_onnx import export_onnx


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
    line, *others = outcome.err.strip().splitlines()
    assert [text.split(": ")[1] for text in others] == ["engine"]  # other kernels, in a larger file
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
    (tmp_path / "base.json").write_text(json.dumps({"target": "rtx-sm86", "kernels": []}))
    outcome = cli("build", tmp_path / "n.onnx", "--target", "rtx-sm86", "--gate", tmp_path / "base.json")
    assert outcome.code == 1
    assert "gate: " in outcome.err
    assert "head/det (Det)" in outcome.err
    assert cli("build", tmp_path / "n.onnx", "--target", "rtx-sm86").code == 2


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="classic TensorRT is here")
def test_what_the_dla_leaves_to_the_gpu_is_said_without_the_library(cli, files) -> None:
    outcome = cli("build", files["even"], "--target", "agx-orin", "--option", "dla=0", "--batch", "2")
    assert outcome.out.splitlines()[0] == "by its rules the DLA can run 3 of 3 layers"
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "tensorrt is not installed" in outcome.err
    model = onnx.load(files["even"])
    model.graph.node[1].op_type = "Erf"
    onnx.save(model, files["even"])
    outcome = cli("build", files["even"], "--target", "agx-orin", "--option", "dla=0", "--batch", "2")
    first, second = outcome.out.splitlines()
    assert first.endswith("2 of 3 layers")
    assert second == "1/relu (Erf) is left to the GPU: it has no Erf"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["agx-orin", "dla=0"], "input input: axes [0] are dynamic, a DLA's are not; give one batch size"),
        (["agx-orin", "dla=abc"], "option dla: a core of agx-orin, 0 to 1, not 'abc'"),
        (["rtx-sm86", "dla=0"], "option dla: rtx-sm86 has no DLA"),
        (["rtx-sm86", "workspace=true"], "option workspace: a whole number, not True"),
    ],
)
def test_options_that_cannot_be(refused, files, arguments, message) -> None:
    target, option = arguments
    assert message in refused("build", files["even"], "--target", target, "--option", option)


def test_options_reach_the_library(cli, refused, files) -> None:
    assert cli("build", files["even"], "--target", "rtx-sm86", "--option", "sparse=true").code == 0
    assert "option wrong: not one of" in refused("build", files["even"], "--target", "rtx-sm86", "--option", "wrong=1")
    assert "--option sparse: expected name=value" in refused(
        "build", files["even"], "--target", "rtx-sm86", "--option", "sparse"
    )
    assert "--batch a: expected sizes" in refused("build", files["even"], "--target", "rtx-sm86", "--batch", "a")


def test_a_bad_baseline_is_bad_input_and_nothing_is_built(refused, files, tmp_path: Path) -> None:
    arguments = ("build", files["even"], "--target", "rtx-sm86", "--gate")
    assert "cannot be read" in refused(*arguments, tmp_path / "no.json")
    (tmp_path / "base.json").write_text(json.dumps({"target": "rtx-sm86", "kernels": [{"padding": True}]}))
    assert "kernels.0.name: Field required" in refused(*arguments, tmp_path / "base.json")
    assert not list(tmp_path.glob("*.rtx"))
    (tmp_path / "base.json").write_text(json.dumps({"target": "rtx-sm86", "precision": "fp32", "kernels": []}))
    assert "the baseline has no fp16 engine for rtx-sm86 (it has fp32)" in refused(*arguments, tmp_path / "base.json")


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_gate_fails_for_every_library_that_lacks_an_operator(cli, tmp_path: Path, engine: str) -> None:
    pytest.importorskip(engine)
    x, y = (
        helper.make_tensor_value_info(n, TensorProto.UINT8, shape) for n, shape in (("x", ["n"]), ("y", list("abc")))
    )
    graph = helper.make_graph([helper.make_node("ImageDecoder", ["x"], ["y"], name="head/image")], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "n.onnx")
    (tmp_path / "base.json").write_text(json.dumps({"target": "cpu", "kernels": []}))
    arguments = ("build", tmp_path / "n.onnx", "--target", "cpu", "--engine", engine)
    assert cli(*arguments).code == 2
    outcome = cli(*arguments, "--gate", tmp_path / "base.json")
    assert outcome.code == 1
    assert outcome.err.startswith("gate: ")
    assert "head/image (ImageDecoder)" in outcome.err
