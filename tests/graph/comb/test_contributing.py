"""CONTRIBUTING's section "An op rule", followed to the letter: its code goes where it says, and its test passes."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import graphcomb
from graphcomb import verify
from graphcomb.graph.comb.rules import RULES
from graphcomb.graph.verify.meanings import RULES as MEANINGS
from graphcomb.passes import RemoveChannels

ROOT = Path(__file__).parents[3]
OPERATOR = "space::my_norm"


@torch.library.custom_op(OPERATOR, mutates_args=())
def my_norm(input: torch.Tensor, weight: torch.Tensor, width: int) -> torch.Tensor:
    assert width == input.shape[-1]
    return weight * input / (input.square().sum(-1, keepdim=True) / width + 1e-5).sqrt()


my_norm.register_fake(lambda input, weight, width: torch.empty_like(input))


@pytest.fixture(scope="module")
def blocks() -> dict[str, str]:
    """The section's blocks of code by the file that they go into."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## An op rule")[1].split("\n## ")[0]
    return dict(re.findall(r"```python\n# (\S+)\n(.*?)```", section, re.DOTALL))


@pytest.fixture
def added(blocks, monkeypatch):
    """The rule and the meaning run in the files they go into, where every name they use has to be known."""
    for table in (RULES, MEANINGS):
        monkeypatch.setitem(table, OPERATOR, None)
    for path in blocks:
        if not path.startswith("tests/"):
            name = f"graphcomb.{path.removesuffix('.py').replace('/', '.')}"
            exec(blocks[path], dict(vars(importlib.import_module(name))))


def test_an_operator_takes_a_rule_a_meaning_and_a_test(blocks):
    rule, meaning, test = blocks
    assert (ROOT / rule).is_file()
    assert (ROOT / meaning).is_file()
    assert test.startswith("tests/graph/comb/")


@pytest.mark.parametrize("dynamic_shapes", [None, "batch"])
def test_its_test_passes(added, blocks, dynamic_shapes):
    names = {"nn": nn, "torch": torch, "pytest": pytest, "graphcomb": graphcomb, "verify": verify}
    scope = {**names, "RemoveChannels": RemoveChannels, "__name__": __name__}
    (source,) = (code for path, code in blocks.items() if path.startswith("tests/"))
    exec(source, scope)
    tests = SimpleNamespace(**{name: value for name, value in scope.items() if name.startswith("test_")})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the operator cannot be differentiated
        for test in vars(tests).values():
            test(dynamic_shapes)
