"""What runs on a device: its TensorRT, a stand-in, and which library it is."""

import hashlib
import importlib
import json

import pytest

from graphcomb.runtime.kit import options

from ..standins import FakeCudart
from .toys import QUICKLY, edit


@pytest.mark.parametrize("fails", ["the engine", "cudaStreamEndCapture", "cudaGraphInstantiateWithFlags"])
def test_a_graph_that_cannot_be_recorded_is_left_out(script, classic, cudart, bundle, monkeypatch, fails):
    """The engine then runs without one: the capture has ended, and no error is left for the next launch."""
    if fails == "the engine":
        classic.recordable = False
    else:
        real = getattr(FakeCudart, fails)
        monkeypatch.setattr(FakeCudart, fails, lambda cuda, *given: real(cuda, *given) or cuda.fail(900))
    assert script.main(["--out", str(bundle / "r.json"), "--rounds", "1", "--power-seconds", "0.01", "--quiet"]) == 0
    found = json.loads((bundle / "r.json").read_text())
    for row in found["models"].values():
        assert list(row["latency"]) == ["stream"]
        wanted = "the engine did not run" if fails == "the engine" else f"{fails}: capture failed"
        assert row["engine"]["no_graph"].startswith(wanted)
    assert found["models"]["dense"]["parity"]["error"] == 0
    assert cudart.recording is None
    assert cudart.pending == 0


def test_an_engine_that_says_it_cannot_be_recorded_is_not(script, rtx, cudart, bundle, monkeypatch):
    """TensorRT-RTX says so, and compiles its kernels for these shapes before the first run."""
    rtx.capturable = False
    monkeypatch.setattr(FakeCudart, "cudaStreamBeginCapture", lambda *given: pytest.fail("a capture"))
    arguments = ["--engine", "tensorrt_rtx", "--out", str(bundle / "r.json"), *QUICKLY, "--quiet"]
    assert script.main(arguments) == 0
    assert rtx.runtime_config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    row = json.loads((bundle / "r.json").read_text())["models"]["dense"]
    assert row["engine"]["no_graph"].startswith("the engine says that its runs cannot be recorded")


def test_an_opset_that_tensorrt_8_does_not_parse_is_said_with_the_cure(script, classic, bundle, capsys):
    edit(bundle, lambda about: about["models"]["dense"].update(opset=18))
    edit(bundle, lambda about: about["models"]["compressed"].update(opset=17))
    old = classic.module.__version__.startswith("8")
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY, "--quiet"]) == int(old)
    cure = (
        f"dense: model.onnx: opset 18; tensorrt {classic.module.__version__} parses up to 17: bundle it with --opset 17"
    )
    assert (cure in capsys.readouterr().err) == old


@pytest.mark.parametrize("classic", ["10.3.0"], indirect=True)
def test_a_type_that_numpy_lacks_is_named(script, classic, bundle, capsys, monkeypatch):
    kind = classic.module.DataType.BF16
    monkeypatch.setattr(classic.module.ICudaEngine, "get_tensor_dtype", lambda engine, name: kind)
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 2
    assert "dense: tensor x is of type BF16, which numpy does not have" in capsys.readouterr().err


def test_the_librarys_reason_is_told(script, classic, bundle, capsys, monkeypatch):
    def fail(builder, network, config):
        severity = classic.module.ILogger.Severity
        builder.logger.log(severity.ERROR, "checkMacros.cpp::catchCudaError::250: nothing telling")
        builder.logger.log(severity.ERROR, "no tactic for  conv1")

    monkeypatch.setattr(classic.module.Builder, "build_serialized_network", fail)
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 2
    assert "builds no engine: no tactic for conv1" in capsys.readouterr().err


def test_plugins_of_the_bundle_are_loaded_before_anything_is_parsed(script, classic, bundle, capsys, monkeypatch):
    library = bundle / "plugin-libraries" / "libnet.so"
    library.parent.mkdir()
    library.write_bytes(b"library")
    name = {"plugin-libraries/libnet.so": hashlib.sha256(b"library").hexdigest()}
    edit(bundle, lambda about: about.update(plugins=name))
    arguments = ["--out", str(bundle / "r.json"), "--seconds", "0", "--power-seconds", "0.05", "--quiet"]
    if classic.module.__version__.startswith("8.5"):
        assert script.main(arguments) == 2
        assert "takes no plugins" in capsys.readouterr().err
        return
    assert script.main(arguments) == 0
    assert classic.plugins == [str(library)] * 2
    assert classic.library.calls.index("init_libnvinfer_plugins") < classic.library.calls.index(
        "IPluginRegistry.load_library"
    )
    classic.library.faults["IPluginRegistry.load_library"] = lambda registry, path: None
    assert script.main(["--out", str(bundle / "r.json"), "--seconds", "0", "--quiet"]) == 2
    assert "libnet.so: not a library of plugins for tensorrt" in capsys.readouterr().err
    library.write_bytes(b"another")
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 2
    assert "libnet.so: not the file that was bundled" in capsys.readouterr().err
    library.unlink()
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 2
    assert "No such file" in capsys.readouterr().err


