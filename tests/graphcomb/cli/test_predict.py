"""Predictions on the command line and in recipes: by the data sheet, and by what a bundle measured."""

import json
from pathlib import Path

import pytest

from graphcomb.runtime import Roofline, get_target
from graphcomb.runtime import summary as summaries

OUTPUTS = {"pt2": False, "onnx": False, "bench": False, "report": False}
INPUTS = [[1, 3, 32, 32]]


@pytest.fixture
def results(cli, recipe, tmp_path: Path) -> Path:
    """What the bundle of a run would bring back from a device that takes twice as long as its data sheet says."""
    path = recipe(data=None, inputs=INPUTS, target="agx-orin", precision="fp16", outputs=OUTPUTS)
    assert cli("run", path, "--out", tmp_path / "run", "--quiet").code == 0
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["prediction"]
    models, measured = {}, {}
    for name, side in (("dense", "before"), ("compressed", "after")):
        rows = [row[side] | {"name": row["name"]} for row in found["layers"] if row[side]]
        models[name] = {"layers": rows}
        latency = {"graph": {"runs": 9, "host_ms": {"median": 2 * found["ms"][side]}}}
        measured[name] = {"engine": {}, "latency": latency, "layers": []}
    bundle = {"target": "agx-orin", "precision": "fp16", "models": models}
    head = {"format": "graphcomb-bench/1", "engine": "tensorrt", "version": "10.3", "device": {"model": "an Orin"}}
    file = tmp_path / "results.json"
    file.write_text(json.dumps(head | {"bundle": bundle, "models": measured}))
    return file


def test_a_run_says_what_its_layers_take(cli, recipe, tmp_path: Path) -> None:
    path = recipe(data=None, inputs=INPUTS, target="rtx-sm86", precision="fp16", outputs=OUTPUTS)
    assert cli("run", path, "--out", tmp_path / "run", "--quiet").code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = summaries.Prediction.model_validate(summary["prediction"], strict=True)
    for which in ("before", "after"):
        rows = [summaries.Predicted.model_validate(row[which], strict=True) for row in summary["prediction"]["layers"]]
        assert sum(row.ms for row in rows) == pytest.approx(found.ms[which])
        assert sum(row.macs for row in rows) == summary["cost"][which]["macs"]
    assert found.by == str(Roofline(get_target("rtx-sm86"), "fp16"))
    assert found.measured_ms is None  # the target is not at hand


def test_the_error_is_said_where_the_target_is_this_machine(cli, recipe, tmp_path: Path, monkeypatch) -> None:
    from graphcomb import run as runs
    from graphcomb.runtime.measure.bench import BenchResult
    from graphcomb.runtime.summary import Timing

    runs_of = {"runs": 20, "rejected": 0, "repeats": 1}
    timings = [Timing(name=name, ms={"median": ms}, **runs_of) for name, ms in (("dense", 4.0), ("compressed", 2.0))]
    result = BenchResult(
        timings=timings, ratios={"compressed": {"median": 2.0}}, ratio=2.0, rounds=20, rejected=0, seconds=1.0, note="",
        environment={}, contended=False,
    )  # fmt: skip
    monkeypatch.setattr(runs.runtime, "bench", lambda *a, **k: result)
    monkeypatch.setattr(runs.runtime, "export_onnx", lambda *a, **k: None)
    monkeypatch.setattr(runs, "_lower", lambda *a: {"onnx": {}, "engines": []})
    path = recipe(data=None, inputs=INPUTS, outputs=OUTPUTS | {"bench": True})
    assert cli("run", path, "--out", tmp_path / "run", "--quiet").code == 0
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["prediction"]
    assert found["measured_ms"] == {"before": 4.0, "after": 2.0}
    assert found["error"]["after"] == pytest.approx(found["ms"]["after"] / 2.0 - 1)


