"""A latency as the target of a recipe: what predicts it, and where the prediction shows."""

import json
from pathlib import Path

import pytest

from graphcomb.runtime.prediction import latency_table
from graphcomb.runtime.prediction.latency_table import LatencyTable

MODEL = "toys:net"
HALF = {"RemoveChannels": {"latency": 0.5, "round_to": 4}}
INPUTS = [[1, 3, 64, 64]]  # large enough that starting kernels is not everything
OUTPUTS = {"pt2": False, "onnx": False, "bench": False}


def run(cli, path: Path, out: Path, *options: str) -> dict:
    outcome = cli("run", path, "--out", out, *options)
    assert (outcome.code, outcome.err.strip()) == (0, "")
    return json.loads((out / "summary.json").read_text())


@pytest.fixture
def timed(monkeypatch) -> list[str]:
    """Tables measure nothing: a layer takes a nanosecond per multiply-accumulate."""
    asked: list[str] = []

    def time(self, layer) -> float:
        asked.append(str(layer))
        return 1e-9 * layer.macs() if layer else 1e-9

    def whole(self, program) -> float:
        asked.append(f"program of {program.macs}")
        return 2e-9 * program.macs

    monkeypatch.setattr(LatencyTable, "_time", time)
    monkeypatch.setattr(LatencyTable, "_whole", whole)
    return asked


def test_a_roofline_stands_in_for_a_device_that_is_not_here(cli, recipe, tmp_path: Path) -> None:
    path = recipe(
        model=MODEL, data=None, inputs=[[16, 3, 224, 224]], target="orin-nano", precision="fp16", latency_table="roofline",
        passes=[HALF], outputs=OUTPUTS,
    )  # fmt: skip
    summary = run(cli, path, tmp_path / "out")
    assert summary["latency_predicted"] >= 2
    assert summary["passes"][0]["latency"]["by"] == "roofline of Jetson Orin Nano 8GB, fp16"


def test_a_table_is_made_at_the_path_and_used_again(cli, recipe, tmp_path: Path, timed: list[str]) -> None:
    table = tmp_path / "table.json"
    path = recipe(model=MODEL, data=None, inputs=INPUTS, latency_table=str(table), passes=[HALF], outputs=OUTPUTS)
    summary = run(cli, path, tmp_path / "out")
    record = summary["passes"][0]["latency"]
    assert record["predicted"]["after"] <= 0.5 * record["predicted"]["before"]
    assert record["by"].startswith("latency table of onnxruntime")
    assert record["predicted"]["before"] == pytest.approx(2e-9 * summary["cost"]["before"]["macs"])  # the program's own
    assert len(timed) == len(set(timed)) == len(json.loads(table.read_text())["seconds"])
    run(cli, path, tmp_path / "again")
    assert len(timed) == len(set(timed))


def test_the_table_is_in_the_cache_by_default(cli, recipe, tmp_path: Path, timed: list[str], monkeypatch) -> None:
    monkeypatch.setenv("GRAPHCOMB_CACHE", str(tmp_path / "cache"))
    run(cli, recipe(model=MODEL, data=None, inputs=INPUTS, passes=[HALF], outputs=OUTPUTS), tmp_path / "out")
    assert timed
    assert (tmp_path / "cache" / "latency-cpu.json").is_file()


def test_a_table_in_half_precision_is_a_file_of_its_own(
    cli, recipe, tmp_path: Path, timed: list[str], monkeypatch
) -> None:
    monkeypatch.setenv("GRAPHCOMB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency_table, "computes_half", lambda: True)
    path = recipe(model=MODEL, data=None, inputs=INPUTS, precision="fp16", passes=[HALF], outputs=OUTPUTS)
    assert run(cli, path, tmp_path / "out")["passes"][0]["latency"]["by"].endswith("as the whole program takes")
    assert json.loads((tmp_path / "cache" / "latency-cpu-fp16.json").read_text())["about"]["dtype"] == "fp16"


def test_a_plan_shows_what_a_latency_leaves(cli, recipe, tmp_path: Path, timed: list[str]) -> None:
    file = str(tmp_path / "table.json")
    path = recipe(model=MODEL, data=None, inputs=INPUTS, latency_table=file, passes=[HALF], outputs=OUTPUTS)
    outcome = cli("plan", path, "--out", tmp_path / "plan.yaml")
    assert outcome.code == 0
    assert "keep" in (tmp_path / "plan.yaml").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "agx-orin"}, "latency_table: latency table: agx-orin is not at hand"),
        ({"precision": "fp16"}, "latency_table: latency table: ONNX Runtime has no fp16 kernels for this CPU"),
        ({"passes": [{"RemoveChannels": {"latency": "soon"}}]}, "passes.0.RemoveChannels.latency: a share above 0"),
        ({"passes": [{"RemoveChannels": {"latency": 0.5, "macs": 0.5}}]}, "passes.0.RemoveChannels: give one of"),
    ],
)
def test_mistakes(cli, recipe, tmp_path: Path, monkeypatch, changes: dict, message: str) -> None:
    monkeypatch.setattr(latency_table, "computes_half", lambda: False)
    path = recipe(**{"model": MODEL, "data": None, "inputs": INPUTS, "passes": [HALF], "outputs": OUTPUTS} | changes)
    outcome = cli("run", path, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert message in outcome.err.replace("\n", " ")
