"""The pipeline verifies, records, measures and resumes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import toys

from graphcomb import Pipeline, capture
from graphcomb.graph.errors import BadInput, GraphcombError
from graphcomb.graph.program import Program
from graphcomb.job import Job
from graphcomb.passes import Comb, Context, Distill, Pass, PassResult, RemoveChannels
from graphcomb.passes.common.repeat import functions_code
from graphcomb.recipe import parse_recipe
from graphcomb.runtime import get_target

CALLS: list[str] = []


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the last layer's weight; claims to be exact, which holds for a factor of 1 only."""

    exact: ClassVar[bool] = True
    factor: float = 1.0

    def run(self, program: Program, context: Context) -> PassResult:
        CALLS.append(f"Scale {self.factor}")
        result = program.copy()
        with torch.no_grad():
            dict(result.module().named_parameters())["8.weight"].mul_(self.factor)
        return PassResult(result, {"changed": ["8.weight"]})


@dataclass(frozen=True)
class Careless(Pass):
    """Removes the wrong channel: says 0, takes 1."""

    def run(self, program: Program, context: Context) -> PassResult:
        result = RemoveChannels(ratio=0.1, round_to=1)(program)
        removed = {name: {d: _other(i) for d, i in dims.items()} for name, dims in result.removed.items()}
        return PassResult(result.program, {"changed": ["something"]}, removed)


def _other(indices: list[int]) -> list[int]:
    return [i - 1 if i else 1 for i in indices]


@dataclass(frozen=True)
class InPlace(Pass):
    """Leaves an in-place operator in the graph."""

    def run(self, program: Program, context: Context) -> PassResult:
        result = program.copy()
        node = next(n for n in result.module().graph.nodes if n.target is torch.ops.aten.relu.default)
        node.target = torch.ops.aten.relu_.default
        return PassResult(result, {"changed": [node.name]})


@dataclass(frozen=True)
class Unreasoned(Pass):
    """Refuses something and does not say why."""

    def run(self, program: Program, context: Context) -> PassResult:
        return PassResult(program.copy(), {"changed": [], "refused": [{"what": "x"}]})


@pytest.fixture
def program() -> Program:
    CALLS.clear()
    return capture(toys.net(), torch.randn(2, 3, 8, 8), dynamic_shapes="batch")


def test_records_hold_cost_verification_and_accuracy(program: Program, tmp_path: Path) -> None:
    before = program.params
    result = Pipeline([Comb(), RemoveChannels(ratio=0.5), Scale()]).run(program, val=toys.batches(), out=tmp_path)
    comb, removal, scale = result.records
    assert [r["pass"] for r in result.records] == ["Comb", "RemoveChannels", "Scale"]
    assert removal["cost"]["before"]["params"] == before
    assert removal["cost"]["after"]["params"] == result.program.params < before
    assert removal["verified"]["oracle"] == "absence oracle"
    assert result.surgery_error == removal["verified"]["error"] <= 1e-10
    assert scale["verified"] == {"oracle": "input program", "error": 0.0, "tolerance": 1e-5}
    assert "accuracy" not in comb
    assert removal["accuracy"]["before"] == result.accuracy_before
    assert removal["accuracy"]["after"] == scale["accuracy"]["before"]
    assert result.accuracy_after == scale["accuracy"]["after"]
    assert json.loads((tmp_path / "record.json").read_text()) == json.loads(json.dumps(result.records))
    assert [r["pass"] for r in result.program.history] == ["Comb", "RemoveChannels", "Scale"]
    assert program.params == before


def test_without_data_and_folder_nothing_is_measured_or_written(program: Program, tmp_path: Path) -> None:
    result = Pipeline([RemoveChannels(ratio=0.5)]).run(program)
    assert result.accuracy_before is None
    assert "accuracy" not in result.records[0]
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_surgery_is_not_kept(program: Program, tmp_path: Path) -> None:
    with pytest.raises(GraphcombError, match=r"Careless: the result is inf off the absence oracle, .* \(.+\); "):
        Pipeline([Careless()]).run(program, out=tmp_path)
    assert not list(tmp_path.rglob("*.pt2"))


