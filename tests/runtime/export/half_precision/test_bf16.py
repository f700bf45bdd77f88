"""Exports in bf16: the range of fp32, an opset that has it, fp32 at both ends, and a comparison that rounds."""

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.graph.errors import BadInput, Refused
from graphcomb.passes import Quantize
from graphcomb.runtime import build_engine, export_onnx
from graphcomb.runtime.export.half_precision.half import BF16, FP16


class Wide(nn.Module):
    """Values beyond the range of fp16 between two convolutions."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.up.weight.data *= 1e5
        self.down.weight.data *= 1e-5

    def forward(self, x):
        return self.head(self.down(self.up(x).relu()).mean((2, 3)))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return g.capture(Wide().eval(), torch.randn(2, 3, 10, 10), dynamic_shapes="batch")


def test_the_types_have_the_numbers_that_their_bits_allow():
    for half, mantissa, exponent in ((FP16, 10, 15), (BF16, 7, 127)):
        assert half.largest == (2 - 2.0**-mantissa) * 2.0**exponent
        assert half.normal == 2.0 ** (1 - exponent)
        assert half.smallest == half.normal * 2.0**-mantissa
        assert float(np.asarray(half.whole).astype(half.dtype)) == half.whole
        assert float(np.asarray(half.whole + 1).astype(half.dtype)) != half.whole + 1


def test_bf16_keeps_no_node_for_its_range(program, tmp_path):
    fp16 = export_onnx(program, tmp_path / "fp16.onnx", precision="fp16")
    assert any("reaches" in why for why in fp16.float32.values())
    report = export_onnx(program, tmp_path / "bf16.onnx", precision="bf16", target="rtx-sm86")
    assert (report.opset, report.float32, report.clamped) == (22, {}, {})
    assert {t.dtype for t in (*report.inputs, *report.outputs)} == {"float32"}
    model = onnx.load(report.path)
    assert {t.data_type for t in model.graph.initializer if t.dims} - {onnx.TensorProto.INT64} == {
        onnx.TensorProto.BFLOAT16
    }
    stored = next(t for t in model.graph.initializer if t.name == "up.weight")
    wanted = program.module().get_parameter("up.weight").detach().bfloat16().float().numpy()
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored).astype(np.float32), wanted)
    assert 1e-4 < report.parity < 0.05, "every operator rounds to eight bits"
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx")
    engine = build_engine(report.path, "rtx-sm86", tmp_path / "bf16.rtx", batch=2)
    products = [k for k in engine.kernels if k.kind in ("correlation", "gemm")]
    assert products
    assert all(i.startswith("bf16") for k in products for i in k.inputs)


def test_coordinates_stay_in_fp32(tmp_path):
    class Boxes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 4)

        def forward(self, x):
            return self.a(x).sigmoid() * 640.0

    program = g.capture(Boxes().eval(), torch.randn(2, 8), dynamic_shapes="batch")
    report = export_onnx(program, tmp_path / "b.onnx", precision="bf16")
    assert any("bf16 misses whole numbers there" in why for why in report.float32.values())
    assert float(np.asarray(257.0).astype(ml_dtypes.bfloat16)) == 256.0


def test_what_is_refused(program, tmp_path):
    with pytest.raises(Refused, match="bf16: target agx-orin has no bf16 convolutions, which came with opset 22"):
        export_onnx(program, tmp_path / "a.onnx", precision="bf16", target="agx-orin")
    with pytest.raises(BadInput, match="rtx-sm75: no bf16"):
        export_onnx(program, tmp_path / "a.onnx", precision="bf16", target="rtx-sm75")
    with pytest.raises(Refused, match="bf16: opset 20 has no bf16 convolutions"):
        export_onnx(program, tmp_path / "a.onnx", precision="bf16", opset=20)
    quantised = Quantize(include="*", samples=4)(program, data=[torch.randn(4, 3, 10, 10)]).program
    with pytest.raises(Refused, match="bf16: it cannot hold the scales"):
        export_onnx(quantised, tmp_path / "a.onnx", precision="bf16")
    assert list(tmp_path.iterdir()) == []
