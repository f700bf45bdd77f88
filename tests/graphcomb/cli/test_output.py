"""What the commands print: no text of a device, a library or a file reaches the terminal as a command."""

import json
import warnings
from pathlib import Path

import pytest
from rich.table import Table

from graphcomb import runtime
from graphcomb.cli.output import console, printable, show_warnings
from graphcomb.runtime.bundle import run as bundle_run
from graphcomb.runtime.engines.base import EngineReport, Kernel

HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m"


def harmless(text: str) -> None:
    """It was printed, and every control character of it replaced."""
    assert "[2J\ufffd]0;owned\ufffd\ufffd31m" in text.replace("\n", "")
    assert not set(text) & {"\x1b", "\x07", "\x9b"}


def test_control_characters_are_replaced_and_nothing_else() -> None:
    assert printable("Orin\x1b[2J\x07\u202e") == "Orin\ufffd[2J\ufffd\ufffd"
    assert printable("3 µm · 5\u00a0% −1\n\tx") == "3 µm · 5\u00a0% −1\n\tx"


def test_lines_and_cells_are_printed_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(f"a{HOSTILE}")
    table.add_row(f"b{HOSTILE}")
    for what in (f"c{HOSTILE}", table):
        console.print(what)
        harmless(capsys.readouterr().out)


def test_a_device_that_names_itself_in_escapes(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "engine": {},
        "parity": {"error": 0.0},
        "latency": {"graph": {"runs": 9, "host_ms": {"median": 1, "p99": 1}}},
    }
    results = {
        "device": {"model": f"Orin{HOSTILE}"},
        "engine": "tensorrt",
        "version": f"10.3{HOSTILE}",
        "models": {f"dense{HOSTILE}": row | {"power": {}}},
        "ratios": {},
        "notes": [f"a note{HOSTILE}"],
        "failed": {"small": f"a reason{HOSTILE}"},
    }
    monkeypatch.setattr(bundle_run, "run_bundle", lambda *a: results)
    (tmp_path / "bundle.json").write_text("{}")
    outcome = cli("bench", tmp_path)
    assert outcome.code == 1
    for start in ("Orin", "10.3", "a note"):
        harmless(outcome.out[outcome.out.index(start) :])
    harmless(outcome.err[outcome.err.index("failed: small: a reason") :])


def test_a_library_that_names_kernels_in_escapes(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(f"pad{HOSTILE}", "Reformat", (), padding=True)
    report = EngineReport(
        f"10.3{HOSTILE}", tmp_path / "x.rtx", "fp16", [kernel], {f"weights{HOSTILE}": 1}, [f"a warning{HOSTILE}"],
        "tensorrt_rtx", "rtx-sm86",
    )  # fmt: skip
    monkeypatch.setattr(runtime, "build_engine", lambda *a, **k: report)
    base = {"target": "rtx-sm86", "precision": "fp16", "kernels": []}
    (tmp_path / "base.json").write_text(json.dumps(base))
    outcome = cli("build", "net.onnx", "--target", "rtx-sm86", "--gate", tmp_path / "base.json")
    assert outcome.code == 1
    for start in ("10.3", "weights", "a warning"):
        harmless(outcome.out[outcome.out.index(start) :])
    harmless(outcome.err[outcome.err.index("gate: ") :])


def test_errors_and_warnings_are_printed_without_control_characters(cli, capfd: pytest.CaptureFixture[str]) -> None:
    harmless(cli("run", f"{HOSTILE}.yaml").err)
    with warnings.catch_warnings():
        show_warnings()
        warnings.warn_explicit(f"a{HOSTILE}", UserWarning, "recipe.py", 1)
    harmless(capfd.readouterr().err)
