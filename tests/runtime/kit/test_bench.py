"""What runs on a device: driving its TensorRT and writing what was measured.

TensorRT and CUDA are stand-ins (`standins.py`), which show what is called and not what a GPU would do.
"""

import hashlib
import importlib
import json
import subprocess
import sys
import types

import numpy as np
import pytest

from graphcomb.runtime.kit import bench as bench_device
from graphcomb.runtime.kit import measuring, telemetry, trt

from ..standins import FakeCudart, flags
from .recorded import ORIN_NANO


@pytest.fixture
def script():
    """The script that a bundle takes to a device."""
    return bench_device


@pytest.fixture
def bundle(script, tmp_path, monkeypatch):
    """A bundle of two models, whose files the stand-in does not read; the first is what it computes, the second not."""
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    models = {}
    for name, factor in (("dense", 2), ("compressed", 2.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(b"model")
        np.savez(tmp_path / name / "reference.npz", **{"input:x": x, "output:000": factor * x})
        digest = hashlib.sha256(b"model").hexdigest()
        models[name] = {"file": f"{name}/model.onnx", "reference": f"{name}/reference.npz", "sha256": digest}
    head = {"format": script.FORMAT, "precision": "fp16"}
    (tmp_path / "bundle.json").write_text(json.dumps(head | {"models": models}))
    monkeypatch.setattr(script, "HERE", tmp_path)
    monkeypatch.setenv("PATH", "")
    return tmp_path


def test_engines_are_built_run_with_and_without_graphs_and_timed(script, classic, cudart, bundle):
    out = bundle / "r.json"
    arguments = ["--out", str(out), "--rounds", "2", "--power-seconds", "0.05", "--sparse", "--dla", "1", "--quiet"]
    assert script.main(arguments) == 0
    found = json.loads(out.read_text())
    assert (found["engine"], found["version"]) == ("tensorrt", classic.module.__version__)
    assert {"SPARSE_WEIGHTS", "GPU_FALLBACK"} <= set(classic.flags)
    assert ("FP16" in classic.flags) == classic.module.__version__.startswith("8")  # elsewhere strongly typed
    assert classic.config.DLA_core == 1
    assert classic.profile == {"x": ((2, 4), (2, 4), (2, 4))}
    for row in found["models"].values():
        for mode in ("stream", "graph"):
            assert row["latency"][mode]["gpu_ms"]["median"] == 1.5  # between two events of the stand-in
            assert row["latency"][mode]["runs"] == 34
        assert row["layers"] == [{"name": "first", "ms": 1.0}, {"name": "second", "ms": 0.5}]
        assert row["engine"]["scratch_bytes"] == 4096
        assert row["engine"]["inspector"][0]["HasSparseWeights"] == 1
    assert found["models"]["dense"]["parity"] == {"finite": True, "error": 0.0, "tolerance": 0.05}
    assert found["models"]["compressed"]["parity"]["error"] == pytest.approx(0.2)
    assert found["notes"][0] == "compressed: outputs that differ from the reference by 2.0e-01, more than 0.05"
    assert found["ratios"]["compressed"]["graph"]["median"] == 1.0
    assert cudart.launched > 34
    assert "not known" in found["notes"][-1]
    assert cudart.blocks == cudart.graphs == {}
    assert cudart.events == 0
    (cache,) = bundle.glob("timing-*.cache")
    assert cache.read_bytes().count(b"+timings") == 2  # the second build knows what the first one measured


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


def test_an_engine_that_says_it_cannot_be_recorded_is_not(script, classic, cudart, bundle, monkeypatch):
    """As TensorRT-RTX does, which also compiles its kernels for these shapes before the first run."""
    asked = []
    trt = classic.module
    trt.DynamicShapesKernelSpecializationStrategy = flags("Strategy", "LAZY EAGER NONE")
    engine = trt.Runtime(types.SimpleNamespace()).deserialize_cuda_engine(b"engine")
    make, kind = engine.create_execution_context, type(engine)
    config = types.SimpleNamespace(dynamic_shapes_kernel_specialization_strategy="LAZY")

    def context(config=None):
        asked.append(config.dynamic_shapes_kernel_specialization_strategy.name)
        found = make()
        found.is_stream_capturable = lambda stream: False
        return found

    monkeypatch.setattr(kind, "create_runtime_config", staticmethod(lambda: config), raising=False)
    monkeypatch.setattr(kind, "create_execution_context", staticmethod(context))
    made = trt.Runtime.deserialize_cuda_engine
    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", lambda self, data: made(self, data) and engine)
    monkeypatch.setattr(FakeCudart, "cudaStreamBeginCapture", lambda *given: pytest.fail("a capture"))
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY, "--quiet"]) == 0
    assert asked == ["EAGER", "EAGER"]
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
    engine = classic.module.Runtime(types.SimpleNamespace()).deserialize_cuda_engine(b"engine")
    kind = types.SimpleNamespace(name="BF16")
    monkeypatch.setattr(type(engine), "get_tensor_dtype", staticmethod(lambda name: kind))
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 2
    assert "dense: tensor x is of type BF16, which numpy does not have" in capsys.readouterr().err


