"""Sizes that a class can express: tied shares, refusals, and the class that takes them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphcomb
from graphcomb import BadInput, Unreachable
from graphcomb.passes import Distill, RemoveChannels

from ..depth.toys import PerMac


class C2f(nn.Module):
    """A YOLO-like block: the first convolution's channels in two, the second half goes on."""

    def __init__(self, width=16):
        super().__init__()
        self.width = width
        self.stem, self.cv1 = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 2 * width, 1)
        self.m = nn.Conv2d(width, width, 3, padding=1)
        self.cv2, self.head = nn.Conv2d(3 * width, 24, 1), nn.Linear(24, 5)

    def forward(self, x):
        y = list(self.cv1(self.stem(x).relu()).chunk(2, 1))
        y.append(self.m(y[-1]).relu())
        return self.head(self.cv2(torch.cat(y, 1)).relu().mean((2, 3)))


class Halves(nn.Module):
    """Takes the first half of the channels by arithmetic."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.a(x)
        half = x.shape[1] // 2
        return self.b(x[:, :half].relu()).mean((2, 3)), self.c(x[:, half:].relu()).mean((2, 3))


class Attention(nn.Module):
    """Computes the width of a head from the channels, as Swin's does."""

    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


class Transformer(nn.Module):
    def __init__(self, width=16, heads=4):
        super().__init__()
        self.stem, self.norm = nn.Linear(6, width), nn.LayerNorm(width)
        self.attn, self.mlp = (
            Attention(width, heads),
            nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)),
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.attn(self.norm(x))
        return self.head((x + self.mlp(x)).mean(1))


CASES = {
    "c2f": (C2f, (2, 3, 8, 8)),
    "halves": (Halves, (2, 3, 5, 5)),
    "transformer": (Transformer, (2, 7, 6)),
}


def prune(name, **options):
    torch.manual_seed(0)
    make, shape = CASES[name]
    model = make().eval()
    program = graphcomb.capture(model, torch.randn(shape))
    return model, program, RemoveChannels(**({"ratio": 0.5, "round_to": 1, "for_class": True} | options))(program)


@pytest.mark.parametrize("options", [{}, {"ratio": None, "macs": 0.5}, {"ratio": 0.6, "scope": "global"}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_class_takes_what_is_left(name, options):
    model, program, result = prune(name, **options)
    assert graphcomb.verify.surgery(program, result) <= 1e-10
    assert result.removed
    result.transplant(model)


def test_the_width_that_makes_the_scale_stays():
    torch.manual_seed(0)
    model = Transformer(heads=1).eval()
    result = RemoveChannels(ratio=0.5, round_to=1, for_class=True)(graphcomb.capture(model, torch.randn(2, 7, 6)))
    assert [row["what"] for row in result.record["changed"]] == ["mlp.0.weight:0"]
    assert any("scale from the width of a head" in row["why"] for row in result.record["refused"])
    result.transplant(model)


def test_without_it_a_class_does_not():
    model, _, result = prune("c2f", for_class=False, ratio=None, macs=0.45, scope="global")
    with pytest.raises(graphcomb.Refused, match="fixes a size"):
        result.transplant(model)


def test_tied_groups_keep_the_same_share_and_their_own_best():
    model, _, result = prune("c2f")
    sizes = [(row["what"], row["after"]) for row in result.record["changed"] if row["what"].startswith("cv1.weight:0")]
    assert [after for _, after in sizes] == [8, 8]
    tied = [row for row in result.record["tied"] if any(g.startswith("cv1") for g in row["groups"])]
    assert tied[0]["steps"] == 16
    assert "chunk(2, 1)" in tied[0]["why"]
    gone = result.removed["cv1.weight"][0]
    assert {i for i in gone if i < 16} != {i - 16 for i in gone if i >= 16}
    norms = model.cv1.weight.detach().flatten(1).norm(dim=1)
    assert len([i for i in gone if i < 16]) == 8
    assert norms.numel() == 32


def test_channels_follow_the_heads():
    model, _, result = prune("transformer")
    new = result.transplant(model)
    assert (new.attn.num_heads, new.attn.qkv.in_features, new.attn.qkv.out_features) == (2, 8, 24)
    assert new.norm.normalized_shape == (8,)


@pytest.mark.parametrize("schedule", ["one-shot", "adaptive"])
def test_while_training(schedule):
    torch.manual_seed(0)
    model = Transformer()
    data = [(torch.randn(4, 7, 6), torch.randint(3, (4,))) for _ in range(4)]
    program = graphcomb.capture(model.eval(), data[0][0], dynamic_shapes="batch")
    options = {"train": Distill(epochs=2, alpha=0.0), "schedule": schedule, "interval": 1, "round_to": 1}
    result = RemoveChannels(macs=0.5, for_class=True, importance="fisher", **options)(program, data=data)
    result.transplant(model)


def test_what_no_class_can_express_is_refused_with_the_line():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 2), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            left, right = torch.cat([x, self.a(x)], 1).chunk(2, 1)
            return self.b(left) * self.c(right)

    program = graphcomb.capture(Fixed(), torch.randn(2, 6))
    with pytest.raises(
        Unreachable, match=r"chunk\(2, 1\)\): a class splits into equal pieces, and something of it may not"
    ):
        RemoveChannels(ratio=0.25, round_to=1, for_class=True)(program)


def test_plans_and_patterns_move_what_is_tied():
    torch.manual_seed(0)
    model = Transformer().eval()
    program = graphcomb.capture(model, torch.randn(2, 7, 6))
    result = RemoveChannels(for_class=True, round_to=1, keep={"attn.qkv.weight*": 0.5})(program)
    assert result.transplant(model).attn.qkv.weight.shape == (24, 8)
    rows = RemoveChannels(for_class=True, round_to=1).plan(program)
    stem = next(r for r in rows if r["name"] == "stem.weight:0")
    assert (stem["keep"], stem["step"]) == (8, 4)
    stem["keep"] = 6
    with pytest.raises(
        BadInput, match=r"for_class: stem.weight:0 may not keep 6 of 16: it has to keep the same share as"
    ):
        RemoveChannels(for_class=True, round_to=1)(program, plan=rows)


def test_a_latency_target_is_met_with_ties():
    model = Transformer().eval()
    program = graphcomb.capture(model, torch.randn(2, 7, 6))
    result = RemoveChannels(latency=0.6, for_class=True, round_to=1)(program, latency=PerMac())
    assert result.record["latency"]["predicted"]["after"] <= 0.6 * result.record["latency"]["predicted"]["before"]
    result.transplant(model)


class Positions(nn.Module):
    """Adds sines of positions, which a class computes for the width that it has."""

    def __init__(self):
        super().__init__()
        self.width = 16
        self.first, self.hidden, self.last = nn.Linear(6, 16), nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x):
        x = self.first(x)
        angles = torch.arange(x.shape[1])[:, None] * torch.arange(1, self.width + 1)[None] / self.width
        return self.last(torch.relu(self.hidden(x + angles.sin())))


def test_a_table_of_positions_keeps_its_width():
    model = Positions().eval()
    program = graphcomb.capture(model, (torch.randn(2, 5, 6),))
    result = RemoveChannels(ratio=0.5, round_to=1, for_class=True)(program)
    assert result.transplant(model).hidden.weight.shape == (12, 16)
    assert any("computes this table" in row["why"] for row in result.record["refused"])
