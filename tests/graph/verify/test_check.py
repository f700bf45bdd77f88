"""The oracles accept pruned programs that are right, refuse those that are wrong, and notice single wrong indices.

The pruned networks here are built by hand, from narrower layers and weights sliced in the test, so that nothing depends on
the comb; the second half takes what the comb and slicing make.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphcomb as g
from graphcomb import verify
from graphcomb.graph.comb.solve import comb
from graphcomb.graph.errors import BadInput, GraphcombError
from graphcomb.graph.nodes import arguments, op_name, set_argument
from graphcomb.graph.surgery import remove
from graphcomb.graph.verify.check import Trial
from graphcomb.graph.verify.evaluate import Evaluator, double_weights, relative_error
from graphcomb.graph.verify.meanings import RULES
from graphcomb.graph.verify.randomise import randomise
from graphcomb.graph.verify.removal import checked
from graphcomb.passes import RemoveChannels

from ...oracles.mutate import mutate, mutation_test
from ...oracles.restriction import interference, restriction

EXACT = 1e-10


def without(tensor, lost):
    for d, indices in lost.items():
        tensor = tensor.index_select(d, torch.tensor([i for i in range(tensor.shape[d]) if i not in indices]))
    return tensor


def by_hand(wide, narrow, removed, *inputs, dynamic="batch"):
    """(dense program, result) from an eager network and its narrower twin, which gets the wide one's sliced weights."""
    state = {name: without(t, removed.get(name, {})) for name, t in wide.state_dict().items()}
    narrow.load_state_dict(state)
    before = g.capture(wide, inputs, dynamic_shapes=dynamic)
    return before, SimpleNamespace(program=g.capture(narrow, inputs, dynamic_shapes=dynamic), removed=removed)


