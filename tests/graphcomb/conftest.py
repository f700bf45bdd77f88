from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from graphcomb.cli.app import main


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _in_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write recipe.yaml: a good one, changed by the keyword arguments (None drops a key)."""

    def write(**changes: object) -> Path:
        tree = {
            "model": "toys:net",
            "data": "toys:splits",
            "passes": [{"RemoveChannels": {"ratio": 0.5}}],
            "outputs": {"onnx": False, "report": False, "bench": False},
        }
        tree = {k: v for k, v in (tree | changes).items() if v is not None}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return write


@pytest.fixture
def refused(cli: Callable[..., Outcome], tmp_path: Path) -> Callable[..., str]:
    """Run a command that must fail as bad input does: exit code 2, one line on stderr, no file half-written."""

    def run(*arguments: object) -> str:
        outcome = cli(*arguments)
        assert outcome.code == 2, outcome
        assert outcome.err.startswith("error: "), outcome.err
        assert outcome.err.count("\n") == 1, outcome.err
        assert "Traceback" not in outcome.out + outcome.err
        leftovers = [p for p in tmp_path.rglob("*") if ".part" in p.name]
        results = [
            p for p in tmp_path.rglob("*") if p.name in ("summary.json", "model.pt2", "model.onnx", "report.html")
        ]
        assert not leftovers + results
        return outcome.err.removeprefix("error: ").strip()

    return run
