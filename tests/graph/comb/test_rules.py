"""Every structure that pruners get wrong: pruned by half, exact, and really smaller; refused where it must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import graphcomb
from graphcomb import Program, capture, verify
from graphcomb.graph.comb.groups import KINDS
from graphcomb.graph.comb.solve import Comb
from graphcomb.graph.comb.surgery import remove
from graphcomb.passes import PassResult, RemoveChannels

from ...oracles.restriction import restriction
from ..toys import CASES, Head


def exact(program: Program, result: PassResult) -> None:
    """Both oracles agree, and the smaller program runs with the outputs' shapes unchanged."""
    assert verify.surgery(program, result) <= 1e-10
    assert restriction(program, result) <= 1e-10
    before, after = program.module()(*program.args), result.program.module()(*program.args)
    assert before.shape == after.shape


def take(program: Program, **keep: int) -> PassResult:
    """Remove all but `keep` random indices of groups named by their first member, __ for a dot."""
    comb, masks = Comb(program), {}
    for name, n in keep.items():
        (group,) = [g for g in comb.groups if g.name == name.replace("__", ".") + ":0"]
        masks[group.atom] = np.random.default_rng(0).permutation(group.size) < n
    smaller, removed = remove(comb, masks)
    return PassResult(smaller, {}, removed)


def shapes(program: Program) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in program.module().named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("dynamic", [None, "batch"])
@pytest.mark.parametrize("name", CASES)
def test_half_of_every_axis_goes_and_nothing_else_changes(name: str, dynamic: str | None) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    program = capture(case.model(), torch.randn(case.shape), dynamic_shapes=dynamic)
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    exact(program, result)
    found = shapes(result.program)
    assert {n: found[n] for n in case.expected} == case.expected
    comb = Comb(program)
    for parameter, word in case.frozen.items():
        assert word in comb.why(parameter)
        assert found[parameter] == shapes(program)[parameter]


@pytest.mark.parametrize(
    "name", ["FusedQkv", "GqaFlag", "GroupedConv", "GroupNorm", "SwinWindows", "DepthwiseMultiplier"]
)
def test_several_factors_of_one_product_at_once(name: str) -> None:
    """Heads and widths, groups and what is inside, base and multiplier: each product loses on all its factors."""
    program = capture(CASES[name].model(), torch.randn(CASES[name].shape))
    comb, masks = Comb(program), {}
    for group in comb.groups:
        if group.frozen is None and group.size > 1:
            masks[group.atom] = np.random.default_rng(1).permutation(group.size) < (group.size + 1) // 2
    smaller, removed = remove(comb, masks)
    exact(program, PassResult(smaller, {}, removed))
    assert len(masks) > 1


# ------------------------------------------------------------------------------------------------- dynamic dimensions
class AnySize(nn.Module):
    """A segmentation network for any height and width: padding that depends on them, views, tokens, resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.qkv = nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm(8), nn.Linear(8, 24)
        self.scale, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(10, 4, 1)

    def forward(self, x):
        y = self.a(x)
        b, c, h, w = y.shape
        y = F.pad(y, (0, (4 - w % 4) % 4, 0, (4 - h % 4) % 4))
        hp, wp = y.shape[2:]
        t = self.norm(y.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(t).view(b, hp * wp, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        t = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, hp * wp, c)
        y = y + t.transpose(1, 2).reshape(b, c, hp, wp)
        y = y * F.adaptive_avg_pool2d(self.scale(y), 1).sigmoid()
        y = F.pad(y, (0, 0, 0, 0, 1, 1))
        return F.interpolate(self.b(y), size=(2 * h, 2 * w), mode="bilinear")


def test_dynamic_height_and_width() -> None:
    dims = {0: Dim("b", min=2, max=8), 2: Dim("h", min=4, max=64), 3: Dim("w", min=4, max=64)}
    program = capture(AnySize(), torch.randn(3, 3, 13, 10), dynamic_shapes={"x": dims})
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    exact(program, result)
    assert shapes(result.program)["a.weight"] == (4, 3, 3, 3)
    for size in ((2, 3, 8, 8), (3, 3, 21, 18)):
        assert result.program.module()(torch.randn(size)).shape == (size[0], 4, 2 * size[2], 2 * size[3])


def test_sizes_are_read_off_what_comes_before() -> None:
    """The product of height and width is an axis of its own only after the first operator that needs it."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 2)

        def forward(self, x):
            y = self.a(x)
            b, c, h, w = y.shape
            z = y.reshape(b, c * h * w).mean(1, keepdim=True)
            return self.head(y.flatten(2).mean(2)) + z

    dims = {2: Dim("h", min=4, max=64), 3: Dim("w", min=4, max=64)}
    program = capture(Late(), torch.randn(2, 3, 8, 10), dynamic_shapes={"x": dims})
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    exact(program, result)
    assert shapes(result.program)["a.weight"] == (4, 3, 3, 3)
    assert result.program.module()(torch.randn(2, 3, 6, 12)).shape == (2, 2)


