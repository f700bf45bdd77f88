"""TensorRT-RTX builds for real, here and without a GPU; running an engine takes a GPU and is skipped without one."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import VisionTransformer

import graphcomb
from graphcomb.graph.errors import BadInput, MissingBackend, Refused
from graphcomb.models import SmallResNet
from graphcomb.passes import Fuse, Quantize
from graphcomb.runtime.devices.table import TARGETS
from graphcomb.runtime.engines.build import build_engine, load_engine
from graphcomb.runtime.export.to_onnx import export_onnx

from ...standins import gpu
from .toys import relu, small

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")

RTX_TARGETS = ["rtx-sm75", "rtx-sm80", "rtx-sm86", "rtx-sm89", "rtx-sm120", "rtx-sm121"]

MODELS = {
    "resnet": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10), (3, 3, 32, 32)),
    "vit": (lambda: VisionTransformer(16, 4, 2, 2, 32, 64, num_classes=10), (3, 3, 16, 16)),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """ONNX files of the models, by name and precision, with a dynamic batch."""
    folder, files = tmp_path_factory.mktemp("onnx"), {}

    def get(name, precision="fp32"):
        if (name, precision) not in files:
            torch.manual_seed(0)
            make, shape = MODELS[name]
            program = graphcomb.capture(make().eval(), (torch.randn(shape),), dynamic_shapes="batch")
            files[name, precision] = folder / f"{name}.{precision}.onnx"
            export_onnx(program, files[name, precision], precision)
        return files[name, precision]

    return get


@needs_rtx
@pytest.mark.parametrize(("name", "precision"), [("resnet", "fp32"), ("resnet", "fp16"), ("vit", "fp16")])
def test_networks_build_without_a_gpu(exported, tmp_path, name, precision):
    model = exported(name, precision)
    report = build_engine(model, "rtx-sm86", tmp_path / "net.rtx")
    assert report.path.stat().st_size == report.bytes > 100_000
    assert (report.backend, report.target, report.precision) == ("tensorrt_rtx", "rtx-sm86", precision)
    assert report.seconds > 0
    # The engine is of this network: its kernels are made of its nodes, and are fewer than those.
    nodes = {node.name for node in onnx.load(model).graph.node}
    seen = {node for kernel in report.kernels for node in kernel.nodes}
    assert seen <= nodes
    assert len(seen) > len(nodes) / 2
    assert 5 < len(report.kernels) < len(nodes)
    compute = [k for k in report.kernels if k.kind in ("correlation", "gemm", "runtime_fusion")]
    types = {"fp32": "fp32[", "fp16": "fp16["}
    assert compute
    assert all(text.startswith(types[precision]) for k in compute for text in (*k.inputs, *k.outputs))
    weights = sum(np.prod(t.dims) for t in onnx.load(model).graph.initializer) * {"fp32": 4, "fp16": 2}[precision]
    assert report.memory["weights"] == pytest.approx(weights, rel=0.1)
    assert not report.padding
    json.dumps(report.to_dict())
    assert list(tmp_path.iterdir()) == [report.path]


@needs_rtx
@pytest.mark.parametrize("target", RTX_TARGETS)
def test_every_rtx_target_builds(exported, tmp_path, target):
    report = build_engine(exported("resnet", "fp16"), target, tmp_path / "net.rtx")
    assert report.target == target
    assert report.kernels


def test_all_rtx_targets_are_tested():
    assert [name for name, t in TARGETS.items() if t.backend == "tensorrt_rtx"] == RTX_TARGETS


@needs_rtx
def test_the_profile_is_what_was_asked_for(exported, tmp_path):
    model = exported("resnet")

    def profile(**options):
        build_engine(model, "rtx-sm86", tmp_path / "net.rtx", log=tmp_path / "log", **options)
        text = (tmp_path / "log").read_text()
        (line,) = [line for line in text.splitlines() if "MinShape" in line]
        return [int(line.split(f"{key}Shape: [")[1].split(",")[0]) for key in ("Min", "Opt", "Max")]

    assert profile() == [1, 1, 8]
    assert profile(batch=4) == [4, 4, 4]
    assert profile(batch=(2, 4, 16)) == [2, 4, 16]
    assert profile(shapes={"x": [(1, 3, 32, 32), (3, 3, 32, 32), (5, 3, 32, 32)]}) == [1, 3, 5]


@needs_rtx
def test_padding_is_reported_with_the_module_it_is_for(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(8, 61, 3), torch.nn.ReLU(), torch.nn.Conv2d(61, 16, 3))
    program = graphcomb.capture(net.eval(), (torch.randn(3, 8, 12, 12),), dynamic_shapes="batch")
    export_onnx(program, tmp_path / "net.onnx", "fp16")
    report = build_engine(tmp_path / "net.onnx", "rtx-sm86")
    (pad,) = [pad for pad in report.pads if pad.how == "kernel"]
    assert [k.name for k in report.padding] == [pad.kernel]
    assert (pad.before, pad.after, pad.alignment) == (61, 62, 2)
    assert pad.nodes[0].startswith("2/")  # the second convolution
    assert report.to_dict()["pads"] == [pad.model_dump(mode="json") for pad in report.pads]


@needs_rtx
@pytest.mark.parametrize("option", [{"sparse": True}, {"tf32": False}, {"optimization_level": 1}, {"workspace": 512}])
def test_options_that_change_no_result(exported, tmp_path, option):
    assert build_engine(exported("resnet"), "rtx-sm86", tmp_path / "net.rtx", **option).kernels


@needs_rtx
def test_progress_shows_the_phases(exported, tmp_path, capsys):
    build_engine(exported("resnet"), "rtx-sm86", tmp_path / "net.rtx", progress=True)
    assert (tmp_path / "net.rtx").exists()
    assert "Traceback" not in capsys.readouterr().err


SUPPORTED = "builds for SM75, SM80, SM86, SM89, SM120, SM121 only"


@needs_rtx
@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"target": "agx-orin"}, BadInput, rf"target agx-orin \(SM87\): TensorRT-RTX [\d.]+ {SUPPORTED}"),
        ({"target": "h200"}, BadInput, rf"target h200 \(SM90\): .*{SUPPORTED}"),
        ({"target": "cpu"}, BadInput, rf"target cpu \(no compute capability\): .*{SUPPORTED}"),
        ({"batch": (4, 2, 1)}, BadInput, "input x: .* is not smallest <= best <= largest"),
        ({"batch": 0}, BadInput, "input x: .* from 1 up"),
        ({"batch": (1, 2)}, BadInput, "batch: three are needed"),
        ({"shapes": {"z": [(1, 3, 32, 32)] * 3}}, BadInput, "shapes: .* has no input z; known: x"),
        ({"shapes": {"x": [(1, 3, 32, 33)] * 3}}, BadInput, r"input x: shape \(1, 3, 32, 33\) does not fit"),
        ({"shapes": {"x": [(1, 3, 32)] * 3}}, BadInput, r"input x: shape \(1, 3, 32\) does not fit"),
        ({"workspace": 0}, BadInput, "option workspace: a whole number of MiB, from 1 up, not 0"),
        ({"optimization_level": 9}, BadInput, "option optimization_level: a whole number from 0 to 5, not 9"),
        ({"dla": 0}, BadInput, "option dla: rtx-sm86 has no DLA"),
        ({"timing_cache": "cache"}, BadInput, "option timing_cache: .* keeps no cache; known: batch, shapes"),
        ({"hardware_compatibility": "ampere_plus"}, BadInput, "option hardware_compatibility: .* of the target; known"),
        ({"version_compatible": True}, Refused, "builds no engine for rtx-sm86 with version_compatible: .*lean"),
        ({"wrokspace": 5}, BadInput, "option wrokspace: .* did you mean workspace"),
    ],
)
def test_what_cannot_be_is_one_clear_line_and_writes_nothing(exported, tmp_path, monkeypatch, options, kind, message):
    monkeypatch.chdir(tmp_path)
    target = options.pop("target", "rtx-sm86")
    with pytest.raises(kind, match=message) as error:
        build_engine(exported("resnet"), target, tmp_path / "net.rtx", backend="tensorrt_rtx", **options)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@needs_rtx
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: SmallResNet(width=16), (2, 1, 16, 16)),
        (lambda: VisionTransformer(16, 4, 1, 2, 32, 64, num_classes=10), (2, 3, 16, 16)),
    ],
)
def test_products_in_fp8_build_for_targets_that_have_it(make, shape, tmp_path):
    torch.manual_seed(0)
    program = Fuse()(graphcomb.capture(make().eval(), (torch.randn(shape),), dynamic_shapes="batch")).program
    found = Quantize(precision="fp8", samples=4)(program, data=[torch.randn(4, *shape[1:])])
    model = export_onnx(found.program, tmp_path / "net.onnx", "fp16", target="rtx-sm89").path
    for target in ("rtx-sm89", "rtx-sm120"):
        report = build_engine(model, target, tmp_path / "net.rtx")
        assert (report.precision, report.target) == ("fp8", target)
        products = [k for k in report.kernels if k.kind in ("correlation", "gemm")]
        eight_bits = [k for k in products if all(text.startswith("fp8[") for text in k.inputs)]
        assert len(eight_bits) == len(found.record["changed"])
        # First and last layers, and products of activations, stay in half precision.
        assert all(text.startswith("fp16[") for k in products if k not in eight_bits for text in k.inputs)
    with pytest.raises(BadInput, match=r"rtx-sm86 .*fp8"):
        build_engine(model, "rtx-sm86", tmp_path / "other.rtx")


@needs_rtx
@pytest.mark.skipif(gpu() is not None, reason="this machine has a GPU, where these engines can be built")
def test_refit_takes_a_gpu(exported, tmp_path):
    with pytest.raises(Refused, match="builds no engine for rtx-sm86 with refit"):
        build_engine(exported("resnet"), "rtx-sm86", tmp_path / "net.rtx", refit=True)
    assert list(tmp_path.iterdir()) == []


# A builder that only the collector can free waits for it, which comes when the library first logs, with its locks held.
GARBAGE = """
import sys, types
import tensorrt_rtx
from graphcomb.runtime import build_engine
from graphcomb.runtime.engines.trt import build
from graphcomb.runtime.kit.trt import new_logger

