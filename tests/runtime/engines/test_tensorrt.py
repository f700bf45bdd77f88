"""TensorRT engines. TensorRT-RTX builds for real, here and without a GPU; running an engine takes a GPU and is skipped
without one.

Classic TensorRT cannot be installed without NVIDIA's own packages, and needs a GPU to build. `classic` below stands in
for its module, and `cudart` for the CUDA runtime, on host memory. They show which calls this backend makes to which
version, not what TensorRT would answer.
"""

import ctypes
import dataclasses
import importlib.util
import json
import sys
import types

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import VisionTransformer

import graphcomb
from graphcomb.graph.errors import BadInput, MissingBackend, Refused
from graphcomb.runtime.devices import here
from graphcomb.runtime.devices.here import local_target
from graphcomb.runtime.devices.table import TARGETS, get_target
from graphcomb.runtime.engines import backends
from graphcomb.runtime.engines.build import build_engine, load_engine
from graphcomb.runtime.engines.options import EngineOptions
from graphcomb.runtime.engines.trt import build as tensorrt
from graphcomb.runtime.engines.trt import library as tensorrt_library
from graphcomb.runtime.engines.trt.build import TensorRTEngine
from graphcomb.runtime.export.to_onnx import export_onnx
from graphcomb.runtime.kit import cuda
from graphcomb.runtime.kit.cuda import Cuda, CudaError, NoCuda

from ..standins import FakeCudart, flags

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
RTX_TARGETS = ["rtx-sm75", "rtx-sm80", "rtx-sm86", "rtx-sm89", "rtx-sm120", "rtx-sm121"]
MODELS = {
    "resnet": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10), (3, 3, 32, 32)),
    "vit": (lambda: VisionTransformer(16, 4, 2, 2, 32, 64, num_classes=10), (3, 3, 16, 16)),
}


def gpu():
    try:
        return Cuda().compute_capability
    except CudaError:
        return None


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


def small(path, nodes, inputs, outputs, weights=(), opset=17):
    """Save an ONNX model; inputs and outputs as {name: (type, shape)}."""
    sides = [[helper.make_tensor_value_info(n, *spec) for n, spec in side.items()] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, "net", *sides, list(weights))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def build(model, target, out, *, backend, **options):
    """What `build_engine` comes down to, whether or not the library is installed."""
    return tensorrt.build(model, target, out, EngineOptions(**options), backend=backend)


def relu(path, shape=("batch", 4), opset=17):
    spec = {"x": (TensorProto.FLOAT, shape)}
    return small(path, [helper.make_node("Relu", ["x"], ["y"], name="relu")], spec, {"y": spec["x"]}, opset=opset)


# ------------------------------------------------------------------------------------------------- TensorRT-RTX, real
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


