"""The demo keeps its promises: at least 4 times fewer MACs within one point of accuracy, exact, exported and built."""

import json
import re
from pathlib import Path

import pytest

from graphcomb.cli import run
from graphcomb.cli.run import DEMO
from graphcomb.recipe import read_recipe


def test_the_recipe_and_those_beside_it_are_valid() -> None:
    recipes = [DEMO, *(Path(__file__).parents[2] / "recipes").glob("*.yaml")]
    assert len(recipes) >= 3
    for path in recipes:
        recipe = read_recipe(path)
        assert [type(p).__name__ for p in recipe.passes][-1] == "Fuse"
        assert recipe.outputs.engines


def test_the_demo_ends_with_a_command_that_exists(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run", lambda *_, **__: None)
    name = re.search(r"make gallery ONLY=(\w+)", cli("demo").out)[1]
    root = Path(__file__).parents[2]
    assert f'    "{name}": Card(' in (root / "benchmarks" / "gallery.py").read_text()
    assert "ONLY" in (root / "Makefile").read_text()


@pytest.mark.slow
def test_the_demo(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("GRAPHCOMB_CACHE", str(tmp_path / "cache"))
    outcome = cli("demo", "--quiet")
    assert outcome.code == 0, outcome.err
    assert "make gallery ONLY=pp_ocr" in outcome.out
    summary = json.loads((tmp_path / "out" / "demo" / "summary.json").read_text())
    assert summary["macs_ratio"] >= 4
    assert summary["params_ratio"] >= 4
    assert summary["accuracy_before"] > 0.97
    assert summary["accuracy_after"] >= summary["accuracy_before"] - 0.01
    assert summary["surgery_error"] <= 1e-10
    assert summary["onnx_parity"] <= 1e-4
    assert summary["latency_ratio"] is None or summary["latency_ratio"] > 1.5
    assert Path(summary["engine"]).is_file()
    files = [p for value in summary["files"].values() for p in (value if isinstance(value, list) else [value])]
    assert {Path(p).suffix for p in files} == {".pt2", ".onnx", ".rtx", ".html"}
    assert all(Path(p).is_file() for p in files)
