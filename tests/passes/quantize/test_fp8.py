"""Quantisation to FP8: it rounds as E4M3 does, trains through the rounding, and exports as Q/DQ with 8-bit floats."""

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import graphcomb as g
from graphcomb.graph import fp8
from graphcomb.graph.errors import BadInput, Refused
from graphcomb.graph.facts import FAKE_PER_CHANNEL, FAKE_PER_TENSOR, FAKE_QUANTISATION
from graphcomb.graph.nodes import op_name
from graphcomb.passes import Context, Distill, Fuse, Minimise, Quantize, RemoveChannels, Sparsify, SplitFused
from graphcomb.passes.quantize.calibrate import FP8, Histogram
from graphcomb.passes.quantize.regions import quantised_alone, quantised_layers
from graphcomb.runtime import export_onnx, get_target, load_engine, predict
from graphcomb.runtime.onnx_file import precision

from ..toys import draws

CALIBRATIONS = ("histogram", "minmax", "percentile", "error")
NUMBERS = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
POSITIVE = np.unique(np.abs(NUMBERS[np.isfinite(NUMBERS)]))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
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
    return Quantize(include="*", precision="fp8")(program, data=batches())


def ops(program):
    return [op_name(n) for n in program.graph.nodes if op_name(n) in FAKE_QUANTISATION]


def outputs(program):
    with torch.no_grad():
        return program.module()(torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1)))


def error(program, reference):
    a, b = outputs(program), outputs(reference)
    return float((a - b).norm() / b.norm())


# ----------------------------------------------------------------------------------------------------------- arithmetic
def values():
    """All numbers of E4M3, subnormal ones too, the middles between them, their neighbours, and what saturates."""
    middles = (POSITIVE[1:] + POSITIVE[:-1]) / 2
    above, below = (np.nextafter(middles, np.float32(end)) for end in (1e9, -1e9))
    random = np.exp(np.random.default_rng(0).uniform(-12, 8, 4000)).astype(np.float32)
    large = np.float32([449, 463.9, 464, 480, 1e6, np.inf])
    found = np.concatenate([POSITIVE, middles, above, below, random, large])
    return np.concatenate([found, -found]).astype(np.float32)


def test_it_rounds_as_the_nearest_number_found_by_search():
    x = values()
    distance = np.abs(np.minimum(np.abs(x), 448)[:, None].astype(np.float64) - POSITIVE)
    nearest = distance.min(1, keepdims=True) == distance
    even = np.arange(len(POSITIVE)) % 2 == 0  # the last bit of the code, on which ties are decided
    index = np.where(nearest.sum(1) == 2, (nearest & even).argmax(1), nearest.argmax(1))
    wanted = np.copysign(POSITIVE[index], x)
    for dtype in (torch.float32, torch.float64):
        np.testing.assert_array_equal(fp8.e4m3(torch.from_numpy(x).to(dtype)).float().numpy(), wanted)
    assert ((wanted != 0) & (np.abs(wanted) < 2.0**-6)).any(), "subnormal ones, too"


@pytest.mark.parametrize("scale", [1.0, 0.013, 2.0**-20, 37.5])
def test_it_rounds_as_numpy_and_as_the_onnx_reference_do(scale):
    x = (values() * np.float32(scale)).astype(np.float32)
    x = x[np.isfinite(x)]
    found = fp8.fake_quantize_per_tensor(torch.from_numpy(x), float(np.float32(scale))).numpy()
    steps = np.clip(x / np.float32(scale), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(found, steps.astype(np.float32) * np.float32(scale))
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    constants = [numpy_helper.from_array(np.float32(scale), "s")]
    constants.append(helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, (), [0.0]))
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])]
    nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]))
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    (wanted,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_array_equal(found, wanted)


def test_channels_have_scales_of_their_own_and_half_precision_is_computed_in_fp32():
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.1, 1e-6, 3.0, 0.5])
    found = fp8.fake_quantize_per_channel(x, scale, 1)
    for i in range(4):
        assert torch.equal(found[:, i], fp8.fake_quantize_per_tensor(x[:, i], float(scale[i])))
    half = fp8.fake_quantize_per_tensor(x.half(), 1e-6)
    assert half.dtype == torch.float16
    assert torch.equal(half, fp8.fake_quantize_per_tensor(x.half().float(), 1e-6).half())