def test_an_exact_pass_that_changes_the_function_is_not_kept(program: Program, tmp_path: Path) -> None:
    with pytest.raises(GraphcombError, match=r"Scale: the result is .* off the input program, more than 1e-05"):
        Pipeline([Scale(), Scale(factor=1.001)]).run(program, out=tmp_path)
    assert [p.name for p in tmp_path.rglob("*.pt2")] == ["00-Scale.pt2"]
    assert [r["options"] for r in json.loads((tmp_path / "record.json").read_text())] == [{"factor": 1.0}]


def test_a_graph_that_is_not_functional_is_refused(program: Program) -> None:
    with pytest.raises(GraphcombError, match="InPlace: left the in-place operator relu_ at relu"):
        Pipeline([InPlace()]).run(program)


def test_a_record_that_nobody_could_read_is_refused(program: Program) -> None:
    with pytest.raises(BadInput, match=r"^Unreasoned: its record: refused.0.why: Field required, got {'what': 'x'}$"):
        Pipeline([Unreasoned()]).run(program)


def test_finished_passes_are_taken_over_until_something_they_depend_on_changes(
    program: Program, tmp_path: Path
) -> None:
    def run(*passes: Pass, **options: object) -> list[str]:
        CALLS.clear()
        Pipeline(passes).run(program, out=tmp_path, **options)
        return list(CALLS)

    first, second = Scale(), Scale(factor=1 + 1e-7)
    assert run(first, second) == ["Scale 1.0", "Scale 1.0000001"]
    assert run(first, second) == []
    assert run(first, second, first) == ["Scale 1.0"]
    assert run(second, second) == ["Scale 1.0000001"] * 2
    assert run(second, second, seed=1) == ["Scale 1.0000001"] * 2
    assert run(second, second, seed=1, key="other data") == ["Scale 1.0000001"] * 2
    with torch.no_grad():
        next(program.module().parameters()).mul_(2)
    assert run(second, seed=1, key="other data") == ["Scale 1.0000001"]


def test_a_resumed_run_has_the_same_result(program: Program, tmp_path: Path) -> None:
    passes = [RemoveChannels(ratio=0.5), Scale()]
    whole = Pipeline(passes).run(program, val=toys.batches(), out=tmp_path)
    again = Pipeline(passes).run(program, val=toys.batches(), out=tmp_path)
    assert json.loads(json.dumps(again.records)) == json.loads(json.dumps(whole.records))
    assert again.accuracy_after == whole.accuracy_after
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(again.program.module()(x), whole.program.module()(x))


def test_the_plan_goes_to_the_first_pass_that_takes_one(program: Program) -> None:
    plan = {"groups": [{"name": "0.weight:0", "keep": 3}]}
    result = Pipeline([RemoveChannels(ratio=0.0), RemoveChannels(ratio=0.0)]).run(program, plan=plan)
    shapes = {n: tuple(p.shape) for n, p in result.program.module().named_parameters()}
    assert shapes["0.weight"] == (3, 3, 3, 3)


def test_only_passes_are_taken() -> None:
    with pytest.raises(BadInput, match=r"passes\.1: expected a pass, got str"):
        Pipeline([Comb(), "Fuse"])  # type: ignore[list-item]


def test_functions_inside_options_decide_what_is_taken_over():
    first, second = (
        RemoveChannels(macs=0.5, train=Distill(outputs=lambda s, t, w=w: w * (s - t).abs().mean())) for w in (1.0, 2.0)
    )
    assert first.options() == second.options()
    assert functions_code(first) != functions_code(second)


@pytest.mark.parametrize(("target", "there"), [("orin-nx", True), ("orin-nano", False)])
def test_a_recipe_knows_where_a_dla_runs_its_layers(target, there):
    recipe = parse_recipe({"model": "package:model", "target": target, "passes": [{"Legalise": {"always": ["silu"]}}]})
    context = Job(recipe, program=None, target=get_target(target)).context()
    assert (context.placement is not None) == there
