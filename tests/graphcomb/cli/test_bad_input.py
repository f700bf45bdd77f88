"""Bad input, end to end: one clear line, exit code 2, nothing half-written."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import toys

from graphcomb import capture
from graphcomb.runtime import TARGETS, export_onnx


@pytest.fixture
def onnx_out() -> dict:
    return {"onnx": True, "report": False, "bench": False}


def test_unknown_recipe_key(refused, recipe) -> None:
    assert refused("run", recipe(modell="x")).endswith("modell: unknown key; did you mean model?")


def test_unknown_pass(refused, recipe) -> None:
    line = refused("run", recipe(passes=["RemoveChanels"]))
    assert line.endswith('passes.0: unknown pass "RemoveChanels"; did you mean RemoveChannels?')


def test_unknown_option(refused, recipe) -> None:
    line = refused("run", recipe(passes=[{"RemoveChannels": {"rato": 0.5}}]))
    assert "passes.0.RemoveChannels.rato: unknown option; did you mean ratio" in line


def test_wrong_type(refused, recipe) -> None:
    assert "passes.0.RemoveChannels.ratio: a number, not 'half'" in refused(
        "run", recipe(), "--set", "passes.0.ratio=half"
    )


def test_out_of_range(refused, recipe) -> None:
    assert "passes.0.RemoveChannels.ratio: a share" in refused("run", recipe(), "--set", "passes.0.ratio=1.5")


def test_model_that_does_not_import(refused, recipe) -> None:
    assert 'model: cannot import "toyz" (ModuleNotFoundError' in refused("run", recipe(model="toyz:net"))
    assert 'model: cannot import "toyz"' in refused("comb", "toyz:net")


def test_model_that_export_refuses(refused, recipe) -> None:
    line = refused("run", recipe(model="toys:Branching"))
    assert line.startswith("model: toys:Branching with inputs (2, 3, 8, 8): torch.export refuses the model: ")
    assert "what to try: " in line


def test_input_shapes_that_do_not_fit(refused, recipe) -> None:
    line = refused("run", recipe(data=None, inputs=[[1, 5, 8, 8]]))
    assert line.startswith("model: toys:net with inputs (1, 5, 8, 8): ")
    assert "expected input[1, 5, 8, 8] to have 3 channels" in line


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("toys:grey", "has shape (8, 1, 8, 8), the program takes (batch, 3, 8, 8)"),
        ("toys:integers", "is torch.int64, the program takes torch.float32"),
        ("toys:words", "the loader yields a str for inputs"),
        ("toys:nothing", "the loader yields no batch"),
        ("toys:raising", "the loader fails on its first batch (OSError: disk gone)"),
    ],
)
def test_data_that_the_model_does_not_take(refused, recipe, data: str, message: str) -> None:
    line = refused("run", recipe(data=data, inputs=[[2, 3, 8, 8]]))
    assert line.startswith("data: ")
    assert message in line


@pytest.mark.parametrize("step", [{"RemoveChannels": {"importance": "fisher"}}, {"Distill": {"epochs": 1}}])
def test_labels_that_the_outputs_do_not_fit(refused, recipe, step: dict) -> None:
    line = refused("run", recipe(data="toys:boxes", passes=[step]), "--quiet")
    assert line.startswith("metric: does not take these outputs and labels (shapes [(8, 4), (8, 5, 4)])")
    line = refused("run", recipe(data="toys:many_classes", passes=[step]), "--quiet")
    assert line.startswith("loss: does not take these outputs and labels (shapes [(8, 4), (8,)])")


def test_nan_loss(refused, recipe, tmp_path: Path) -> None:
    passes = [{"RemoveChannels": {"ratio": 0.5}}, {"Distill": {"epochs": 1}}]
    line = refused("run", recipe(passes=passes, loss="toys:nan_loss"), "--out", tmp_path / "out", "--quiet")
    assert "Distill" in line
    assert "nan" in line.lower()
    assert [p.name for p in (tmp_path / "out").rglob("*.pt2")] == ["00-RemoveChannels.pt2"]


def test_a_target_that_cannot_be_reached(refused, recipe) -> None:
    line = refused("run", recipe(passes=[{"RemoveChannels": {"macs": 0.001}}]))
    assert line.startswith("RemoveChannels.macs: ")
    assert "cannot be reached" in line
    assert "frozen: 0.weight:1" in line


def test_out_that_is_a_file(refused, recipe, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    assert refused("run", recipe(), "--out", tmp_path / "taken" / "deep").endswith("is not a folder")
    assert (tmp_path / "taken").read_text() == "mine"


def test_out_that_cannot_be_written(refused, recipe) -> None:
    assert "--out /proc/graphcomb" in refused("run", recipe(), "--out", "/proc/graphcomb")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut off"])
def test_corrupted_pt2(refused, recipe, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt2").write_bytes(content)
    assert "m.pt2: not a .pt2 file (or a damaged one)" in refused("run", recipe(model="m.pt2"))


def test_truncated_and_foreign_pt2(refused, recipe, tmp_path: Path) -> None:
    good = capture(toys.net(), torch.zeros(2, 3, 8, 8)).save(tmp_path / "good.pt2").read_bytes()
    (tmp_path / "m.pt2").write_bytes(good[: len(good) // 2])
    assert refused("run", recipe(model="m.pt2")).startswith("model: m.pt2: not a")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt2")
    assert refused("run", recipe(model="foreign.pt2")).startswith("model: foreign.pt2: not a loadable .pt2")


@pytest.mark.parametrize("content", [b"", b"\x00\x01garbage"])
def test_foreign_onnx(refused, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    assert "m.onnx: not " in refused("build", "m.onnx", "--target", "cpu")
    assert "m.onnx: " in refused("bench", "m.onnx", "m.onnx")


def test_absent_files(refused) -> None:
    assert refused("build", "absent.onnx", "--target", "cpu") == "absent.onnx: no such file"
    assert refused("bench", "absent.onnx", "absent.onnx") == "absent.onnx: no such file"
    assert refused("run", "absent.yaml").startswith("absent.yaml: cannot be read")


def test_foreign_summary(refused, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("[1]")
    assert refused("report", "s.json") == "s.json: not a summary.json of graphcomb run"
    (tmp_path / "s.json").write_text("{")
    assert refused("report", "s.json").startswith("s.json: not JSON")
    assert refused("report", "none.json").startswith("none.json: cannot be read")


def test_missing_backend(refused, recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    absent = "tensorrt_rtx"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == absent else real(name, *a))
    line = refused("run", recipe(outputs={"engines": ["rtx-sm86"]}))
    assert line == "outputs.engines.0: tensorrt_rtx is not installed; install it with: pip install 'graphcomb[rtx]'"


def test_unknown_target(refused, recipe) -> None:
    assert refused("run", recipe(target="rtx-sm68")).startswith("target rtx-sm68: not known; did you mean")
    assert refused("run", recipe(outputs={"engines": ["orim"]})).startswith("outputs.engines.0: target orim: not known")


def test_a_target_that_the_library_refuses(refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    export_onnx(capture(toys.net(), torch.zeros(2, 3, 8, 8)), tmp_path / "m.onnx")
    hopper = dataclasses.replace(TARGETS["rtx-sm86"], name="rtx-sm90", compute_capability=(9, 0))
    monkeypatch.setitem(TARGETS, "rtx-sm90", hopper)
    line = refused("build", "m.onnx", "--target", "rtx-sm90")
    assert "rtx-sm90" in line
    assert "SM90" in line or "9.0" in line
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_usage_errors(refused) -> None:
    assert refused("frobnicate") == "No such command 'frobnicate'."
    assert refused("run") == "run: a recipe, or --plan with a file that `graphcomb tune` wrote"
    assert "x" in refused("comb", "toys:net", "--input", "1,x")
    assert refused("comb", "toys:net", "--arg", "classes").startswith("--arg classes: expected name=value")


def test_plans_that_do_not_fit(refused, recipe, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("groups:\n- {name: '0.weight:0', size: 16, keep: 0}\n")
    assert "plan.yaml: groups.0.keep: should be greater than 0, got 0" in refused("run", recipe(), "--plan", plan)
    plan.write_text("groups:\n- {name: '0.weight:0', size: 16, keep: 17}\n")
    assert "plan: 0.weight:0: keep must be a whole number from 1 to 16, not 17" in refused(
        "run", recipe(), "--plan", plan
    )
    plan.write_text("groups:\n- {name: nobody, size: 16, keep: 3}\n")
    assert "plan: no group 'nobody'" in refused("run", recipe(), "--plan", plan)


def test_unexpected_exceptions_are_one_line_too(cli, recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphcomb import run as runs

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyError("lost\nand found")

    monkeypatch.setattr(runs, "run", fail)
    outcome = cli("run", recipe())
    assert outcome.code == 1
    assert outcome.err.startswith("error: unexpected KeyError: ")
    assert outcome.err.count("\n") == 1
    assert "graphcomb --debug run" in outcome.err
    assert "Traceback" in cli("--debug", "run", recipe()).err


def test_interrupting_is_one_line(cli, recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphcomb import run as runs

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run", stop)
    outcome = cli("run", recipe())
    assert outcome.code == 130
    assert outcome.err == "error: interrupted; run the same command again to continue\n"


def test_a_failed_run_leaves_what_was_there(refused, cli, recipe, tmp_path: Path) -> None:
    good = recipe()
    assert cli("run", good, "--out", tmp_path / "out", "--quiet").code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    outcome = cli("run", good, "--out", tmp_path / "out", "--set", "model=toys:broken")
    assert outcome.code == 2
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["surgery_error"] <= 1e-10
