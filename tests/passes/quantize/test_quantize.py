"""INT8 fake quantisation: its arithmetic, its calibration, zeros, training, and what engines make of it."""

import onnx
import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.graph import sparse as masks
from graphcomb.graph.errors import BadInput
from graphcomb.graph.nodes import op_name
from graphcomb.passes import Distill, Fuse, Minimise, Quantize, Sparsify, SplitFused
from graphcomb.runtime import build_engine, export_onnx

from ..toys import draws

CALIBRATIONS = ("histogram", "minmax", "percentile", "error")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.q, self.k, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.conv(self.stem(x).relu()).relu()
        x = (x + self.depthwise(x)).mean((2, 3))
        return self.head((self.q(x) * self.k(x).sigmoid()).relu())


def batches(count=4):
    return draws(count, (8, 3, 12, 12), 5)


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return g.capture(Network(), torch.randn(2, 3, 12, 12), dynamic_shapes="batch")


@pytest.fixture(scope="module")
def result(program):
    sparse = Sparsify(pattern="2:4", where="all", method="magnitude")(program).program
    return Quantize(include="*")(sparse, data=batches())


def ops(program):
    return [op_name(n) for n in program.graph.nodes if "fake_quantize" in op_name(n)]


def error(program, reference):
    x = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = program.module()(x), reference.module()(x)
    return float((a - b).norm() / b.norm())


def test_every_layer_reads_quantised_inputs_and_weights(program, result):
    assert ops(program) == []
    assert [c["what"] for c in result.record["changed"]] == [
        f"{n}.weight" for n in ("stem", "conv", "depthwise", "q", "k", "head")
    ]
    found = ops(result.program)
    assert found.count("fake_quantize_per_channel_affine") == 6
    assert found.count("fake_quantize_per_tensor_affine") == 5, "q and k read the same quantised value"
    assert 0 < error(result.program, program) < 1
    result.program.graph.lint()


class Projections(nn.Linear):
    """Queries and keys from one layer."""

    def forward(self, x):
        q, k = super().forward(x).view(-1, 2, 4).unbind(1)
        return q * k.sigmoid()


def test_passes_that_keep_the_function_go_on_from_int8(result):
    """Their proofs run in float64, in which scales for each channel are not taken."""
    for pass_ in (Fuse(), Minimise()):
        assert g.Pipeline([pass_]).run(result.program).records[-1]["changed"] == []
    torch.manual_seed(0)
    program = g.capture(Projections(6, 8), torch.randn(4, 6), dynamic_shapes="batch")
    program = Quantize(include="*")(program, data=[torch.randn(16, 6)]).program
    (record,) = g.Pipeline([SplitFused()]).run(program).records
    assert record["changed"]
    assert record["verified"]["error"] == 0


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_the_error_is_that_of_eight_bits(program, calibration):
    found = Quantize(include="*", calibration=calibration)(program, data=batches())
    assert 1e-4 < error(found.program, program) < 0.03


def test_scales_are_those_of_the_data_and_of_the_rows(program):
    data = batches()
    found = Quantize(include="*", calibration="minmax")(program, data=data)
    module = found.program.module()
    largest = max(float(x.abs().max()) for x, _ in data)
    assert found.record["changed"][0]["input_scales"][0] == pytest.approx(largest / 127, rel=1e-6), "none saturates"
    weight, scale = module.get_parameter("q.weight").detach(), module.get_buffer("q.weight_scale")
    torch.testing.assert_close(scale, weight.abs().amax(1) / 127)
    assert module.get_buffer("q.weight_zero").eq(0).all()


def test_fewer_samples_are_looked_at_when_fewer_are_asked_for(program):
    data = [(torch.ones(4, 3, 12, 12), None), (100 * torch.ones(4, 3, 12, 12), None)]
    small, large = (
        Quantize(include="*", samples=n, calibration="minmax")(program, data=[x for x, _ in data]).record["changed"][0][
            "input_scales"
        ]
        for n in (4, 8)
    )
    assert large[0] == pytest.approx(100 * small[0])


def test_only_so_many_samples_of_a_batch_calibrate(program):
    """A batch whose other samples are larger; a program of a fixed batch size takes all of it."""
    one = batches(1)[0][0][:1]
    data = [torch.cat([one, 100 * one.expand(3, -1, -1, -1)])]
    how = Quantize(samples=1, include="*", calibration="minmax", bias_correction=True)

    def scale(of, images) -> float:
        return next(
            row["input_scales"][0] for row in how(of, data=images).record["changed"] if row["what"] == "stem.weight"
        )

    assert scale(program, data) == scale(program, [one]) == pytest.approx(float(one.abs().max()) / 127, rel=1e-6)
    fixed = g.capture(Network(), torch.randn(4, 3, 12, 12))
    assert scale(fixed, data) == pytest.approx(100 * float(one.abs().max()) / 127, rel=1e-6)


