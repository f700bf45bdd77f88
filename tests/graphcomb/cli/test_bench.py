"""`graphcomb bundle`, `bench` on a bundle, and `report` with what a device measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import graphcomb
from graphcomb.graph.errors import BadInput
from graphcomb.passes import RemoveChannels
from graphcomb.runtime.bundle import run as bundle_run
from graphcomb.runtime.bundle import write as bundle_write

QUICK = ("--seconds", "1", "--engine", "onnxruntime", "--quiet")


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3))
    program = graphcomb.capture(net.eval(), (torch.randn(1, 3, 8, 8),))
    small = RemoveChannels(ratio=0.5, round_to=8)(program).program
    return {n: p.save(tmp_path / f"{n}.pt2") for n, p in (("dense", program), ("small", small))}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    run = bundle_run.run_bundle
    short = ("--rounds", "2", "--power-seconds", "0.1")
    monkeypatch.setattr(bundle_run, "run_bundle", lambda a, b, c, d, e: run(a, b, c, [*short, *d], e))


def no_ratio(outcome) -> int:
    """The exit code on a machine that may be too busy for a ratio."""
    return int("small (stream): no ratio: " in outcome.out)


def test_bundle_bench_report(cli, models, tmp_path: Path) -> None:
    out = tmp_path / "b"
    outcome = cli("bundle", f"dense={models['dense']}", models["small"], "--out", out, "--target", "orin-nano")
    assert outcome.code == 0, outcome.err
    assert "--host USER@DEVICE" in " ".join(outcome.out.split())
    outcome = cli("bench", out, *QUICK)
    assert outcome.code == no_ratio(outcome), outcome.err
    assert "small" in outcome.out
    found = json.loads((out / "results.json").read_text())
    assert list(found["models"]) == ["dense", "small"]
    assert cli("report", out / "results.json").code == 0
    page = (out / "report.html").read_text()
    assert "onnxruntime" in page
    assert ">small<" in page
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps({"model": "net", "passes": [], "macs_ratio": 2.0}))
    assert cli("report", summary, "--device", out / "results.json", "--out", tmp_path / "r.html").code == 0
    page = (tmp_path / "r.html").read_text()
    assert "2×" in page
    assert ">small<" in page


def test_options_reach_the_script(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    def stop(*arguments: object) -> None:
        given.extend(arguments)
        raise BadInput("far enough")

    monkeypatch.setattr(bundle_run, "run_bundle", stop)
    texts = ("sparse=true", "dla=0", "no_graphs=false", "rounds=7", "power-seconds=2.5", "seconds=3")
    options = [part for text in texts for part in ("--option", text)]
    assert "far enough" in cli("bench", tmp_path, "--host", "user@jetson", "--python", "venv/bin/python", *options).err
    wanted = ["--seconds=3", "--threads=1", "--sparse", "--dla=0", "--rounds=7", "--power-seconds=2.5"]
    assert given == [tmp_path, tmp_path / "results.json", "user@jetson", wanted, "venv/bin/python"]


def test_what_became_of_the_models_is_said(cli, models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = bundle_write._lower
    monkeypatch.setattr(bundle_write, "_lower", lambda *given: (*lower(*given)[:2], "left as it is"))
    outcome = cli("bundle", models["small"], "--out", tmp_path / "b", "--precision", "fp32")
    assert "small: left as it is" in outcome.out.splitlines()
    with np.load(tmp_path / "b" / "small" / "reference.npz") as data:
        arrays = dict(data)
    arrays["output:000"] += 1
    np.savez(tmp_path / "b" / "small" / "reference.npz", **arrays)
    outcome = cli("bench", tmp_path / "b", *QUICK)
    assert outcome.code == no_ratio(outcome)
    assert "small: left as it is" in outcome.out.splitlines()
    assert "small: outputs that differ from the reference by " in outcome.out


RESULTS = {
    "device": {"model": "an Orin"}, "engine": "tensorrt", "version": "10.3", "notes": [], "failed": {},
    "models": {
        name: {"power": {}, "parity": {"error": 0.0}, "latency": {"stream": {"host_ms": {"median": ms, "p99": ms}}}}
        for name, ms in (("dense", 2.0), ("small", 1.0))
    },
    "ratios": {"small": {"stream": {"median": 2.0, "low": 1.9, "high": 2.1}}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({}, 0),
        ({"failed": {"third": "no tactic"}}, 1),
        ({"ratios": {"small": {}}}, 1),
        ({"interrupted": True}, 130),
        ({"models": {"dense": RESULTS["models"]["dense"]}, "ratios": {}}, 0),  # one model has nothing to compare with
    ],
)
def test_the_exit_code_says_what_is_missing(cli, tmp_path: Path, monkeypatch, changed, code: int) -> None:
    monkeypatch.setattr(bundle_run, "run_bundle", lambda *given: RESULTS | changed)
    outcome = cli("bench", tmp_path)
    assert outcome.code == code
    assert "2.000" in outcome.out  # what was measured is shown
    said = "small (stream): 2.00 (1.90 to 2.10) times faster, with 95 %" in outcome.out
    assert said == bool((RESULTS | changed)["ratios"].get("small"))
    wanted = {"failed: third: no tactic"} if "failed" in changed else set()
    assert wanted <= set(outcome.err.splitlines())


def test_an_interrupt_without_results_is_one_line(cli, tmp_path: Path, monkeypatch) -> None:
    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle_run, "run_bundle", stop)
    outcome = cli("bench", tmp_path)
    assert (outcome.code, outcome.err.count("\n")) == (130, 1)


def test_a_run_is_bundled_with_its_record(cli, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphcomb.run.BENCH_SECONDS", 0.2)
    path = recipe(outputs={"onnx": True, "report": False, "bench": True}, precision="fp16")
    assert cli("run", path, "--out", tmp_path / "run", "--quiet").code == 0
    assert cli("bundle", tmp_path / "run", "--out", tmp_path / "b").code == 0
    about = json.loads((tmp_path / "b" / "bundle.json").read_text())
    assert about["precision"] == "fp16"
    assert list(about["models"]) == ["dense", "compressed"]
    assert json.loads((tmp_path / "b" / "record.json").read_text())[0]["pass"] == "RemoveChannels"


def test_mistakes_are_one_line(cli, models, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        outcome = cli(*arguments)
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
        return outcome.err

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text('{"passes": []}')
    assert "dense.onnx is missing; run the recipe with" in refused("bundle", tmp_path / "run")
    assert "two models named dense" in refused("bundle", models["dense"], models["dense"])
    assert "not a bench bundle" in refused("bench", tmp_path / "run")
    assert "is no bench bundle" in refused("bench", models["dense"], "--host", "user@jetson")
    assert "--option: " in refused("bench", models["dense"], "--option", "dla=0")
    assert "against what?" in refused("bench", models["dense"])
    assert "option rouns: not one of the bench bundle; did you mean rounds" in refused(
        "bench", ".", "--option", "rouns=1"
    )
    assert "option rounds: 0: a number of at least 1" in refused("bench", ".", "--option", "rounds=0")
    assert "option seconds: -1.0: a number of at least 0" in refused("bench", ".", "--seconds", "-1")
    assert "option sparse: true or false, not 1" in refused("bench", ".", "--option", "sparse=1")
    assert "option engine=tensort: did you mean tensorrt" in refused("bench", ".", "--engine", "tensort")
    assert "--batch: a bundle has the batch" in refused("bench", ".", "--batch", "2")
    assert "batch: 1 or more, not 0" in refused("bundle", models["dense"], "--batch", "0")
    assert "batch: 1 or more, not -1" in refused("bench", "a.onnx", "b.onnx", "--batch", "-1")
    assert "leave" in refused("bench", tmp_path / "run", models["dense"])
    (tmp_path / "x.json").write_text('{"format": "other"}')
    assert "not the results of a bench bundle" in refused("report", tmp_path / "x.json")


@pytest.mark.parametrize(("low", "high", "code"), [(1.9, 2.1, 0), (2.2, 2.4, 1)])
def test_a_model_slower_than_an_earlier_result_fails_the_gate(
    cli, tmp_path: Path, monkeypatch, low, high, code
) -> None:
    monkeypatch.setattr(bundle_run, "run_bundle", lambda *given: RESULTS)
    earlier = RESULTS | {"ratios": {"small": {"stream": {"median": (low + high) / 2, "low": low, "high": high}}}}
    (tmp_path / "baseline.json").write_text(json.dumps(earlier))
    (tmp_path / "bundle").mkdir()
    outcome = cli("bench", tmp_path / "bundle", "--gate", tmp_path / "baseline.json")
    assert outcome.code == code
    wanted = "gate: small (stream): 2.00 (1.90 to 2.10) times faster, the baseline 2.30 (2.20 to 2.40)\n"
    assert outcome.err == wanted * code


def test_the_gate_is_read_before_anything_is_measured(refused, tmp_path: Path) -> None:
    assert "--gate " in refused("bench", tmp_path, "--gate", tmp_path / "absent.json")
