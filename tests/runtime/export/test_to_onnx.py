"""Export of small models, and of the families (slow): what comes out, and that wrong results are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import graphcomb as g
import graphcomb.runtime.export.to_onnx as onnx_module
from graphcomb.graph.errors import BadInput, Refused
from graphcomb.graph.program import Program
from graphcomb.runtime import export_onnx, load_engine

from .toys import calibrated, captured, float_types


class Attention(nn.Module):
    """One block of multi-head attention, with GELU and LayerNorm, a class token and an added mask."""

    def __init__(self, width: int = 16, heads: int = 2, tokens: int = 9) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.register_buffer("mask", torch.triu(torch.full((tokens, tokens), -1e9), 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = torch.nn.functional.scaled_dot_product_attention(q, k, v, self.mask)
        return self.out(torch.nn.functional.gelu(x.transpose(1, 2).reshape(b, n, c)))


def test_fp32_is_checked_at_several_batch_sizes(program: Program, net: nn.Module, tmp_path: Path) -> None:
    report = export_onnx(program, tmp_path / "net.onnx")
    assert [(c.inputs, c.batch) for c in report.checks] == [("example", 3), ("random", 1), ("random", 3), ("random", 4)]
    assert report.parity is not None
    assert 0 < report.parity < 1e-5
    assert (report.opset, report.precision, report.warnings) == (18, "fp32", [])
    assert [(i.name, i.dtype, i.shape) for i in report.inputs] == [("x", "float32", (None, 3, 12, 12))]
    assert [(o.name, o.shape) for o in report.outputs] == [("output", (None, 5))]
    assert report.bytes == report.path.stat().st_size
    assert set(report.types) == {"fp32", "int64"}
    assert float_types(report.path) == {onnx.TensorProto.FLOAT}
    assert report.to_dict()["parity"] == report.parity
    x = torch.randn(7, 3, 12, 12)
    (found,) = load_engine(report.path).run([x.numpy()])
    np.testing.assert_allclose(found, net(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert [f.name for f in tmp_path.iterdir()] == ["net.onnx"]


def test_the_graph_is_small_and_named_after_the_modules(program: Program, tmp_path: Path) -> None:
    report = export_onnx(program, tmp_path / "net.onnx")
    assert report.nodes["Conv"] == 2
    assert "BatchNormalization" not in report.nodes
    assert not set(report.nodes) & {"Gather", "Range", "Shape", "Constant"}
    model = onnx.load(report.path)
    names = [n.name for n in model.graph.node]
    assert len(set(names)) == len(names)
    assert any(n.startswith("body.2/") for n in names)
    assert {t.name for t in model.graph.initializer} >= {"stem.0.weight", "head.bias"}
    assert b"site-packages" not in report.path.read_bytes()
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_program_is_left_as_it_was(net: nn.Module, tmp_path: Path) -> None:
    program = captured(net, 3, 12, 12)
    program.module().train()
    before = {k: v.clone() for k, v in program.module().state_dict().items()}
    code = program.module().code
    report = export_onnx(program, tmp_path / "net.onnx", "fp16")
    assert report.parity is not None
    assert report.parity < 1e-2
    assert program.module().training
    assert program.module().code == code
    assert all(torch.equal(v, before[k]) for k, v in program.module().state_dict().items())


def test_fp16_is_strongly_typed_and_its_error_stated(program: Program, tmp_path: Path) -> None:
    single = export_onnx(program, tmp_path / "net.onnx")
    half = export_onnx(program, tmp_path / "half.onnx", "fp16", target="rtx-sm86")
    assert float_types(half.path) == {onnx.TensorProto.FLOAT16}
    assert half.nodes == single.nodes
    assert {i.dtype for i in (*half.inputs, *half.outputs)} == {"float16"}
    assert half.float32 == half.clamped == {}
    inputs = ["example", *["random"] * 3]
    assert [c.inputs for c in half.checks] == [*inputs, *(f"{i}, every operator rounded to fp16" for i in inputs)]
    assert single.parity is not None
    assert half.parity is not None
    assert 10 * single.parity < half.parity < 1e-2
    assert half.bytes < 0.75 * single.bytes


def test_a_static_program_stays_static(net: nn.Module, tmp_path: Path) -> None:
    report = export_onnx(captured(net, 3, 12, 12, dynamic=False, batch=1), tmp_path / "net.onnx")
    assert report.inputs[0].shape == (1, 3, 12, 12)
    assert [(c.inputs, c.batch) for c in report.checks] == [("example", None), ("random", None)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_attention_is_matmul_softmax_matmul(precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = export_onnx(captured(Attention().eval(), 8, 16), tmp_path / "a.onnx", precision)
    assert report.parity is not None
    assert report.parity < {"fp32": 1e-5, "fp16": 5e-3}[precision]
    model = onnx.load(report.path)
    by_output = {o: n for n in model.graph.node for o in n.output}
    softmax = next(n for n in model.graph.node if n.op_type == "Softmax")
    scores = by_output[by_output[softmax.input[0]].input[0]]
    keys = by_output[scores.input[1]]
    assert (scores.op_type, keys.op_type) == ("MatMul", "Transpose")
    assert list(keys.attribute[0].ints) == [0, 1, 3, 2]
    assert report.nodes["LayerNormalization"] == 1
    if precision == "fp16":
        assert float_types(report.path) == {onnx.TensorProto.FLOAT16}
        assert list(report.clamped.values()) == ["36 of 81 values, such as -1e+09 to -65504"]


def test_structured_inputs_and_outputs(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, image: torch.Tensor, *, index: torch.Tensor, scale: float = 2.0) -> dict[str, Any]:
            found = self.head(image * scale + self.embedding(index))
            return {"logits": found, "parts": (found.sum(-1), image), "again": found}

    kwargs = {"index": torch.tensor([1, 6, 0]), "scale": 3.0}
    program = g.capture(Model().eval(), (torch.randn(3, 4),), kwargs, dynamic_shapes="batch")
    report = export_onnx(program, tmp_path / "m.onnx", "fp16")
    assert [(i.name, i.dtype) for i in report.inputs] == [("image", "float16"), ("index", "int64")]
    assert [o.name for o in report.outputs] == ["logits", "parts_0", "parts_1", "again"]
    assert report.parity is not None
    assert report.parity < 1e-2
    engine = load_engine(report.path)
    image, index = np.ones((5, 4), np.float16), np.arange(5)
    logits, total, same, again = engine.run([image, index])
    np.testing.assert_array_equal(same, image)
    np.testing.assert_array_equal(logits, again)
    np.testing.assert_allclose(logits.sum(-1, dtype=np.float32), total, atol=1e-2)


def test_weights_that_exceed_protobuf_go_to_a_file_beside(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export_onnx(program, tmp_path / "whole.onnx")
    monkeypatch.setattr(onnx_module, "LARGE", 1000)
    report = export_onnx(program, tmp_path / "split" / "net.onnx")
    assert sorted(f.name for f in (tmp_path / "split").iterdir()) == ["net.onnx", "net.onnx.data"]
    assert report.bytes == sum(f.stat().st_size for f in (tmp_path / "split").iterdir())
    assert len({f.stat().st_mode for f in (tmp_path / "split").iterdir()}) == 1, "all as the umask says"
    (tmp_path / "split").rename(tmp_path / "moved")
    x = np.random.default_rng(0).standard_normal((2, 3, 12, 12), np.float32)
    found = load_engine(tmp_path / "moved" / "net.onnx").run([x])[0]
    np.testing.assert_array_equal(found, load_engine(whole.path).run([x])[0])


def test_the_oldest_target_gets_its_opset(program: Program, tmp_path: Path) -> None:
    report = export_onnx(program, tmp_path / "net.onnx", "fp16", target="drive-orin")
    assert report.opset == 17
    assert onnx.load(report.path).opset_import[0].version == 17
    assert report.nodes["ReduceMean"] == 1


def test_newer_opsets(tmp_path: Path) -> None:
    report = export_onnx(captured(Attention().eval(), 8, 16), tmp_path / "a.onnx", opset=20)
    assert report.opset == 20
    assert report.nodes["Gelu"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, r"precision int8: Quantize makes a program INT8; give the precision of the rest"),
        ({"precision": "fp61"}, r"precision fp61: not known; did you mean fp16"),
        ({"opset": 11}, "opset 11: 17 is the lowest"),
        ({"opset": 21, "target": "orin-nx"}, "opset 21: target orin-nx parses up to 20"),
        ({"target": "orin-nxx"}, "did you mean orin-nx"),
    ],
)
def test_wrong_arguments(program: Program, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        export_onnx(program, tmp_path / "net.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_opset_that_did_not_come_out_is_refused(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: export(*a, **{**k, "opset_version": 18}))
    with pytest.raises(Refused, match=r"opset 20 was asked for, torch\.onnx wrote 18"):
        export_onnx(program, tmp_path / "net.onnx", opset=20)


def test_a_wrong_weight_is_refused_and_nothing_is_written(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    translate = onnx_module.translate

    def spoiled(*args: Any) -> onnx.ModelProto:
        model = translate(*args)
        weight = next(t for t in model.graph.initializer if t.name == "head.weight")
        values = onnx.numpy_helper.to_array(weight).copy()
        values[0, 0] += 1e-2
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return model

    monkeypatch.setattr(onnx_module, "translate", spoiled)
    with pytest.raises(Refused, match=r"fp32 differs from the program by 0\.0\d+"):
        export_onnx(program, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
    assert export_onnx(program, tmp_path / "net.onnx", tolerance=1.0).parity > 1e-4  # type: ignore[operator]


def test_inputs_and_outputs_keep_their_types_when_asked(program: Program, net: nn.Module, tmp_path: Path) -> None:
    report = export_onnx(program, tmp_path / "net.onnx", "fp16", keep_io_types=True)
    assert {i.dtype for i in (*report.inputs, *report.outputs)} == {"float32"}
    assert report.nodes["Cast"] == 2
    assert set(report.types) == {"fp16", "int64"}
    x = torch.randn(2, 3, 12, 12)
    (found,) = load_engine(report.path).run([x.numpy()])
    np.testing.assert_allclose(found, net(x).detach().numpy(), atol=2e-2)


def test_mixed_types_are_refused(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(x.double() * 2).float()

    for precision, kind in (("fp32", "fp64"), ("fp16", "fp64")):
        with pytest.raises(Refused, match=rf"is {kind} in a graph that should be {precision}"):
            export_onnx(captured(Mixed().eval(), 4), tmp_path / "m.onnx", precision)


def test_an_operator_without_translation_is_refused_in_one_line(tmp_path: Path) -> None:
    @torch.library.custom_op("graphcomb_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double.register_fake(torch.empty_like)

    class Custom(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return double(x)

    with pytest.raises(Refused, match=r"torch\.onnx cannot translate the program: .*graphcomb_test") as caught:
        export_onnx(captured(Custom().eval(), 4), tmp_path / "c.onnx")
    assert "\n" not in str(caught.value)


def test_a_path_that_cannot_be_written(program: Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(BadInput, match=r"file/net\.onnx: cannot be written"):
        export_onnx(program, tmp_path / "file" / "net.onnx")


def zoo(name: str, size: int) -> nn.Module:
    models = pytest.importorskip("torchvision").models
    if name == "vit":
        vit = models.VisionTransformer(size, 8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)
        nn.init.normal_(vit.heads.head.weight, std=0.1)
        return vit.eval()
    return calibrated(getattr(models, name)(), 3, size, size)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "name", "resnet18 mobilenet_v3_small vit swin_t efficientnet_b0 convnext_tiny densenet121 regnet_y_400mf".split()
)
def test_families(name: str, dynamic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = captured(zoo(name, 64), 3, 64, 64, dynamic=dynamic)
    single = export_onnx(program, tmp_path / "single.onnx")
    half = export_onnx(program, tmp_path / "half.onnx", "fp16")
    assert single.parity is not None
    assert half.parity is not None
    assert 0 < single.parity <= 1e-4
    assert 0 < half.parity <= 5e-2
    assert float_types(half.path) == {onnx.TensorProto.FLOAT16}
    assert "Shape" not in single.nodes or dynamic
    assert not set(single.nodes) & {"ScatterND", "Constant"}


def test_probabilities_that_vanish_are_no_fault_of_the_file(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Sigmoid(), nn.Flatten())
    with torch.no_grad():
        net[0].bias.copy_(torch.tensor([-40.0, 0.0]))  # 4e-18, where ONNX Runtime says 0
    report = export_onnx(g.capture(net.eval(), torch.randn(2, 3, 8, 8)), tmp_path / "m.onnx")
    assert report.parity <= 1e-4


class Counted(nn.Module):
    """Returns its batch size, and nothing in a third place, beside a tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return {"y": self.layer(x), "count": x.shape[0], "nothing": None}


@pytest.mark.parametrize("dynamic", [None, "batch"])
def test_numbers_among_the_outputs_are_refused_by_name(tmp_path, dynamic):
    x = torch.randn(2, 4)
    with pytest.raises(Refused, match=r"output count is a number, not a tensor.*capture the model with outputs="):
        export_onnx(g.capture(Counted(), x, dynamic_shapes=dynamic), tmp_path / "m.onnx")
    program = g.capture(Counted(), x, dynamic_shapes=dynamic, outputs=["y"])
    assert len(export_onnx(program, tmp_path / "m.onnx").outputs) == 1
