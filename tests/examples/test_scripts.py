"""The examples of one technique each, with tiny settings; each fits on a page."""

import importlib.util
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _in_scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAPHCOMB_CACHE", str(tmp_path / "cache"))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def few_digits(module: ModuleType, monkeypatch) -> None:
    """Only a few batches of small images."""
    loaders = module.digits

    def few(*args, **options):
        train, test = loaders(16, 16)
        train.dataset.tensors = tuple(tensor[:128] for tensor in train.dataset.tensors)
        return train, test

    monkeypatch.setattr(module, "digits", few)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_a_script_fits_on_a_page(path):
    assert len(path.read_text().splitlines()) <= 60


def test_plain_loop(monkeypatch):
    module = script("plain_loop")
    few_digits(module, monkeypatch)
    small, result = module.main(["--epochs", "2", "--width", "16"])
    assert isinstance(small, module.SmallResNet)
    assert sum(p.numel() for p in small.parameters()) == result.program.params
    assert result.program.macs <= 0.5 * result.record["cost"]["before"]["macs"]


def test_lightning_loop(monkeypatch):
    pytest.importorskip("lightning")
    module = script("lightning_loop")
    few_digits(module, monkeypatch)
    trained, callback = module.main(steps=8, width=16)
    assert callback.result.record["steps"] == 8
    images = torch.randn(3, 1, 16, 16)
    wanted = callback.result.program.module().eval()(images)
    torch.testing.assert_close(trained.eval().model(images), wanted, rtol=1e-4, atol=1e-5)
    assert Path("small.pt2").is_file()


def test_transformers_trainer(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    module = script("transformers_trainer")
    few_digits(module, monkeypatch)
    _, callback = module.main(steps=6, width=16, folder=str(tmp_path / "out"))
    assert callback.result.program.macs <= 0.8 * callback.session.program.macs
    assert callback.result.record["verified"]["error"] < 1e-10


def test_repair_without_training(monkeypatch):
    module = script("repair_without_training")
    before, after, result = module.main(["--macs", "0.7"], width=16, epochs=4)
    assert result.program.macs <= 0.7 * result.record["cost"]["before"]["macs"]
    assert after > before - 0.2
    onnx.checker.check_model("small.onnx")


def test_onnx_in():
    module = script("onnx_in")
    from graphcomb.models import SmallResNet

    torch.onnx.export(SmallResNet(width=16).eval(), (torch.randn(1, 1, 16, 16),), "model.onnx", verbose=False)
    program, result = module.main(["model.onnx", "small.onnx"])
    assert result.program.macs <= 0.8 * program.macs
    onnx.checker.check_model("small.onnx")


def test_detector():
    module = script("detector")
    dense, result = module.main(steps=20)
    assert result.program.macs <= 0.5 * dense.macs
    assert {v.name for v in onnx.load("small.onnx").graph.output} == {"scores", "boxes"}