def edit(bundle, change):
    about = json.loads((bundle / "bundle.json").read_text())
    change(about)
    (bundle / "bundle.json").write_text(json.dumps(about))


QUICKLY = ("--rounds", "1", "--power-seconds", "0.01")


def spoil(bundle, name):
    """Rename a model so that the stand-in's parser refuses it."""
    (bundle / name / "model.onnx").rename(bundle / name / "bad.onnx")
    edit(bundle, lambda about: about["models"][name].update(file=f"{name}/bad.onnx"))


@pytest.mark.parametrize("bad", ["dense", "compressed"])
def test_a_model_that_cannot_be_built_does_not_discard_the_others(script, classic, bundle, capsys, bad):
    spoil(bundle, bad)
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY, "--quiet"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {bad}: bad.onnx: tensorrt ")
    assert "cannot parse it: no importer" in err
    assert err.count("\n") == 1
    found = json.loads((bundle / "r.json").read_text())
    (good,) = {"dense", "compressed"} - {bad}
    assert list(found["models"]) == [good]
    assert found["models"][good]["layers"]
    assert list(found["failed"]) == [bad]
    assert any(note.startswith(f"{bad}: failed: bad.onnx: ") for note in found["notes"])
    assert not found["ratios"].get(good)  # times faster than what?


def test_without_any_model_there_are_no_results(script, classic, bundle, capsys):
    spoil(bundle, "dense")
    spoil(bundle, "compressed")
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert not (bundle / "r.json").exists()
    assert script.main(["--engine", "tensorrt_rtx", "--out", str(bundle / "r.json"), "--quiet"]) == 2


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
    assert script.main(["--out", str(bundle / "r.json"), "--seconds", "0", "--power-seconds", "0.05", "--quiet"]) == 2
    assert "takes no plugins" in capsys.readouterr().err
    loaded = []
    load = lambda path: loaded.append(path) or 1  # noqa: E731
    registry = types.SimpleNamespace(load_library=load)
    monkeypatch.setattr(classic.module, "get_plugin_registry", lambda: registry, raising=False)
    assert script.main(["--out", str(bundle / "r.json"), "--seconds", "0", "--power-seconds", "0.05", "--quiet"]) == 0
    assert loaded == [str(library)] * 2
    registry.load_library = lambda path: None
    assert script.main(["--out", str(bundle / "r.json"), "--seconds", "0", "--quiet"]) == 2
    assert "libnet.so: not a library of plugins for tensorrt" in capsys.readouterr().err
    library.write_bytes(b"another")
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 2
    assert "libnet.so: not the file that was bundled" in capsys.readouterr().err
    library.unlink()
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 2
    assert "No such file" in capsys.readouterr().err


def test_outputs_without_a_reference_are_compared_with_nothing(script):
    assert measuring.check([np.ones(2)], [], 0.1) == {"finite": True, "error": None, "tolerance": 0.1}
    assert "note" in measuring.check([np.array([np.inf])], [], 0.1)


