"""What a user chooses beside a target: sizes by pattern, kinds that are ranked apart, and importances of one's own."""

import numpy as np
import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.graph.comb.solve import Comb
from graphcomb.graph.errors import BadInput, Unreachable
from graphcomb.passes import Distill, RemoveChannels
from graphcomb.passes.channels.groups import alike
from graphcomb.passes.channels.importance.members import Members
from graphcomb.passes.channels.importance.scores import from_function, magnitude

from .toys import Block, Transformer, batches, capture, dense, pruning


def sizes(result):
    return {row["what"]: row["after"] for row in result.record["changed"]}


# -------------------------------------------------------------------------------------------------- sizes by pattern
def test_patterns_say_what_groups_keep_and_the_others_stay():
    result = RemoveChannels(keep={"0.*": 0.5, "0.two.weight": 3, "1.one*": 1}, round_to=1)(dense())
    assert sizes(result) == {"0.one.weight:0": 4, "0.two.weight:0": 3}
    assert g.verify.surgery(dense(), result) <= 1e-10


def test_the_others_meet_the_target():
    result = RemoveChannels(macs=0.5, keep={"0.one*": 7}, round_to=1, scope="global")(dense())
    assert sizes(result)["0.one.weight:0"] == 7
    assert 0.45 < result.record["cost"]["after"]["macs"] / dense().macs <= 0.5
    with pytest.raises(Unreachable, match=r"the sizes in the plan for 0\.one\.weight:0 \(8\), "):
        RemoveChannels(macs=0.1, keep={"*": 1}, round_to=1)(dense())


def test_shares_are_aligned_numbers_are_not_and_a_plan_goes_before():
    pass_ = RemoveChannels(keep={"1.one*": 0.3, "1.two*": 7}, round_to=4)
    assert sizes(pass_(dense())) == {"1.one.weight:0": 8, "1.two.weight:0": 7}
    rows = {row["name"]: row["keep"] for row in pass_.plan(dense())}
    assert (rows["1.one.weight:0"], rows["1.two.weight:0"]) == (8, 7)
    plan = {"groups": [{"name": "1.two.weight:0", "keep": 5}]}
    assert sizes(pass_(dense(), plan=plan))["1.two.weight:0"] == 5


def test_patterns_hold_while_training():
    result = pruning(keep={"0.one*": 6}, macs=0.6)(dense(), data=batches())
    assert sizes(result)["0.one.weight:0"] == 6
    assert result.record["cost"]["after"]["macs"] <= 0.6 * dense().macs


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ({"2.*": 0.5}, r"keep: '2\.\*' matches no group that may shrink; they are called 0\.one\.weight:0, "),
        ({"4.*": 0.5}, r"keep: '4\.\*' matches no group that may shrink; 4\.weight:0 is frozen \(.*an output of"),
        ({"0.one*": 9}, r"keep: 0\.one\.weight:0 may keep 2 to 8 indices, not 9"),
        ({"0.one*": 0}, r"keep: by pattern what stays: a share above 0 and at most 1, or a whole number above 1"),
        ({"0.one*": 2.5}, r"keep: by pattern what stays: "),
        ({"0.one*": "half"}, r"keep: a mapping, not "),
    ],
)
def test_patterns_that_cannot_hold_are_refused(keep, says):
    with pytest.raises(BadInput, match=r"^RemoveChannels\." + says):
        RemoveChannels(keep=keep, min_channels=2)(dense())


def test_groups_that_are_left_out_are_said():
    with pytest.raises(BadInput, match=r"matches no group that may shrink; 0\.one\.weight:0 is left out$"):
        RemoveChannels(keep={"0.one*": 0.5}, exclude=("0.one*",))(dense())


