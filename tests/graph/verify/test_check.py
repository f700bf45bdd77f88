"""The oracles accept pruned programs that are right, refuse those that are wrong, and notice single wrong indices.

The pruned networks here are built by hand, so that nothing depends on the comb; `test_oracles` takes what the comb and
slicing make.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphcomb as g
from graphcomb import verify
from graphcomb.graph.comb.solve import comb
from graphcomb.graph.comb.surgery import remove
from graphcomb.graph.errors import BadInput, GraphcombError
from graphcomb.graph.nodes import arguments, op_name, set_argument
from graphcomb.graph.trainable import set_tag, tag, wanted
from graphcomb.graph.verify.evaluate import Evaluator, double_weights
from graphcomb.graph.verify.meanings import RULES
from graphcomb.passes import RemoveChannels

from .toys import (
    EXACT,
    HEADS,
    IMAGE,
    INNER,
    RESIDUAL,
    SQUEEZE,
    WIDTH,
    Residual,
    attention,
    by_hand,
    residual,
    without,
)


# --------------------------------------------------------------------------------------------------------- what is right
@pytest.mark.parametrize("make", [residual, attention])
@pytest.mark.parametrize("seed", [0, 1])
def test_right_surgery_is_exact(make, seed):
    before, result = make()
    verdict = verify.check(before, result, seed=seed)
    assert verdict.ok
    assert verdict.error < EXACT
    assert verdict.dense_difference > 1e-3
    assert 0 < verdict.conditioning < 1e4
    assert len({shapes[0][0] for shapes in verdict.inputs}) == 2  # two batch sizes
    assert verify.surgery(before, result, seed=seed) == pytest.approx(verdict.error)


def test_programs_are_left_alone():
    before, result = residual()
    before.module().train()
    saved = {n: t.clone() for p in (before, result.program) for n, t in p.module().state_dict().items()}
    graphs = [str(p.module().graph) for p in (before, result.program)]
    assert verify.check(before, result).ok  # also in train mode: the verdict is about inference
    assert graphs == [str(p.module().graph) for p in (before, result.program)]
    for program in (before, result.program):
        for tensor in program.module().state_dict().values():
            assert tensor.dtype == torch.float32 or not tensor.is_floating_point()
    for name, tensor in result.program.module().state_dict().items():
        assert torch.equal(tensor, saved[name])


def test_verdict_is_the_same_for_the_same_seed():
    before, result = residual()
    assert verify.check(before, result, seed=3).record() == verify.check(before, result, seed=3).record()


class Noisy(nn.Module):
    """Draws noise in eval mode too, as masked autoencoders do."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.after(self.before(x + torch.rand(x.shape[0], 6)).relu()) + torch.randn_like(x[:, :3])


def test_networks_that_draw_at_random_are_compared_on_the_same_draws():
    program = g.capture(Noisy(), torch.randn(3, 6))
    state = torch.get_rng_state()
    assert verify.check(program, RemoveChannels(ratio=0.5, round_to=1)(program)).error < EXACT
    assert torch.equal(torch.get_rng_state(), state)