def test_a_missing_folder_is_noticed_before_anything_is_built(script, classic, bundle, capsys):
    assert script.main(["--out", str(bundle / "no" / "r.json"), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --out: there is no folder ")
    assert err.count("\n") == 1
    assert classic.built == 0


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


def test_an_interrupt_leaves_what_was_measured(script, classic, bundle, capsys, monkeypatch):
    runs = iter(range(10**6))
    time_one = script.TensorRT.time

    def interrupt(engine, mode):
        if next(runs) == 4 * measuring.BLOCK + 5:  # in the third round
            raise KeyboardInterrupt
        return time_one(engine, mode)

    monkeypatch.setattr(script.TensorRT, "time", interrupt)
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 130
    found = json.loads((bundle / "r.json").read_text())
    assert found["interrupted"] is True
    for row in found["models"].values():
        assert row["latency"]["stream"]["runs"] == 2 * (measuring.BLOCK - measuring.SETTLE)  # of whole rounds
        assert "graph" not in row["latency"]
    assert "interrupted: what was measured until then" in found["notes"]
    assert capsys.readouterr().err == "error: interrupted\n"


def test_an_interrupt_before_anything_is_measured_leaves_nothing(script, classic, bundle, capsys, monkeypatch):
    def interrupt(builder, network, config):
        raise KeyboardInterrupt

    monkeypatch.setattr(classic.module.Builder, "build_serialized_network", interrupt)
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert not (bundle / "r.json").exists()


def test_attached_it_ends_with_its_input():
    """As over ssh: nobody can press Ctrl-C there, and SIGINT may be ignored from the start."""
    code = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from graphcomb.runtime.kit import bench\n"
        "bench._attach()\n"
        "try:\n    print(1, flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('stopped')\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "1\n"
    assert child.communicate(timeout=60)[0] == "stopped\n"


def test_no_library_is_one_line(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "LIBRARIES", ("no_such_library",))
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

    monkeypatch.setattr(script.importlib, "import_module", fail)
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


def test_another_library_than_the_targets_is_noted(script, classic, bundle):
    edit(bundle, lambda about: about.update(engine="tensorrt_rtx", target="rtx-sm86"))
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY, "--engine", "tensorrt", "--quiet"]) == 0
    found = json.loads((bundle / "r.json").read_text())
    assert found["notes"][0] == "measured with tensorrt; the target rtx-sm86 runs tensorrt_rtx"


@pytest.mark.parametrize("factor", [np.nan, 10])
def test_wrong_outputs_are_no_clean_speedup(script, classic, bundle, capsys, factor):
    classic.factor = factor
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "times faster; no figure to rely on, the outputs of dense and compressed are wrong" in out
    assert "note: dense: outputs that " in out


def rounds(script, ratios):
    """An engine twice, whose second one's blocks have these ratios to the first one's."""
    times = {"a": [1.0] * len(ratios), "b": [1 / ratio for ratio in ratios]}

    def engine(name):
        blocks = (ms for ms in times[name] for _ in range(measuring.BLOCK))
        return types.SimpleNamespace(modes=("stream",), about={}, time=lambda mode: (None, next(blocks)))

    return script.measure({name: engine(name) for name in times}, 60.0, len(ratios))[1]["b"]["stream"]


def test_the_interval_is_of_the_median(script):
    """By order statistics: of 20 values the sixth and the fifteenth hold the median with 95.9 %."""
    values = [1 + 0.001 * i for i in range(20)]
    found = rounds(script, values[::-1])
    assert (found["low"], found["high"]) == (pytest.approx(1.005), pytest.approx(1.014))
    assert script.unsure(found) == ""
    assert "low" not in rounds(script, values[:5])  # even the extremes hold it with 93.75 % only
    assert measuring.median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (1.0, 6.0)
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(500):
        low, high = measuring.median_interval(random.exponential(size=31))
        inside += low <= np.log(2) <= high
    assert 0.94 <= inside / 500 <= 0.99


