"""What a target, a plan and patterns ask for: met with what is free, or a line that says why not, before any training."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from graphcomb import Comb, Pipeline, capture
from graphcomb.graph.errors import BadInput, Unreachable
from graphcomb.passes import Context, Distill, RemoveChannels
from graphcomb.passes.channels.importance.scores import IMPORTANCES
from graphcomb.passes.channels.sizes.selection import Selection, lowest_removed

from ...toys import chain

DATA = [(torch.randn(4, 1, 8, 8), torch.randint(3, (4,))) for _ in range(8)]
TRAIN = Distill(epochs=1, lr=1e-3, alpha=0.0)


@functools.cache
def program(*widths, frozen=()):
    torch.manual_seed(0)
    model = chain(*widths)
    for index in frozen:
        model[index].requires_grad_(False)
    return capture(model, (torch.randn(2, 1, 8, 8),), dynamic_shapes="batch")


def sizes(found, result):
    after = {row["what"]: row["after"] for row in result.record["changed"]}
    return {g.name: after.get(g.name, g.size) for g in Comb(found).groups if g.frozen is None}


def never(outputs, labels):
    raise AssertionError("trained")


WAYS = pytest.mark.parametrize("train", [None, TRAIN], ids=["at once", "while training"])


# ------------------------------------------------------------------------------------------------ nothing that matches
@pytest.mark.parametrize("field", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("0.wieght", r"RemoveChannels.{}: '0.wieght' matches no parameter; did you mean '0.weight'\?"),
        ("zzz", r"RemoveChannels.{}: 'zzz' matches no parameter; parameters are called '0.weight'"),
    ],
)
@WAYS
def test_a_pattern_that_matches_nothing_is_named(field, pattern, says, train):
    pass_ = RemoveChannels(ratio=0.5, train=train, **{field: ("2.*", pattern)})
    with pytest.raises(BadInput, match=says.format(field)):
        pass_(program(8, 8), data=DATA, loss=never)
    with pytest.raises(BadInput, match=says.format(field)):
        pass_.plan(program(8, 8), Context(data=DATA))


def test_a_pattern_for_a_part_of_a_network_is_corrected():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer1, self.layer2 = chain(4), nn.Linear(3, 2)

        def forward(self, x):
            return self.layer2(self.layer1(x))

    found = capture(Two(), (torch.randn(2, 1, 8, 8),))
    with pytest.raises(BadInput, match=r"did you mean 'layer1\.\*'\?"):
        RemoveChannels(include="layr1.*")(found)


@WAYS
@pytest.mark.parametrize("importance", ["magnitude", "fisher"])
@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"macs": 0.5}, {"params": 0.5}])
def test_with_nothing_to_prune_it_stops_before_training(train, importance, options):
    pass_ = RemoveChannels(importance=importance, kinds="head", train=train, **options)
    says = r"RemoveChannels: nothing to prune: of \d groups \d are frozen \(.*\) and 2 are left out by kinds"
    if train is None and "ratio" in options:  # half of nothing is nothing: met, and said
        with pytest.warns(UserWarning, match=says):
            result = pass_(program(8, 8), data=DATA)
        assert result.record["changed"] == []
        return
    with pytest.raises(Unreachable, match=says):
        pass_(program(8, 8), data=DATA, loss=never)


# ---------------------------------------------------------------------------------------------------------------- plans
@WAYS
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("target", ["macs", "params"])
def test_an_edited_plan_meets_the_target_with_the_rest(train, scope, target):
    found, importance = program(16, 24, 16), "magnitude"
    options = {target: 0.5, "scope": scope, "importance": importance, "round_to": 2}
    pass_ = RemoveChannels(**options, train=train, **({"interval": 2} if train else {}))
    rows = [r for r in pass_.plan(found, Context(data=DATA)) if "frozen" not in r]
    kept = {r["name"]: r["keep"] for r in rows}
    asked = 0.5 * getattr(found, target)

    def planned(rows):
        result = pass_(found, data=DATA, plan={"groups": rows})
        assert getattr(result.program, target) <= asked
        assert getattr(result.program, target) > 0.7 * asked
        return sizes(found, result)

    assert planned(rows) == kept, "as it is, a plan is what happens"
    assert planned(rows[1:])[rows[1]["name"]] == kept[rows[1]["name"]], "rows that are left stand"
    planned([])
    if scope == "global" or target == "macs":
        assert planned([{**rows[0], "prune": False}, *rows[1:]])[rows[0]["name"]] == rows[0]["size"]
    more = planned([{**rows[0], "keep": rows[0]["keep"] + 2}, *rows[1:]])
    assert more[rows[0]["name"]] == rows[0]["keep"] + 2


@WAYS
def test_a_plan_that_leaves_too_much_says_what_it_fixes(train):
    found = program(16, 16)
    pass_ = RemoveChannels(macs=0.3, round_to=2, train=train, importance="magnitude")
    rows = [r for r in pass_.plan(found) if "frozen" not in r]
    plan = {"groups": [{**r, "prune": False} for r in rows]}
    with pytest.raises(Unreachable, match=r"100\.0%\) can, with .* the sizes in the plan for 0.weight:0 \(16\), 2.wei"):
        pass_(found, data=DATA, loss=never, plan=plan)


def test_a_plan_of_names_and_sizes_is_all_decisions():
    found = program(16, 16)
    plan = {"groups": [{"name": "0.weight:0", "keep": 15}, {"name": "2.weight:0", "keep": 15}]}
    with pytest.raises(Unreachable, match="the sizes in the plan"):
        RemoveChannels(macs=0.5)(found, plan=plan)


# -------------------------------------------------------------------------------------------------------------- targets
@pytest.mark.parametrize("name", ["macs", "params"])
@pytest.mark.parametrize("value", [1.5, 1.0001, 100.5, 0, -1])
def test_a_cost_is_a_share_or_a_whole_number(name, value):
    with pytest.raises(
        BadInput, match=rf"RemoveChannels.{name}: what may remain: a share above 0 and at most 1, or a w"
    ):
        RemoveChannels(**{name: value})
    RemoveChannels(**{name: 2e6})


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("widths", [(16,), (8, 16), (16, 16), (12, 20), (9, 17, 9), (16, 64, 16)])
@pytest.mark.parametrize("asked", [0.55, 0.8])
def test_a_small_network_is_as_near_as_it_can_be_and_says_so(scope, widths, asked):
    found = program(*widths)
    pass_ = RemoveChannels(macs=asked, scope=scope)
    result = pass_(found)
    target = result.record["target"]
    assert target["reached"] == result.program.macs / found.macs <= asked == target["asked"]
    if target["reached"] < asked - 0.02:
        assert target["why"].startswith("no size that was removed would fit back, with alignment 8")
    comb = Comb(found)
    groups = [g for g in comb.groups if g.frozen is None]
    left = {g.atom: sizes(found, result)[g.name] for g in groups}
    selection = Selection(comb, groups, 8, 1, left)
    for group in groups:
        if left[group.atom] < group.size:
            more = selection.above(group, {group.atom: group.size})
            assert comb.macs({**left, group.atom: more}) > asked * found.macs


def test_an_alignment_that_fits_no_group_is_said():
    found = program(6, 7)
    with pytest.raises(Unreachable, match=r"100\.0%\) can, with alignment 8"):
        RemoveChannels(macs=0.9)(found)
    target = RemoveChannels(ratio=0.5)(found).record["target"]
    assert (target["asked"], target["reached"]) == (0.5, 1.0)
    assert target["why"].startswith(
        "nothing more can go, with alignment 8 and min_channels 1: 0.weight:0 in steps of 8 of 6"
    )


# ------------------------------------------------------------------------------------------------------ frozen weights
def test_a_frozen_backbone_is_named_as_the_reason():
    found = program(16, 16, 16, frozen=(0, 2, 4))
    says = r"0\.weight:0, 2\.weight:0.*requires_grad=False.*requires_grad_\(True\) before capture\), or take importance"
    frozen = program(16, 16, frozen=(0, 2, 6))
    for network in (found, frozen):
        with pytest.raises(Unreachable, match=says):
            RemoveChannels(macs=0.2, train=TRAIN)(network, data=DATA, loss=never)
    for options in ({"importance": "magnitude"}, {"schedule": "one-shot"}):
        result = RemoveChannels(macs=0.5, train=TRAIN, **options)(found, data=DATA)
        assert result.program.macs <= 0.5 * found.macs
    assert RemoveChannels(macs=0.5, importance="fisher")(found, data=DATA).program.macs <= 0.5 * found.macs


# ------------------------------------------------------------------------------------- options that would not be heard
@pytest.mark.parametrize(
    "option",
    [{"schedule": "iterative"}, {"interval": 10}, {"rounds": 3}, {"prune_share": 0.3}],
    ids=lambda o: next(iter(o)),
)
def test_options_of_training_need_training(option):
    """A loop of the user's own may come (`attach`), so it is said where the pass is used, and before a pipeline runs."""
    says = rf"RemoveChannels.{next(iter(option))}: says how to prune while training"
    for use in (lambda p: p(capture(nn.Linear(4, 4), (torch.zeros(2, 4),))), lambda p: Pipeline([p])):
        with pytest.raises(BadInput, match=says):
            use(RemoveChannels(macs=0.5, **option))
    RemoveChannels(macs=0.5, train=TRAIN, **option)
    assert RemoveChannels(macs=0.5, schedule="one-shot").schedule == "one-shot"