def test_zeros_quantise_to_zero_and_training_holds_them(program, result):
    names = masks.sparse_weights(result.program)
    assert set(names) == {"conv.weight", "q.weight", "k.weight"}
    module = result.program.module()
    for name in names:
        weight, scale = module.get_parameter(name).detach(), module.get_buffer(f"{name}_scale")
        zero = torch.zeros(len(scale), dtype=torch.int32)
        quantised = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -128, 127)
        assert (quantised[weight == 0] == 0).all()
        assert masks.legal(quantised, "2:4")
    trained = Distill(epochs=3, lr=3e-3)(result.program, data=batches(), teacher=program)
    after = trained.program.module()
    for name in names:
        before, now = module.get_parameter(name), after.get_parameter(name)
        assert torch.equal(before == 0, now == 0)
        assert not torch.equal(before, now)
        assert torch.equal(module.get_buffer(f"{name}_scale"), after.get_buffer(f"{name}_scale"))
    losses = [e["loss"] for e in trained.record["epochs"]]
    assert losses[-1] < losses[0], "gradients pass straight through the rounding"


def test_it_survives_storage(result, tmp_path):
    loaded = g.load(result.program.save(tmp_path / "int8.pt2"))
    assert ops(loaded) == ops(result.program)
    assert error(loaded, result.program) < 1e-6


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnx_has_symmetric_q_dq_and_tensorrt_rtx_builds_it(result, tmp_path, precision):
    report = export_onnx(result.program, tmp_path / "int8.onnx", precision=precision)
    assert report.nodes["QuantizeLinear"] == report.nodes["DequantizeLinear"] == 11
    assert report.opset == 20
    assert "Cast" not in report.nodes, "from opset 19 on Q/DQ take fp16"
    assert sum(w.pattern == "2:4" for w in report.sparse) == 3
    model = onnx.load(str(report.path))
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    zeros = [constants[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert all(z.dtype == "int8" and (z == 0).all() for z in zeros)
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx")
    engine = build_engine(report.path, target="rtx-sm86", out=tmp_path / "int8.engine")
    products = [k for k in engine.kernels if k.kind in ("correlation", "gemm", "depthwise_correlation")]
    assert len(products) >= 5
    assert all(i.startswith("int8") for k in products for i in k.inputs), "computed in INT8"


def test_chosen_layers_only(program):
    found = Quantize(include="*.weight", exclude=["stem*", "head*"])(program, data=batches())
    assert [c["what"] for c in found.record["changed"]] == [f"{n}.weight" for n in ("conv", "depthwise", "q", "k")]
    assert {"what": "stem.weight", "why": "excluded"} in found.record["refused"]
    only = Quantize(include="q.*")(program, data=batches())
    assert {"what": "k.weight", "why": "not included"} in only.record["refused"]
    with pytest.raises(BadInput, match=r'Quantize.include: "no.such" matches no weight; there are stem.weight, conv'):
        Quantize(include=("q.*", "no.such"))(program, data=batches())


def test_what_is_refused(program, result):
    norm = g.capture(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), torch.randn(2, 3, 5, 5))
    found = Quantize(include="*")(norm, data=[torch.randn(2, 3, 5, 5)])
    assert "run Fuse before Quantize" in found.record["refused"][0]["why"]
    silent = Quantize(include="*")(norm, data=[torch.zeros(2, 3, 5, 5)])
    assert any("all zero" in r["why"] for r in silent.record["refused"])
    assert silent.record["changed"] == []
    late = Sparsify(method="magnitude", include="*")(result.program)
    assert {r["why"] for r in late.record["refused"]} == {"it is quantised; Quantize comes last"}
    with pytest.raises(BadInput, match="Quantize: needs data"):
        Quantize(include="*")(program)
    with pytest.raises(BadInput, match="data: yields no batch; it must be iterable again"):
        Quantize(include="*")(program, data=[])
    for options in (
        {"samples": 0},
        {"samples": True},
        {"calibration": "none"},
        {"percentile": 0.0},
        {"include": 3},
        {"exclude": (3,)},
    ):
        with pytest.raises(BadInput, match=rf"Quantize\.{next(iter(options))}: "):
            Quantize(**options)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_samples_that_are_not_finite_are_refused(program, calibration, value):
    data = batches()
    data[1][0][2, 0, 5, 5] = value
    with pytest.raises(BadInput, match=r"Quantize: the inputs of stem\.weight are not finite; check the data"):
        Quantize(include="*", calibration=calibration)(program, data=data)


def test_tied_weights_are_quantised_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(self.a(x).relu())

    found = Quantize(include="*")(g.capture(Tied(), torch.randn(2, 4)), data=[torch.randn(2, 4)])
    assert ops(found.program).count("fake_quantize_per_channel_affine") == 1
    assert len(found.record["changed"][0]["input_scales"]) == 2
