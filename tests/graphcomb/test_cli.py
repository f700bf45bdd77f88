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
import yaml
from rich.console import Console

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
    assert 0 <= summary["accuracy_after"] <= 1
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


def test_plan_is_printed_edited_and_applied(cli, recipe, tmp_path: Path) -> None:
    path = recipe(passes=[{"RemoveChannels": {"ratio": 0.5, "round_to": 1}}])
    outcome = cli("plan", path, "--out", tmp_path / "plan.yaml")
    assert outcome.code == 0, outcome.err
    assert "0.weight:0" in outcome.out
    tree = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    rows = {row["name"]: row for row in tree["groups"]}
    assert {n: (r["size"], r["keep"], r["kind"]) for n, r in rows.items()} == {
        "0.weight:0": (16, 8, "channel"),
        "3.weight:0": (32, 16, "channel"),
    }
    assert all(0 < row["saves_macs"] < 1 for row in rows.values())
    assert {row["name"]: row["why"] for row in tree["frozen"]}.keys() == {"0.weight:1", "8.weight:0"}

    rows["0.weight:0"]["keep"] = 5
    rows["3.weight:0"]["prune"] = False
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(tree))
    assert cli("run", path, "--plan", tmp_path / "plan.yaml", "--out", tmp_path / "out").code == 0
    shapes = {n: tuple(p.shape) for n, p in load(tmp_path / "out" / "model.pt2").module().named_parameters()}
    assert shapes["0.weight"] == (5, 3, 3, 3)
    assert shapes["3.weight"] == (32, 5, 3, 3)


def test_an_unedited_plan_gives_the_unplanned_result(cli, recipe, tmp_path: Path) -> None:
    path = recipe()
    assert cli("plan", path, "--out", tmp_path / "plan.yaml").code == 0
    assert cli("run", path, "--plan", tmp_path / "plan.yaml", "--out", tmp_path / "planned").code == 0
    assert cli("run", path, "--out", tmp_path / "plain").code == 0
    first, second = (load(tmp_path / n / "model.pt2").module().state_dict() for n in ("planned", "plain"))
    assert all(torch.equal(first[k], second[k]) for k in second)


def test_nothing_to_plan(refused, recipe) -> None:
    assert refused("plan", recipe(passes=["Comb"])).startswith("passes: no RemoveChannels in the recipe")


def test_comb_lists_groups_and_reasons(cli) -> None:
    outcome = cli("comb", "toys:net", "--input", "1,3,8,8", "--arg", "classes=7", "--json")
    found = json.loads(outcome.out)
    groups = {g["name"]: g for g in found["groups"]}
    assert ["3.weight", 0] in groups["3.weight:0"]["members"]
    assert ["8.weight", 1] in groups["3.weight:0"]["members"]
    assert groups["3.weight:0"]["frozen"] is None
    assert groups["8.weight:0"]["size"] == 7
    assert "output of the program" in groups["8.weight:0"]["frozen"]
    table = cli("comb", "toys:net", "--input", "1,3,8,8").out
    assert "2 of 4 groups can shrink" in table
    why = cli("comb", "toys:net", "--input", "1,3,8,8", "--why", "0.weight").out
    assert "0.weight:1" in why
    assert "an input of the program" in why
    assert "no parameter 0.wait" in cli("comb", "toys:net", "--input", "1,3,8,8", "--why", "0.wait").err


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
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([str(c) for c in command], env=environment, stderr=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "killed" / "passes" / "01-Distill"
    until = time.monotonic() + 120
    while not list(checkpoints.glob("*.ckpt")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.stderr is not None
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert list(checkpoints.glob("*.ckpt"))
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
    own = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **own}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("surgery_error") == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["passes"][2]["processes"] == 2
    assert summary["surgery_error"] <= 1e-10


def test_plan_lists_the_blocks_of_a_recipe_that_prunes_depth(cli, recipe, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("graphcomb.cli.plan.console", Console(width=80))
    path = recipe(model={"source": "torchvision.models:resnet18"}, data=None, inputs=[[1, 3, 64, 64]],
                  passes=[{"PruneDepth": {"blocks": 2}}])  # fmt: skip
    out = cli("plan", path, "--out", tmp_path / "plan.yaml")
    assert out.code == 0, out.err
    assert all(text in out.out for text in ("residual", "kernels"))
    table = [[c.strip() for c in line.split("│")[1:-1]] for line in out.out.splitlines() if line.startswith("│")]
    assert table[0] == ["layer1.0", "residual", "18.9 M", "73,984", "9.4 M", "1"], "whole numbers at 80 columns"
    assert [row[0] for row in table] == [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    text = (tmp_path / "plan.yaml").read_text()
    listed = [yaml.safe_load(line[4:]) for line in text.splitlines() if line.startswith("# - {")]
    assert [b["name"] for b in listed] == [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert all(0 < b["saves_macs"] < b["macs"] and b["saves_kernels"] > 0 for b in listed)
    assert yaml.safe_load(text)["groups"] == []
