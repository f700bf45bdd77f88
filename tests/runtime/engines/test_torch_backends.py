"""Inductor for real on the CPU, and Torch-TensorRT with a stand-in for the library: it cannot be imported without a GPU.
The stand-in shows what the library is asked, not what it would answer."""

import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import graphcomb
from graphcomb.graph.errors import BadInput, MissingBackend, Refused
from graphcomb.runtime import bench, build_engine, load_engine
from graphcomb.runtime.engines.base import Engine
from graphcomb.runtime.engines.build import open_engine
from graphcomb.runtime.engines.options import EngineOptions
from graphcomb.runtime.engines.torch import inductor as inductor_module
from graphcomb.runtime.engines.torch import torch_tensorrt as backend
from graphcomb.runtime.engines.torch.base import TorchEngine, on_leaves, precision, specs

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    return graphcomb.capture(net.eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes="batch")


def wanted(program, x):
    with torch.no_grad():
        return program.copy().module().eval()(torch.from_numpy(x)).numpy()


def numbers(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- the interface
def test_a_callable_is_an_engine(program):
    engine = TorchEngine(on_leaves(program, program.copy().module().eval()), *specs(program), torch.device("cpu"))
    assert isinstance(engine, Engine)
    assert not engine.on_device
    assert [(i.name, i.dtype, i.shape) for i in engine.inputs] == [("input", "float32", (None, 3, 8, 8))]
    assert [(o.name, o.shape) for o in engine.outputs] == [("output", (None, 8, 6, 6))]
    for batch in (1, 5):
        x = numbers(batch, 3, 8, 8)
        assert np.array_equal(engine.run([x])[0], wanted(program, x))
    engine.prepared([x])()
    with pytest.raises(BadInput, match=r"takes 1 inputs \(input\), got 2"):
        engine.run([x, x])
    with pytest.raises(BadInput, match=r"input input: the engine takes shape \(None, 3, 8, 8\), got \(1, 3, 8, 9\)"):
        engine.run([numbers(1, 3, 8, 9)])
    with pytest.raises(BadInput, match="takes float32, got float64"):
        engine.run([x.astype(np.float64)])
    engine.close()


def test_only_tensors_are_inputs():
    class Net(torch.nn.Module):
        def forward(self, x, factor, *, y):
            return x * factor, y

    x, y = torch.randn(2, 3), torch.randn(1)
    program = graphcomb.capture(Net(), (x, 3), {"y": y})
    found = on_leaves(program, program.module())(x, y)
    assert torch.equal(found[0], 3 * x)
    assert [len(side) for side in specs(program)] == [2, 2]
    assert precision(program) == "fp32"


@pytest.mark.parametrize("name", ["inductor", "torch_tensorrt"])
def test_they_build_from_programs(tmp_path, name, monkeypatch):
    monkeypatch.setattr("graphcomb.runtime.engines.build.backend_module", lambda name: None)
    (tmp_path / "net.onnx").write_bytes(b"")
    with pytest.raises(BadInput, match=rf"net\.onnx: {name} builds from a saved program \(\.pt2\)"):
        build_engine(tmp_path / "net.onnx", "cpu", backend=name)


def test_engines_of_onnx_run_no_programs(program):
    pytest.importorskip("openvino")
    with pytest.raises(BadInput, match="backend openvino: does not run programs"):
        open_engine(program, "openvino")


# ------------------------------------------------------------------------------------------------------------ inductor
@needs_compiler
@pytest.mark.slow
def test_inductor_compiles_in_this_process(program):
    engine = open_engine(program, "inductor")
    for batch in (2, 5):
        x = numbers(batch, 3, 8, 8)
        np.testing.assert_allclose(engine.run([x])[0], wanted(program, x), rtol=1e-4, atol=1e-5)
    found = bench([program, program], engine="inductor", names=["a", "b"], seconds=2, min_runs=1)
    assert [t.name for t in found.timings] == ["a", "b"]


@needs_compiler
@pytest.mark.slow
def test_inductor_compiles_ahead_of_time(program, tmp_path):
    saved = program.save(tmp_path / "net.pt2")
    report = build_engine(saved, "cpu", backend="inductor")
    assert report.path == tmp_path / "net.cpu.aoti"
    assert report.bytes == report.path.stat().st_size
    assert report.precision == "fp32"
    engine = load_engine(report.path)
    for batch in (2, 5):
        x = numbers(batch, 3, 8, 8)
        np.testing.assert_allclose(engine.run([x])[0], wanted(program, x), rtol=1e-4, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.cpu.aoti", "net.pt2"]


@needs_compiler
def test_a_cpu_is_a_machine_that_inductor_compiles_ahead_for(program, tmp_path, monkeypatch):
    """Without the compiler itself, which takes its time."""

    def package(exported, package_path):
        Path(package_path).write_bytes(b"compiled")
        return package_path

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", package)
    report = build_engine(program.save(tmp_path / "net.pt2"), "cpu", backend="inductor")
    assert (report.target, report.path) == ("cpu", tmp_path / "net.cpu.aoti")
    seen = []
    load = lambda path: seen.append(Path(path).read_bytes()) or (lambda x: 2 * x)  # noqa: E731
    monkeypatch.setattr(torch._inductor, "aoti_load_package", load)
    assert np.array_equal(load_engine(report.path).run([numbers(1, 3, 8, 8)])[0], 2 * numbers(1, 3, 8, 8))
    assert seen == [b"compiled"]


def test_inductor_needs_a_compiler(program, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("on a GPU it brings its own")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MissingBackend, match="needs a C\\+\\+ compiler on a CPU; install g\\+\\+"):
        open_engine(program, "inductor")


@needs_compiler
def test_inductor_compiles_for_this_machine(program, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    saved = program.save(tmp_path / "net.pt2")
    with pytest.raises(BadInput, match=r"target h100: inductor compiles for the machine at hand, which is a CPU"):
        build_engine(saved, "h100", backend="inductor")


@needs_compiler
def test_what_inductor_refuses_is_one_line(program, monkeypatch):
    def compile(module, **options):
        assert options["options"]["freezing"]
        assert options["dynamic"]

        def fail(*args):
            raise RuntimeError("LoweringException: no\nmore") from ValueError("\n an operator is missing\nsomewhere")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(Refused, match=r"inductor cannot compile the program: an operator is missing$"):
        inductor_module.compile_program(program)


def test_a_file_of_something_else_is_no_engine(tmp_path):
    (tmp_path / "net.aoti").write_bytes(b"no zip")
    with pytest.raises(BadInput, match=r"net\.aoti: not an engine that inductor can load here"):
        load_engine(tmp_path / "net.aoti")


# ------------------------------------------------------------------------------------------------------ Torch-TensorRT
@pytest.fixture
def library(monkeypatch):
    """A stand-in for torch_tensorrt, 2.14 unless `old` is set; it "compiles" to the exported program's module."""
    asked = types.SimpleNamespace(options=None, old=False)

    def new(exported_program, inputs=None, *, arg_inputs=None, kwarg_inputs=None, sparse_weights=False,
            optimization_level=None, truncate_double=False, min_block_size=5, use_explicit_typing=True):  # fmt: skip
        asked.options = {k: v for k, v in locals().items() if k not in ("exported_program", "asked")}
        module = exported_program.module()
        module.add_module("_run_on_acc_0", torch.nn.Identity())
        module.add_module("_run_on_gpu_1", torch.nn.Identity())
        return module

    def old(exported_program, inputs=None, *, arg_inputs=None, kwarg_inputs=None, enabled_precisions=None):
        asked.options = {"enabled_precisions": enabled_precisions}
        return exported_program.module()

    fake = types.ModuleType("torch_tensorrt")
    fake.__version__ = "2.14.0"
    fake.dynamo = types.SimpleNamespace(compile=new)
    fake.Input = lambda **shapes: shapes
    fake.save = lambda module, path, output_format, retrace: torch.save(module.state_dict(), path)
    fake.load = lambda path: types.SimpleNamespace(module=lambda: lambda x: torch.load(path) and x)
    asked.use_old = lambda: setattr(fake.dynamo, "compile", old)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    monkeypatch.setattr(backend, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    asked.module = fake
    return asked


def test_torch_tensorrt_is_asked_for_the_programs_types_and_shapes(program, library):
    engine = backend.compile_program(program, sparse=True)
    x = numbers(3, 3, 8, 8)
    np.testing.assert_allclose(engine.run([x])[0], wanted(program, x), rtol=1e-5, atol=1e-6)
    shapes = {"min_shape": (1, 3, 8, 8), "opt_shape": (1, 3, 8, 8), "max_shape": (8, 3, 8, 8), "dtype": torch.float32}
    assert library.options["arg_inputs"] == [shapes]
    assert library.options["sparse_weights"]
    assert library.options["use_explicit_typing"]
    assert library.options["min_block_size"] == 1
    assert library.options["optimization_level"] is None


def test_torch_tensorrt_is_compiled_for_the_batch_it_is_measured_with(program, library, monkeypatch):
    monkeypatch.setattr("graphcomb.runtime.engines.build.backend_module", lambda name: backend)
    open_engine(program, "torch_tensorrt", 1, [(16, 3, 8, 8)])
    assert {shape[0] for key, shape in library.options["arg_inputs"][0].items() if key != "dtype"} == {16}


def test_older_versions_are_told_the_types(program, library):
    library.use_old()
    backend.compile_program(program)
    assert library.options == {"enabled_precisions": {torch.float32}}


def test_parts_that_stay_in_pytorch_are_reported(program, library, tmp_path):
    saved = program.save(tmp_path / "net.pt2")
    report = backend.build(
        saved, graphcomb.runtime.get_target("h100"), tmp_path / "net.ep", EngineOptions(batch=(2, 3, 4))
    )
    assert [library.options["arg_inputs"][0][f"{key}_shape"][0] for key in ("min", "opt", "max")] == [2, 3, 4]
    assert [(k.name, k.kind) for k in report.kernels[-2:]] == [
        ("_run_on_acc_0", "TensorRT"),
        ("_run_on_gpu_1", "PyTorch"),
    ]
    assert any("parts run in PyTorch" in text for text in report.warnings)
    assert report.path == tmp_path / "net.ep"
    engine = backend.load(tmp_path / "net.ep")
    assert engine.inputs == specs(program)[0]
    with pytest.raises(BadInput, match="target agx-orin: torch_tensorrt compiles for the GPU at hand, which is SM90"):
        backend.build(saved, graphcomb.runtime.get_target("agx-orin"), None, EngineOptions())


def test_what_torch_tensorrt_refuses_is_one_line(program, library):
    def fail(exported, **options):
        raise ValueError("unsupported: aten.x\nand so on")

    library.module.dynamo.compile = fail
    with pytest.raises(Refused, match=r"Torch-TensorRT 2\.14\.0 cannot compile the program: unsupported: aten\.x$"):
        backend.compile_program(program)


def test_without_the_library_or_a_gpu_it_says_so(program, monkeypatch):
    with pytest.raises(MissingBackend, match=r"torch_tensorrt is not installed; install it with: pip install"):
        open_engine(program, "torch_tensorrt")
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(MissingBackend, match="torch_tensorrt is not installed"):
        backend.compile_program(program)

    def fail(name):
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(backend.importlib, "import_module", fail)
    with pytest.raises(MissingBackend, match="does not load here: No CUDA GPUs are available; it needs an NVIDIA GPU"):
        backend.compile_program(program)