class Residual(nn.Module):
    """Convolutions with BatchNorm, a residual branch and squeeze-excite."""

    def __init__(self, body=8, inner=6, squeeze=4):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, body, 3, padding=1), nn.BatchNorm2d(body)
        self.a, self.norm_a = nn.Conv2d(body, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.b = nn.Conv2d(inner, body, 1)
        self.reduce, self.expand = nn.Conv2d(body, squeeze, 1), nn.Conv2d(squeeze, body, 1)
        self.head = nn.Linear(body, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        y = self.b(self.norm_a(self.a(x)).relu())
        y = y * self.expand(self.reduce(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head((x + y).relu().mean((2, 3)))


BODY, INNER, SQUEEZE = [0, 3, 6], [1, 2], [3]
RESIDUAL = (
    {f"{n}.{k}": {0: BODY} for n in ("stem", "b", "expand") for k in ("weight", "bias")}
    | {f"norm.{k}": {0: BODY} for k in ("weight", "bias", "running_mean", "running_var")}
    | {f"norm_a.{k}": {0: INNER} for k in ("weight", "bias", "running_mean", "running_var")}
    | {"a.weight": {0: INNER, 1: BODY}, "a.bias": {0: INNER}, "head.weight": {1: BODY}}
    | {"reduce.weight": {0: SQUEEZE, 1: BODY}, "reduce.bias": {0: SQUEEZE}}
)
RESIDUAL["b.weight"] = {0: BODY, 1: INNER}
RESIDUAL["expand.weight"] = {0: BODY, 1: SQUEEZE}
IMAGE = (3, 3, 7, 5)


def residual(removed=RESIDUAL):
    torch.manual_seed(0)
    return by_hand(Residual(), Residual(5, 4, 3), removed, torch.randn(IMAGE))


class Attention(nn.Module):
    """Attention with separate projections; heads and widths may be smaller, the scale is the one of width 8."""

    def __init__(self, body=12, heads=4, width=8, values=8, scale=8**-0.5):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.norm = nn.LayerNorm(body)
        self.q, self.k = nn.Linear(body, heads * width), nn.Linear(body, heads * width)
        self.v, self.out = nn.Linear(body, heads * values), nn.Linear(heads * values, body)
        self.head = nn.Linear(body, 3)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x):
        x = x * 1.0
        y = self.norm(x)
        q, k, v = self.split(self.q(y)), self.split(self.k(y)), self.split(self.v(y))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


def grid(heads, width, lost_heads, lost_width):
    """Indices of a (head, width) axis that go."""
    return [h * width + w for h in range(heads) for w in range(width) if h in lost_heads or w in lost_width]


WIDTH, VALUES = grid(4, 8, [2], [0, 5]), grid(4, 8, [2], [3])
HEADS = (
    {f"{n}.{k}": {0: WIDTH} for n in "qk" for k in ("weight", "bias")}
    | {f"v.{k}": {0: VALUES} for k in ("weight", "bias")}
    | {"out.weight": {1: VALUES}}
)


def attention(removed=HEADS, scale=8**-0.5):
    torch.manual_seed(0)
    return by_hand(Attention(), Attention(12, 3, 6, 7, scale), removed, torch.randn(3, 5, 12))


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
        assert "test_check.py" in verdict.disagreements[0]


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


# ------------------------------------------------------------------------------------------------------- random weights
class Shy(nn.Module):
    """A network whose fresh weights hide nearly everything."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 1e-6))
        self.register_buffer("mask", torch.tensor([0.0, -100.0, 0, 0, 0, 0, float("-inf"), 0]))
        self.register_buffer("order", torch.arange(8))
        self.out = nn.Linear(8, 8)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.norm.bias, -9.0)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu() * self.gamma
        return (self.out(x.mean((2, 3)))[:, self.order] + self.mask).softmax(-1)


def test_random_weights_hide_nothing_and_keep_what_has_meaning():
    program = g.capture(Shy(), torch.randn(3, 3, 6, 6), dynamic_shapes="batch")
    x = torch.randn(2, 3, 6, 6)
    saved = {n: t.clone() for n, t in program.module().state_dict().items()}
    weights, _ = randomise(program, [x], seed=0)
    assert all(torch.equal(saved[n], t) for n, t in program.module().state_dict().items())
    assert torch.equal(weights["mask"], saved["mask"].double())
    assert torch.equal(weights["order"], saved["order"])
    assert weights["gamma"].min() > 0.1
    assert len(weights["out.weight"].unique()) == 64
    assert all(w.dtype == torch.float64 for n, w in weights.items() if n != "order")
    seen = {}
    Evaluator(program, weights).run([x], lambda n, v: seen.update({op_name(n): v}))
    assert (seen["relu"].amax((0, 2, 3)) > 0).all()  # no dead channel
    assert torch.equal(randomise(program, [x], seed=0)[0]["conv.weight"], weights["conv.weight"])
    assert not torch.equal(randomise(program, [x], seed=1)[0]["conv.weight"], weights["conv.weight"])


def test_own_weights_would_hide_what_random_ones_show():
    """The reason to draw weights: with a zero layer, right and wrong surgery give the same outputs."""
    torch.manual_seed(0)
    wide, narrow = Residual(), Residual(5, 4, 3)
    nn.init.zeros_(wide.b.weight)
    before, result = by_hand(wide, narrow, RESIDUAL, torch.randn(IMAGE))
    removed = checked(before, result.removed)
    wrong = {**removed, "b.weight": {0: BODY, 1: [1, 3]}}
    own = double_weights(before)
    x = [torch.randn(IMAGE)]

    def outputs(weights, lost):
        return Evaluator(result.program, {n: without(t, lost.get(n, {})) for n, t in weights.items()}).run(x)

    assert relative_error(outputs(own, wrong), outputs(own, removed)) == 0
    trial = Trial(before, result.program, removed)
    trial.prepare()
    assert relative_error(outputs(trial.weights, wrong), outputs(trial.weights, removed)) > 1e-3


def test_evaluation_in_double_matches_the_program():
    torch.manual_seed(0)
    program = g.capture(Residual().double(), torch.randn(IMAGE, dtype=torch.float64))
    expected = program.graph_module(*program.args)
    assert relative_error(Evaluator(program, double_weights(program)).run(program.args), expected) == 0


class Started(nn.Module):
    """A layer applied to nothing but zeros, whose type no argument names."""

    def __init__(self):
        super().__init__()
        self.start, self.body, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.start(torch.zeros(x.shape[0], 6)) * self.body(x))


def test_tensors_that_a_network_makes_are_double_too():
    program = g.capture(Started().eval(), torch.randn(2, 6), dynamic_shapes="batch")
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    assert verify.check(program, result).ok


# ---------------------------------------------------------------------------------------- programs made by the comb
class Mixed(nn.Module):
    """Grouped and depthwise convolutions, a transposed one, concatenation, GroupNorm and a shuffle."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.depth = nn.Conv2d(16, 32, 3, padding=1, groups=16)
        self.up = nn.ConvTranspose2d(48, 8, 2, stride=2)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        y = F.channel_shuffle(self.grouped(x), 4)
        z = torch.cat([self.depth(y).relu(), x], 1)
        return self.out(self.up(z).relu())


class Transformer(nn.Module):
    """Patches, a class token, position embedding, fused qkv, layer scale and an MLP."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 24, 4, stride=4)
        self.token, self.place = nn.Parameter(torch.zeros(1, 1, 24)), nn.Parameter(torch.randn(1, 5, 24) * 0.02)
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.scale = nn.Parameter(torch.full((24,), 1e-5))
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.head = nn.Linear(24, 7)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 4, 6)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.scale * self.proj(y)
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


def combed(model, x, seed=0, ratio=0.5):
    torch.manual_seed(seed)
    before = g.capture(model(), x, dynamic_shapes="batch")
    solved, generator, masks = comb(before), np.random.default_rng(seed), {}
    for group in solved.groups:
        if group.frozen is None and group.size > 1 and group.kind not in ("token", "multiplier", "constant"):
            masks[group.atom] = np.ones(group.size, dtype=bool)
            masks[group.atom][generator.permutation(group.size)[: int(group.size * ratio)]] = False
    program, removed = remove(solved, masks)
    return before, SimpleNamespace(program=program, removed=removed)


MADE = [(Residual, IMAGE), (Mixed, (3, 3, 6, 6)), (Transformer, (3, 3, 8, 8))]


@pytest.mark.parametrize(("model", "size"), MADE)
def test_three_oracles_agree(model, size):
    before, result = combed(model, torch.randn(size))
    assert result.removed
    assert verify.check(before, result).ok
    assert restriction(before, result) < EXACT
    assert interference(before, result) < EXACT


@pytest.mark.parametrize(("model", "size"), MADE)
def test_wrong_indices_are_caught(model, size):
    before, result = combed(model, torch.randn(size))
    report = mutation_test(before, result, seed=1)
    assert report.total >= 12
    assert report.caught + len(report.missed) == report.total
    invisible = [m for m in report.missed if "softmax" in m.why or "attention" in m.why]
    assert len(report.missed) == len(invisible), report.missed  # only shifts in front of a softmax stay hidden


def test_mutations_that_stay_hidden_are_explained():
    """The bias of keys shifts all scores of a query alike, and the softmax forgets it."""
    torch.manual_seed(0)
    before, result = attention()
    found = {(m.parameter, m.dim): m for m in mutate(before, result)}
    assert found["k.weight", 0].caught
    hidden = found["k.bias", 0]
    assert not hidden.caught
    assert "scaled_dot_product_attention" in hidden.why
    assert all(m.caught for key, m in found.items() if key != ("k.bias", 0))
    assert mutation_test(before, result, count=3).total == 3


def test_removals_that_are_no_union_of_atoms():
    before, result = combed(Residual, torch.randn(IMAGE))
    removed = {n: dict(d) for n, d in result.removed.items()}
    removed["head.weight"][1] = removed["head.weight"][1][1:]
    with pytest.raises(GraphcombError, match="not what its atoms lose elsewhere"):
        restriction(before, SimpleNamespace(program=result.program, removed=removed))


def test_second_opinions_see_a_leak():
    """A comb that overlooks one consumer: noise gets through to the outputs, and the restricted network is another."""
    before, result = combed(Residual, torch.randn(IMAGE))
    wrong = comb(before)
    head = next(n for n in wrong.module.graph.nodes if op_name(n) == "linear")
    wrong.axes[head.args[0]] = [wrong.axes[head.args[0]][0], wrong.fresh(head.args[0], 1)]
    assert interference(before, result, comb=wrong) > 1e-3
    assert restriction(before, result, comb=wrong) > 1e-3


def test_buffers_that_the_network_writes_stay_as_they_are():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return self.b(self.a(x).relu()) * self.calls

    before, result = combed(Counting, torch.randn(3, 4))
    assert verify.check(before, result).ok
    assert before.module().get_buffer("calls") == result.program.module().get_buffer("calls") == 0


# ---------------------------------------------------------------------------------------------------------------- parity
def test_parity_of_the_forms_of_a_program(tmp_path):
    torch.manual_seed(0)
    model = Residual()
    program = g.capture(model, torch.randn(IMAGE), dynamic_shapes="batch")
    assert verify.parity(program, model.eval()) < 1e-6
    assert verify.parity(program, g.load(program.save(tmp_path / "m.pt2"))) < 1e-6
    assert verify.parity(program, lambda x: [model(x).detach().numpy()], (torch.randn(2, 3, 9, 9),)) < 1e-6
    assert verify.parity(program, lambda x: model(x) * 1.01) == pytest.approx(0.01, rel=0.2)
    assert verify.parity(program, lambda x: model(x)[:1]) == float("inf")
    model.train()
    assert verify.parity(program, model) < 1e-6  # compared in eval mode, left in train mode
    assert model.training


def test_equivalence_of_rewrites():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).eval()
    folded = nn.Linear(4, 3)
    with torch.no_grad():
        folded.weight.copy_(model[1].weight @ model[0].weight)
        folded.bias.copy_(model[1].weight @ model[0].bias + model[1].bias)
    x = torch.randn(3, 4)
    before, after = g.capture(model, x, dynamic_shapes="batch"), g.capture(folded, x, dynamic_shapes="batch")
    assert verify.equivalence(before, after) < 1e-6  # the folded weights were rounded to float32
    with torch.no_grad():
        after.module().get_parameter("bias")[0] += 0.1
    assert verify.equivalence(before, after) > 1e-3


def test_randomised_program_is_alive_and_leaves_its_source():
    torch.manual_seed(0)
    program = g.capture(Shy(), torch.randn(3, 3, 6, 6), dynamic_shapes="batch")
    other = verify.randomised(program, seed=2)
    assert program.module().get_parameter("out.weight").abs().max() == 0
    assert other.module().get_parameter("out.weight").abs().min() > 0
    assert other.module().get_parameter("out.weight").dtype == torch.float32
    x = torch.randn(3, 3, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.allclose(other.graph_module(x)[0], other.graph_module(x)[1])


def chain(*ratios):
    """A program, and the results of pruning it again and again."""
    program = g.capture(Residual(), torch.randn(2, 3, 8, 8), dynamic_shapes="batch")
    results, last = [], program
    for ratio in ratios:
        results.append(RemoveChannels(ratio=ratio, round_to=1)(last))
        last = results[-1].program
    return program, results


def test_several_surgeries_in_a_row_are_one():
    program, results = chain(0.25, 0.4, 0.3)
    for before, result in ((program, results[1]), (program, results[2]), (results[0].program, results[2])):
        assert verify.surgery(before, result) <= EXACT
        assert restriction(before, result) <= EXACT
        assert interference(before, result) <= EXACT
    assert verify.surgery(results[1].program, results[2]) <= EXACT


def test_a_wrong_weight_after_several_surgeries_is_found():
    program, results = chain(0.25, 0.4)
    results[1].program.module().get_parameter("a.weight").data[1] *= 2
    with pytest.warns(UserWarning, match=r"a\.weight does not hold the kept values"):
        assert verify.surgery(program, results[1]) == float("inf")


def test_surgeries_of_another_program_are_refused_with_a_line():
    _, results = chain(0.25, 0.4)
    with pytest.raises(BadInput, match="verify one pass after the other"):
        verify.surgery(g.capture(nn.Conv2d(3, 8, 3), torch.randn(2, 3, 8, 8)), results[1])
