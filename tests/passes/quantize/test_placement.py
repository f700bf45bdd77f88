"""Where values are quantised: for TensorRT, and for the kernels of a CPU."""

from collections import Counter

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphcomb as g
from graphcomb.graph.errors import BadInput
from graphcomb.graph.nodes import op_name
from graphcomb.passes import Context, Quantize
from graphcomb.passes.quantize.placement import is_nonnegative, pads_zeros
from graphcomb.passes.quantize.regions import quantised_alone, quantised_layers
from graphcomb.runtime import build_engine, export_onnx, get_target
from graphcomb.runtime.engines.ort import OrtEngine


class Residual(nn.Module):
    """A stem, a block with a shortcut of its own, a block whose shortcut is its input, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.a, self.down, self.c, self.d = (nn.Conv2d(32, 32, 3, padding=1) for _ in range(4))
        self.b = nn.Conv2d(32, 32, 3)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        shortcut = self.down(x)
        x = (self.b(F.pad(self.a(x).relu(), (1, 1, 1, 1))) + shortcut).relu()
        x = (x + self.d(self.c(x).relu())).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return g.capture(Residual().eval(), torch.randn(2, 3, 12, 12), dynamic_shapes="batch")


def data():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 12, 12, generator=generator) for _ in range(4)]


@pytest.fixture(scope="module")
def for_tensorrt(program):
    return Quantize()(program, data=data())


@pytest.fixture(scope="module")
def for_cpu(program):
    return Quantize(placement="cpu")(program, data=data())


def kernels(path):
    """The number of each kind of operator that ONNX Runtime makes of a file."""
    optimized = path.with_suffix(".optimized.onnx")
    OrtEngine(path, optimized=optimized).close()
    return Counter(n.op_type for n in onnx.load(optimized).graph.node)


def sums(program):
    return [[op_name(v) for v in n.args] for n in program.graph.nodes if op_name(n) == "add"]


def test_residual_additions_share_the_scale_of_the_next_layer(for_tensorrt):
    assert for_tensorrt.record["placement"] == "tensorrt"
    fake = "fake_quantize_per_tensor_affine"
    assert sums(for_tensorrt.program) == [["conv2d", fake], [fake, "conv2d"]], "the shortcuts, not the branches"
    nodes = [n for n in for_tensorrt.program.graph.nodes if op_name(n) == fake]
    assert len(nodes) == 4 + 1, (
        "inputs of five layers, two of which share, and a shortcut; the other is a layer's input"
    )
    shared = [n for n in nodes if {op_name(u) for u in n.users} >= {"add"}]
    assert len(shared) == 2
    assert all(n.args[2:] == (0, -128, 127) for n in nodes)


def test_no_addition_is_quantised_where_a_layer_stays_in_floating_point(program):
    found = Quantize(exclude=("a.weight", "c.weight", "down.weight"))(program, data=data())
    assert sums(found.program) == [["conv2d", "conv2d"], ["relu", "conv2d"]]


def test_quantised_for_a_cpu_onnx_runtime_has_an_int8_kernel_for_every_layer(program, for_cpu, tmp_path):
    values = [n for n in for_cpu.program.graph.nodes if op_name(n) == "fake_quantize_per_tensor_affine"]
    assert {n.args[2:] for n in values} == {(0, 0, 255), (128, 0, 255)}
    counts = []
    for name, found in (("cpu", for_cpu), ("trt", Quantize()(program, data=data()))):
        report = export_onnx(found.program, tmp_path / f"{name}.onnx")
        counts.append(kernels(report.path))
    assert (counts[0]["QLinearConv"], counts[1]["QLinearConv"]) == (5, 0)


class Several(nn.Module):
    """Layers before what is no ReLU, a concatenation, and pooling."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1) for i in range(3))
        self.fc, self.head = nn.Linear(32, 24), nn.Linear(24, 4)

    def forward(self, x):
        x = F.max_pool2d(self.a(x).relu(), 2)
        x = torch.cat([F.silu(self.b(x)), self.c(x).relu()], 1)
        return self.head(F.gelu(self.fc(x.mean((2, 3)))))


