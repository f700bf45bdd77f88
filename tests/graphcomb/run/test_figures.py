"""A run's figure is called what it is; batches of unusual form in a recipe."""

import pytest
import torch
import toys
from rich.console import Console

from graphcomb import Pipeline, capture
from graphcomb.graph.errors import BadInput
from graphcomb.job import prepare
from graphcomb.passes import Fuse
from graphcomb.pipeline import figure
from graphcomb.recipe import parse_recipe


def log_loss(outputs, labels):
    return -torch.nn.functional.cross_entropy(outputs, labels, reduction="none")


@pytest.mark.parametrize(
    ("metric", "single", "name"),
    [(None, False, "accuracy"), (None, True, "training accuracy"), (log_loss, False, "log_loss"),
     (log_loss, True, "training log_loss"), (lambda o, y: o.amax(1), False, "metric")],
)  # fmt: skip
def test_a_figure_is_called_what_it_is(metric, single, name, monkeypatch, capsys) -> None:
    monkeypatch.setattr("graphcomb.pipeline.Console", lambda **options: Console(width=200))
    program = capture(toys.net(), torch.randn(2, 3, 8, 8), dynamic_shapes="batch")
    data = toys.batches()
    val = data if single else toys.batches(count=2)
    result = Pipeline([Fuse()]).run(program, data=data, val=val, metric=metric, progress=True)
    assert result.metric == result.records[0]["accuracy"]["metric"] == name
    said = capsys.readouterr().out
    assert f", {name} {figure(name, result.accuracy_before)}" in said
    assert ("%" in said) is (metric is None)


def test_figures_of_own_metrics_are_no_shares() -> None:
    assert figure("accuracy", 0.9861) == "98.61%"
    assert figure("log_loss", -27.9596) == "-27.96"


def test_a_recipe_names_functions_that_split_batches() -> None:
    recipe = {"model": "toys:net", "passes": ["Fuse"]}
    job = prepare(
        parse_recipe(recipe | {"data": {"source": "toys:odd", "inputs": "toys:image", "labels": "toys:label"}})
    )
    result = Pipeline(job.recipe.passes).run(job.program, data=job.train, val=job.val)
    assert result.metric == "training accuracy"
    assert result.accuracy_before == pytest.approx(result.accuracy_after)
    with pytest.raises(BadInput, match=r"a tuple of 3 .* give inputs= and labels=, functions of a batch"):
        prepare(parse_recipe(recipe | {"data": "toys:odd"}))
    with pytest.raises(BadInput, match=r"data\.inputs: .* has no"):
        prepare(parse_recipe(recipe | {"data": {"source": "toys:odd", "inputs": "toys:images_"}}))
