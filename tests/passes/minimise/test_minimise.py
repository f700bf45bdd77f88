"""Channels without a purpose go, exactly: what is left computes what the network with its zeros does."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphcomb as g
from graphcomb import verify
from graphcomb.graph.sparse import sparse_weights, zeros
from graphcomb.passes import Distill, Minimise, Sparsify
from graphcomb.pipeline import Pipeline

from ...graph.random_networks.trial import network
from ..toys import same, state
from .toys import convolutions, with_zeros, zero


def minimised(model, x, dynamic_shapes="batch"):
    """The result, compared with the user's own model in float64 and applied a second time; and the sizes of its groups."""
    model, x = model.double().eval(), x.double()
    program = g.capture(model, (x,), dynamic_shapes=dynamic_shapes)
    before = state(program)
    result = Minimise()(program)
    assert same(before, state(program))
    for inputs in (x, torch.cat([torch.randn_like(x), x])[:3] if dynamic_shapes == "batch" else torch.randn_like(x)):
        with torch.no_grad():
            expected, found = model(inputs), result.program.module().eval()(inputs)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    if result.removed:
        assert verify.surgery(program, result) <= 1e-10
    assert Minimise()(result.program).record["changed"] == []
    return result, {row["what"]: (row["before"], row["after"]) for row in result.record["changed"]}


def reasons(result, group):
    return [row["why"] for row in result.record["refused"] if row["what"] == group]


def rows(result, group):
    return next(row for row in result.record["changed"] if row["what"] == group)


# ------------------------------------------------------------------------------------------------------ dead and unread
def test_dead_and_unread_units_go_until_nothing_is_left_to_remove():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    zero(model[0].weight, [1, 3])  # dead: constants that the next layer takes
    model[0].bias.data[[1, 3]] = 0.5
    zero(model[2].weight, [5], 1)  # unread
    zero(model[6].weight, [0], 1)  # unread, and then whatever only it reads:
    zero(model[4].weight, [1, 2, 3, 4, 5])
    model[4].weight.data[1:, 0] = 1.0
    result, sizes = minimised(model, torch.randn(4, 5))
    assert sizes["4.weight:0"] == (6, 5)
    assert sizes["2.weight:0"] == (7, 1)  # of seven, the others read the first alone
    assert sizes["0.weight:0"][1] <= 5
    assert result.record["folded"]


def test_constants_are_folded_into_biases_and_running_means():
    result, sizes = minimised(convolutions(0.7, last=1), torch.randn(2, 3, 6, 6))
    assert sizes == {"0.weight:0": (8, 6)}
    assert rows(result, "0.weight:0")["dead"] == 2
    assert result.record["folded"] == ["4.running_mean"]
    assert result.record["verified"]["error"] <= 1e-10
    assert result.record["unchanged"]["oracle"] == "input program"


def test_a_constant_in_front_of_padding_stays_unless_it_is_zero():
    result, sizes = minimised(convolutions(0.7), torch.randn(2, 3, 6, 6))
    assert sizes == {"0.weight:0": (8, 7)}
    (why,) = reasons(result, "0.weight:0")
    assert "not zero" in why
    assert "pads its input with zeros" in why
    assert minimised(convolutions(-0.7), torch.randn(2, 3, 6, 6))[1] == {"0.weight:0": (8, 6)}


def test_a_constant_that_nothing_can_take_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    zero(model[0].weight, [2])
    result, sizes = minimised(model, torch.randn(4, 5))
    assert sizes == {}
    assert "has no bias and no BatchNorm" in reasons(result, "0.weight:0")[0]
    zero(model[0].bias, [2])
    assert minimised(model, torch.randn(4, 5))[1] == {"0.weight:0": (6, 5)}


def test_a_bias_that_two_layers_share_takes_no_constant():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(6, 4)
            self.b.bias = self.a.bias

        def forward(self, x):
            x = self.first(x)
            return self.a(x) * self.b(x)

    torch.manual_seed(0)
    model = Shared()
    zero(model.first.weight, [2])
    result, sizes = minimised(model, torch.randn(4, 5))
    assert sizes == {}
    assert "more than once" in reasons(result, "first.weight:0")[0]


def test_norms_that_scale_by_zero_make_channels_dead():
    """A user's own zeros, such as slimming leaves."""
    model = convolutions(last=1)
    zero(model[1].weight, [0, 2])
    assert minimised(model, torch.randn(2, 3, 6, 6))[1] == {"0.weight:0": (8, 4)}


def test_a_layer_without_a_purpose_keeps_one_index():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    zero(model[0].weight, list(range(8)))
    result, sizes = minimised(model, torch.randn(4, 5))
    assert sizes == {"0.weight:0": (8, 1)}
    assert "an operator needs 1" in reasons(result, "0.weight:0")[0]