def test_a_recipe_is_calibrated_by_results(cli, recipe, results: Path, tmp_path: Path) -> None:
    path = recipe(
        data=None, inputs=INPUTS, target="agx-orin", precision="fp16", latency_table=str(results), outputs=OUTPUTS,
        passes=[{"RemoveChannels": {"latency": 0.95}}],
    )  # fmt: skip
    outcome = cli("run", path, "--out", tmp_path / "again", "--quiet")
    assert outcome.code == 0, outcome.err
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    found = summaries.Prediction.model_validate(summary["prediction"])
    assert found.calibration.fitted == ["common factor"]
    half = 0.5 * Roofline(get_target("agx-orin"), "fp16").rates[0]
    assert found.calibration.compute_share == pytest.approx(half)
    assert f"calibrated: {half:.3g} of peak" in summary["passes"][0]["latency"]["by"]
    plain = json.loads((tmp_path / "run" / "summary.json").read_text())["prediction"]
    assert found.ms["before"] == pytest.approx(2 * plain["ms"]["before"])


def test_predict(cli, results: Path, tmp_path: Path) -> None:
    outcome = cli("predict", "toys:net", "--input", "1,3,32,32", "--target", "agx-orin", "--precision", "fp16")
    assert outcome.code == 0, outcome.err
    assert "launch" in outcome.out
    assert "roofline of Jetson AGX Orin 64GB, fp16: " in outcome.out
    assert "off by up to 2 times: nothing was measured" in outcome.out
    arguments = ("--input", "1,3,32,32", "--calibrate", results, "--json", tmp_path / "p.json", "--target", "agx-orin")
    outcome = cli("predict", "toys:net", "toys:net", *arguments)
    assert outcome.code == 0, outcome.err
    assert "calibrated with 2 models and 0 kernels measured by tensorrt 10.3 (common factor)" in outcome.out
    found = summaries.Prediction.model_validate(json.loads((tmp_path / "p.json").read_text()), strict=True)
    assert found.ms["before"] == found.ms["after"] > 0
    assert found.precision == "fp16"


def test_results_cannot_command_the_terminal(cli, results: Path) -> None:
    results.write_text(results.read_text().replace('"10.3"', r'"10.3\u001b[2J\u0007"'))
    outcome = cli("predict", "toys:net", "--input", "1,3,32,32", "--calibrate", results, "--target", "agx-orin")
    assert outcome.code == 0, outcome.err
    assert "measured by tensorrt 10.3\ufffd[2J\ufffd (" in outcome.out
    assert "\x1b" not in outcome.out


@pytest.mark.parametrize("batch", [0, -4])
def test_a_batch_below_one_is_refused(refused, batch: int) -> None:
    assert refused("predict", "toys:net", "--input", "1,3,32,32", "--batch", batch) == f"batch: 1 or more, not {batch}"


def test_results_of_another_target_are_one_line(cli, recipe, results: Path) -> None:
    outcome = cli("predict", "toys:net", "--target", "orin-nano", "--calibrate", results)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "measured for target agx-orin, not orin-nano" in outcome.err
    path = recipe(data=None, inputs=INPUTS, target="orin-nano", precision="fp16", latency_table=str(results))
    outcome = cli("run", path)
    assert outcome.code == 2
    assert "latency_table: " in outcome.err
    assert "not orin-nano" in outcome.err
    outcome = cli("predict", "a:b", "c:d", "e:f")
    assert "predict: one model, or one and what became of it, not 3" in outcome.err


def test_the_bundle_of_a_run_knows_its_layers(cli, recipe, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("graphcomb.run.BENCH_SECONDS", 0.1)
    path = recipe(data=None, inputs=INPUTS, outputs={"onnx": True, "report": False, "bench": True})
    assert cli("run", path, "--out", tmp_path / "run", "--quiet").code == 0
    assert cli("bundle", tmp_path / "run", "--out", tmp_path / "b").code == 0
    about = json.loads((tmp_path / "b" / "bundle.json").read_text())
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["prediction"]
    for name, side in (("dense", "before"), ("compressed", "after")):
        rows = about["models"][name]["layers"]
        assert [row["node"] for row in rows] == [row[side]["node"] for row in found["layers"]]
        assert all(row["onnx"] for row in rows if row["op"] in ("conv", "matmul"))
