"""Shapes and batches on the command line, the exit code of `bench`, and warnings."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graphcomb
from graphcomb import runtime
from graphcomb.cli.shared.shapes import read_ranges, read_shapes, with_batch
from graphcomb.graph.errors import BadInput
from graphcomb.runtime.bundle.run import run_bundle
from graphcomb.runtime.measure.bench import BenchResult
from graphcomb.runtime.onnx_file import check_model, precision
from graphcomb.runtime.summary import Timing


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A convolution of which only the channels are fixed."""
    sides = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", c, "h", "w"]) for n, c in (("image", 3), ("y", 4))
    ]
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "weight")
    nodes = [helper.make_node("Conv", ["image", "weight"], ["y"], "conv", pads=[1, 1, 1, 1])]
    graph = helper.make_graph(nodes, "g", sides[:1], sides[1:], [weight])
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


# --------------------------------------------------------------------------------------------------------------- texts
def test_shapes_are_read() -> None:
    assert read_shapes(["x=1x3x480x640", "a=b=2x3"]) == {"x": (1, 3, 480, 640), "a=b": (2, 3)}
    assert read_ranges(["x=1x3,2x3,8x3"]) == {"x": ((1, 3), (2, 3), (8, 3))}
    assert with_batch([], 16) == [[16, 3, 224, 224]]
    assert with_batch([[1, 3, 8, 8], [1, 5], [7]], 4) == [[4, 3, 8, 8], [4, 5], [7]]
    assert with_batch([[2, 3]], None) == [[2, 3]]


@pytest.mark.parametrize("text", ["x", "x=", "=1x3", "x=1,3,4,5", "x=1x3xa", "x=0x3", "x=1x3,2x3", "x=-1x3"])
def test_texts_that_are_no_shapes(text: str) -> None:
    with pytest.raises(BadInput, match=r"--shape .*: "):
        read_shapes([text])


# ------------------------------------------------------------------------------------------------------------ commands
def test_bench_takes_shapes(cli, refused, model: Path, tmp_path: Path) -> None:
    assert "--shape image=1x3xNxN" in refused("bench", model, model, "--seconds", "0.2")
    assert "no input imag; did you mean image?" in refused("bench", model, model, "--shape", "imag=1x3x8x8")
    outcome = cli("bench", model, model, "--shape", "image=2x3x12x16", "--seconds", "3", "--out", tmp_path / "o.json")
    found = json.loads((tmp_path / "o.json").read_text())
    assert outcome.code == int(found["ratio"] is None), outcome.err  # which a busy machine may have none of