def test_a_ratio_with_a_wide_interval_is_refused(script, classic, bundle, capsys, monkeypatch):
    random, runs = np.random.default_rng(0), iter(range(10**6))
    levels = random.uniform(1.0, 2.0, 10**4)  # milliseconds, of one block each
    monkeypatch.setattr(script.TensorRT, "time", lambda engine, mode: (levels[next(runs) // measuring.BLOCK],) * 2)
    arguments = ["--out", str(bundle / "r.json"), "--rounds", "12", "--power-seconds", "0.01", "--quiet"]
    assert script.main(arguments) == 0
    found = json.loads((bundle / "r.json").read_text())
    assert found["ratios"] == {"compressed": {}}
    assert sum("no ratio: it lies between" in note for note in found["notes"]) == 2
    assert "times faster" not in capsys.readouterr().out


@pytest.mark.parametrize("reason", ["the processor", "the GPU", "the hypervisor"])
def test_a_loaded_machine_gives_no_ratio(script, classic, bundle, monkeypatch, reason):
    if reason == "the processor":
        waited = iter(range(10**9))
        monkeypatch.setattr(trt, "waited", lambda: float(next(waited)))
        monkeypatch.setattr(trt, "TRIES", 2)
    if reason == "the GPU":
        sample = telemetry.parse_smi("71.52, 34, 1980, 2619, 64")
        monitor = types.SimpleNamespace(source="nvidia-smi", since=lambda *times: [sample], close=lambda: None)
        monitor.notes = list
        monkeypatch.setattr(script, "Monitor", lambda: monitor)
    if reason == "the hypervisor":
        taken = iter((0.0, 3600.0))
        monkeypatch.setattr(script, "stolen", lambda: next(taken))
    arguments = ["--out", str(bundle / "r.json"), "--rounds", "8", "--power-seconds", "0.01", "--idle-seconds", "0"]
    assert script.main([*arguments, "--quiet"]) == 0
    found = json.loads((bundle / "r.json").read_text())
    wanted = {
        "the processor": "the machine was busy",
        "the GPU": "something else had the GPU for 64 % of the time before",
        "the hypervisor": "the hypervisor took the processor for 3600.0 s",
    }[reason]
    assert found["ratios"] == {"compressed": {}}
    assert any(note.startswith(f"compressed (stream): no ratio: {wanted}") for note in found["notes"])


@pytest.mark.parametrize("classic", ["10.3.0"], indirect=True)
def test_power_at_rest_is_read_before_anything_is_built(script, classic, bundle, monkeypatch):
    built = []
    sample = telemetry.parse_tegrastats(ORIN_NANO)

    def since(*times):
        built.append(classic.built)
        return [sample]

    monitor = types.SimpleNamespace(source="tegrastats", since=since, close=lambda: None, notes=list)
    monkeypatch.setattr(script, "Monitor", lambda: monitor)
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY, "--idle-seconds", "0", "--quiet"]) == 0
    assert json.loads((bundle / "r.json").read_text())["idle"]["total_mw"] == 4880
    assert built[0] == 0


@pytest.mark.parametrize("root", [True, False])
def test_clocks_that_only_root_may_know_are_noted(tmp_path, monkeypatch, root):
    (tmp_path / "jetson_clocks").write_text(f"#!/bin/sh\necho 'GPU MaxFreq=918000000'\nexit {int(not root)}\n")
    (tmp_path / "jetson_clocks").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    device = telemetry.describe_device()
    assert device["clocks"] == ("GPU MaxFreq=918000000" if root else None)
    notes = telemetry.clock_notes(device)
    assert notes == [] if root else notes[0].startswith("whether the clocks are fixed is not known: jetson_clocks says")


@pytest.mark.parametrize("option", ["--seconds", "--power-seconds"])
def test_without_time_there_is_one_round(script, classic, bundle, option):
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY, option, "0", "--quiet"]) == 0
    found = json.loads((bundle / "r.json").read_text())
    assert found["models"]["dense"]["latency"]["graph"]["runs"] == 17