# --------------------------------------------------------------------------------------------------------- structures
class Trunk(nn.Module):
    """Two residual blocks with an expansion; (N, 2, 6, 6) to (N, 3)."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.wide = nn.ModuleList(nn.Conv2d(width, 12, 1) for _ in range(2))
        self.back = nn.ModuleList(nn.Conv2d(12, width, 1) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        for wide, back in zip(self.wide, self.back, strict=True):
            x = x + back(F.gelu(wide(x)))
        return self.head(x.mean((2, 3)))


def test_an_index_of_a_trunk_is_dead_where_everything_that_is_added_is():
    torch.manual_seed(0)
    model, x = Trunk(), torch.randn(2, 2, 6, 6)
    zero(model.stem.weight, [3, 4])
    zero(model.back[0].weight, [3, 4])
    assert minimised(model, x)[1] == {}
    zero(model.back[1].weight, [3])
    assert minimised(model, x)[1] == {"stem.weight:0": (8, 7)}


def test_what_reads_only_itself_is_unread():
    """A trunk's index that blocks read and write, but nothing else: dead code in a circle."""
    torch.manual_seed(0)
    model, x = Trunk(), torch.randn(2, 2, 6, 6)
    zero(model.head.weight, [5], 1)
    zero(model.wide[0].weight, [5], 1)
    zero(model.back[1].weight, [0, 1, 2, 3, 4, 6, 7])
    sizes = minimised(model, x)[1]
    assert sizes == {"stem.weight:0": (8, 7), "wide.1.weight:0": (12, 1)}


def test_concatenated_branches_lose_their_own_channels():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 6, 1), nn.Conv2d(8, 6, 3, padding=1)
            self.norm, self.last = nn.BatchNorm2d(14), nn.Conv2d(14, 4, 1)

        def forward(self, x):
            x = torch.cat([x, self.a(x).relu()], 1)
            x = torch.cat([x, self.b(x).relu()], 1)
            return self.last(self.norm(x)).mean((2, 3))

    torch.manual_seed(0)
    model = Dense()
    zero(model.a.weight, [1])
    zero(model.a.bias, [1])
    zero(model.last.weight, [5, 9, 10], 1)  # 5: also read by b; 9 and 10: by nothing else
    zero(model.b.weight, [0])
    model.b.bias.data[0] = 0.4
    sizes = minimised(model, torch.randn(2, 2, 6, 6))[1]
    assert sizes == {"a.weight:0": (6, 5), "b.weight:0": (6, 3)}


@pytest.mark.parametrize("bias", [0.0, 0.4])
def test_depthwise_channels_go_with_their_producers(bias):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.ReLU6(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.ReLU6(),
        nn.Conv2d(6, 3, 1), nn.AdaptiveAvgPool2d(1),
    )  # fmt: skip
    zero(model[0].weight, [1])  # its constant meets the padding of the depthwise layer
    model[0].bias.data[1] = bias
    zero(model[2].weight, [4])  # dead behind it
    result, sizes = minimised(model, torch.randn(2, 2, 6, 6))
    assert sizes == {"0.weight:0": (6, 5 if bias else 4)}
    if bias:
        assert "not the same at all positions" in reasons(result, "0.weight:0")[0]


def test_grouped_convolutions_lose_what_every_group_lacks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 3, 1))
    zero(model[2].weight, [1], 1)  # the second input of both groups
    result, sizes = minimised(model, torch.randn(2, 2, 6, 6))
    assert sizes
    assert result.program.module().get_parameter("2.weight").shape == (8, 3, 1, 1)


def test_gates_of_zero_channels_go_with_them():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8)
            self.down, self.up, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 3, 3, padding=1)

        def forward(self, x):
            x = self.norm(self.first(x)).relu()
            return self.last(x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid())

    torch.manual_seed(0)
    model = Gated()
    zero(model.norm.weight, [2, 6])
    assert minimised(model, torch.randn(2, 2, 6, 6))[1] == {"first.weight:0": (8, 6)}


class Attention(nn.Module):
    """Four heads of six, behind a LayerNorm or not; (N, 5, 7) to (N, 3)."""

    def __init__(self, norm=False):
        super().__init__()
        self.embed, self.q, self.k, self.v = nn.Linear(7, 24), *(nn.Linear(24, 24) for _ in range(3))
        self.norm, self.proj, self.head = (
            nn.LayerNorm(24) if norm else nn.Identity(),
            nn.Linear(24, 10),
            nn.Linear(10, 3),
        )

    def forward(self, x):
        x = self.norm(self.embed(x))
        q, k, v = (m(x).unflatten(2, (4, 6)).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.head(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1))


def test_heads_that_nothing_reads_or_whose_values_are_constant_go():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 5, 7)
    zero(model.proj.weight, list(range(6, 12)), 1)
    zero(model.v.weight, list(range(18, 24)))
    result, sizes = minimised(model, x)
    assert [size for name, size in sizes.items() if "head" not in name or "width" not in name] == [(4, 2)]
    assert result.program.module().get_parameter("q.weight").shape == (12, 24)


def test_widths_of_values_go_where_all_heads_lack_them():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 5, 7)
    zero(model.proj.weight, [0, 6, 12, 18], 1)
    result, _ = minimised(model, x)
    assert result.program.module().get_parameter("v.weight").shape == (20, 24)
    assert result.program.module().get_parameter("q.weight").shape == (24, 24)