def test_kernels_are_int8_behind_and_before_everything(tmp_path):
    torch.manual_seed(0)
    program = g.capture(Several().eval(), torch.randn(2, 3, 12, 12), dynamic_shapes="batch")
    found = Quantize(placement="cpu", include="*")(program, data=data())
    grids = {
        n.args[0]: n.args[1:] for n in found.program.graph.nodes if op_name(n) == "fake_quantize_per_tensor_affine"
    }
    pooled = next(n for n in grids if op_name(n) == "max_pool2d")
    assert grids[pooled] == grids[next(n for n in grids if op_name(n) == "relu")], "pooling rounds nothing anew"
    output = found.program.graph.output_node().args[0][0]
    assert op_name(output) == "linear", "the network's output is not quantised"
    report = export_onnx(found.program, tmp_path / "net.onnx")
    counts = kernels(report.path)
    assert (counts["QLinearConv"], counts["QGemm"], counts["Conv"], counts["Gemm"]) == (3, 1, 0, 1), counts
    assert report.parity < 0.05


def test_it_is_at_least_as_near_to_the_program(program, for_tensorrt, for_cpu):
    x = torch.cat(data())
    with torch.no_grad():
        dense = program.module()(x)
        errors = [float((r.program.module()(x) - dense).norm() / dense.norm()) for r in (for_tensorrt, for_cpu)]
    assert errors[1] < errors[0] < 0.05


def test_the_target_decides(program, for_tensorrt, for_cpu, tmp_path):
    for name, placement in (("cpu", "cpu"), ("orin-nano", "tensorrt"), ("rtx-sm86", "tensorrt")):
        found = Quantize(samples=8)(program, Context(data=data(), target=get_target(name)))
        assert found.record["placement"] == placement
    with pytest.raises(BadInput, match=r'target rtx-sm86: has no UINT8, which Quantize\(placement="cpu"\) made'):
        export_onnx(for_cpu.program, tmp_path / "net.onnx", target="rtx-sm86")
    with pytest.raises(BadInput, match=r"Quantize\.placement: "):
        Quantize(placement="gpu")
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx")
    path = export_onnx(for_tensorrt.program, tmp_path / "net.onnx", "fp16", target="rtx-sm86").path
    engine = build_engine(path, "rtx-sm86", tmp_path / "net.rtx")
    assert any("int8" in i for k in engine.kernels for i in k.inputs)


@pytest.mark.parametrize("placement", ["tensorrt", "cpu"])
def test_a_part_of_it_is_what_the_pass_makes_of_that_part(program, placement):
    whole = Quantize(placement=placement, include="*")(program, data=data()).program
    x = data()[0]
    for names in ({"a", "b", "down"}, {"a", "b"}, {"d"}, {"c"}, set()):
        part = quantised_alone(whole, {f"{name}.weight" for name in names})
        assert {name for _, name in quantised_layers(part)} == {f"{name}.weight" for name in names}
        asked = dict.fromkeys(names, "int8") | {"*": "fp16"}
        wanted = Quantize(placement=placement, layers=asked)(program, data=data()).program
        with torch.no_grad():
            assert torch.equal(part.module()(x), wanted.module()(x)), names


def test_what_is_never_negative():
    class Signs(nn.Module):
        def forward(self, x):
            a, b = x.clamp(0, 6), F.pad(x.relu(), (1, 1), value=1.0)
            return (
                a,
                b,
                F.max_pool2d(x.sigmoid(), 2),
                x.clamp(-1, 1),
                F.pad(a, (1, 1)),
                F.pad(x, (1, 1, 1, 1), mode="reflect"),
            )

    graph = g.capture(Signs(), torch.randn(1, 2, 4, 4)).graph
    outputs = graph.output_node().args[0]
    assert [is_nonnegative(n) for n in outputs] == [True, False, True, False, True, False]
    assert [pads_zeros(n) for n in outputs] == [False, False, False, False, True, False]