def test_a_latency_is_met_by_all_groups_together():
    with pytest.raises(BadInput, match=r"RemoveChannels.scope: global with a latency target"):
        RemoveChannels(latency=0.5, scope="local")
    assert RemoveChannels(latency=0.5).scope == RemoveChannels(latency=0.5, train=TRAIN).scope == "global"


# ---------------------------------------------------------------------------------------------------- the scores' scale
@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e20])
@pytest.mark.parametrize("options", [{"macs": 0.4}, {"params": 0.4}, {"ratio": 0.4}], ids=lambda o: next(iter(o)))
def test_what_goes_while_training_does_not_depend_on_the_scale_of_the_scores(scale, options, monkeypatch):
    """Only the order of scores matters, in all events after the first too, where some channels are gone already."""
    found, draw = program(16, 24, 16), np.random.default_rng(0)
    fixed = {g.name: draw.exponential(size=g.size) for g in Comb(found).groups}

    def removed(times):
        scores = lambda comb, groups, *_: {g.atom: times * fixed[g.name] for g in groups}  # noqa: E731
        monkeypatch.setattr("graphcomb.passes.channels.while_training.relative_norms", scores)
        pass_ = RemoveChannels(importance="magnitude", round_to=1, interval=1, train=TRAIN, **options)
        result = pass_(found, data=DATA)
        assert len([e for e in result.record["events"] if e["removed"]]) > 2
        return result.removed

    assert removed(scale) == removed(1.0)


@pytest.mark.parametrize("importance", list(IMPORTANCES))
def test_every_importance_takes_a_target(importance):
    found = program(8, 16)
    result = RemoveChannels(macs=0.5, round_to=1, importance=importance, scope="global")(found, data=DATA)
    assert 0.3 < result.record["target"]["reached"] <= 0.5


def test_of_equal_scores_the_first_stay():
    assert lowest_removed(np.array([1.0, 1.0, 0.0, 1.0]), 2).tolist() == [True, True, False, False]


@pytest.mark.parametrize("importance", ["fisher-unlabelled", "repair"])
def test_training_takes_no_importance_that_is_not_of_its_loss(importance):
    with pytest.raises(BadInput, match=r"RemoveChannels\.importance: one of the loss that trains, with `train`"):
        RemoveChannels(importance=importance, train=Distill())
