"""Results of bench bundles: which are read, which calibrate, and what the report says of them."""

import json

import pytest

from graphcomb.graph.errors import BadInput
from graphcomb.runtime import Roofline, write_report
from graphcomb.runtime.device_results import read_results


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "not the results"), ('{"models": {}, "format": "graphcomb-bench/0"}', "of format")],
)
def test_results_of_something_else_are_refused(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(BadInput, match=message):
        read_results(tmp_path / "r.json")


@pytest.mark.parametrize("models", ["[]", "null", "{}", '{"a": 1}'])
def test_results_without_models_are_refused(tmp_path, models):
    (tmp_path / "r.json").write_text(f'{{"format": "graphcomb-bench/1", "models": {models}}}')
    with pytest.raises(BadInput, match=r"r\.json: models: expected what was measured, by name"):
        read_results(tmp_path / "r.json")


def results(kinds, **changed):
    """What was measured of models with these precisions, of one layer each that takes a millisecond."""
    layer = {"op": "copy", "sizes": {"entries": 10**7}, "options": {}, "name": "x", "onnx": ["/x"]}
    ms = {"p5": 1.0, "median": 1.0, "p95": 1.0, "p99": 1.0}
    model = {
        "file": "x.onnx", "engine": {}, "power": {}, "latency": {"graph": {"runs": 9, "host_ms": ms, "gpu_ms": ms}},
        "parity": {"finite": True, "error": 1e-4, "tolerance": 1e-3}, "layers": [{"name": "/x", "ms": 1.0}],
    }  # fmt: skip
    about = {name: {"layers": [layer], "precision": kind} for name, kind in kinds.items()}
    head = {"format": "graphcomb-bench/1", "engine": "tensorrt", "version": "10.3", "device": {"model": "an Orin"}}
    head |= {"bundle": {"target": "agx-orin", "precision": "fp16", "models": about}, "notes": [], "ratios": {}}
    head |= {"date": "", "idle": {}, "monitor": None}
    return json.loads(json.dumps(head | {"models": dict.fromkeys(kinds, model | changed)}))


MIXED = {"dense": "fp16", "small": "int8"}


def test_models_of_one_precision_calibrate():
    for dtype, kind in ((None, "fp16"), ("int8", "int8")):
        found = Roofline.calibrated(results(MIXED), dtype=dtype)
        assert (found.calibration["precision"], found.calibration["models"]) == (kind, 1)
    assert Roofline.calibrated(results({"small": "int8"})).calibration["precision"] == "int8"
    with pytest.raises(BadInput, match="measured in fp16 and int8, not fp32"):
        Roofline.calibrated(results(MIXED), dtype="fp32")


def test_a_measurement_counts_once(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(json.dumps(results(MIXED), indent=ord(name) - 96))
    with pytest.raises(BadInput, match=f"{tmp_path}/b: the same measurement as {tmp_path}/a"):
        Roofline.calibrated([tmp_path / "a", tmp_path / "b"])


ENDLESS = {"graph": {"runs": 9, "host_ms": {"median": float("inf")}}}


@pytest.mark.parametrize("wrong", [{"latency": ENDLESS}, {"layers": [{"name": "/x", "ms": float("inf")}]}])
def test_times_without_end_calibrate_nothing(tmp_path, wrong):
    found = results(MIXED, **wrong)
    with pytest.raises(BadInput, match="sizes or times of dense"):
        Roofline.calibrated(found)
    assert "an Orin" in write_report({"devices": [found]}, tmp_path / "r.html").read_text()


def test_the_report_says_which_outputs_are_wrong(tmp_path):
    found = results(MIXED, power={"temperatures_c": {"cpu": None, "tj": 41}})
    found["models"]["small"]["parity"] |= {"error": None, "note": "outputs of shapes [[1]] instead of [[2]]"}
    found["ratios"] = {"small": {"graph": {"median": 2.5}}}
    page = write_report({"devices": [found]}, tmp_path / "r.html").read_text()
    assert "dense: tj 41 °C; small: tj 41 °C" in page
    assert "2.5× faster, with wrong outputs" in page
    assert 'watch-text">outputs of shapes [[1]] instead of [[2]]' in page
    assert page.count('watch-text">') == 1
    assert "dense: fp16, small: int8" in page
    found["models"]["small"]["parity"] = {"finite": True, "error": 1e-2, "tolerance": 1e-3}
    assert 'watch-text">1.0e-02' in write_report({"devices": [found]}, tmp_path / "r.html").read_text()
    found["models"]["small"]["parity"]["tolerance"] = 0.3
    assert "wrong outputs" not in write_report({"devices": [found]}, tmp_path / "r.html").read_text()
