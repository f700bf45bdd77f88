"""Pruning while training, from a recipe to the files, on scikit-learn's digits."""

import json
from pathlib import Path

from graphcomb import load

MODEL = {"source": "graphcomb.models:SmallResNet", "arguments": {"width": 8}}
DENSE = {"Distill": {"epochs": 3, "lr": 0.01, "alpha": 0.0}}
PRUNED = {"RemoveChannels": {"macs": 0.4, "interval": 5, "train": {"epochs": 3, "lr": 0.005, "alpha": 0.0}}}


def test_a_recipe_prunes_while_it_trains(cli, recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outputs = {"onnx": False, "report": True, "bench": False}
    path = recipe(model=MODEL, data="digits", passes=[DENSE, PRUNED, "Fuse"], outputs=outputs)
    outcome = cli("run", path, "--out", out, "--set", "passes.1.round_to=2")
    assert (outcome.code, outcome.err.strip()) == (0, "")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["macs_ratio"] >= 2.5
    assert summary["surgery_error"] <= 1e-10
    record = summary["passes"][1]
    assert record["options"]["train"]["lr"] == 0.005
    assert record["accuracy"]["before"] > 0.9
    assert record["accuracy"]["after"] > 0.8
    macs = [event["macs"] for event in record["events"]]
    assert len(macs) > 3
    assert macs == sorted(macs, reverse=True)
    assert record["curve"][-1][0] == record["steps"]
    assert "<html" in (out / "report.html").read_text()
    assert load(out / "model.pt2").history[1]["features"]
