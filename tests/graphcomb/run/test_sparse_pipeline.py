"""Fuse, Sparsify, Distill and Quantize as a recipe runs them: checked after each, stored, taken up again, exported."""

import pytest
import torch
from torch import nn

import graphcomb
from graphcomb.graph import sparse
from graphcomb.graph import sparse as masks
from graphcomb.passes import Sparsify
from graphcomb.pipeline import Pipeline
from graphcomb.recipe import parse_recipe


def test_a_sparse_int8_recipe_runs_and_resumes(tmp_path):
    recipe = parse_recipe(
        {
            "model": "package:model",
            "passes": [
                "Fuse",
                {"Sparsify": {"pattern": "2:4", "where": "all", "gradients": 16, "block": 48}},
                {"Distill": {"epochs": 1, "schedule": "linear", "lr": 0.01}},
                {"Quantize": {"samples": 16, "calibration": "minmax"}},
                {"Distill": {"epochs": 1, "lr": 0.001}},
            ],
        }
    )
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip
    data = [(torch.randn(8, 1, 10, 10), torch.randint(3, (8,))) for _ in range(3)]
    program = graphcomb.capture(net.eval(), torch.randn(2, 1, 10, 10), dynamic_shapes="batch")
    result = Pipeline(recipe.passes).run(program, data=data, val=data, out=tmp_path)
    assert [r["pass"] for r in result.records] == ["Fuse", "Sparsify", "Distill", "Quantize", "Distill"]
    assert result.records[0]["verified"]["error"] < 1e-6
    assert masks.sparse_weights(result.program) == {"3.weight": "2:4", "8.weight": "2:4"}
    assert all(masks.legal(masks.weight(result.program, n), "2:4") for n in masks.sparse_weights(result.program))
    report = graphcomb.runtime.export_onnx(result.program, tmp_path / "sparse.onnx")
    assert sum(w.pattern == "2:4" for w in report.sparse) == 2
    again = Pipeline(recipe.passes).run(program, data=data, val=data, out=tmp_path)
    x = torch.randn(4, 1, 10, 10)
    with torch.no_grad():
        assert torch.equal(again.program.module()(x), result.program.module()(x))
    assert masks.sparse_weights(again.program) == masks.sparse_weights(result.program)


@pytest.mark.parametrize(("pattern", "precision"), [("2:4", "fp32"), ("1:4", "fp32"), ("2:4", "fp16")])
def test_an_export_may_have_more_zeros_than_the_program(tmp_path, pattern, precision):
    """A folded norm with a scale of 0 empties a filter, half precision one of tiny weights."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    net[3].weight.data[:3] = 0
    net[5].weight.data[:3] *= 1e-9
    program = graphcomb.capture(net.eval(), torch.randn(2, 1, 10, 10), dynamic_shapes="batch")
    pruned = Sparsify(pattern=pattern, where="all", method="magnitude")(program).program
    report = graphcomb.runtime.export_onnx(pruned, tmp_path / "sparse.onnx", precision=precision)
    assert sum(w.pattern == "2:4" for w in report.sparse) == 2


def test_patterns_imply_one_another():
    for given, other, holds in (
        ("2:4", "2:4", True), ("1:4", "2:4", True), ("1:2", "2:4", True), ("2:8", "2:4", True), ("2:4", "4:8", True),
        ("4:8", "2:4", False), ("3:4", "2:4", False), ("2:4", "1:2", False), ("1:3", "2:4", False), (None, "2:4", False),
    ):  # fmt: skip
        assert sparse.implies(given, other) == holds, (given, other)
    assert [sparse.stronger(*p) for p in (("2:4", "1:4"), ("1:4", "2:4"), ("2:4", None), (None, "2:4"))] == [
        "1:4", "1:4", "2:4", "2:4",
    ]  # fmt: skip