# ----------------------------------------------------------------------------------------------------- kinds of groups
class Deep(nn.Module):
    """Three blocks of one form and one of another; depthwise, grouped, and behind a concatenation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 8, 3, 2, 1)
        self.blocks = nn.ModuleList(Block(8, 8) for _ in range(3))
        self.deep, self.point = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(16, 12, 1)
        self.grouped, self.head = nn.Conv2d(12, 8, 3, 1, 1, groups=2), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.point(torch.cat([x, self.deep(x)], 1)).relu()
        return self.head(self.grouped(x).mean((2, 3)))


def test_groups_of_one_kind_do_the_same_in_the_same_places():
    comb = Comb(capture(Transformer()))
    kinds = [{x.name for x in kind} for kind in alike(comb, [x for x in comb.groups if x.frozen is None])]
    assert {"layers.0.up.weight:0", "layers.1.up.weight:0"} in kinds
    assert {"layers.0.qkv.weight:0/head", "layers.1.qkv.weight:0/head"} in kinds
    assert {"layers.0.qkv.weight:0/head width", "layers.1.qkv.weight:0/head width"} in kinds
    assert {"embed.weight:0"} in kinds
    comb = Comb(capture(Deep()))
    kinds = [{x.name for x in kind} for kind in alike(comb, [x for x in comb.groups if x.frozen is None])]
    assert {f"blocks.{i}.one.weight:0" for i in range(3)} in kinds
    # the last block's outputs are read by other operators than those of the others
    assert {f"blocks.{i}.two.weight:0" for i in range(2)} in kinds


def test_of_each_kind_the_same_share_goes_and_the_least_important_of_all_of_it():
    program = capture(Deep())
    comb = Comb(program)
    result = RemoveChannels(ratio=0.5, scope="isomorphic", round_to=1)(program)
    kept = {x.name: x.size for x in comb.groups} | sizes(result)
    free = {row["what"] for row in result.record["changed"]}
    scores = magnitude(comb, comb.groups, g.passes.Context())
    for kind in alike(comb, [x for x in comb.groups if x.name in free]):
        total = sum(x.size for x in kind)
        chosen = sorted((scores[x.atom][i], x.name) for x in kind for i in range(x.size))[: total // 2]
        lost = {x.name: sum(name == x.name for _, name in chosen) for x in kind}
        if all(lost[x.name] < x.size for x in kind):
            assert {x.name: x.size - kept[x.name] for x in kind} == lost
    assert g.verify.surgery(program, result) <= 1e-10


def test_one_kind_that_outweighs_all_others_is_not_emptied_and_none_is_spared():
    """Scores of one kind are a million times those of the others: ranked globally the others alone would go."""

    def loud(group, weights):
        values = next(iter(weights.values())).square().sum(1)
        return values * 1e6 if "one" in group.name else values

    program = capture(Deep())
    for scope in ("global", "isomorphic"):
        result = RemoveChannels(macs=0.5, scope=scope, importance=loud, round_to=1)(program)
        after = sizes(result)
        assert 0.45 < result.record["cost"]["after"]["macs"] / program.macs <= 0.5
        loudest = [after.get(f"blocks.{i}.one.weight:0", 8) for i in range(3)]
        assert (sum(loudest) == 24) == (scope == "global")
    shares = []
    for kind in alike(Comb(program), [x for x in Comb(program).groups if x.name in after]):
        shares.append(sum(after[x.name] for x in kind) / sum(x.size for x in kind))
    assert max(shares) - min(shares) <= 0.25, "one index of eight, and what came back"


def test_kinds_are_ranked_apart_while_training_too():
    result = pruning(scope="isomorphic", macs=0.5)(dense(), data=batches())
    assert result.record["cost"]["after"]["macs"] <= 0.5 * dense().macs
    assert g.verify.surgery(dense(), result) <= 1e-4
    with pytest.raises(BadInput, match=r"^RemoveChannels\.scope: global with a latency target"):
        RemoveChannels(latency=0.5, scope="isomorphic")


# ------------------------------------------------------------------------------------------------ importances as functions
def norms(group, weights):
    return torch.stack([w.square().sum(1) for w in weights.values()]).sum(0)


def test_a_function_sees_the_entries_of_each_index():
    """Against sums over the same entries, also where an axis is a product or a sum and some of it is gone."""
    for program in (capture(Deep()), capture(Transformer())):
        comb = Comb(program)
        groups = [x for x in comb.groups if x.frozen is None]
        found = from_function(norms)(comb, groups, g.passes.Context())
        expected = {x.atom: np.zeros(x.size) for x in groups}
        for _, sums in Members(comb, expected).sums(program.module(), gradients=False):
            for atom, values in sums.items():
                expected[atom] += values
        buffers = {n for n, _ in program.module().named_buffers()}
        for group in groups:
            assert not {name for name, _ in group.members} & buffers
            np.testing.assert_allclose(found[group.atom], expected[group.atom], rtol=1e-5)


def test_a_function_decides_what_goes_at_once_and_while_training():
    seen = []

    def first(group, weights):
        seen.append(group.size)
        assert all(len(w) == group.size for w in weights.values())
        return list(range(group.size))

    result = RemoveChannels(ratio=0.25, round_to=1, importance=first)(dense())
    assert result.removed["0.one.weight"][0] == [0, 1]
    assert result.record["options"]["importance"].endswith("<locals>.first")
    result = pruning(importance=first, ratio=0.5, macs=None, interval=2, scope="local")(dense(), data=batches())
    assert result.removed["0.one.weight"][0] == [0, 1, 2, 3], "what is left is counted anew"
    assert min(seen) < 8
    assert {event["importance"] for event in result.record["events"]} == {result.record["options"]["importance"]}


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (
            lambda group, weights: [1.0],
            r"gives \(1,\) for 0\.one\.weight:0; it takes one finite number for each of its 8",
        ),
        (lambda group, weights: [np.nan] * group.size, r"gives numbers that are not finite for 0\.one\.weight:0; "),
        (lambda group, weights: weights["nothing"], r"fails for 0\.one\.weight:0 \('nothing'\)"),
        (lambda group: 1, r"fails for 0\.one\.weight:0 \(.*takes 1 positional argument"),
        (lambda group, weights: "text", r"fails for 0\.one\.weight:0 "),
    ],
)
def test_what_a_function_gives_is_checked(function, says):
    with pytest.raises(BadInput, match=r"^RemoveChannels\.importance: " + says):
        RemoveChannels(importance=function)(dense())


def test_another_function_is_another_run(tmp_path):
    from ..toys import Cut, Stop

    train = Distill(steps=8, checkpoint_every=2)

    def by(power):
        return lambda group, weights: norms(group, weights) ** power

    options = {"ratio": 0.5, "round_to": 1, "interval": 2, "train": train}
    with pytest.raises(Stop):
        RemoveChannels(**options, importance=by(1))(dense(), data=Cut(batches(), 5, every_pass=True), out=tmp_path)
    with pytest.warns(UserWarning, match="starts anew"):
        other = RemoveChannels(**options, importance=by(2))(dense(), data=batches(), out=tmp_path)
    assert "resumed_at" not in other.record
