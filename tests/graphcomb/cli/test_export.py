"""`graphcomb export`, on a toy network."""

import json

import numpy as np
import onnx
import onnxruntime

from graphcomb import load


def test_a_model_becomes_a_file_that_computes_the_same(cli, recipe, tmp_path) -> None:
    assert cli("run", recipe(passes=[{"RemoveChannels": {"ratio": 0.5, "round_to": 1}}]), "--out", tmp_path).code == 0
    program = load(tmp_path / "model.pt2")
    outcome = cli(
        "export", tmp_path / "model.pt2", tmp_path / "m.onnx", "--target", "drive-orin", "--json", tmp_path / "r.json"
    )
    assert outcome.code == 0, outcome.err
    assert "opset 17" in outcome.out  # the highest that TensorRT 8.6 there parses
    assert "worst error of an output" in outcome.out
    report = json.loads((tmp_path / "r.json").read_text())
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == report["opset"] == 17
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    found = session.run(None, {session.get_inputs()[0].name: program.args[0].numpy()})[0]
    wanted = program.module().eval()(*program.args).detach().numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_half_precision_names_what_stays_in_fp32(cli, tmp_path) -> None:
    outcome = cli("export", "toys:net", tmp_path / "m.onnx", "--precision", "fp16", "--keep-fp32", "*", "--quiet")
    assert outcome.code == 0, outcome.err
    assert "stays in fp32: Gemm: asked for" in outcome.out
    types = {t.data_type for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT in types


def test_what_a_target_cannot_take_is_refused(refused, tmp_path) -> None:
    assert "precision fp8: not known" in refused("export", "toys:net", tmp_path / "m.onnx", "--precision", "fp8")
    assert "opset" in refused("export", "toys:net", tmp_path / "m.onnx", "--target", "drive-orin", "--opset", "20")
    assert "ends in .onnx" in refused("export", "toys:net", tmp_path / "m.pt")
    assert not list(tmp_path.glob("m.*"))
