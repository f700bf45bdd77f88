"""What the commands print: no text of a device, a library or a file reaches the terminal as a command."""

import json
import warnings
from pathlib import Path

import pytest
from rich.table import Table

from graphcomb import runtime
from graphcomb.cli.run import show_summary
from graphcomb.cli.shared.output import console, printable, show_warnings
from graphcomb.runtime.bundle import run as bundle_run
from graphcomb.runtime.engines.base import EngineReport, Kernel
from graphcomb.runtime.summary import read_summary

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
    kernel = Kernel(name=f"pad{HOSTILE}", kind="Reformat", padding=True)
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


def test_figures_of_a_run_say_what_they_are_of(capsys: pytest.CaptureFixture[str]) -> None:
    """Which file the parity is of, where the latency was measured, and how far off the prediction may be."""
    bench = {"timings": [], "ratio": None, "ratios": {}, "rounds": 9, "contended": 0, "note": ""}
    bench["environment"] = {"threads": 1, "cpu": "a processor"}
    prediction = {
        "target": "rtx-sm86", "precision": "fp16", "batch": 1, "by": "a roofline", "ms": {"before": 3.0, "after": 1.5},
        "run_ms": 0.1, "calibration": None, "layers": [], "uncertainty": {"factor": 2.0, "source": "a data sheet"},
    }  # fmt: skip
    figures = {"latency_ratio": 3.04, "onnx_parity": 2.8e-7, "bench": bench, "inputs": [[1, 3, 8, 8]]}
    show_summary(read_summary(figures, "summary"))
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "3.04x faster in ONNX Runtime, fp32, 1 thread of a processor, batch 1" in text
    assert "2.8e-07" in text
    show_summary(read_summary(figures | {"onnx_parity_fp16": 9.6e-4, "prediction": prediction}, "summary"))
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "9.6e-04" in text
    assert "2.8e-07" not in text, "of a file that no engine is built from"
    assert "2.00x faster on rtx-sm86, fp16, batch 1: 3 -> 1.5 ms (each off by up to 2 times)" in text