# ---------------------------------------------------------------------------------------------------------- bad input
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
@pytest.mark.skipif(gpu() is not None, reason="this machine has a GPU, where these engines can be built")
def test_refit_takes_a_gpu(exported, tmp_path):
    with pytest.raises(Refused, match="builds no engine for rtx-sm86 with refit"):
        build_engine(exported("resnet"), "rtx-sm86", tmp_path / "net.rtx", refit=True)
    assert list(tmp_path.iterdir()) == []


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


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingBackend, match=r"tensorrt_rtx is not installed.*pip install 'graphcomb\[rtx\]'"):
        build(relu(tmp_path / "net.onnx"), get_target("rtx-sm86"), None, backend="tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))  # what the package on PyPI leaves
    with pytest.raises(MissingBackend, match="tensorrt is installed without its libraries"):
        build(relu(tmp_path / "net.onnx"), get_target("agx-orin"), None, backend="tensorrt")


# -------------------------------------------------------------------------------------------------------- running it
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


@pytest.mark.skipif(gpu() is None, reason="needs an NVIDIA GPU and its driver")
def test_memory_goes_to_the_gpu_and_back():
    device, data = Cuda(), np.arange(1000, dtype=np.float32)
    address, back = device.allocate(data.nbytes), np.empty_like(data)
    device.to_device(address, data)
    device.to_host(back, address)
    device.synchronize()
    device.free(address)
    device.close()
    assert (back == data).all()


# --------------------------------------------------------------------------- what needs a GPU, with the stand-ins
ORIN = get_target("agx-orin")


def test_classic_is_strongly_typed_where_it_can_be(classic, tmp_path):
    weight = [numpy_helper.from_array(np.ones(4, np.float16), "w")]
    spec = {"x": (TensorProto.FLOAT16, ("batch", 4))}
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"], name="mul")]
    model = small(tmp_path / "net.onnx", nodes, spec, {"y": spec["x"]}, weight)
    report = build(model, ORIN, None, backend="tensorrt", batch=(1, 2, 4), sparse=True, tf32=False)
    names = classic.module.NetworkDefinitionCreationFlag
    if classic.module.__version__.startswith("8"):
        assert classic.network_flags == 1 << names.EXPLICIT_BATCH
        assert classic.flags == ["FP16", "SPARSE_WEIGHTS", "-TF32"]
        assert "no strongly typed networks" in report.warnings[0]
    else:
        assert classic.network_flags == 1 << names.STRONGLY_TYPED
        assert classic.flags == ["SPARSE_WEIGHTS", "-TF32"]
        assert report.warnings == ["tactics were skipped"]
    assert classic.config.profiling_verbosity == classic.module.ProfilingVerbosity.DETAILED
    assert classic.profile == {"x": ((1, 4), (2, 4), (4, 4))}
    assert report.path == tmp_path / "net.engine"
    assert report.path.read_bytes() == b"engine"
    assert [k.kind for k in report.kernels] == ["Relu"]


def test_classic_builds_for_the_gpu_at_hand_only(classic, tmp_path, cudart):
    model = relu(tmp_path / "net.onnx")
    with pytest.raises(BadInput, match=r"target h100 \(SM90\): TensorRT .* builds for the GPU at hand, which is SM87"):
        build(model, get_target("h100"), None, backend="tensorrt")
    cudart.count = 0
    with pytest.raises(
        Refused, match=r"target agx-orin \(SM87\): TensorRT .* builds on the device itself; no NVIDIA GPU"
    ):
        build(model, ORIN, None, backend="tensorrt")


def test_a_parser_error_names_the_node_in_every_version(classic, tmp_path):
    with pytest.raises(BadInput, match=r"bad\.onnx: TensorRT .* cannot parse it: node relu \(Relu\): no importer$"):
        build(relu(tmp_path / "bad.onnx"), ORIN, None, backend="tensorrt")


def test_an_opset_that_the_version_does_not_parse_is_refused(classic, tmp_path):
    limit = {"8.5.2": 17, "8.6.1": 17, "10.3.0": 20, "11.4.0": 25}[classic.module.__version__]
    build(relu(tmp_path / "net.onnx", opset=limit), ORIN, None, backend="tensorrt")
    with pytest.raises(
        BadInput, match=rf"new\.onnx: opset {limit + 1}; TensorRT .* parses up to {limit}: export it with"
    ):
        build(relu(tmp_path / "new.onnx", opset=limit + 1), ORIN, None, backend="tensorrt")


def test_the_timing_cache_is_reused_and_kept(classic, tmp_path):
    model, cache = relu(tmp_path / "net.onnx"), tmp_path / "cache"
    for expected in (b"+timings", b"+timings+timings"):
        build(model, ORIN, None, backend="tensorrt", timing_cache=cache)
        assert cache.read_bytes() == expected
    cache.write_bytes(b"foreign")
    with pytest.raises(BadInput, match=r"option timing_cache: .*cache was made by another version or device"):
        build(model, ORIN, None, backend="tensorrt", timing_cache=cache)


def test_layers_that_the_dla_cannot_run_are_named(classic, tmp_path):
    spec, weight = {"x": (TensorProto.FLOAT16, ("batch", 4))}, [numpy_helper.from_array(np.ones(4, np.float16), "w")]
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"], name="mul")]
    model = small(tmp_path / "net.onnx", nodes, spec, {"y": spec["x"]}, weight)
    report = build(model, ORIN, None, backend="tensorrt", dla=1, batch=2)
    assert "the DLA cannot run 1 of 2 layers: softmax (SOFTMAX)" in report.warnings
    assert classic.config.default_device_type == classic.module.DeviceType.DLA
    assert classic.config.DLA_core == 1
    assert "GPU_FALLBACK" in classic.flags
    with pytest.raises(BadInput, match=r"input x: axes \[0\] are dynamic"):
        build(model, ORIN, None, backend="tensorrt", dla=1)
    classic.module.Builder.num_DLA_cores = 0
    message = (
        "core 0 asked for, TensorRT .* finds 0 cores on this machine; agx-orin's DLA is driven by TensorRT 10.3, 11.4"
    )
    with pytest.raises(Refused, match=message):
        build(model, ORIN, None, backend="tensorrt", dla=0, batch=2)


def test_flags_that_a_version_lacks_are_refused(classic, tmp_path):
    classic.module.BuilderFlag = flags("BuilderFlag", "FP16")
    with pytest.raises(Refused, match=r"option refit: TensorRT .* has no builder flag REFIT"):
        build(relu(tmp_path / "net.onnx"), ORIN, None, backend="tensorrt", refit=True)


def test_engines_for_other_gpus_are_of_a_level_that_the_version_has(classic, tmp_path):
    model = relu(tmp_path / "net.onnx")
    if classic.module.__version__.startswith("8"):
        with pytest.raises(Refused, match=r"option hardware_compatibility: TensorRT .* has no level same_compute_cap"):
            build(model, ORIN, None, backend="tensorrt", hardware_compatibility="same_compute_capability")
    if classic.module.__version__ != "8.5.2":
        build(model, ORIN, None, backend="tensorrt", hardware_compatibility="ampere_plus")
        assert classic.config.hardware_compatibility_level.name == "AMPERE_PLUS"


def test_an_engine_binds_copies_and_runs(classic, tmp_path, cudart):
    (tmp_path / "net.engine").write_bytes(b"engine")
    engine = TensorRTEngine(tmp_path / "net.engine", "tensorrt")
    assert [dataclasses.astuple(s) for s in engine.inputs] == [("x", "float32", (None, 4))]
    assert [s.name for s in engine.outputs] == ["y"]
    for batch in (2, 8, 1):  # buffers grow, and are used again
        x = np.random.default_rng(batch).standard_normal((4, batch)).astype(np.float32).T  # not contiguous
        (y,) = engine.run([x])
        assert np.array_equal(y, 2 * x)
        assert len(cudart.blocks) == 2
    with pytest.raises(BadInput, match=r"input x: shape \(9, 4\) is outside of .* range \(1, 4\) to \(8, 4\)"):
        engine.run([np.zeros((9, 4), np.float32)])
    with pytest.raises(BadInput, match="input x: the engine takes float32, got float64"):
        engine.run([np.zeros((1, 4))])
    with pytest.raises(BadInput, match=r"takes 1 inputs \(x\), got 2"):
        engine.run([x, x])
    engine.close()
    assert cudart.blocks == {}


@pytest.fixture
def engine(classic, tmp_path):
    (tmp_path / "net.engine").write_bytes(b"engine")

    def load(graphs=False):
        return TensorRTEngine(tmp_path / "net.engine", "tensorrt", graphs)

    return load


def numbers(batch):
    return np.random.default_rng(batch).standard_normal((batch, 4)).astype(np.float32)


def test_a_graph_is_recorded_once_for_shapes_and_buffers(engine, cudart):
    net = engine(graphs=True)
    for batch, launched in ((2, 1), (2, 2), (8, 3), (8, 4), (2, 5)):
        x = numbers(batch) + launched
        (y,) = net.run([x])
        assert np.array_equal(y, 2 * x)  # of this run's input, although an earlier one was recorded
        assert cudart.launched == launched
        assert len(cudart.graphs) == 1
    net.close()
    assert cudart.graphs == cudart.blocks == {}


@pytest.mark.filterwarnings("ignore:.*optimised for")
def test_a_prepared_run_leaves_the_data_on_the_device(engine, cudart, monkeypatch):
    for graphs in (False, True):
        call = engine(graphs).prepared([numbers(3)])
        with monkeypatch.context() as patch:
            patch.setattr(FakeCudart, "cudaMemcpyAsync", lambda *a: pytest.fail("a copy"))
            call()
        assert cudart.launched == (2 if graphs else 0)


def test_what_cannot_be_recorded_runs_without_a_graph(engine, classic, cudart):
    """The stream has left the capture, and no error is left for the next launch."""
    classic.recordable = False
    net, x = engine(graphs=True), numbers(2)
    with pytest.warns(UserWarning, match=r"net\.engine: runs without a CUDA graph: the engine did not run"):
        assert np.array_equal(net.run([x])[0], 2 * x)
    assert (cudart.recording, cudart.pending, cudart.graphs) == (None, 0, {})
    assert np.array_equal(net.run([x])[0], 2 * x)  # and is not tried again
    net.close()


@pytest.mark.filterwarnings("ignore:.*optimised for")
def test_a_second_prepared_run_leaves_the_first_as_it_was(engine):
    net = engine()
    first, second = net.prepared([numbers(3)]), net.prepared([numbers(5)])

    def result():
        return np.ctypeslib.as_array((ctypes.c_float * 12).from_address(net._buffers["y"][0]))

    second()
    first()
    assert np.array_equal(result(), 2 * numbers(3).ravel())


def test_another_shape_than_the_optimum_is_said(engine):
    with pytest.warns(UserWarning, match=r"measured with shape \(3, 4\), and the engine is optimised for \(1, 4\)"):
        engine().prepared([numbers(3)])


def test_of_several_profiles_the_one_for_the_shapes_is_used(engine, monkeypatch, recwarn):
    net = engine()
    ranges = [[(1, 4), (1, 4), (8, 4)], [(4, 4), (5, 4), (8, 4)], [(16, 4), (16, 4), (16, 4)]]
    asked = []
    kind = type(net._engine)
    monkeypatch.setattr(kind, "num_optimization_profiles", 3)
    monkeypatch.setattr(kind, "get_tensor_profile_shape", staticmethod(lambda name, profile: ranges[profile]))
    choose = lambda context, profile, stream: asked.append(profile) or True  # noqa: E731
    monkeypatch.setattr(type(net._context), "set_optimization_profile_async", choose, raising=False)
    for batch, wanted in ((5, [1]), (5, [1]), (2, [1, 0]), (1, [1, 0])):
        net.prepared([numbers(batch)])()
        assert asked == wanted
    assert len(recwarn) == 1  # about the batch of 2


def test_only_a_trusted_file_brings_code_of_its_own(classic, tmp_path):
    (tmp_path / "net.engine").write_bytes(b"engine")
    if classic.module.__version__.startswith("8.5"):
        with pytest.raises(Refused, match=r"option host_code: TensorRT .* knows no engines"):
            load_classic(tmp_path, host_code=True)
        return
    assert not load_classic(tmp_path)._runtime.engine_host_code_allowed
    assert load_classic(tmp_path, host_code=True)._runtime.engine_host_code_allowed


def load_classic(folder, **options):
    return tensorrt.load(folder / "net.engine", backend="tensorrt", **options)


def test_the_first_cuda_library_that_works_is_taken(monkeypatch):
    """The newest one may want a newer driver than there is."""
    made = {"libcudart.so.13": FakeCudart(count=0), "libcudart.so.12": FakeCudart()}
    made["libcudart.so.13"].cudaGetDeviceCount = lambda count: 35  # the driver is too old
    made["libcudart.so.13"].cudaGetErrorString = lambda status: b"driver is insufficient"

    def load(name):
        if name not in made:
            raise OSError(name)
        return made[name]

    monkeypatch.setattr(cuda.ctypes, "CDLL", load)
    assert cuda._load() is made["libcudart.so.12"]
    del made["libcudart.so.12"]
    with pytest.raises(NoCuda, match="no usable NVIDIA GPU here: cudaGetDeviceCount: driver is insufficient"):
        Cuda()
    made.clear()
    with pytest.raises(NoCuda, match="no CUDA runtime here"):
        Cuda()


def test_a_library_that_does_not_load_is_not_missing(tmp_path, monkeypatch):
    def fail(name):
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(tensorrt_library.importlib, "import_module", fail)
    with pytest.raises(MissingBackend, match=r"tensorrt is installed and cannot be loaded: libnvinfer\.so\.10"):
        build(relu(tmp_path / "net.onnx"), ORIN, None, backend="tensorrt")


def test_plugins_are_loaded_to_build_and_to_run(classic, tmp_path):
    model, library = relu(tmp_path / "net.onnx"), tmp_path / "libplugin.so"
    with pytest.raises(BadInput, match=r"option plugins: tensorrt .* takes no plugins"):
        build(model, ORIN, None, backend="tensorrt", plugins=[str(library)])
    loaded = []
    load = lambda path: None if "bad" in path else loaded.append(path) or 1  # noqa: E731
    classic.module.get_plugin_registry = lambda: types.SimpleNamespace(load_library=load)
    with pytest.raises(BadInput, match=r"option plugins: .*libplugin\.so: no such file"):
        build(model, ORIN, None, backend="tensorrt", plugins=[str(library)])
    library.write_bytes(b"")
    report = build(model, ORIN, None, backend="tensorrt", plugins=[str(library)])
    TensorRTEngine(report.path, "tensorrt", plugins=[str(library)]).close()
    assert loaded == [str(library)] * 2
    (tmp_path / "bad.so").write_bytes(b"")
    with pytest.raises(BadInput, match=r"bad\.so: not a library of plugins"):
        build(model, ORIN, None, backend="tensorrt", plugins=[str(tmp_path / "bad.so")])


def test_layers_are_timed_in_runs_of_their_own(engine):
    net = engine(graphs=True)
    assert net.profile([numbers(2)], runs=4) == [("first", 1.0), ("second", 0.5)]
    x = numbers(2)
    assert np.array_equal(net.run([x])[0], 2 * x)  # and it runs as before


def test_the_inspector_is_read(engine):
    assert engine().inspect() == [{"Name": "relu", "HasSparseWeights": 1}, {"Name": "plain"}]


def test_weights_are_replaced_where_the_version_can(engine, classic, tmp_path):
    net, x = engine(), numbers(2)
    if classic.module.__version__.startswith("8"):
        with pytest.raises(Refused, match=r"TensorRT 8.\d.\d refits no ONNX files"):
            net.refit(tmp_path / "net.onnx")
        return
    with pytest.raises(BadInput, match=r"other.onnx: not the network of .*net.engine: weights are missing"):
        net.refit(tmp_path / "other.onnx")
    net.refit(tmp_path / "net.onnx")
    assert np.array_equal(net.run([x])[0], 3 * x)
    net._engine.refittable = False
    with pytest.raises(Refused, match="not built with the option refit"):
        net.refit(tmp_path / "net.onnx")


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_an_engine_is_measured_on_a_profile_for_its_batch(classic, tmp_path, monkeypatch, recwarn, batch):
    """The stand-in's engine takes what its profile says."""
    model = relu(tmp_path / "net.onnx")
    engine = classic.module.Runtime(types.SimpleNamespace()).deserialize_cuda_engine(b"engine")
    monkeypatch.setattr(type(engine), "get_tensor_profile_shape", staticmethod(lambda *of: classic.profile["x"]))
    context = type(engine.create_execution_context())

    def fits(self, name, shape):
        self.shape = shape
        smallest, _, largest = classic.profile["x"]
        return all(a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True))

    monkeypatch.setattr(context, "set_input_shape", fits)
    monkeypatch.setattr(here, "_machine_names", lambda: here._words("Jetson AGX Orin"))
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: True)
    result = graphcomb.runtime.bench([model, model], engine="tensorrt", batch=batch, seconds=0.2, min_runs=1)
    assert result.ratio is not None
    assert classic.profile == {"x": ((batch, 4),) * 3}
    assert not [str(warning.message) for warning in recwarn if "optimised for" in str(warning.message)]