def test_padding_amounts_of_dynamic_dimensions_stay_expressions() -> None:
    """Channels are padded by a constant, rows by what the height asks for, in one call."""

    class Pads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(11, 4, 1)

        def forward(self, x):
            y = self.a(x)
            return self.b(F.pad(y, (0, 0, 0, (4 - y.shape[2] % 4) % 4, 1, 2)))

    program = capture(Pads(), torch.randn(2, 3, 17, 6), dynamic_shapes={"x": {2: Dim("h", min=4, max=64)}})
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    exact(program, result)
    assert result.program.module()(torch.randn(2, 3, 16, 6)).shape == (2, 4, 16, 6)


# ------------------------------------------------------------------------------------------- failures found on the way
def test_an_axis_pruned_to_one_index_is_not_squeezed_away() -> None:
    class Squeezes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 6, 1), Head(6)

        def forward(self, x):
            y = self.a(x).squeeze(1).unsqueeze(0).squeeze()  # squeezes only what unsqueeze made
            return self.head(self.b(y.squeeze((1, 2))))

    program = capture(Squeezes(), torch.randn(2, 3, 4, 4))
    result = take(program, a__weight=1, b__weight=1)
    exact(program, result)
    assert shapes(result.program)["b.weight"] == (1, 1, 1, 1)


def test_sums_over_padding_freeze_it() -> None:
    """A parameter says which padded channels go, but a mean over the same channels cannot know: padding stays whole."""

    class Pads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(1, 2, 1), Head(12)

        def forward(self, x):
            y = F.pad(self.a(x), (0, 0, 0, 0, 2, 2), value=0.5)
            return self.head(y) + self.b(y.mean(1, keepdim=True)).mean((1, 2, 3)).unsqueeze(1)

    program = capture(Pads(), torch.randn(2, 3, 4, 4))
    result = RemoveChannels(ratio=0.5, round_to=1, kinds=KINDS)(program)
    exact(program, result)
    assert shapes(result.program)["head.fc.weight"] == (3, 2 + 4 + 2)
    assert "sums over padding" in Comb(program).why("head.fc.weight")


def test_padding_is_kept_unless_asked_for() -> None:
    class Pads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 8, 1), Head(14)

        def forward(self, x):
            return self.head(F.pad(self.a(x), (0, 0, 0, 0, 2, 4)))

    program = capture(Pads(), torch.randn(2, 3, 4, 4))
    found = [RemoveChannels(ratio=0.5, round_to=1, kinds=k)(program) for k in (("channel",), ("channel", "constant"))]
    for result, width in zip(found, (2 + 4 + 4, 1 + 4 + 2), strict=True):
        exact(program, result)
        assert shapes(result.program)["head.fc.weight"] == (3, width)


def test_repetitions_are_kept_unless_asked_for() -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 8, 1), Head(24)

        def forward(self, x):
            return self.head(self.a(x).repeat(1, 3, 1, 1))

    program = capture(Repeats(), torch.randn(2, 3, 4, 4))
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    exact(program, result)
    assert shapes(result.program)["head.fc.weight"] == (3, 12)
    result = RemoveChannels(ratio=0.5, round_to=1, kinds=("multiplier",))(program)
    exact(program, result)
    assert shapes(result.program)["head.fc.weight"] == (3, 16)


def test_padding_that_lost_an_inner_factor() -> None:
    """(1 + 9)·2 channels, shuffled: the padding loses the same inner index as the channels."""

    class Shuffles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 18, 1), nn.Conv2d(20, 6, 1), Head(6)

        def forward(self, x):
            y = F.pad(self.a(x), (0, 0, 0, 0, 2, 0), value=0.5)
            return self.head(self.b(nn.ChannelShuffle(10)(y)))

    program = capture(Shuffles(), torch.randn(2, 3, 4, 4))
    comb = Comb(program)
    masks = {g.atom: np.arange(g.size) % 2 == 0 for g in comb.groups if g.members[0] == ("a.weight", 0)}
    smaller, removed = remove(comb, masks)
    exact(program, PassResult(smaller, {}, removed))
    assert shapes(smaller)["a.weight"] == (5, 3, 1, 1)


def test_group_norm_over_tokens_that_can_go() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.norm, self.head = nn.Linear(5, 6), nn.GroupNorm(2, 4), nn.Linear(24, 3)

        def forward(self, x):
            return self.head(self.norm(self.mix(x)).flatten(1))

    program = capture(Tokens(), torch.randn(2, 4, 5))
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    exact(program, result)
    assert shapes(result.program)["mix.weight"] == (3, 5)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_over_channels_that_can_go(dim: int | None) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 12, 3), Head(12)
            self.body = nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 12, 3, padding=1), dim=dim)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.head(x + self.body(x).relu())

    program = capture(Residual(), torch.randn(2, 3, 6, 6))
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    exact(program, result)
    sizes = shapes(result.program)
    length = (6, 1, 1, 1) if dim == 0 else (1, 6, 1, 1) if dim == 1 else ()
    assert sizes["body.parametrizations.weight.original1"] == (6, 6, 3, 3)
    assert sizes["body.parametrizations.weight.original0"] == length