def noisy(trt):
    logger = new_logger(trt)
    known = logger.log
    def log(severity, message):
        if waiting:
            waiting.clear()
            [[] for _ in range(100_000)]
        known(severity, message)
    logger.log = log
    return logger

old = new_logger(tensorrt_rtx)
cycle = types.SimpleNamespace(builder=tensorrt_rtx.Builder(old))
cycle.itself = cycle
waiting = [cycle]
del cycle
build.new_logger = noisy
build_engine(sys.argv[1], "rtx-sm86")
assert not waiting
"""


@needs_rtx
def test_what_an_earlier_build_left_is_not_freed_within_the_library(tmp_path):
    model = relu(tmp_path / "net.onnx", (2, 4))
    subprocess.run([sys.executable, "-c", GARBAGE, str(model)], check=True, timeout=60)
    assert list(tmp_path.glob("*.rtx"))


@needs_rtx
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_scales_below_fp16_do_not_become_0(tmp_path, precision):
    """As a layer scale of 1e-5 makes them that is folded into weights; TensorRT refuses scales of 0."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3))
    with torch.no_grad():
        net[2].weight *= 1e-6
    images = [torch.randn(2, 3, 12, 12)]
    program = graphcomb.capture(net.eval(), (images[0],), dynamic_shapes="batch")
    small = Quantize(precision=precision, include="*")(program, data=images).program
    export_onnx(small, tmp_path / "net.onnx", "fp16", target="rtx-sm89")
    scales = {node.input[1] for node in onnx.load(tmp_path / "net.onnx").graph.node if node.op_type == "QuantizeLinear"}
    values = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert scales
    assert all((values[name] > 0).all() for name in scales)
    assert build_engine(tmp_path / "net.onnx", "rtx-sm89").kernels


