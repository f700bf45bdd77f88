"""Models, data and functions by name: each mistake is one line that names the field."""

import pytest
import torch

from graphcomb.graph.errors import BadInput
from graphcomb.graph.program import Program, capture
from graphcomb.sources import first_batch, load_data, load_model, resolve


def test_a_model_from_a_callable_with_arguments() -> None:
    model = load_model("toys:net", {"classes": 7})
    assert isinstance(model, torch.nn.Module)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 7)


def test_a_model_from_a_pt2(tmp_path) -> None:
    saved = capture(load_model("toys:net"), torch.zeros(1, 3, 8, 8)).save(tmp_path / "m.pt2")
    assert isinstance(load_model(str(saved)), Program)
    with pytest.raises(BadInput, match=r"^model: a \.pt2 file takes no arguments"):
        load_model(str(saved), {"classes": 3})


def test_modules_of_the_working_folder_are_found(tmp_path) -> None:
    (tmp_path / "beside_the_recipe.py").write_text("answer = 42\n")
    assert resolve("beside_the_recipe:answer", "model") == 42


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet50", r'model: "resnet50" is neither package\.module:callable nor a \.pt2 or \.onnx file'),
        ("toyz:net", r'model: cannot import "toyz" \(ModuleNotFoundError: No module named'),
        ("toys:nett", r'model: toys has no "nett"; did you mean net'),
        ("toys:WIDTH", "model: toys:WIDTH is a int, not a callable"),
        ("toys:broken", r"model: toys:broken\(\) failed \(RuntimeError: weights not found\)"),
        ("toys:number", "model: toys:number returned a int, not a torch.nn.Module"),
        ("absent.pt2", "model: absent.pt2: no such file"),
    ],
)
def test_models_that_cannot_be_had(spec: str, message: str) -> None:
    with pytest.raises(BadInput, match=f"^{message}"):
        load_model(spec)


def test_an_argument_the_callable_does_not_take() -> None:
    with pytest.raises(BadInput, match=r"model: toys:net\(depth=3\) failed \(TypeError: .*depth"):
        load_model("toys:net", {"depth": 3})


def test_one_loader_serves_both_purposes() -> None:
    train, val = load_data("toys:batches", {"count": 3})
    assert train is val
    assert len(train) == 3
    assert [len(part) for part in load_data("toys:splits")] == [4, 2]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", 'data: unknown data "digit"; did you mean digits'),
        ("toys:text", r"data: toys:text returned a str, not a DataLoader"),
        ("toys:once", "data: toys:once returned a one-shot iterator"),
    ],
)
def test_data_that_cannot_be_had(spec: str, message: str) -> None:
    with pytest.raises(BadInput, match=f"^{message}"):
        load_data(spec)


def test_loaders_that_yield_nothing_or_fail() -> None:
    with pytest.raises(BadInput, match="data: the loader yields no batch"):
        first_batch(load_data("toys:nothing")[0])
    with pytest.raises(BadInput, match=r"data: the loader fails on its first batch \(OSError: disk gone\)"):
        first_batch(load_data("toys:raising")[0])
