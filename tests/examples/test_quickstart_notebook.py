"""The notebook runs from top to bottom in a kernel of its own, with a smaller network."""

import os
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
SMALL = {"trained_digits(epochs=6)": "trained_digits(width=16, epochs=1)", "seconds=5": "seconds=1"}


@pytest.fixture
def notebook():
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package)
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_runs(notebook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("GRAPHCOMB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    for text, small in SMALL.items():
        assert sum(cell.source.count(text) for cell in notebook.cells) == 1
        for cell in notebook.cells:
            cell.source = cell.source.replace(text, small)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert "stages.0.conv1.weight:0" in text
    assert "accuracy" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "small.onnx").is_file()
    assert (tmp_path / "small.pt2").is_file()


def test_the_notebook_is_kept_without_outputs(notebook) -> None:
    assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