def test_engines_are_kept_and_used_again(script, classic, bundle, monkeypatch):
    arguments = ["--out", str(bundle / "r.json"), *QUICKLY, "--quiet"]
    assert script.main(arguments) == 0
    first = json.loads((bundle / "r.json").read_text())["models"]
    names = [row["engine"]["file"] for row in first.values()]
    assert sorted(path.name for path in bundle.glob("*.engine")) == sorted(names)
    assert all((bundle / name).read_bytes() == b"engine" for name in names)
    assert classic.built == 2
    assert script.main(arguments) == 0
    second = json.loads((bundle / "r.json").read_text())["models"]
    assert classic.built == 2
    assert all(row["engine"]["reused"] and row["engine"]["build_seconds"] is None for row in second.values())
    assert [row["engine"]["file"] for row in second.values()] == names
    # Not after a change of what they depend on, nor when the file is none any more.
    for change, built in (([], 0), (["--sparse"], 2), (["--dla", "0"], 2), (["--rebuild"], 2)):
        before = classic.built
        assert script.main([*arguments, *change]) == 0
        assert classic.built - before == built
    classic.module.__version__ += ".1"
    assert script.main(arguments) == 0
    assert not any(
        row["engine"].get("reused") for row in json.loads((bundle / "r.json").read_text())["models"].values()
    )
    names = [row["engine"]["file"] for row in json.loads((bundle / "r.json").read_text())["models"].values()]
    (bundle / names[0]).write_bytes(b"cut off")
    before = classic.built
    assert script.main(arguments) == 0
    assert classic.built - before == 1
    assert (bundle / names[0]).read_bytes() == b"engine"


def test_no_library_is_one_line(script, monkeypatch, capsys):
    monkeypatch.setattr(options, "LIBRARIES", ("no_such_library",))
    with pytest.raises(
        script.Failure, match=r"none of no_such_library can run here \(no_such_library: not installed\)"
    ):
        script.library("auto")


def test_the_library_is_the_bundles_if_it_can_run(script, classic, cudart, monkeypatch):
    assert script.library("auto")[0] == "tensorrt"
    assert script.library("auto", "onnxruntime")[0] == "onnxruntime"
    cudart.count = 0
    found, missing = script.library("auto", "tensorrt")  # TensorRT is installed, and there is no GPU
    assert found == "onnxruntime"
    assert missing["tensorrt"] == "cannot be used: no NVIDIA GPU here"
    assert script.library("tensorrt", "onnxruntime")[0] == "tensorrt"  # what is asked for is tried


def test_a_library_that_does_not_load_is_not_missing(script, classic, bundle, capsys, monkeypatch):
    load = importlib.import_module

    def fail(name):
        if name == "tensorrt":
            raise ImportError("libnvinfer.so.10: cannot open shared object file")
        return load(name)

    monkeypatch.setattr(options.importlib, "import_module", fail)
    with pytest.raises(
        script.Failure, match=r"^tensorrt: cannot be used: ImportError: libnvinfer\.so\.10: cannot open"
    ):
        script.library("tensorrt")
    _, missing = script.library("auto", "tensorrt")
    assert "libnvinfer" in missing["tensorrt"]


def test_each_model_is_built_as_it_is(script, classic, bundle, capsys):
    """An engine of TensorRT 8 is only as precise, and any engine only as sparse, as it is allowed to be."""

    def change(about):
        about |= {"engine": "tensorrt", "target": "agx-orin"}
        about["models"]["dense"] |= {"precision": "fp32"}
        about["models"]["compressed"] |= {"precision": "int8", "sparse": True, "note": "as it came"}

    edit(bundle, change)
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY]) == 0
    found = json.loads((bundle / "r.json").read_text())
    weak = classic.module.__version__.startswith("8")
    assert found["models"]["dense"]["engine"]["flags"] == []
    assert found["models"]["compressed"]["engine"]["flags"] == ["SPARSE_WEIGHTS", *(["FP16", "INT8"] if weak else [])]
    assert "compressed: kernels for 2:4 sparse weights are allowed" in capsys.readouterr().out
    assert found["notes"][0] == "compressed: as it came"
    assert [row["parity"]["tolerance"] for row in found["models"].values()] == [1e-3, 0.3]
