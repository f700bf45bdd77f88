"""What runs on a device: driving its TensorRT and writing what was measured.

TensorRT and CUDA are stand-ins (`standins.py`), which show what is called and not what a GPU would do.
"""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from graphcomb.runtime.kit import measuring

from .toys import QUICKLY, edit


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
    digest = hashlib.sha256(cache.read_bytes()).hexdigest()
    compressed = found["models"]["compressed"]["engine"]
    assert compressed["timing_cache"] == {"file": cache.name, "sha256": digest}
    assert compressed["dla"] == {"layers": 2, "gpu": [["softmax", "SOFTMAX"]]}
    assert compressed["cold_ms"]["load"] >= 0
    assert compressed["device_bytes"] == 64  # of an input and an output of 2 x 4 floats
    shapes = "--minShapes=x:2x4 --optShapes=x:2x4 --maxShapes=x:2x4 --shapes=x:2x4"
    assert shapes in compressed["trtexec"]
    assert ("--stronglyTyped" in compressed["trtexec"]) == classic.module.__version__.startswith("10")
    assert found["models"]["dense"]["throughput"]["streams"] == 2
    assert found["models"]["dense"]["throughput"]["images_per_second"] > 0
    assert found["host_peak_bytes"] > 1 << 20
    assert cache.read_bytes().count(b"+timings") == 2  # the second build knows what the first one measured


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


def test_outputs_without_a_reference_are_compared_with_nothing(script):
    assert measuring.check([np.ones(2)], [], 0.1) == {"finite": True, "error": None, "tolerance": 0.1}
    assert "note" in measuring.check([np.array([np.inf])], [], 0.1)


def test_a_missing_folder_is_noticed_before_anything_is_built(script, classic, bundle, capsys):
    assert script.main(["--out", str(bundle / "no" / "r.json"), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --out: there is no folder ")
    assert err.count("\n") == 1
    assert classic.built == 0


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
