"""What a run hands out: files that hold what was promised, engines with their options, bundles for the target."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import toys
from torch import nn

import graphcomb
from graphcomb import runtime
from graphcomb.runtime.devices.table import get_target
from graphcomb.runtime.engines.base import EngineReport
from graphcomb.runtime.export.opset import choose_opset
from graphcomb.runtime.onnx_file import precision

FP16 = {"data": None, "inputs": [[2, 3, 8, 8]], "precision": "fp16", "passes": ["Comb"]}
ONNX = {"onnx": True, "report": False, "bench": False, "pt2": False}


def test_an_fp16_file_that_is_far_off_ends_the_run(cli, recipe, refused, tmp_path: Path) -> None:
    path = recipe(model="toys:cancelled", outputs=ONNX, **FP16)
    message = refused_but_fp32(cli, path, tmp_path / "out")
    assert "fp16 differs from the program" in message
    assert "first off in fp16: sub" in message
    assert not (tmp_path / "out" / "model.fp16.onnx").exists()
    path = recipe(model="toys:cancelled", outputs=ONNX | {"keep_fp32": ["*"]}, **FP16)
    assert cli("run", path, "--out", tmp_path / "out", "--quiet").code == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["onnx"]["fp16"]["parity"] < 1e-3
    assert len(summary["onnx"]["fp16"]["float32"]) == 3


def refused_but_fp32(cli, path: Path, out: Path) -> str:
    """The one line that a run ends with whose fp32 file is good."""
    outcome = cli("run", path, "--out", out, "--quiet")
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    return outcome.err


def test_files_are_compared_on_samples_that_nothing_was_trained_on(
    cli, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    export = runtime.export_onnx

    def watched(*arguments: Any, **options: Any) -> Any:
        given.append(options["data"])
        return export(*arguments, **options)

    monkeypatch.setattr(runtime, "export_onnx", watched)
    path = recipe(passes=["Comb"], precision="fp16", outputs=ONNX)
    assert cli("run", path, "--out", tmp_path / "out", "--quiet").code == 0
    wanted = [images for images, _ in toys.splits()[1]]
    for data in given:
        assert all(torch.equal(x, y) for ((x,), _), y in zip(data, wanted, strict=True))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [summary["onnx"][precision]["agreement"] for precision in ("fp32", "fp16")] == [1.0, 1.0]


class Builds(list):
    """Stands for `build_engine` and keeps what it is asked for."""

    def __call__(self, path: Path, target: Any, **options: Any) -> Any:
        self.append((Path(path).name, target.name, options))
        return EngineReport("1.7", path, "fp32", backend="tensorrt_rtx", target=target.name)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    found = Builds()
    monkeypatch.setattr(runtime, "build_engine", found)
    return found


def test_weights_with_the_pattern_build_engines_that_may_use_it(cli, recipe, builds, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    engines = ["rtx-sm86", {"target": "rtx-sm89", "sparse": False, "workspace": 64}]
    passes = [{"Sparsify": {"pattern": "2:4", "where": "all", "method": "magnitude"}}]
    path = recipe(model="toys:wide", passes=passes, outputs=ONNX | {"engines": engines})
    outcome = cli("run", path, "--out", tmp_path / "out", "--quiet")
    assert outcome.code == 0, outcome.err
    assert builds == [
        ("model.onnx", "rtx-sm86", {"sparse": True}),
        ("model.onnx", "rtx-sm89", {"sparse": False, "workspace": 64}),
    ]


@pytest.mark.parametrize(
    ("engine", "passes", "message"),
    [
        ({"target": "rtx-sm86", "dla": 0}, ["Comb"], "option dla: rtx-sm86 has no DLA"),
        ({"target": "cpu", "sparse": True}, ["Comb"], "option sparse: not one of backend onnxruntime"),
    ],
)
def test_options_of_engines_are_checked_before_anything_runs(
    recipe, refused, engine: dict[str, Any], passes: list[Any], message: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    found = refused("run", recipe(passes=passes, precision="fp16", outputs=ONNX | {"engines": [engine]}))
    assert found.startswith(f"outputs.engines.0: {message}")


def test_a_run_for_an_old_target_can_be_bundled(cli, recipe, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("graphcomb.run.BENCH_SECONDS", 0.3)
    outputs = ONNX | {"bench": True}
    path = recipe(target="drive-orin", precision="fp16", outputs=outputs, passes=["Fuse"])
    outcome = cli("run", path, "--out", tmp_path / "out", "--quiet")
    assert outcome.code == 0, outcome.err
    for name in ("dense.onnx", "model.onnx", "model.fp16.onnx"):
        assert onnx.load(tmp_path / "out" / name).opset_import[0].version == 17
    outcome = cli("bundle", tmp_path / "out", "--out", tmp_path / "bundle")
    assert outcome.code == 0, outcome.err


def test_opsets_are_asked_for_in_the_recipe(cli, recipe, refused, tmp_path: Path) -> None:
    path = recipe(outputs=ONNX | {"opset": 19}, passes=["Comb"])
    assert cli("run", path, "--out", tmp_path / "out", "--quiet").code == 0
    assert onnx.load(tmp_path / "out" / "model.onnx").opset_import[0].version == 19
    (tmp_path / "out" / "model.onnx").unlink()
    (tmp_path / "out" / "summary.json").unlink()
    assert "outputs.opset: 19: 17 is the lowest, and target drive-orin parses up to 17" in refused(
        "run", recipe(outputs=ONNX | {"opset": 19}, target="drive-orin")
    )


def test_fp8_is_checked_against_targets_and_opset_before_anything_runs(cli, recipe, refused, tmp_path: Path) -> None:
    passes = [{"Quantize": {"precision": "fp8", "include": ["*"]}}]
    found = refused("run", recipe(target="orin-nano", passes=passes, outputs=ONNX))
    assert found.startswith("target orin-nano: no fp8; it computes in fp32, ")
    found = refused("run", recipe(target="rtx-sm89", passes=passes, outputs=ONNX | {"opset": 18}))
    assert found.startswith("outputs.opset: 18: 19 is the lowest for FP8, and target rtx-sm89 parses up to ")
    path = recipe(target="rtx-sm89", precision="fp16", passes=passes, outputs=ONNX)
    outcome = cli("run", path, "--out", tmp_path / "out", "--quiet")
    assert outcome.code == 0, outcome.err
    assert precision(onnx.load(tmp_path / "out" / "model.fp16.onnx")) == "fp8"


def test_the_best_opset_is_what_the_operators_need() -> None:
    program = graphcomb.capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4),))
    assert [choose_opset(program, get_target(name)) for name in ("drive-orin", "rtx-sm86")] == [17, 18]
    assert choose_opset(program) == 18
    assert choose_opset(program, get_target("orin-nano"), 20) == 20