@needs_rtx
def test_a_fixed_batch_has_no_range(tmp_path):
    model = relu(tmp_path / "net.onnx", (2, 4))
    with pytest.raises(BadInput, match=r"batch: .* has a fixed batch"):
        build_engine(model, "rtx-sm86", batch=2)
    assert build_engine(model, "rtx-sm86").kernels


@needs_rtx
def test_other_dynamic_axes_want_shapes(tmp_path):
    model = relu(tmp_path / "net.onnx", ("batch", "width"))
    with pytest.raises(BadInput, match=r"input x: axes \[0, 1\] are dynamic; give shapes=\{'x': .*--shape x=NxN$"):
        build_engine(model, "rtx-sm86")
    assert build_engine(model, "rtx-sm86", shapes={"x": [(1, 4), (1, 8), (2, 8)]}).kernels


@needs_rtx
def test_an_operator_that_the_parser_lacks_is_named_with_its_node(tmp_path):
    square = {"x": (TensorProto.FLOAT, (4, 4))}
    nodes = [
        helper.make_node("Relu", ["x"], ["z"], name="relu"),
        helper.make_node("Det", ["z"], ["y"], name="block.2/det"),
    ]
    model = small(tmp_path / "net.onnx", nodes, square, {"y": (TensorProto.FLOAT, ())})
    with pytest.raises(BadInput, match=r"net.onnx: .* cannot parse it: node block.2/det \(Det\): operator not supp"):
        build_engine(model, "rtx-sm86")