@pytest.fixture
def machine(cudart, monkeypatch):
    """A machine with a GPU and a name."""

    def make(capability, *names):
        cudart.capability = capability
        monkeypatch.setattr(here, "_machine_names", lambda: here._words(" ".join(names)))

    return make


@pytest.mark.parametrize(
    ("capability", "name", "target"),
    [
        ((7, 5), "", "rtx-sm75"),
        ((8, 0), "NVIDIA A100-SXM4-40GB", "rtx-sm80"),
        ((8, 6), "", "rtx-sm86"),
        ((8, 9), "NVIDIA L40S", "rtx-sm89"),
        ((9, 0), "NVIDIA H200", "h200"),
        ((9, 0), "NVIDIA H100 80GB HBM3", "h100"),
        ((10, 0), "NVIDIA B200", "b200"),
        ((10, 3), "NVIDIA B300 SXM6 AC", "b300"),
        ((12, 0), "", "rtx-sm120"),
        ((8, 7), "NVIDIA Jetson AGX Orin Developer Kit", "agx-orin"),
        ((8, 7), "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super Orin", "orin-nano"),
        ((8, 7), "NVIDIA Orin NX Developer Kit", "orin-nx"),
        ((8, 7), "NVIDIA DRIVE AGX Orin", "drive-orin"),
        ((11, 0), "NVIDIA Jetson AGX Thor Developer Kit", "agx-thor"),
        ((10, 1), "NVIDIA DRIVE AGX Thor", "drive-thor"),  # as CUDA 12 calls it
    ],
)
def test_classic_has_a_target_on_every_gpu(machine, recwarn, capability, name, target):
    machine(capability, name)
    assert local_target("tensorrt").name == target
    assert not recwarn


