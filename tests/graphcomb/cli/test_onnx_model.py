"""An ONNX file as the model: in recipes and on the command line."""

import json
from pathlib import Path

import onnx
import torch

from graphcomb import load

PRUNE, SHORT = [{"RemoveChannels": {"ratio": 0.5, "round_to": 1}}], {"report": False, "bench": False}


def an_onnx_file(path: Path) -> Path:
    weights = [torch.randn(8, 3, 3, 3), torch.randn(5, 8)]
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N,3,height,width] image) => (float[N,5] scores) {
            a = Conv <kernel_shape = [3,3], pads = [1,1,1,1]> (image, stem)
            b = Relu(a)
            c = GlobalAveragePool(b)
            d = Flatten(c)
            scores = Gemm <transB = 1> (d, head)
        }""")
    for name, value in zip(("stem", "head"), weights, strict=True):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name))
    onnx.save(model, str(path))
    return path


def test_a_recipe_prunes_an_onnx_file(cli, recipe, tmp_path: Path) -> None:
    file = an_onnx_file(tmp_path / "net.onnx")
    path = recipe(model=str(file), inputs=[[1, 3, 8, 8]], passes=PRUNE, data=None, outputs=SHORT)
    outcome = cli("run", path, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    program = load(tmp_path / "out" / "model.pt2")
    assert {n: tuple(p.shape) for n, p in program.module().named_parameters()} == {"stem": (4, 3, 3, 3), "head": (5, 4)}
    again = onnx.load(str(tmp_path / "out" / "model.onnx")).graph
    assert ([i.name for i in again.input], [o.name for o in again.output]) == (["image"], ["scores"])


def test_comb_takes_an_onnx_file(cli, refused, tmp_path: Path) -> None:
    file = an_onnx_file(tmp_path / "net.onnx")
    outcome = cli("comb", file, "--input", "1,3,8,8", "--json")
    assert {g["name"] for g in json.loads(outcome.out)["groups"] if not g["frozen"]} == {"stem:0"}
    assert refused("comb", file).startswith(f"model: {file}: the input image (N x 3 x height x width): give its sizes")
    assert refused("comb", tmp_path / "absent.onnx") == f"model: {tmp_path}/absent.onnx: no such file"
    said = refused("comb", file, "--arg", "classes=3")
    assert said == "model: an .onnx file takes no arguments but shapes, {name of an input: [sizes]}"
