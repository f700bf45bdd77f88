"""Splitting of fused projections: the same function, in every order in which models write q, k and v."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphcomb as g
from graphcomb.graph.comb.solve import Comb
from graphcomb.graph.nodes import op_name
from graphcomb.passes import RemoveChannels, SplitFused

HEADS, WIDTH = 3, 4
DIM = HEADS * WIDTH


class Attention(nn.Module):
    """Self-attention of one fused projection; `layout` says how its output is taken apart."""

    def __init__(self, layout):
        super().__init__()
        self.qkv, self.proj, self.layout = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), layout

    def forward(self, x):
        b, n, _ = x.shape
        y = self.qkv(x)
        match self.layout:
            case "view, permute, unbind":
                q, k, v = y.view(b, n, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
            case "reshape, permute, select":
                y = y.reshape(b, n, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
                q, k, v = y[0], y[1], y[2]
            case "unflatten, unbind, transpose":
                q, k, v = (t.transpose(1, 2) for t in y.unflatten(-1, (3, HEADS, WIDTH)).unbind(2))
            case "view, two transposes, unbind":
                q, k, v = y.view(b, n, 3, HEADS, WIDTH).transpose(1, 2).transpose(2, 3).unbind(1)
            case "view, permute, unbind from behind":
                q, k, v = y.view(b, n, 3, HEADS, WIDTH).permute(0, 3, 1, 4, 2).unbind(-1)
            case "only q and v are read":
                q, _, v = y.view(b, n, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
                k = q
            case "heads outermost":
                q, k, v = y.view(b, n, HEADS, 3, WIDTH).permute(3, 0, 2, 1, 4).unbind(0)
            case _:
                raise ValueError(self.layout)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, DIM))


LAYOUTS = [
    "view, permute, unbind", "reshape, permute, select", "unflatten, unbind, transpose", "view, two transposes, unbind",
    "view, permute, unbind from behind", "only q and v are read",
]  # fmt: skip


def captured(layout, dynamic="batch"):
    torch.manual_seed(0)
    model = Attention(layout).double().eval()
    return model, g.capture(model, (torch.randn(2, 5, DIM).double(),), dynamic_shapes=dynamic)


@pytest.mark.parametrize("dynamic", ["batch", None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_split_into_the_same_function(layout, dynamic):
    model, program = captured(layout, dynamic)
    result = SplitFused()(program)
    assert result.record["changed"] == [{"what": result.record["changed"][0]["what"], "parts": 3}]
    assert result.record["refused"] == []
    assert not any(op_name(n) in ("unbind", "select") for n in result.program.graph.nodes)
    x = torch.randn(3 if dynamic else 2, 5, DIM).double()
    torch.testing.assert_close(result.program.module()(x), model(x), rtol=1e-13, atol=1e-13)
    model(x).square().sum().backward()
    module = result.program.module()
    module(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(module.get_parameter(name).grad, p.grad, rtol=1e-12, atol=1e-12)


def test_the_parts_of_v_have_a_width_of_their_own_afterwards():
    _, program = captured(LAYOUTS[0])
    assert [grp.kind for grp in Comb(program).groups if not grp.frozen] == ["head", "head width"]
    split = SplitFused()(program).program
    groups = [grp for grp in Comb(split).groups if not grp.frozen]
    assert sorted(grp.kind for grp in groups).count("head width") == 2
    result = RemoveChannels(ratio=0.5, round_to=1, kinds=("head width",))(split)
    assert g.verify.surgery(split, result) < 1e-12


def test_heads_outside_of_the_parts_are_left_with_the_reason():
    model, program = captured("heads outermost")
    result = SplitFused()(program)
    assert result.record["changed"] == []
    assert "not the outermost" in result.record["refused"][0]["why"]
    x = program.args[0]
    torch.testing.assert_close(result.program.module()(x), model(x))


def test_a_projection_that_something_else_reads_is_left():
    class Both(Attention):
        def forward(self, x):
            y = self.qkv(x).view(*x.shape[:2], 3, HEADS, WIDTH)
            return super().forward(x), y.sum((2, 3, 4))

    torch.manual_seed(0)
    model = Both(LAYOUTS[0]).double().eval()
    x = torch.randn(2, 5, DIM).double()
    result = SplitFused()(g.capture(model, (x,)))
    for found, expected in zip(result.program.module()(x), model(x), strict=True):
        torch.testing.assert_close(found, expected)