def test_boards_that_cannot_be_told_apart_are_named(machine):
    machine((8, 7), "a carrier board")
    with pytest.warns(UserWarning, match=r"\(SM87\) is taken for orin-nano; it may be orin-nx, agx-orin, drive-orin"):
        local_target("tensorrt")


def test_a_renamed_capability_is_built_for(classic, tmp_path, cudart):
    cudart.capability = (10, 1)
    assert build(relu(tmp_path / "net.onnx"), get_target("drive-thor"), None, backend="tensorrt").path.is_file()
    with pytest.raises(BadInput, match="for the GPU at hand, which is SM110"):
        build(relu(tmp_path / "net.onnx"), ORIN, None, backend="tensorrt")


def test_this_machines_gpu_is_a_target(machine, cudart):
    machine((8, 7), "Jetson AGX Orin")
    assert local_target("tensorrt").compute_capability == (8, 7)
    with pytest.raises(BadInput, match=r"TensorRT-RTX: no target for this machine's GPU \(SM87\)"):
        local_target("tensorrt_rtx")
    cudart.count = 0
    with pytest.raises(MissingBackend, match="tensorrt builds for this machine's GPU; no NVIDIA GPU here"):
        local_target("tensorrt")


def test_a_foreign_engine_file_is_one_line(classic, tmp_path):
    (tmp_path / "net.engine").write_bytes(b"of another version")
    with pytest.raises(BadInput, match=r"not an engine for TensorRT .* here: the engine plan is of version 8"):
        TensorRTEngine(tmp_path / "net.engine", "tensorrt")


def test_cuda_errors_carry_cudas_words(cudart):
    with pytest.raises(CudaError, match="cudaMalloc: out of memory"):
        Cuda().allocate(1 << 30)
