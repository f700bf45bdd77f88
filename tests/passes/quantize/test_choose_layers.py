"""Which layers become INT8: the ends of a network stay in floating point, and patterns decide over everything else."""

import onnx
import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.graph.errors import BadInput
from graphcomb.passes import Quantize
from graphcomb.runtime import export_onnx


class Detector(nn.Module):
    """A trunk with a residual block, and a head whose box edges are expectations over a softmax."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.neck, self.scores, self.edges = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 1), nn.Conv2d(8, 4 * 6, 1)
        self.decode = nn.Conv2d(6, 1, 1, bias=False)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.b(self.a(x).relu())).relu()
        x = self.neck(x).relu()
        edges = self.edges(x).flatten(2).unflatten(1, (4, 6)).transpose(1, 2).softmax(1)
        boxes = self.decode(edges).squeeze(1)
        return torch.cat([boxes * 8, self.scores(x).flatten(2).sigmoid()], 1)


class Features(nn.Module):
    """A backbone that gives the sums of its residual stream away."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, 1, 1) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x.relu())
        return x


def quantised(model, **options):
    torch.manual_seed(0)
    program = g.capture(model.eval(), torch.randn(2, 3, 16, 16), dynamic_shapes="batch")
    return Quantize(samples=4, **options)(program, data=[torch.randn(4, 3, 16, 16)])


def changed(result):
    return [row["what"].removesuffix(".weight") for row in result.record["changed"]]


def why(result, name):
    return next(row["why"] for row in result.record["refused"] if row["what"] == f"{name}.weight")


def test_first_layers_heads_and_box_decoding_stay_in_floating_point():
    result = quantised(Detector())
    assert changed(result) == ["a", "b", "neck"]
    assert why(result, "stem").startswith("it reads the network's inputs")
    for name in ("scores", "edges", "decode"):
        assert why(result, name).startswith("it computes an output")


def test_of_a_residual_stream_only_the_last_branch_computes_the_output():
    assert changed(quantised(Features())) == ["blocks.0", "blocks.1"]


def test_patterns_decide_over_everything_else_and_the_first_one_wins():
    layers = {"stem": "int8", "a.weight": "fp16", "?": "int8", "neck": "fp32"}
    result = quantised(Detector(), include=("neck.*",), exclude=("b.*",), layers=layers)
    assert changed(result) == ["stem", "b"]
    assert (why(result, "a"), why(result, "neck")) == ("fp16 was asked for", "fp32 was asked for")
    assert why(result, "scores") == "not included"
    assert result.record["fp32"] == ["neck.weight"]


def test_layers_asked_for_in_fp32_stay_so_in_an_fp16_export(tmp_path):
    result = quantised(Detector(), layers={"neck": "fp32"})
    loaded = g.load(result.program.save(tmp_path / "q.pt2"))
    report = export_onnx(loaded, tmp_path / "q.onnx", precision="fp16")
    (name,) = report.float32
    model = onnx.load(report.path)
    node = next(n for n in model.graph.node if n.name == name)
    assert (node.op_type, node.input[1]) == ("Conv", "neck.weight")
    weights = {t.name: t.data_type for t in model.graph.initializer}
    assert weights["neck.weight"] == onnx.TensorProto.FLOAT
    assert weights["scores.weight"] == onnx.TensorProto.FLOAT16


def test_options_that_do_not_fit():
    with pytest.raises(BadInput, match=r'Quantize.layers: "nek" matches no layer; there are stem.weight, a.weight'):
        quantised(Detector(), layers={"nek": "fp16"})
    with pytest.raises(BadInput, match=r"Quantize\.layers: "):
        Quantize(layers={"neck": "fp17"})
    with pytest.raises(BadInput, match=r"Quantize\.layers: "):
        Quantize(layers=["neck"])
