"""The benchmark of public figures, on rows made up: it resumes, and the first row of a device and precision calibrates."""

import json
from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    figures = pytest.importorskip("public_figures")

ROWS = [("orin", "fp16", name, ms, "where") for name, ms in (("a", 2.0), ("b", 3.0), ("c", 8.0))]


@pytest.fixture
def asked(monkeypatch):
    """The networks that were predicted; each takes 1 ms, and there is no "c" before it is allowed."""
    asked = []

    def program(name):
        if name == "c" and asked.count("b") == 1:
            raise ModuleNotFoundError(name)
        return name

    monkeypatch.setattr(figures, "ROWS", ROWS)
    monkeypatch.setattr(figures, "program", program)
    monkeypatch.setattr(figures, "predicted", lambda source, target, kind: asked.append(source) or 1.0)
    return asked


def test_stored_rows_are_not_predicted_again(asked, tmp_path):
    file = tmp_path / "figures.json"
    rows = figures.compare(file)
    assert asked == ["a", "b"]
    assert [row["factor"] for row in rows] == [None, 2.0]
    assert [row["per_run"] for row in rows] == [None, 2.0]
    assert json.loads(file.read_text())["rows"] == rows
    asked += ["b"]  # and now there is a "c"
    rows = figures.compare(file)
    assert asked == ["a", "b", "b", "c"]
    assert [row["factor"] for row in rows] == [None, 2.0, 2.0]
    text = file.with_suffix(".md").read_text()
    assert "Data sheet: 0% of 3 rows within a factor of 1.5; median factor 3.00, largest 8.00." in text
    assert "Calibrated by a time of every run: 0% of 2 rows" in text
    figures.compare(file, again=True)
    assert asked[4:] == ["a", "b", "c"]
