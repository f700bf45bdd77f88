"""The worked example of a script in timm's manner, with tiny settings."""

import importlib.util
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "examples" / "timm_style.py"


def test_it_trains_prunes_and_gives_the_class_back(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    spec = importlib.util.spec_from_file_location("timm_style", FILE)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    loaders = script.digits

    def few(*args):
        train, test = loaders(*args)
        return [next(iter(train)) for _ in range(10)], test

    monkeypatch.setattr(script, "digits", few)
    torch.manual_seed(0)
    arguments = ["--model", "test_resnet", "--epochs", "2", "--batch", "16", "--out", str(tmp_path / "small.pt")]
    small, result, optimizer = script.main(arguments)
    assert type(small) is type(timm.create_model("test_resnet"))
    assert result.record["steps"] == 10
    assert result.program.macs <= 0.5 * result.record["cost"]["before"]["macs"]
    assert len(optimizer.param_groups) == 2
    assert all(state["step"] == 10 for state in optimizer.state.values())
    again = torch.load(tmp_path / "small.pt")
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in small.state_dict().items()}
    assert len(FILE.read_text().splitlines()) <= 60