def test_gradients_pass_straight_through_unless_a_value_saturates():
    x = torch.tensor([[0.1, -3.0, 463.0, -463.0], [465.0, -1e4, 0.0, 447.0]], requires_grad=True)
    inside = torch.tensor([[1.0, 1, 1, 1], [0, 0, 1, 1]])
    grads = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    scales = torch.tensor([0.5, 2.0])
    for found in (
        fp8.fake_quantize_per_tensor(x * 0.25, 0.25),
        fp8.fake_quantize_per_channel(x * scales[:, None], scales, 0) / scales[:, None],
    ):
        (grad,) = torch.autograd.grad((found * grads).sum(), x)
        factor = 0.25 if found.grad_fn.name().startswith("Generated") else 1.0
        torch.testing.assert_close(grad, grads * inside * factor)


def test_torchs_own_checks_of_an_operator_pass():
    x = torch.randn(3, 4, requires_grad=True)
    torch.library.opcheck(fp8.PER_TENSOR, (x, 0.1))
    torch.library.opcheck(fp8.PER_CHANNEL, (x, torch.rand(3) + 0.1, 0))


# ------------------------------------------------------------------------------------------------------------- the pass
def test_every_layer_reads_fp8(program, result):
    assert result.record["precision"] == "fp8"
    assert [c["what"] for c in result.record["changed"]] == [
        f"{n}.weight" for n in ("stem", "conv", "depthwise", "q", "k", "head")
    ]
    found = ops(result.program)
    assert all("e4m3" in name for name in found)
    assert sum(name in FAKE_PER_CHANNEL for name in found) == 6
    assert sum(name in FAKE_PER_TENSOR for name in found) == 5, "q and k read the same quantised value"
    result.program.graph.lint()


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_the_error_is_that_of_three_bits_of_mantissa(program, calibration):
    found = Quantize(include="*", precision="fp8", calibration=calibration)(program, data=batches())
    assert 0.005 < error(found.program, program) < 0.05


def test_the_largest_value_becomes_448(program):
    data = batches()
    found = Quantize(include="*", precision="fp8", calibration="minmax")(program, data=data)
    module = found.program.module()
    largest = max(float(x.abs().max()) for x, _ in data)
    assert found.record["changed"][0]["input_scales"][0] == pytest.approx(largest / 448, rel=1e-6)
    weight, scale = module.get_parameter("q.weight").detach(), module.get_buffer("q.weight_scale")
    torch.testing.assert_close(scale, weight.abs().amax(1) / 448)


def test_the_least_error_is_that_of_trying_all_saturations():
    values = torch.randn(20000, generator=torch.Generator().manual_seed(0)) ** 3  # with a long tail
    made = Histogram()
    made.add(values)

    def squared(end):
        return float((fp8.fake_quantize_per_tensor(values, end / 448) - values).square().sum())

    tried = [squared(made.largest * share) for share in np.linspace(0.05, 1, 400)]
    assert squared(made.least_error(FP8)) <= 1.02 * min(tried)


def test_the_error_does_not_depend_on_the_size_of_a_channel(program, tmp_path):
    """In fp16 files, too, whose smallest number is 6e-8."""
    small = program.copy()
    with torch.no_grad():
        small.module().get_parameter("q.weight")[3] *= 1e-6
    found = Quantize(include="*", precision="fp8")(small, data=batches())
    module = found.program.module()
    weight, scale = module.get_parameter("q.weight").detach(), module.get_buffer("q.weight_scale")
    off = (fp8.fake_quantize_per_channel(weight, scale, 0) - weight).norm(dim=1) / weight.norm(dim=1)
    assert 0.01 < float(off.min()) < float(off.max()) < 0.04
    assert float(scale.half().min()) > 0
    assert export_onnx(found.program, tmp_path / "net.onnx", "fp16").clamped == {}


