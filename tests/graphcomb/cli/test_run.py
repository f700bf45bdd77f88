"""The command line, end to end, on a toy network."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import toys

from graphcomb import capture, load
from graphcomb.passes import RemoveChannels

FULL = {"onnx": True, "report": True, "bench": True}
TRAINED = [
    "Comb",
    {"RemoveChannels": {"ratio": 0.5, "round_to": 4}},
    {"Distill": {"epochs": 2, "lr": 0.01}},
    "Fuse",
]


def test_run_writes_everything_it_names(cli, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("graphcomb.run.BENCH_SECONDS", 1.0)
    outputs = FULL | {"engines": ["rtx-sm86"]}
    out = tmp_path / "out"
    path = recipe(passes=TRAINED, outputs=outputs, precision="fp16", target="rtx-sm86")
    outcome = cli("run", path, "--out", out)
    assert (outcome.code, outcome.err.strip()) == (0, "")

    summary = json.loads((out / "summary.json").read_text())
    assert summary["surgery_error"] <= 1e-10
    assert summary["onnx_parity"] <= 1e-4
    assert summary["onnx_parity_fp16"] <= 1e-1
    assert summary["macs_ratio"] > 2
    assert summary["params_ratio"] > 2
    low, high = summary["accuracy_interval"]
    assert 0 <= low <= summary["accuracy_after"] <= high <= 1
    assert [r["pass"] for r in summary["passes"]] == ["Comb", "RemoveChannels", "Distill", "Fuse"]
    assert "accuracy" in summary["passes"][2]
    assert summary["passes"][3]["verified"]["error"] <= 1e-5
    assert Path(summary["engine"]).stat().st_size > 1000
    files = [p for value in summary["files"].values() for p in (value if isinstance(value, list) else [value])]
    assert all(Path(p).stat().st_size > 500 for p in files)
    assert "<html" in (out / "report.html").read_text()
    assert not list(out.rglob("*.part*"))

    program = load(out / "model.pt2")
    assert [r["pass"] for r in program.history] == ["Comb", "RemoveChannels", "Distill", "Fuse"]
    assert program.module()(torch.zeros(5, 3, 8, 8)).shape == (5, 4)

    (out / "report.html").unlink()
    assert cli("report", out / "summary.json").code == 0
    assert (out / "report.html").is_file()
    assert "kernels" in cli("build", out / "model.onnx", "--target", "rtx-sm89", "--out", tmp_path / "e.rtx").out
    assert (tmp_path / "e.rtx").is_file()


def test_what_zeros_leave_without_a_purpose_goes(cli, recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    passes = [{"Sparsify": {"sparsity": 0.9, "method": "magnitude", "include": ["0.weight"]}}, "Minimise"]
    outcome = cli("run", recipe(passes=passes, outputs={"onnx": True, "report": True}), "--out", out)
    assert (outcome.code, outcome.err.strip()) == (0, "")
    summary = json.loads((out / "summary.json").read_text())
    sparse, minimised = summary["passes"]
    assert minimised["accuracy"]["after"] == sparse["accuracy"]["after"]
    assert minimised["verified"]["error"] <= 1e-10
    assert minimised["cost"]["after"]["macs"] < minimised["cost"]["before"]["macs"]
    (changed,) = [row for row in minimised["changed"] if row["what"] == "0.weight:0"]
    assert changed["before"] - changed["after"] == changed["dead"] + changed["unread"] > 0
    assert "Minimise" in (out / "report.html").read_text()


def test_a_second_run_takes_over_finished_passes(cli, recipe, tmp_path: Path) -> None:
    path = recipe()
    assert cli("run", path, "--out", tmp_path / "out").code == 0
    before = (tmp_path / "out" / "passes" / "00-RemoveChannels.pt2").stat().st_mtime_ns
    assert cli("run", path, "--out", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "passes" / "00-RemoveChannels.pt2").stat().st_mtime_ns == before
    assert cli("run", path, "--out", tmp_path / "out", "--fresh").code == 0
    assert (tmp_path / "out" / "passes" / "00-RemoveChannels.pt2").stat().st_mtime_ns != before


def test_run_by_default_writes_beside_and_can_be_quiet(cli, recipe, tmp_path: Path) -> None:
    outcome = cli("run", recipe(data=None, inputs=[[1, 3, 8, 8]]), "--quiet", "--set", "passes.0.ratio=0.25")
    assert outcome.code == 0
    assert "RemoveChannels" not in outcome.out
    summary = json.loads((tmp_path / "out" / "recipe" / "summary.json").read_text())
    assert summary["accuracy_before"] is None
    assert summary["passes"][0]["options"]["ratio"] == 0.25
    assert summary["inputs"] == [[1, 3, 8, 8]]


def test_unlabelled_data_distils_and_reports_no_accuracy(cli, recipe, tmp_path: Path) -> None:
    outcome = cli("run", recipe(data="toys:unlabelled", passes=[{"Distill": {"steps": 2}}]), "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["accuracy_after"] is None


def test_random_data_takes_the_shape_of_the_inputs(cli, recipe, tmp_path: Path) -> None:
    data = {"source": "random", "arguments": {"classes": 4, "batch_size": 2}}
    path = recipe(data=data, inputs=[[1, 3, 8, 8]], passes=[{"RemoveChannels": {"importance": "fisher"}}])
    assert cli("run", path, "--out", tmp_path / "out").code == 0


def test_a_pt2_is_a_model(cli, recipe, tmp_path: Path) -> None:
    capture(toys.net(), torch.zeros(2, 3, 8, 8), dynamic_shapes="batch").save(tmp_path / "net.pt2")
    assert cli("run", recipe(model="net.pt2"), "--out", tmp_path / "out").code == 0
    assert load(tmp_path / "out" / "model.pt2").history[0]["pass"] == "RemoveChannels"


def test_bench_compares_two_files(cli, tmp_path: Path) -> None:
    from graphcomb.runtime import export_onnx

    program = capture(toys.net(), torch.zeros(2, 3, 8, 8))
    export_onnx(program, tmp_path / "a.onnx")
    export_onnx(RemoveChannels(ratio=0.5)(program).program, tmp_path / "b.onnx")
    outcome = cli("bench", tmp_path / "a.onnx", tmp_path / "b.onnx", "--quiet", "--seconds", 1)
    assert outcome.code == int("no figure: " in outcome.out), outcome.err  # which a busy machine gives
    assert "times faster" in outcome.out


def test_help_names_every_command(cli) -> None:
    outcome = cli("--help")
    assert outcome.code == 0
    for command in ("run", "plan", "comb", "build", "bench", "report", "demo"):
        assert f"\n  {command} " in outcome.out


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from graphcomb.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are added up in the same order as in a process with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_killed_in_the_middle_of_distill_a_run_resumes_to_the_same_result(
    cli, recipe, tmp_path: Path, one_thread: None
) -> None:
    path = recipe(data="toys:slow", passes=[{"RemoveChannels": {"ratio": 0.5}}, {"Distill": {"epochs": 6, "lr": 0.01}}])
    command = [sys.executable, "-m", "graphcomb", "run", path, "--out", tmp_path / "killed", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(Path(toys.__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([str(c) for c in command], env=environment, stderr=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "killed" / "passes" / "01-Distill"
    until = time.monotonic() + 120
    while not list(checkpoints.glob("distill-*.ckpt")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.stderr is not None
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert list(checkpoints.glob("distill-*.ckpt"))
    assert not (tmp_path / "killed" / "summary.json").exists()

    assert cli("run", path, "--out", tmp_path / "killed", "--quiet").code == 0
    assert cli("run", path, "--out", tmp_path / "whole", "--quiet").code == 0
    first, second = (load(tmp_path / n / "model.pt2").module().state_dict() for n in ("whole", "killed"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    record = json.loads((tmp_path / "killed" / "record.json").read_text())[1]
    assert record["resumed_at"] > 0


@pytest.mark.slow
def test_two_processes_run_the_same_recipe(cli, recipe, tmp_path: Path) -> None:
    path = recipe(passes=["Comb", {"RemoveChannels": {"ratio": 0.5}}, {"Distill": {"epochs": 2}}, "Fuse"])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "graphcomb"]
    command = [sys.executable, *launch, "run", str(path), "--out", str(tmp_path / "out")]
    own = {"PYTHONPATH": str(Path(toys.__file__).parent), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **own}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("surgery_error") == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["passes"][2]["processes"] == 2
    assert summary["surgery_error"] <= 1e-10
