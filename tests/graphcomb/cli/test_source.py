"""`graphcomb source`, on a toy network."""

import importlib.util

import torch

from graphcomb import load


def test_a_program_becomes_a_file_of_its_own(cli, recipe, tmp_path) -> None:
    assert cli("run", recipe(passes=[{"RemoveChannels": {"ratio": 0.5, "round_to": 1}}]), "--out", tmp_path).code == 0
    outcome = cli("source", tmp_path / "model.pt2", tmp_path / "small.py")
    assert outcome.code == 0, outcome.err
    assert "small.safetensors" in outcome.out
    spec = importlib.util.spec_from_file_location("small", tmp_path / "small.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    program = load(tmp_path / "model.pt2")
    torch.testing.assert_close(module.load()(*program.args), program.module().eval()(*program.args))


def test_the_file_is_python(refused, tmp_path) -> None:
    assert "ends in .py" in refused("source", "toys:net", tmp_path / "small.txt")