def test_it_survives_storage_and_capture(result, tmp_path):
    loaded = g.load(result.program.save(tmp_path / "fp8.pt2"))
    assert ops(loaded) == ops(result.program)
    assert torch.equal(outputs(loaded), outputs(result.program))
    again = g.capture(loaded.module(), torch.randn(2, 3, 12, 12), dynamic_shapes="batch")
    assert ops(again) == ops(result.program)


def test_training_goes_through_the_rounding_and_holds_scales_and_zeros(program):
    sparse = Sparsify(pattern="2:4", where="all", method="magnitude")(program).program
    found = Quantize(include="*", precision="fp8")(sparse, data=batches()).program
    trained = Distill(epochs=3, lr=3e-3)(found, data=batches(), teacher=program)
    before, after = found.module(), trained.program.module()
    for name in ("conv.weight", "q.weight", "k.weight"):
        assert torch.equal(before.get_parameter(name) == 0, after.get_parameter(name) == 0)
        assert not torch.equal(before.get_parameter(name), after.get_parameter(name))
        assert torch.equal(before.get_buffer(f"{name}_scale"), after.get_buffer(f"{name}_scale"))
    losses = [e["loss"] for e in trained.record["epochs"]]
    assert losses[-1] < losses[0]


def test_corrected_biases_restore_the_means(program):
    data = [x for x, _ in batches()]

    def means(of):
        with torch.no_grad():
            return of.module()(torch.cat(data)).mean(0)

    plain, corrected = (
        Quantize(include="*", precision="fp8", bias_correction=b)(program, data=data) for b in (False, True)
    )
    assert "largest_bias_shift" in corrected.record["changed"][-1]
    torch.testing.assert_close(means(corrected.program), means(program), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(means(plain.program), means(program), rtol=1e-4, atol=1e-5)


def test_a_part_of_it_is_what_the_pass_makes_of_that_part(program, result):
    for names in ({"conv", "q"}, {"depthwise"}, set()):
        part = quantised_alone(result.program, {f"{name}.weight" for name in names})
        assert {name for _, name in quantised_layers(part)} == {f"{name}.weight" for name in names}
        layers = dict.fromkeys(names, "fp8") | {"*": "fp16"}
        wanted = Quantize(precision="fp8", layers=layers)(program, data=batches()).program
        assert torch.equal(outputs(part), outputs(wanted)), names


class Projections(nn.Linear):
    """Queries and keys from one layer."""

    def forward(self, x):
        q, k = super().forward(x).view(-1, 2, 4).unbind(1)
        return q * k.sigmoid()


def test_other_passes_treat_it_as_int8(program, result):
    for pass_ in (Fuse(), Minimise()):
        assert g.Pipeline([pass_]).run(result.program).records[-1]["changed"] == []
    late = Sparsify(method="magnitude", include="*")(result.program)
    assert {r["why"] for r in late.record["refused"]} == {"it is quantised; Quantize comes last"}
    integer = Quantize(include="*")(program, data=batches()).program
    for quantised in (integer, result.program):
        with pytest.warns(UserWarning, match=r"nothing to prune: .* groups .* are frozen .* has no rule"):
            assert RemoveChannels(ratio=0.5)(quantised).record["changed"] == []
    torch.manual_seed(0)
    fused = g.capture(Projections(6, 8), torch.randn(4, 6), dynamic_shapes="batch")
    fused = Quantize(include="*", precision="fp8")(fused, data=[torch.randn(16, 6)]).program
    (record,) = g.Pipeline([SplitFused()]).run(fused).records
    assert record["changed"]
    assert record["verified"]["error"] == 0


def test_its_latency_is_predicted(program, result):
    found = predict({"before": program, "after": result.program}, get_target("rtx-sm89"), "fp8")
    assert 0 < found["ms"]["after"] <= found["ms"]["before"] * 1.001
    with pytest.raises(BadInput, match="target rtx-sm86: no fp8"):
        predict({"after": result.program}, get_target("rtx-sm86"), "fp8")


def test_what_is_refused(program):
    for name in ("cpu", "orin-nano"):
        with pytest.raises(BadInput, match=rf"target {name}: no fp8; .*; agx-thor, .*rtx-sm89, .* have fp8$"):
            Quantize(precision="fp8")(program, Context(data=batches(), target=get_target(name)))
    assert Quantize(precision="fp8")(program, Context(data=batches(), target=get_target("h100"))).record["changed"]
    with pytest.raises(BadInput, match=r'Quantize\.placement: "tensorrt" for FP8, which no CPU computes in'):
        Quantize(precision="fp8", placement="cpu")
    with pytest.raises(BadInput, match=r'Quantize\.layers: "q" is int8, and the pass makes fp8'):
        Quantize(precision="fp8", layers={"q": "int8"})
    with pytest.raises(BadInput, match=r'Quantize\.layers: "q" is fp8, and the pass makes int8'):
        Quantize(layers={"q": "fp8"})
    with pytest.raises(BadInput, match=r"Quantize\.precision: "):
        Quantize(precision="fp4")


# ------------------------------------------------------------------------------------------------------------ the file
@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_the_file_has_zero_points_of_fp8_and_runs_in_onnx_runtime(result, tmp_path, kind):
    report = export_onnx(result.program, tmp_path / "fp8.onnx", kind, target="rtx-sm89")
    assert report.nodes["QuantizeLinear"] == report.nodes["DequantizeLinear"] == 11
    assert report.opset == 20
    assert "Cast" not in report.nodes
    assert report.parity < {"fp32": 1e-5, "fp16": 0.05}[kind]
    model = onnx.load(str(report.path))
    assert precision(model) == "fp8"
    constants = {t.name: t for t in model.graph.initializer}
    zeros = [constants[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert {t.data_type for t in zeros} == {TensorProto.FLOAT8E4M3FN}
    assert all((numpy_helper.to_array(t).astype(np.float32) == 0).all() for t in zeros)
    scales = {constants[n.input[1]].data_type for n in model.graph.node if n.op_type == "QuantizeLinear"}
    assert scales == {TensorProto.FLOAT if kind == "fp32" else TensorProto.FLOAT16}


def test_opsets_and_targets_of_a_file(result, tmp_path):
    report = export_onnx(result.program, tmp_path / "fp8.onnx", opset=19)
    assert (report.opset, report.parity < 1e-5) == (19, True)
    for opset in (17, 18):
        with pytest.raises(Refused, match=rf"FP8: it came with opset 19, not {opset}; export it with opset=19$"):
            export_onnx(result.program, tmp_path / "low.onnx", opset=opset)
    with pytest.raises(BadInput, match=r"target rtx-sm86: no fp8; .* rtx-sm89, .* have fp8$"):
        export_onnx(result.program, tmp_path / "low.onnx", target="rtx-sm86")
    with pytest.raises(Refused, match="bf16: it cannot hold the scales"):
        export_onnx(result.program, tmp_path / "low.onnx", "bf16")
    assert not (tmp_path / "low.onnx").exists()


def test_an_engine_of_onnx_runtime_computes_what_the_file_says(tmp_path):
    """Its optimisations would drop the ReLU, whose zero point they take for that of UINT8, and make a QGemm of FP8."""
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    program = g.capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval(), (x,))
    found = Quantize(include="*", precision="fp8")(program, data=[x]).program
    with torch.no_grad():
        wanted = found.module()(x).numpy()
    for kind, limit in (("fp32", 1e-6), ("fp16", 2e-2)):
        path = export_onnx(found, tmp_path / f"{kind}.onnx", kind).path
        engine = load_engine(path)
        (out,) = engine.run([x.numpy().astype(engine.inputs[0].dtype)])
        engine.close()
        assert np.abs(out - wanted).max() < limit * np.abs(wanted).max()