@pytest.mark.parametrize("way", ["index", "index_select", "gather"])
def test_looking_up_freezes_what_is_looked_up_and_lets_the_rest_go(way: str) -> None:
    class LooksUp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(5, 6, 1), Head(6)
            self.register_buffer("order", torch.tensor([7, 0, 3, 3, 1]))

        def forward(self, x):
            y = self.a(x)
            if way == "index":
                y = y[:, self.order]
            elif way == "index_select":
                y = y.index_select(1, self.order)
            else:
                y = y.gather(1, self.order.view(1, -1, 1, 1).expand(y.shape[0], -1, *y.shape[2:]))
            return self.head(self.b(y))

    program = capture(LooksUp(), torch.randn(2, 3, 4, 4))
    result = RemoveChannels(ratio=0.5, round_to=1, kinds=KINDS)(program)
    exact(program, result)
    assert shapes(result.program)["a.weight"] == (8, 3, 1, 1)
    assert shapes(result.program)["b.weight"][0] == 3
    assert "along the axis" in graphcomb.comb(program).why("a.weight")


def test_folding_windows_of_repeated_channels() -> None:
    class Folds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 6, 1), Head(6)

        def forward(self, x):
            y = self.a(x).repeat_interleave(2, 1)
            return self.head(self.b(F.fold(F.unfold(y, 2, stride=2), x.shape[2:], 2, stride=2)))

    program = capture(Folds(), torch.randn(2, 3, 4, 4))
    result = RemoveChannels(ratio=0.5, round_to=1, kinds=("multiplier",))(program)
    exact(program, result)
    assert shapes(result.program)["b.weight"] == (6, 4, 1, 1)


# ------------------------------------------------------------------------------------- found in the transformers library
def test_views_need_no_memory_layout() -> None:
    """The layout of what attention returns depends on the kernel: a view of it becomes a reshape."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.head = (
                nn.Linear(10, 12),
                nn.Linear(10, 12),
                nn.Linear(10, 12),
                nn.Linear(12, 3),
            )

        def forward(self, x):
            b, n, _ = x.shape
            q, k, v = (f(x).view(b, n, 3, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).view(b, n, 12)
            return self.head(y.mean(1))

    program = capture(Views(), torch.randn(2, 7, 10))
    assert all(n.target is not torch.ops.aten.view.default for n in program.graph.nodes)
    comb = Comb(program)
    masks = {g.atom: np.arange(g.size) < 2 for g in comb.groups if g.members[0] == ("v.weight", 0)}
    smaller, removed = remove(comb, masks)
    exact(program, PassResult(smaller, {}, removed))
    assert shapes(smaller)["v.weight"] == (6, 10)  # 3 heads of width 2, where q and k have 4


class Queries(nn.Module):
    """Learned queries repeated for every sample, as in DETR; frames in the batch and cut by it, as in TimeSformer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.queries = nn.Linear(10, 12), nn.Parameter(torch.randn(5, 12))
        self.q, self.kv, self.proj, self.head = nn.Linear(12, 12), nn.Linear(12, 24), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        b, t, n, c = x.shape
        y = self.stem(x.view(b * t, n, c))
        first = y[:b, 0].unsqueeze(1)
        q = self.q(self.queries.unsqueeze(0).repeat(b, 1, 1) + first).view(b, -1, 3, 4).transpose(1, 2)
        k, v = self.kv(y.view(b, t * n, 12)).view(b, t * n, 2, 3, 4).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, 5, 12)
        return self.head(self.proj(z).mean(1))


def test_queries_repeated_for_a_dynamic_batch() -> None:
    program = capture(Queries(), torch.randn(3, 4, 6, 10), dynamic_shapes="batch")
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    exact(program, result)
    found = shapes(result.program)
    assert (found["q.weight"], found["kv.weight"], found["proj.weight"]) == ((8, 6), (16, 6), (4, 8))
    assert found["queries"] == (5, 6)
    assert result.program.module()(torch.randn(7, 4, 6, 10)).shape == (7, 3)


def test_sizes_that_depend_on_data_freeze_what_they_touch() -> None:
    class Selects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)

        def forward(self, x):
            y = self.b(self.a(x).relu())
            chosen = y[y[:, 0] > 0].sum(0, keepdim=True)
            return self.c(y) + chosen.mean() * 0.1

    program = capture(Selects(), torch.randn(9, 6))
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    assert verify.surgery(program, result) <= 1e-10
    assert shapes(result.program)["a.weight"] == (4, 6)
    assert shapes(result.program)["b.weight"] == (5, 4)
    assert "selects by data" in Comb(program).why("b.weight")