def test_bundle_takes_shapes(cli, refused, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    assert "--shape image=1x3xNxN" in refused("bundle", f"net={model}", "--out", out, "--precision", "fp32")
    arguments = ("--out", out, "--precision", "fp32", "--shape", "image=2x3x12x16")
    assert cli("bundle", f"net={model}", *arguments).code == 0
    with np.load(out / "net" / "reference.npz") as data:
        assert data["input:image"].shape == (2, 3, 12, 16)
    quick = ["--engine", "onnxruntime", "--rounds", "1", "--power-seconds", "0", "--idle-seconds", "0"]
    assert run_bundle(out, tmp_path / "r.json", arguments=quick)["models"]["net"]["parity"]["error"] == 0
    assert "--shape: a bundle has the shapes" in cli("bench", out, "--shape", "image=2x3x12x16").err


def test_build_takes_shapes(cli, refused, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert "--shape image=Nx3xNxN" in refused("build", model, "--target", "rtx-sm86")
    assert cli("build", model, "--target", "rtx-sm86", "--shape", "image=1x3x8x8,1x3x12x16,2x3x32x32").code == 0
    assert "is not smallest <= best <= largest" in refused(
        "build", model, "--target", "rtx-sm86", "--shape", "image=2x3x8x8,1x3x12x16,2x3x32x32"
    )


CALLABLE = ("torch.nn:Conv2d", "--arg", "in_channels=3", "--arg", "out_channels=8", "--arg", "kernel_size=3")


def macs(path: Path) -> int:
    return sum(row["before"]["macs"] for row in json.loads(path.read_text())["layers"])


def test_predict_counts_the_batch_that_is_asked_for(cli, refused, tmp_path: Path) -> None:
    out = tmp_path / "p.json"

    def predicted(*arguments: object) -> tuple[int, int]:
        outcome = cli("predict", *CALLABLE, "--json", out, *arguments)
        assert outcome.code == 0, outcome.err
        return macs(out), json.loads(out.read_text())["batch"]

    assert predicted("--input", "1,3,16,16") == (14 * 14 * 27 * 8, 1)
    assert predicted("--input", "1,3,16,16", "--batch", "16") == (16 * 14 * 14 * 27 * 8, 16)
    assert predicted("--input", "4,3,16,16") == (4 * 14 * 14 * 27 * 8, 4)
    assert predicted("--shape", "input=1x3x10x20", "--batch", "2") == (2 * 8 * 18 * 27 * 8, 2)
    assert "--batch 16: the shapes have a batch of 4" in refused(
        "predict", *CALLABLE, "--input", "4,3,9,9", "--batch", 16
    )
    assert "--shape x: the model has no such input; known: input" in refused(
        "predict", *CALLABLE, "--shape", "x=1x3x9x9"
    )


def test_predict_takes_saved_programs_at_shapes(cli, refused, tmp_path: Path) -> None:
    net, out = torch.nn.Conv2d(3, 8, 3), tmp_path / "p.json"
    sizes = {2: torch.export.Dim("h", min=8), 3: torch.export.Dim("w", min=8)}
    graphcomb.capture(net, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: torch.export.Dim("n")} | sizes,)).save(
        tmp_path / "dynamic.pt2"
    )
    graphcomb.capture(net, (torch.randn(4, 3, 16, 16),)).save(tmp_path / "fixed.pt2")
    arguments = ("predict", tmp_path / "dynamic.pt2", "--shape", "input=3x3x10x20", "--json", out)
    assert cli(*arguments).code == 0
    assert (macs(out), json.loads(out.read_text())["batch"]) == (3 * 8 * 18 * 27 * 8, 3)
    assert cli("predict", tmp_path / "fixed.pt2", "--json", out).code == 0
    assert (macs(out), json.loads(out.read_text())["batch"]) == (4 * 14 * 14 * 27 * 8, 4)
    assert "has a fixed batch of 4" in refused("predict", tmp_path / "fixed.pt2", "--batch", "2")


def test_bench_without_a_figure_is_no_success(cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = [Timing(name=name, runs=0, rejected=9, repeats=1, ms={}) for name in "ab"]
    result = BenchResult(
        timings=timings, ratios={"b": None}, ratio=None, rounds=0, rejected=9, seconds=1.0, note="no figure: busy",
        environment={}, contended=True,
    )  # fmt: skip
    monkeypatch.setattr(runtime, "bench", lambda *given, **options: result)
    outcome = cli("bench", model, model)
    assert outcome.code == 1
    assert "no figure: busy" in outcome.out


def test_weights_in_constants_have_a_precision_too(model: Path) -> None:
    found = onnx.load(model)
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float16), "weight")
    found.graph.node.insert(0, helper.make_node("Constant", [], ["weight"], "constant", value=weight))
    del found.graph.initializer[:]
    for side in (*found.graph.input, *found.graph.output):
        side.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(found, model)
    assert precision(check_model(model)) == "fp16"


# ------------------------------------------------------------------------------------------------------------ warnings
def test_warnings_are_one_line_each(cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphcomb's and the user's; not those of libraries, nor of what is deprecated."""

    def bench(*given: object, **options: object) -> None:
        for _ in range(2):
            warnings.warn("the GPU is taken\nfor another", stacklevel=2)  # as seen from graphcomb.cli
        warnings.warn("the user's", stacklevel=1)
        warnings.warn("soon gone", DeprecationWarning, stacklevel=2)
        warnings.warn_explicit("a library's", UserWarning, torch.__file__, 1)
        raise BadInput("far enough")

    monkeypatch.setattr(runtime, "bench", bench)
    outcome = cli("bench", model, model)
    assert outcome.err.splitlines() == [
        "warning: the GPU is taken for another", "warning: the user's", "error: far enough",
    ]  # fmt: skip


def test_a_gpu_that_is_taken_for_one_of_several_is_said(cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphcomb.runtime.devices import here
    from graphcomb.runtime.engines import backends

    class Orin:
        compute_capability = (8, 7)

    monkeypatch.setattr(here, "Cuda", Orin)
    monkeypatch.setattr(here, "_machine_names", set)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    outcome = cli("bench", model, model, "--engine", "tensorrt", "--shape", "image=1x3x8x8")
    assert outcome.code == 2
    assert outcome.err.splitlines()[0].startswith(
        "warning: this machine's GPU (SM87) is taken for orin-nano; it may be"
    )
