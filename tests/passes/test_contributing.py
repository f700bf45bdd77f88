"""What CONTRIBUTING says of a pass is true: its file and its test, taken from the text, work."""

import re
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

from graphcomb import passes
from graphcomb.recipe import parse_passes

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
SECTION = TEXT[TEXT.index("## A pass") : TEXT.index("## A target")]
PASS, TEST = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


@pytest.fixture
def added(monkeypatch):
    """The package with the pass of the text, as the text says how."""
    module = ModuleType("graphcomb.passes.scale_biases")
    module.__package__ = "graphcomb.passes"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(PASS, "passes/scale_biases.py", "exec"), vars(module))
    monkeypatch.setattr(passes, "ScaleBiases", module.ScaleBiases, raising=False)
    monkeypatch.setattr(passes, "__all__", [*passes.__all__, "ScaleBiases"])


def test_the_test_of_the_pass_passes(added):
    names: dict = {}
    exec(compile(TEST, "tests/passes/test_scale_biases.py", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        marks = [mark.args for mark in getattr(test, "pytestmark", ())]
        for values in product(*(values for _, values in marks)):
            test(**dict(zip((name for name, _ in marks), values, strict=True)))


def test_recipes_can_use_it(added):
    (found,) = parse_passes([{"ScaleBiases": {"factor": 0.1}}])
    assert found == passes.ScaleBiases(factor=0.1)


def test_the_text_names_files_that_are_there():
    root = Path(__file__).parents[2]
    named = set(re.findall(r"`((?:passes|tests|graph)/[\w/.]*)`", SECTION)) - {
        "passes/scale_biases.py", "tests/passes/test_scale_biases.py",
    }  # fmt: skip
    assert {"passes/__init__.py", "passes/train/callbacks.py"} <= named
    assert all((root / name).exists() for name in named)