def test_axes_of_a_layer_norm_stay():
    torch.manual_seed(0)
    model, x = Attention(norm=True), torch.randn(2, 5, 7)
    for layer in (model.q, model.k, model.v):
        zero(layer.weight, [3], 1)
    result, sizes = minimised(model, x)
    assert sizes == {}
    assert "layer_norm takes statistics over it" in reasons(result, "embed.weight:0")[0]


def random_zeros(seed, share):
    """On the user's own model and other inputs than the pass compares; in float32, since the networks cast to it."""
    drawn = network(seed)
    model, x = with_zeros(drawn.model, seed, share).eval(), torch.randn_like(drawn.x)
    with torch.no_grad():
        outputs = model(x)
    if not all(bool(t.isfinite().all()) and float(t.abs().max()) < 1e4 for t in outputs):
        return
    result = Minimise()(drawn.capture())
    with torch.no_grad():
        for found, expected in zip(result.program.module()(x), outputs, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * (1 + float(expected.abs().max())))
    assert Minimise()(result.program).record["changed"] == []


anything = given(st.integers(0, 10**6), st.floats(0.2, 0.8))
# In network 350 all that one output reads is constant, and one index of each group has to stay what it is.
test_random_networks_with_random_zeros = settings(max_examples=5, deadline=None)(
    example(350, 0.5)(anything(random_zeros))
)
test_more_random_networks = pytest.mark.slow(settings(max_examples=120, deadline=None)(anything(random_zeros)))


# ------------------------------------------------------------------------------------------------------- other passes
def test_nothing_to_do_leaves_the_program_as_it_is():
    program = g.capture(convolutions().float(), (torch.randn(2, 3, 6, 6),), dynamic_shapes="batch")
    program.module().get_parameter("0.weight").data.normal_()
    result = Minimise()(program)
    assert result.record["changed"] == []
    assert result.removed == {}
    assert same(state(program), state(result.program))


def test_single_precision_rounds_the_bias_that_took_a_constant_once():
    program = g.capture(convolutions(0.7, last=1).float(), (torch.randn(2, 3, 6, 6),), dynamic_shapes="batch")
    result = Minimise()(program)
    assert result.record["changed"]
    assert 0 < result.record["unchanged"]["error"] <= 1e-6


def test_half_precision_takes_no_constants():
    program = g.capture(convolutions(0.7, last=1).bfloat16(), (torch.randn(2, 3, 6, 6).bfloat16(),))
    result = Minimise()(program)
    assert [row["after"] for row in result.record["changed"]] == [7]
    assert "stored in bfloat16" in reasons(result, "0.weight:0")[0]


def test_masks_of_sparsify_shrink_with_their_weights():
    program = g.capture(convolutions().float(), (torch.randn(2, 3, 6, 6),), dynamic_shapes="batch")
    sparse = Sparsify(sparsity=0.6, method="magnitude", include=("0.weight", "3.weight"))(program).program
    result = Minimise()(sparse)
    assert result.record["changed"]
    assert sparse_weights(result.program) == sparse_weights(sparse)
    masks = zeros(result.program)
    assert all(bool(mask.any()) for mask in masks.values())
    data = [(torch.randn(4, 3, 6, 6), torch.randint(4, (4,))) for _ in range(2)]
    trained = Distill(epochs=1, lr=0.1, alpha=0.0)(result.program, data=data).program
    for name, mask in zeros(trained).items():
        assert torch.equal(mask & masks[name], masks[name])


def test_input_channels_of_a_pattern_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    program = g.capture(model, (torch.randn(2, 5),), dynamic_shapes="batch")
    program = Sparsify(pattern="2:4", method="magnitude", where="all", include=("2.weight",))(program).program
    zero(program.module().get_parameter("0.weight"), [1])
    zero(program.module().get_parameter("4.weight"), [2], 1)
    result = Minimise()(program)
    assert {row["what"] for row in result.record["changed"]} == {"2.weight:0"}
    assert "pattern would break" in reasons(result, "0.weight:0")[0]


def test_a_pipeline_prunes_weights_and_then_what_they_leave(tmp_path):
    torch.manual_seed(0)
    program = g.capture(convolutions().float(), (torch.randn(2, 3, 6, 6),), dynamic_shapes="batch")
    passes = [Sparsify(sparsity=0.7, method="magnitude"), Minimise()]
    result = Pipeline(passes).run(program, out=tmp_path)
    assert result.program.params < program.params
    assert result.surgery_error <= 1e-10
    x = torch.randn(3, 3, 6, 6)
    again = g.load(result.program.save(tmp_path / "m.pt2"))
    assert torch.equal(again.module()(x), result.program.module()(x))


def test_grouped_convolutions_with_a_computed_weight_lose_whole_groups():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)
            self.grouped = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3, groups=4))

        def forward(self, x):
            return self.last(self.grouped(self.a(x).relu()).relu())

    torch.manual_seed(0)
    model = Normalised()
    zero(model.a.weight, [3])
    zero(model.a.bias, [3])
    zero(model.last.weight, range(4, 8), 1)
    _, sizes = minimised(model, torch.randn(2, 3, 8, 8))
    assert sizes == {"a.weight:0/group": (4, 3)}