@needs_rtx
def test_a_parser_error_has_the_librarys_reason(tmp_path):
    vector = {"x": (TensorProto.FLOAT, (4,))}
    weights = [numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.int8(3), "zero")]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "zero"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "zero"], ["y"], name="dequantize"),
    ]
    model = small(tmp_path / "net.onnx", nodes, vector, {"y": vector["x"]}, weights)
    with pytest.raises(BadInput, match=r"node quantize \(QuantizeLinear\): .*[Nn]on-zero zero point"):
        build_engine(model, "rtx-sm86")


@needs_rtx
def test_a_damaged_file(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"no model")
    with pytest.raises(BadInput, match=r"net\.onnx: not a"):
        build_engine(tmp_path / "net.onnx", "rtx-sm86")


@needs_rtx
def test_a_folder_that_cannot_be_written(exported, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"net\.rtx: cannot be written"):
        build_engine(exported("resnet"), "rtx-sm86", tmp_path / "file" / "net.rtx")


@needs_rtx
@pytest.mark.skipif(gpu() is not None, reason="this machine has a GPU")
def test_running_without_a_gpu_says_so(exported, tmp_path):
    build_engine(exported("resnet"), "rtx-sm86", tmp_path / "net.rtx")
    with pytest.raises(MissingBackend, match=r"net\.rtx: running an engine takes the GPU it was built for; no .*GPU"):
        load_engine(tmp_path / "net.rtx")


@needs_rtx
@pytest.mark.skipif(gpu() is None, reason="needs an NVIDIA GPU and its driver")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_an_engine_computes_what_onnx_runtime_does(exported, tmp_path, name, precision):
    target = "rtx-sm{}{}".format(*gpu())
    if target not in TARGETS:
        pytest.skip(f"TensorRT-RTX does not support this GPU ({target})")
    build_engine(exported(name, precision), target, tmp_path / "net.rtx", tf32=False)
    engine, reference = load_engine(tmp_path / "net.rtx"), load_engine(exported(name, "fp32"))
    for batch in (1, 8, 3):
        x = np.random.default_rng(batch).standard_normal((batch, *MODELS[name][1][1:])).astype(np.float32)
        (got,) = engine.run([x.astype(engine.inputs[0].dtype)])
        (want,) = reference.run([x])
        assert np.abs(got - want).max() <= {"fp32": 1e-4, "fp16": 2e-2}[precision] * np.abs(want).max()
    engine.close()
