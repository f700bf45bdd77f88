"""The documented formats are what is written, and the page is what the models say."""

import json
from pathlib import Path

import pytest
import torch

import graphcomb
from graphcomb import schema
from graphcomb.runtime.bundle.run import run_bundle
from graphcomb.runtime.bundle.write import write_bundle

PAGE = Path(schema.__file__).parents[1] / "docs" / "formats.md"


def test_the_page_is_what_the_models_say() -> None:
    assert PAGE.read_text() == schema.markdown(), "run: python -m graphcomb.schema > docs/formats.md"


def test_a_run_writes_what_is_documented(cli, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphcomb.run.BENCH_SECONDS", 0.3)
    path = recipe(outputs={"onnx": True, "report": True, "bench": True, "engines": ["cpu"]}, precision="fp16")
    assert cli("run", path, "--out", tmp_path / "out", "--quiet").code == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    found = schema.Summary.model_validate(summary, strict=True)
    assert found.onnx.keys() == {"fp32", "fp16"}
    assert found.engines[0].kernels
    records = json.loads((tmp_path / "out" / "record.json").read_text())
    assert [schema.Record.model_validate(r, strict=True).pass_ for r in records] == ["RemoveChannels"]
    assert schema.Record.model_validate(records[0]).removed
    for record in records:
        for cost in (record["cost"]["before"], record["cost"]["after"]):
            schema.Cost.model_validate(cost, strict=True)
    files = tmp_path / "out" / "dense.onnx", tmp_path / "out" / "model.onnx"
    code = cli("bench", *files, "--seconds", "0.3", "--out", tmp_path / "b.json", "--quiet").code
    assert code == int(json.loads((tmp_path / "b.json").read_text())["ratio"] is None)  # as on a busy machine
    schema.Bench.model_validate(json.loads((tmp_path / "b.json").read_text()), strict=True)


def test_a_build_writes_what_is_documented(cli, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    program = graphcomb.capture(torch.nn.Conv2d(8, 8, 3).eval(), (torch.randn(1, 8, 6, 6),))
    graphcomb.runtime.export_onnx(program, tmp_path / "net.onnx", "fp16")
    for target in ("cpu", "rtx-sm86"):
        assert cli("build", tmp_path / "net.onnx", "--target", target, "--json", tmp_path / "e.json").code == 0
        schema.Engine.model_validate(json.loads((tmp_path / "e.json").read_text()), strict=True)


def test_a_device_writes_what_is_documented(tmp_path: Path) -> None:
    program = graphcomb.capture(torch.nn.Conv2d(3, 4, 3).eval(), (torch.randn(1, 3, 6, 6),))
    folder = write_bundle(tmp_path / "b", {"dense": program, "same": program})
    arguments = ["--engine", "onnxruntime", "--rounds", "1", "--power-seconds", "0.05", "--quiet"]
    found = schema.Device.model_validate(run_bundle(folder, tmp_path / "r.json", arguments=arguments), strict=True)
    assert found.models["same"].latency["stream"].runs == 17


@pytest.mark.parametrize("key", ["macs_ratio", "passes", "files"])
def test_what_is_required_is_missed(key: str) -> None:
    good = {
        "model": "m", "target": "cpu", "precision": "fp32", "accuracy_before": None, "accuracy_after": None,
        "macs_ratio": 1.0, "params_ratio": 1.0, "latency_ratio": None, "surgery_error": None, "onnx_parity": None,
        "cost": {"before": {}, "after": {}}, "passes": [], "files": {}, "environment": {},
    }  # fmt: skip
    schema.Summary.model_validate(good)
    with pytest.raises(ValueError, match=key):
        schema.Summary.model_validate({k: v for k, v in good.items() if k != key})
