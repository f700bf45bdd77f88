"""What cannot be pruned is frozen, exactly that, with a reason a person can act on; kinds and patterns choose the rest."""

from __future__ import annotations

import gc
import re
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphcomb
from graphcomb import capture, verify
from graphcomb.graph.comb.groups import KINDS
from graphcomb.graph.comb.rules import RULES
from graphcomb.graph.comb.solve import Comb
from graphcomb.graph.comb.surgery import remove
from graphcomb.graph.errors import BadInput, Refused
from graphcomb.passes import RemoveChannels

from ..toys import CASES, Head
from .toys import Around, X, pruned


@torch.library.custom_op("graphcomb_test::damp", mutates_args=())
def damp(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Entry by entry, but nobody can tell from outside."""
    return x * factor


@damp.register_fake
def _(x: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.empty_like(x)


# --------------------------------------------------------------------------------------------------- unknown operators


def test_an_unknown_operator_freezes_what_it_touches_and_nothing_else():
    found, comb, result = pruned(Around(lambda y: torch.ops.graphcomb_test.damp(y, 0.5)), X)
    assert found["before.weight"] == (8, 3, 1, 1)  # its channels stay, those before it go
    assert found["after.weight"] == (5, 8, 1, 1)
    assert found["stem.weight"] == (3, 3, 1, 1)
    assert found["head.fc.weight"] == (3, 5)
    (refused,) = [r for r in result.record["refused"] if r["what"] == "before.weight:0"]
    for text in (comb.why("before.weight"), comb.why("after.weight"), refused["why"]):
        assert "graphcomb_test::damp has no rule" in text
        assert re.search(r"damp \(comb/toys\.py:\d+: return self\.head\(", text)  # node, file, line and code
        assert "register a rule for it with graphcomb.rule" in text


def test_a_registered_rule_makes_it_prunable():
    @graphcomb.rule("graphcomb_test::damp")
    def entrywise(c, node, a):
        return c.axes[a["x"]]

    try:
        program = capture(Around(lambda y: torch.ops.graphcomb_test.damp(y, 0.5)), X)
        result = RemoveChannels(ratio=0.5, round_to=1)(program)
    finally:
        del RULES["graphcomb_test::damp"]
    found = {n: tuple(p.shape) for n, p in result.program.module().named_parameters()}
    assert found["before.weight"] == (4, 3, 1, 1)
    assert found["after.weight"] == (5, 4, 1, 1)
    # the oracle shares no rule with the comb and does not know the operator; the same network without it is the check
    plain = capture(Around(lambda y: y * 0.5), X)
    with torch.no_grad():
        for p, q in zip(plain.module().parameters(), program.module().parameters(), strict=True):
            p.copy_(q)
    expected = RemoveChannels(ratio=0.5, round_to=1)(plain)
    assert expected.removed == result.removed
    assert verify.surgery(plain, expected) <= 1e-10
    torch.testing.assert_close(result.program.module()(X), expected.program.module()(X))


@torch.library.custom_op("graphcomb_test::plain_norm", mutates_args=())
def plain_norm(x: torch.Tensor) -> torch.Tensor:
    """A norm over the channels that has no weight to say so."""
    return x / (x.pow(2).sum(1, keepdim=True) + 1).sqrt()


@plain_norm.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("says", [False, True])
def test_a_users_rule_is_taken_to_sum_unless_it_says_otherwise(says, monkeypatch):
    """Padded channels change a norm, and nothing in a rule that only passes axes on says that it is one."""

    def rule(c, node, a):
        if says:
            c.sums(node, [])
        return c.axes[a["x"]]

    monkeypatch.setitem(RULES, "graphcomb_test::plain_norm", rule)
    pads = Around(lambda y: torch.ops.graphcomb_test.plain_norm(F.pad(y, (0, 0, 0, 0, 0, 4), value=0.5)), out=12)
    comb = Comb(capture(pads, X))
    free = {g.size for g in comb.groups if ("after.weight", 1) in g.members and g.frozen is None}
    assert free == ({8, 4} if says else {8})


POINTWISE = {
    "atanh": lambda y: (y * 0.1).tanh().atanh(),
    "float_power": lambda y: y.float_power(2).to(y.dtype),
    "sinc": torch.sinc,
    "logaddexp2": lambda y: torch.logaddexp2(y, y * 2),
    "xlog1py": lambda y: torch.special.xlog1py(y, y.abs()),
    "signbit": lambda y: y * torch.signbit(y),
    "isposinf": lambda y: y * ~torch.isposinf(y),
    "ldexp": lambda y: torch.ldexp(y, torch.ones(8, 1, 1)),
    "arctan": torch.arctan,
    "absolute": torch.absolute,
    "bessel": torch.special.i0e,
}


@pytest.mark.parametrize("name", POINTWISE)
def test_operators_that_act_entry_by_entry_need_no_rule(name):
    found, _, result = pruned(Around(POINTWISE[name]), X)
    assert found["after.weight"] == (5, 4, 1, 1)
    assert not any("no rule" in r["why"] for r in result.record["refused"])


MISTAKES = {
    "the rule gives": lambda c, node, a: c.axes[a["x"]][:2],
    "KeyError: 'weight'": lambda c, node, a: c.axes[a["weight"]],
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistaken_rule_is_refused_not_believed(text, monkeypatch):
    monkeypatch.delenv("GRAPHCOMB_STRICT")  # as for users
    monkeypatch.setitem(RULES, "graphcomb_test::damp", MISTAKES[text])
    found, comb, _ = pruned(Around(lambda y: torch.ops.graphcomb_test.damp(y, 0.5)), X)
    assert found["before.weight"] == (8, 3, 1, 1)
    assert text in comb.why("before.weight")


@pytest.mark.parametrize(("text", "error"), [("the rule gives", ValueError), ("KeyError: 'weight'", KeyError)])
def test_a_mistaken_rule_fails_our_own_tests(text, error, monkeypatch):
    monkeypatch.setitem(RULES, "graphcomb_test::damp", MISTAKES[text])
    with pytest.raises(error):
        Comb(capture(Around(lambda y: torch.ops.graphcomb_test.damp(y, 0.5)), X))


# ------------------------------------------------------------------------------------------------- orders and look-ups
ALONG = {
    "topk": lambda y: y.topk(5, 1)[0],
    "sort": lambda y: y.sort(1)[0],
    "argsort": lambda y: y.gather(1, y.argsort(1)),
    "argmax": lambda y: y * y.argmax(1, keepdim=True).float(),
    "cumsum": lambda y: y.cumsum(1),
    "roll": lambda y: y.roll(2, 1),
    "flip": lambda y: y.flip(1),
    "max with positions": lambda y: y * y.max(1, keepdim=True)[1].float(),
    "strided slice": lambda y: y[:, 1:7:2],
    "index": lambda y: y[:, torch.tensor([3, 3, 1, 0])],
    "reflection": lambda y: (
        nn.functional.pad(y.flatten(2).transpose(1, 2), (1, 1), mode="reflect").transpose(1, 2).unsqueeze(3)
    ),
    "sliding window": lambda y: y.unfold(1, 3, 1).mean(-1),
}
BESIDE = {
    "topk": lambda y: y.topk(3, 2)[0],
    "sort": lambda y: y.flatten(2).sort(2)[0].unsqueeze(3),
    "argmax": lambda y: y * y.argmax(2, keepdim=True).float(),
    "cumsum": lambda y: y.cumsum(3),
    "roll": lambda y: y.roll((1, 1), (2, 3)),
    "flip": lambda y: y.flip(2, 3),
    "maximum": lambda y: y * y.max(1, keepdim=True)[0],
    "index": lambda y: y[:, :, torch.tensor([3, 1, 0])],
    "reflection": lambda y: nn.functional.pad(y, (1, 1, 0, 1), mode="reflect"),
    "strided slice": lambda y: y[:, :, ::2, 1::2],
}


@pytest.mark.parametrize("name", ALONG)
def test_positions_along_the_channels_freeze_them(name):
    with torch.no_grad():
        out = ALONG[name](torch.randn(2, 8, 4, 4)).shape[1]
    found, comb, _ = pruned(Around(ALONG[name], out), X, kinds=KINDS)
    assert found["before.weight"] == (8, 3, 1, 1)
    assert found["stem.weight"][0] == 3
    assert found["after.weight"][0] == 5
    reason = comb.why("before.weight").splitlines()[1]
    assert "frozen" in reason
    assert re.search(r"comb/(test_refusal|toys)\.py", reason)


@pytest.mark.parametrize("name", BESIDE)
def test_positions_along_another_axis_leave_the_channels_free(name):
    found, _, _ = pruned(Around(BESIDE[name]), X)
    assert found["before.weight"] == (4, 3, 1, 1)
    assert found["after.weight"] == (5, 4, 1, 1)


def test_a_choice_between_entries_is_no_selection_of_them():
    found, _, _ = pruned(Around(lambda y: torch.where(y > 0, y, y * 0.1).masked_fill(y > 2, 2.0)), X)
    assert found["before.weight"] == (4, 3, 1, 1)


def test_a_rule_that_makes_unlike_sizes_one_says_which(monkeypatch):
    monkeypatch.setitem(RULES, "graphcomb_test::damp", lambda c, node, a: c.unify(c.axes[a["x"]][1], c.axes[a["x"]][2]))
    comb = Comb(capture(Around(lambda y: torch.ops.graphcomb_test.damp(y, 0.5)), X))
    assert "cannot be followed (an axis of size 8 cannot be the same as one of size 4)" in comb.why("before.weight")


def test_a_comb_that_is_gone_keeps_no_network_alive():
    program = capture(Around(lambda y: y * 2), X)
    weight = weakref.ref(program.module().get_parameter("before.weight"))
    comb = Comb(program)
    comb.groups  # noqa: B018
    del program, comb
    gc.collect()
    assert weight() is None


def test_inputs_and_outputs_say_so():
    _, comb, _ = pruned(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 5))
    assert "x: an input" in comb.why("0.weight") or "an input of the program" in comb.why("0.weight")
    assert "an output of the program" in comb.why("2.weight")
    assert "8 prunable: hidden, group 0.weight:0" in comb.why("0.weight")


def test_unknown_parameters_are_answered_with_near_ones():
    comb = graphcomb.comb(capture(nn.Sequential(nn.Linear(5, 8)), torch.randn(2, 5)))
    with pytest.raises(BadInput, match=r"no parameter 0\.wieght; did you mean 0\.weight"):
        comb.why("0.wieght")


def test_comb_takes_a_program():
    with pytest.raises(BadInput, match=r"graphcomb\.capture makes one"):
        graphcomb.comb(nn.Linear(2, 2))


# -------------------------------------------------------------------------------------------------------------- surgery
def test_surgery_refuses_frozen_empty_and_ill_fitting_masks():
    comb = Comb(capture(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 5)))
    frozen = next(g for g in comb.groups if g.frozen)
    free = next(g for g in comb.groups if not g.frozen)
    with pytest.raises(Refused, match=r"a frozen atom of size 5 cannot lose indices: .*an input"):
        remove(comb, {frozen.atom: np.arange(frozen.size) > 0})
    with pytest.raises(Refused, match="cannot keep 0 of 8"):
        remove(comb, {free.atom: np.zeros(8, dtype=bool)})
    with pytest.raises(Refused, match="cannot keep 2 of 3"):
        remove(comb, {free.atom: np.array([True, True, False])})


def test_surgery_leaves_its_input_alone():
    program = capture(CASES["FusedQkv"].model(), torch.randn(2, 7, 10))
    before = {n: p.detach().clone() for n, p in program.module().named_parameters()}
    code = program.module().code
    RemoveChannels(ratio=0.5, round_to=1)(program)
    assert program.module().code == code
    assert all(torch.equal(p, before[n]) for n, p in program.module().named_parameters())


# ------------------------------------------------------------------------------------------------- too little to reduce
class Deviation(nn.Module):
    """Channels divided by their standard deviation over the channels, or over channels and positions."""

    def __init__(self, dims, correction=1):
        super().__init__()
        self.dims, self.correction = dims, correction
        self.before, self.after = nn.Conv2d(3, 4, 1), Head(4)

    def forward(self, x):
        y = self.before(x)
        return self.after(y / (y.std(self.dims, correction=self.correction, keepdim=True) + 1))


@pytest.mark.parametrize(("dims", "correction", "least"), [((1,), 1, 2), ((1,), 0, 1), ((1,), 2, 3), ((1, 2, 3), 1, 1)])
def test_a_deviation_keeps_enough_entries_to_be_defined(dims, correction, least):
    program = capture(Deviation(dims, correction), X)
    (group,) = [g for g in Comb(program).groups if g.frozen is None]
    assert (group.size, group.least) == (4, least)
    result = RemoveChannels(ratio=0.9, round_to=1)(program)
    assert len(result.removed["before.weight"][0]) == 4 - least
    assert verify.surgery(program, result) <= 1e-10


def test_too_few_entries_for_a_deviation_are_refused():
    comb = Comb(capture(Deviation((1,)), X))
    (group,) = [g for g in comb.groups if g.frozen is None]
    with pytest.raises(Refused, match="std is undefined over fewer than 2 entries"):
        remove(comb, {group.atom: np.array([True, False, False, False])})


class PaddedTwice(nn.Module):
    """Padding that meets a scale on one side of a concatenation and is summed as it is on the other."""

    def __init__(self):
        super().__init__()
        self.before, self.norm, self.after = nn.Linear(3, 5), nn.RMSNorm(8), nn.Linear(16, 3)

    def forward(self, x):
        y = nn.functional.pad(self.before(x), (0, 3), value=0.5)
        y = torch.cat([y, self.norm(y)], -1)
        return self.after(y * y.mean(-1, keepdim=True))


def test_padding_that_meets_a_scale_on_one_side_of_a_concatenation_is_frozen():
    program = capture(PaddedTwice(), torch.randn(2, 3))
    (padding,) = [g for g in Comb(program).groups if g.kind == "constant"]
    assert "sums over padding" in padding.frozen
    result = RemoveChannels(ratio=0.5, round_to=1, kinds=KINDS)(program)
    assert verify.surgery(program, result) <= 1e-10
