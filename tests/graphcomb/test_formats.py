"""The documented formats are what is written, and the page is what the models say."""

import json
import runpy
from pathlib import Path

import pytest
import torch

import graphcomb
from graphcomb.graph.errors import BadInput
from graphcomb.runtime import device_results as results
from graphcomb.runtime import summary as schema
from graphcomb.runtime.bundle.run import run_bundle
from graphcomb.runtime.bundle.write import write_bundle
from graphcomb.runtime.formats import Format

DOCS = Path(__file__).parents[2] / "docs"


def test_the_pages_are_what_the_models_say() -> None:
    pages = runpy.run_path(str(DOCS / "formats.py"))["pages"]()
    assert pages.keys() == {"formats.md", "summary.schema.json"}
    for name, text in pages.items():
        assert (DOCS / name).read_text() == text, "run: make docs-formats"


def test_every_model_is_on_the_page() -> None:
    for module in (schema, results):
        for name, model in vars(module).items():
            if isinstance(model, type) and issubclass(model, Format) and model is not Format and "[" not in name:
                assert f"\n## {name}\n" in (DOCS / "formats.md").read_text()


def test_a_run_writes_what_is_documented(cli, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphcomb.run.BENCH_SECONDS", 0.3)
    path = recipe(outputs={"onnx": True, "report": True, "bench": True, "engines": ["cpu"]}, precision="fp16")
    assert cli("run", path, "--out", tmp_path / "out", "--quiet").code == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    found = schema.Summary.model_validate(summary, strict=True)
    assert json.loads(json.dumps(found.to_dict(), default=str)) == summary
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
    found = results.Device.model_validate(run_bundle(folder, tmp_path / "r.json", arguments=arguments), strict=True)
    assert found.models["same"].latency["stream"].runs == 17


@pytest.mark.parametrize("key", ["macs_ratio", "passes", "files"])
def test_what_is_required_is_missed(key: str) -> None:
    cost = {"macs": 1, "params": 1}
    good = {
        "model": "m", "target": "cpu", "precision": "fp32", "accuracy_before": None, "accuracy_after": None,
        "macs_ratio": 1.0, "params_ratio": 1.0, "latency_ratio": None, "surgery_error": None, "onnx_parity": None,
        "cost": {"before": cost, "after": cost}, "passes": [], "files": {}, "environment": {},
    }  # fmt: skip
    schema.Summary.model_validate(good)
    with pytest.raises(ValueError, match=key):
        schema.Summary.model_validate({k: v for k, v in good.items() if k != key})
    found = schema.read_summary({k: v for k, v in good.items() if k != key}, "summary.json")
    assert not getattr(found, key)


def test_a_damaged_summary_is_one_line() -> None:
    for values, message in [
        ([1], "s.json: the summary is a mapping of names to values, not a list"),
        ({"passes": [{"pass": "Fuse"}]}, "s.json: passes.0.options: Field required, got {'pass': 'Fuse'}"),
        ({"macs_ratio": "many"}, "s.json: macs_ratio: should be a valid number, .*, got 'many'"),
        ({"files": 3}, "s.json: files: should be a valid dictionary, got 3"),
    ]:
        with pytest.raises(BadInput, match=f"^{message}$"):
            schema.read_summary(values, "s.json")