class AlwaysOn(nn.Module):
    """Dropout and statistics of the batch in eval mode too."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.out = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        x = F.dropout(self.a(x), 0.3, training=True)
        x = F.batch_norm(x, self.norm.running_mean, self.norm.running_var, self.norm.weight, training=True)
        return self.out(x.relu())


def test_what_trains_in_eval_mode_too_is_proven_as_it_is():
    program = g.capture(AlwaysOn(), torch.randn(5, 6))
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    before = program.module().norm.running_mean.clone()
    assert verify.surgery(program, result) < EXACT
    assert torch.equal(program.module().norm.running_mean, before)
    x = torch.randn(5, 6).double()
    weights = double_weights(program)
    (values,) = Evaluator(program, weights).run([x])
    model = AlwaysOn().double()
    model.load_state_dict(weights, strict=False)
    y = F.batch_norm(model.a(x), None, None, model.norm.weight, training=True)  # dropout aside
    torch.testing.assert_close(values, model.out(y.relu()))


@pytest.mark.parametrize("op", ["batch_norm", "dropout"])
def test_what_no_longer_trains_in_eval_mode_is_found(op):
    program = g.capture(AlwaysOn(), torch.randn(5, 6))
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    node = next(n for n in result.program.graph.nodes if op_name(n) == op)
    (switch,) = wanted(node, False)
    set_tag(node, **tag(node) | {"modes": {switch: [False, True]}})
    with pytest.warns(UserWarning, match=rf"{op} has .*{switch}.*: False.* in eval mode, the original .*True"):
        assert verify.surgery(program, result) == float("inf")


def test_tied_weights_and_shared_modules():
    class Tied(nn.Module):
        def __init__(self, n=8):
            super().__init__()
            self.a, self.b = nn.Linear(6, n, bias=False), nn.Linear(6, n, bias=False)
            self.b.weight = self.a.weight
            self.out = nn.Linear(n, 2)

        def forward(self, x):
            return self.out(self.a(x).relu() + self.b(x.flip(0)))

    torch.manual_seed(0)
    lost = {"a.weight": {0: [2, 5]}, "out.weight": {1: [2, 5]}}
    wide, narrow = Tied(), Tied(6)
    narrow.load_state_dict(
        {n: without(t, {**lost, "b.weight": lost["a.weight"]}.get(n, {})) for n, t in wide.state_dict().items()}
    )
    x = torch.randn(4, 6)
    before, after = g.capture(wide, x), g.capture(narrow, x)
    assert verify.check(before, SimpleNamespace(program=after, removed=lost)).ok  # one of the two names is enough
    both = {**lost, "b.weight": {0: [2, 4]}}
    with pytest.raises(BadInput, match="one tensor and lose different indices"):
        verify.check(before, SimpleNamespace(program=after, removed=both))


def test_half_precision_programs_are_verified_in_double():
    half = g.capture(Residual().bfloat16(), torch.randn(IMAGE).bfloat16())
    c = comb(half)
    group = next(x for x in c.groups if x.frozen is None)
    program, removed = remove(c, {group.atom: np.arange(group.size) > 0})
    assert verify.surgery(half, SimpleNamespace(program=program, removed=removed)) < EXACT


# --------------------------------------------------------------------------------------------------------- what is wrong
def test_wrong_weights_are_noticed_even_when_shapes_fit():
    before, result = residual()
    with torch.no_grad():
        weight = result.program.module().get_parameter("b.weight")
        weight[1] = dict(before.module().named_parameters())["b.weight"][0][[0, 3, 4, 5]]
    with pytest.warns(UserWarning, match=r"b\.weight does not hold the kept values"):
        assert verify.surgery(before, result) == float("inf")
    # trained weights are compared by shape only, and the surgery is proven on random ones
    assert verify.surgery(before, result, retrained=True) < EXACT


def test_wrong_index_in_one_parameter_is_a_disagreement_at_a_node():
    for name, dim in (("head.weight", 1), ("norm.weight", 0), ("b.weight", 1), ("reduce.bias", 0)):
        removed = {n: dict(d) for n, d in RESIDUAL.items()}
        removed[name][dim] = [i + 1 if i == removed[name][dim][-1] else i for i in removed[name][dim]]
        if name == "reduce.bias":
            removed[name] = {0: [1]}
        before, result = residual(removed)
        verdict = verify.check(before, result)
        assert verdict.error == float("inf")
        assert not verdict.ok
        assert "disagree on absence" in verdict.disagreements[0]
        assert "verify/toys.py" in verdict.disagreements[0]


def test_residual_branches_must_agree():
    removed = RESIDUAL | {"b.weight": {0: [0, 3, 5], 1: INNER}, "b.bias": {0: [0, 3, 5]}}
    removed |= {"expand.weight": {0: [0, 3, 5], 1: SQUEEZE}, "expand.bias": {0: [0, 3, 5]}}
    removed["reduce.weight"] = {0: SQUEEZE, 1: [0, 3, 5]}
    verdict = verify.check(*residual(removed))
    assert "add: operands disagree on absence at 2 of 8 indices, 5, 6" in verdict.disagreements[0]


def test_heads_must_be_balanced():
    uneven = list(range(len(WIDTH)))
    removed = HEADS | {f"{n}.{k}": {0: uneven} for n in "qk" for k in ("weight", "bias")}
    verdict = verify.check(*attention(removed))
    assert verdict.error == float("inf")
    assert "no whole indices of the axes 4 x 8" in verdict.disagreements[0]


def test_attention_keeps_the_scale_of_the_original_width():
    verdict = verify.check(*attention(scale=6**-0.5))
    assert verdict.error > 1e-4
    assert "scaled_dot_product_attention" in verdict.disagreements[0]
    assert "first to differ" in verdict.disagreements[0]


class Flat(nn.Module):
    def __init__(self, channels=4, last=False):
        super().__init__()
        self.conv, self.out, self.last = nn.Conv2d(3, channels, 1), nn.Linear(channels * 6, 2), last

    def forward(self, x):
        x = self.conv(x)
        return self.out(x.movedim(1, -1).flatten(1) if self.last else x.flatten(1))


@pytest.mark.parametrize("last", [False, True])
def test_order_of_a_flattened_axis(last):
    nchw = [1 * 6 + i for i in range(6)]
    nhwc = [i * 4 + 1 for i in range(6)]
    for order in (nchw, nhwc):
        torch.manual_seed(0)
        removed = {"conv.weight": {0: [1]}, "conv.bias": {0: [1]}, "out.weight": {1: order}}
        verdict = verify.check(*by_hand(Flat(last=last), Flat(3, last), removed, torch.randn(3, 3, 2, 3)))
        assert verdict.ok == ((order is nhwc) == last)


def test_wrong_groups_of_a_convolution():
    def net(n, groups):
        return nn.Sequential(nn.Conv2d(3, n, 1), nn.Conv2d(n, n, 3, groups=groups), nn.Conv2d(n, 2, 1))

    def has_absent(*gone):
        gone = list(gone)
        return (
            {f"0.{k}": {0: gone} for k in ("weight", "bias")}
            | {f"1.{k}": {0: gone} for k in ("weight", "bias")}
            | {"2.weight": {1: gone}}
        )

    torch.manual_seed(0)
    x = torch.randn(3, 3, 5, 5)
    whole = by_hand(net(8, 4), net(6, 3), has_absent(2, 3), x)
    assert verify.surgery(*whole) < EXACT
    split = by_hand(net(8, 4), net(6, 3), has_absent(2, 4), x)
    assert "unbalanced heads or groups" in verify.check(*split).disagreements[0]


def test_vacuous_surgery_is_an_error():
    class Blind(nn.Module):
        def __init__(self, n=6):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, n), nn.Linear(n, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(x + self.b(self.a(x)) * 0)

    torch.manual_seed(0)
    removed = {"a.weight": {0: [1]}, "a.bias": {0: [1]}, "b.weight": {1: [1]}}
    before, result = by_hand(Blind(), Blind(5), removed, torch.randn(3, 4))
    assert verify.check(before, result).vacuous
    with pytest.raises(GraphcombError, match="vacuous"):
        verify.surgery(before, result)


def test_nothing_removed_is_not_vacuous():
    before, _ = residual()
    result = SimpleNamespace(program=before.copy(), removed={})
    assert verify.surgery(before, result) < EXACT
    assert verify.check(before, result).ok


def test_a_batch_size_written_into_the_pruned_program_is_noticed():
    class Windows(nn.Module):
        def __init__(self, n=6):
            super().__init__()
            self.a, self.b = nn.Linear(4, n), nn.Linear(n, 2)

        def forward(self, x):
            x = self.a(x).relu()
            return self.b(x.reshape(x.shape[0] * 2, -1, x.shape[2])).reshape(x.shape[0], -1)

    torch.manual_seed(0)
    removed = {"a.weight": {0: [1]}, "a.bias": {0: [1]}, "b.weight": {1: [1]}}
    before, result = by_hand(Windows(), Windows(5), removed, torch.randn(5, 6, 4))
    assert verify.check(before, result).ok
    view = next(n for n in result.program.module().graph.nodes if op_name(n) in ("reshape", "view"))
    key = "shape" if "shape" in arguments(view) else "size"
    set_argument(view, key, [4, *list(arguments(view)[key])[1:]])  # right at batch size 2
    verdict = verify.check(before, result)
    assert verdict.error > 1e-6
    assert verdict.disagreements
    assert verify.check(before, result, batches=1).ok


def test_dynamic_height_and_width_run_at_another_size():
    class Rows(nn.Module):
        def __init__(self, n=6):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, n, 3, padding=1), nn.Conv2d(n, 2, 1)

        def forward(self, x):
            return self.b(self.a(x).flatten(2).relu().unflatten(2, (x.shape[2], x.shape[3])))

    h, w = torch.export.Dim("h"), torch.export.Dim("w")
    removed = {"a.weight": {0: [1]}, "a.bias": {0: [1]}, "b.weight": {1: [1]}}
    torch.manual_seed(0)
    before, result = by_hand(Rows(), Rows(5), removed, torch.randn(2, 3, 10, 14), dynamic=({2: h, 3: w},))
    verdict = verify.check(before, result)
    assert verdict.ok
    assert {shapes[0][2:] for shapes in verdict.inputs} == {(10, 14), (5, 7)}


def test_shapes_that_do_not_fit_are_named():
    before, result = residual()
    other = Residual(5, 3, 3)
    result.program = g.capture(other, torch.randn(IMAGE))
    with pytest.warns(UserWarning, match=r"a\.weight has shape \(3, 5, 3, 3\), but removed leaves \(4, 5, 3, 3\)"):
        assert verify.surgery(before, result) == float("inf")


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"stem.wait": {0: [0]}}, "no parameter or buffer stem.wait"),
        ({"stem.weight": {4: [0]}}, "stem.weight dimension 4"),
        ({"stem.weight": {0: [8]}}, r"stem.weight dimension 0 \(size 8\) cannot lose"),
        ({"stem.weight": {0: [1, 1]}}, "cannot lose"),
        ({"stem.weight": {0: list(range(8))}}, "nothing is left of stem.weight"),
    ],
)
def test_removals_that_do_not_fit_the_program(removed, message):
    before, result = residual()
    with pytest.raises(BadInput, match=message):
        verify.check(before, SimpleNamespace(program=result.program, removed=removed))


@torch.library.custom_op("verify_test::swing", mutates_args=())
def swing(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + x.sin()


@swing.register_fake
def _(x):
    return torch.empty_like(x)


def test_custom_operators_need_a_meaning(monkeypatch):
    class Custom(nn.Module):
        def __init__(self, n=6):
            super().__init__()
            self.a, self.b = nn.Linear(4, n), nn.Linear(n, 2)

        def forward(self, x):
            return self.b(swing(self.a(x)))

    torch.manual_seed(0)
    removed = {"a.weight": {0: [1]}, "a.bias": {0: [1]}, "b.weight": {1: [1]}}
    before, result = by_hand(Custom(), Custom(5), removed, torch.randn(3, 4))
    monkeypatch.delitem(RULES, "verify_test::swing", raising=False)
    assert "say so with graphcomb.verify.means" in verify.check(before, result).disagreements[0]
    verify.means("verify_test::swing")(verify.entrywise)
    assert verify.surgery(before, result) < EXACT
    verify.means("verify_test::swing")(lambda call: call.a["y"])
    with pytest.raises(AssertionError, match="swing: its meaning fails: KeyError: 'y'"):  # in our own tests
        verify.check(before, result)
    monkeypatch.delenv("GRAPHCOMB_STRICT")
    assert "its meaning fails: KeyError: 'y'" in verify.check(before, result).disagreements[0]