@pytest.mark.parametrize(
    "wrong", [("--seconds", "-1"), ("--seconds", "nan"), ("--rounds", "0"), ("--power-seconds", "-1"), ("--dla", "-1")]
)
def test_wrong_options_are_one_line(script, bundle, capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        script.main(list(wrong))
    assert stop.value.code == 2
    assert "a number of at least" in capsys.readouterr().err.splitlines()[-1]


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: cut(b / "bundle.json"), "bundle.json: damaged (JSONDecodeError: "),
        (lambda b: (b / "bundle.json").unlink(), "bundle.json: No such file"),
        (
            lambda b: edit(b, lambda about: about.update(format="graphcomb-bench/0")),
            "of format graphcomb-bench/0, this",
        ),
        (lambda b: edit(b, lambda about: about.pop("format")), "bundle.json: damaged (KeyError: 'format')"),
        (lambda b: edit(b, lambda about: about.update(models={})), "bundle.json: damaged (ValueError: no models)"),
        (lambda b: edit(b, lambda about: about.update(precision="fp3")), "bundle.json: damaged (KeyError: 'fp3')"),
        (lambda b: edit(b, lambda about: about["models"]["dense"].pop("file")), "damaged (KeyError: 'file')"),
        (lambda b: cut(b / "dense" / "reference.npz"), "reference.npz: damaged (BadZipFile: "),
        (lambda b: np.savez(b / "dense" / "reference.npz", y=1), "model.onnx: takes x, and the reference has ;"),
        (lambda b: (b / "dense" / "weights").write_bytes(b"y"), "weights: not the file that was bundled"),
        (lambda b: (b / "dense" / "weights").unlink(), "weights: No such file"),
    ],
)
@pytest.mark.parametrize("classic", ["10.3.0"], indirect=True)
def test_a_damaged_bundle_is_one_line(script, classic, bundle, capsys, damage, message):
    (bundle / "dense" / "weights").write_bytes(b"x")
    data = {"dense/weights": hashlib.sha256(b"x").hexdigest()}
    edit(bundle, lambda about: about["models"]["dense"].update(data=data))
    damage(bundle)
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("classic", ["10.3.0"], indirect=True)
def test_outputs_are_compared_by_name(script, classic, bundle, monkeypatch):
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    outputs = {"second": 3 * x, "first": 2 * x}
    monkeypatch.setattr(script.TensorRT, "outputs", lambda engine: outputs)
    for name in ("dense", "compressed"):
        arrays = {"input:x": x, "output:000": 2 * x, "output:001": 3 * x}
        np.savez(bundle / name / "reference.npz", **arrays)
    edit(bundle, lambda about: about["models"]["dense"].update(outputs=["first", "second"]))
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY, "--quiet"]) == 0
    found = json.loads((bundle / "r.json").read_text())["models"]
    assert found["dense"]["parity"]["error"] == 0
    assert found["compressed"]["parity"]["error"] > 0  # no names: by position


def test_outputs_of_other_shapes_are_no_parity(script):
    found = script.check([np.zeros((2, 3), np.float32)], [np.zeros((3, 2), np.float32)], 1e-3)
    assert found["error"] is None
    assert found["note"] == "outputs of shapes [[2, 3]] instead of [[3, 2]]"
    assert script.check([np.array([1.0, np.nan], np.float32)], [np.ones(2, np.float32)], 1.0)["finite"] is False


def test_models_take_turns(script):
    order = []

    def engine(name, ms):
        return types.SimpleNamespace(modes=("stream",), time=lambda mode: order.append(name) or (None, ms))

    times, ratios = script.measure({"a": engine("a", 4.0), "b": engine("b", 2.0)}, 5.0, 3)
    assert order == ["a"] * 20 + ["b"] * 40 + ["a"] * 40 + ["b"] * 20
    assert ratios == {"b": {"stream": {"p5": 2.0, "median": 2.0, "p95": 2.0, "p99": 2.0}}}
    assert times["a"]["stream"]["host_ms"]["p99"] == 4.0
    assert "gpu_ms" not in times["a"]["stream"]
