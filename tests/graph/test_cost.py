"""Multiply-accumulates are those of torch's own counter; what cannot be counted is said and never taken for nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.backends import mkldnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import graphcomb as g
from graphcomb import Program, capture
from graphcomb.graph.comb.solve import Comb
from graphcomb.graph.cost import COUNTS
from graphcomb.graph.errors import Refused
from graphcomb.graph.workload.layers import Layers
from graphcomb.passes import PruneDepth, RemoveChannels

from .toys import CASES

Sizes = tuple[int, ...]


class Calls(nn.Module):
    """A function of the inputs, of parameters of some shapes and of modules."""

    def __init__(self, function: Callable[..., Any], *given: Sizes | nn.Module):
        super().__init__()
        self.function = function
        self.given = [str(i) for i in range(len(given))]
        for name, what in zip(self.given, given, strict=True):
            setattr(self, f"given{name}", what if isinstance(what, nn.Module) else nn.Parameter(torch.randn(what)))

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs, *(getattr(self, f"given{name}") for name in self.given))


def deformed(x: Sizes, weight: Sizes, *rest: Any, out_shape: Sizes, **more: Any) -> int:
    """What a deformable convolution takes, which torch's counter does not know: as much as any convolution."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def counted(model: nn.Module, *inputs: torch.Tensor) -> float:
    """Half of what torch's counter says; attention and recurrence spelled out, as the counter knows no
    kernels for processors."""
    more = {torch.ops.torchvision.deform_conv2d: deformed}
    with (
        FlopCounterMode(display=False, custom_mapping=more) as counter,
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        mkldnn.flags(enabled=False),
    ):
        model.eval()(*inputs)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", CASES)
def test_macs_of_every_micro_model_are_those_of_torch(name: str) -> None:
    case = CASES[name]
    model, x = case.model(), torch.randn(case.shape)
    program = capture(model, x)
    assert program.macs == counted(model, x)
    if not any(group.frozen is None for group in Comb(program).groups):
        return
    result = RemoveChannels(ratio=0.5, round_to=1)(program).program
    assert result.macs == counted(result.module(), x) == result.copy().macs


def einsum(equation: str, *shapes: Sizes) -> tuple[nn.Module, tuple[Sizes, ...]]:
    return Calls(lambda x, *w: torch.einsum(equation, x, *w), *shapes[1:]), shapes[:1]


LIKE_TORCH: dict[str, tuple[nn.Module, tuple[Sizes, ...]]] = {
    "an ellipsis": einsum("...ij,kj->...ik", (2, 3, 5, 6), (4, 6)),
    "a transposition": einsum("btc->cbt", (2, 5, 6)),
    "an outer product": einsum("bi,bj->bij", (2, 5), (2, 6)),
    "a scale": einsum("bchw,c->bchw", (2, 5, 3, 3), (5,)),
    "a sum": einsum("bij->bj", (2, 5, 6)),
    "a dot product": einsum("i,i->", (6,), (6,)),
    "a diagonal": einsum("bii->b", (2, 5, 5)),
    "what only one operand has, summed": einsum("bij,kj->bk", (2, 5, 6), (4, 6)),
    "a batch": einsum("bhqd,bhkd->bhqk", (2, 3, 5, 6), (2, 3, 4, 6)),
    "a size of one": einsum("bij,ij->b", (1, 5, 6), (5, 6)),
    "three operands": einsum("bi,oij,bj->bo", (2, 5), (4, 5, 6), (2, 6)),
    "four operands": einsum("ab,bc,cd,de->ae", (3, 4), (4, 5), (5, 6), (6, 7)),
    "no arrow": einsum("ij,jk", (3, 4), (4, 5)),
    "lstm with projections": (Calls(lambda x, m: m(x)[0], nn.LSTM(5, 6, proj_size=4)), ((3, 7, 5),)),
    "gru": (Calls(lambda x, m: m(x)[0], nn.GRU(5, 6, 2, bidirectional=True, batch_first=True)), ((3, 7, 5),)),
    "gru without a batch": (Calls(lambda x, m: m(x)[0], nn.GRU(5, 6)), ((7, 5),)),
    "rnn": (Calls(lambda x, m: m(x)[0], nn.RNN(5, 6, 2)), ((3, 7, 5),)),
    "lstm cell": (Calls(lambda x, m: m(x)[0], nn.LSTMCell(5, 6)), ((3, 5),)),
    "gru cell": (Calls(lambda x, m: m(x), nn.GRUCell(5, 6)), ((3, 5),)),
    "attention": (Calls(lambda x, m: m(x, x, x)[0], nn.MultiheadAttention(12, 3, batch_first=True)), ((2, 5, 12),)),
    "encoder": (nn.TransformerEncoderLayer(12, 3, 24, batch_first=True), ((2, 5, 12),)),
    "tensordot": (Calls(lambda x, w: torch.tensordot(x, w, dims=([2, 1], [0, 1])), (6, 5, 4)), ((3, 5, 6),)),
    "inner": (Calls(torch.inner, (4, 6)), ((3, 5, 6),)),
    "broadcast product": (Calls(torch.matmul, (3, 1, 6, 4)), ((2, 5, 6),)),
    "transposed convolution": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), ((2, 4, 5, 5),)),
    "same padding": (nn.Conv3d(4, 6, 3, padding="same", dilation=2, groups=2), ((2, 4, 5, 5, 5),)),
    "condition": (
        Calls(
            lambda x, a, b: torch.cond(x.sum() > 0, lambda x: a(x), lambda x: b(b(x)), (x,)),
            nn.Linear(6, 6),
            nn.Linear(6, 6),
        ),
        ((3, 6),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIKE_TORCH)
def test_macs_of_rarer_operators_are_those_of_torch(name: str) -> None:
    model, shapes = LIKE_TORCH[name]
    inputs = [torch.ones(s) for s in shapes]
    expected = counted(model, *inputs)
    program = capture(model, tuple(inputs))
    assert program.macs == expected == Comb(program).macs()
    assert "unknown" not in program.cost()


BY_HAND: dict[str, tuple[nn.Module, tuple[Sizes, ...], int]] = {
    "lstm": (
        Calls(lambda x, m: m(x)[0], nn.LSTM(5, 6, 2, bidirectional=True)), ((3, 7, 5),),
        3 * 7 * 2 * 24 * ((5 + 6) + (12 + 6)),
    ),
    "bilinear": (nn.Bilinear(5, 6, 7), ((3, 5), (3, 6)), 3 * 7 * 5 * 6),
    "deformable convolution": (
        Calls(lambda x, o, w: torchvision.ops.deform_conv2d(x, o, w, padding=1), (8, 2, 3, 3)),
        ((2, 4, 6, 6), (2, 18, 6, 6)), 2 * 8 * 36 * 2 * 9,
    ),
    "matrix and vector": (Calls(torch.mv, (6,)), ((3, 6),), 18),
    "dot": (Calls(torch.dot, (6,)), ((6,),), 6),
    "addbmm": (Calls(lambda x, w, b: torch.addbmm(b, x, w), (3, 6, 4), (5, 4)), ((3, 5, 6),), 3 * 5 * 6 * 4),
    "vecdot": (Calls(torch.linalg.vecdot, (6,)), ((3, 5, 6),), 90),
    "cdist": (Calls(torch.cdist, (4, 6)), ((5, 6),), 5 * 4 * 6),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_macs_that_the_counter_of_torch_leaves_out(name: str) -> None:
    """Kernels for processors, and operators that are no matrix product to it."""
    model, shapes, expected = BY_HAND[name]
    program = capture(model, tuple(torch.randn(s) for s in shapes))
    assert program.macs == expected == Comb(program).macs()


# -------------------------------------------------------------------------------------------------- what is not known
@torch.library.custom_op("costtest::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def odd_ones() -> Program:
    """A product whose cost is not written down, and an operator that only its author knows."""
    model = Calls(
        lambda x, w, a, b: b(a(torch.ops.costtest.twice(torch.linalg.multi_dot([x, w, w]))).relu()),
        (6, 6), nn.Linear(6, 16), nn.Linear(16, 3),
    )  # fmt: skip
    return capture(model, torch.randn(5, 6))


def test_what_is_not_known_is_said() -> None:
    program = odd_ones()
    found = program.cost()["unknown"]
    assert [text.split()[0] for text in found] == ["linalg_multi_dot", "twice"]
    assert "say so with graphcomb.counts" in found[1]
    with pytest.warns(UserWarning, match="linalg_multi_dot"):
        assert program.macs == 5 * (6 * 16 + 16 * 3)
    assert "at least 720 MACs" in repr(program)
    assert Comb(program).cost({})["unknown"] == found


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: RemoveChannels(macs=0.5, round_to=1), r"^RemoveChannels\.macs: linalg_multi_dot .* is not known"),
        (lambda: PruneDepth(macs=0.9), r"^PruneDepth\.macs: linalg_multi_dot .* is not known"),
    ],
)
def test_a_target_in_macs_is_refused_where_not_all_are_known(make: Any, field: str) -> None:
    with pytest.raises(Refused, match=field):
        make()(odd_ones(), data=[torch.randn(5, 6)])


def test_a_target_in_parameters_needs_no_macs() -> None:
    program = odd_ones()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = RemoveChannels(params=0.9, round_to=1)(program)
    assert "unknown" in result.record["cost"]["after"]


@pytest.mark.parametrize("name", ["bilinear", "deformable convolution"])
def test_the_latency_of_what_is_no_layer_is_refused(name: str) -> None:
    model, shapes, _ = BY_HAND[name]
    with pytest.raises(Refused, match=r"^latency: .* is not known$"):
        Layers(Comb(capture(model, tuple(torch.randn(s) for s in shapes))))


def test_an_author_says_what_an_operator_multiplies() -> None:
    g.counts("costtest::twice")(lambda node, a: [[(a["x"], 0), (a["x"], 1), 7]])
    try:
        model = Calls(lambda x, a, b: b(torch.ops.costtest.twice(a(x))), nn.Linear(6, 16), nn.Linear(16, 3))
        program = capture(model, torch.randn(5, 6))
        assert program.macs == 5 * (6 * 16 + 16 * 7 + 16 * 3)
        assert "unknown" not in program.cost()
    finally:
        del COUNTS["costtest::twice"]


# ------------------------------------------------------------------------------------------------------------- edits
def test_macs_are_fresh_after_the_head_is_swapped() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 10))
    for program in (
        capture(model, torch.randn(5, 6)),
        RemoveChannels(round_to=1)(capture(model, torch.randn(5, 6))).program,
    ):
        width = program.module().get_parameter("2.weight").shape[1]
        assert program.macs == 5 * (6 * width + width * 10)
        head = program.module().get_submodule("2")
        head.weight, head.bias = nn.Parameter(torch.randn(3, width)), nn.Parameter(torch.randn(3))
        assert program.macs == 5 * (6 * width + width * 3) == Comb(program).macs()
        assert program.params == (6 + 1) * width + (width + 1) * 3
        assert program.graph.find_nodes(op="output")[0].all_input_nodes[0].meta["val"].shape == (5, 3)


def test_macs_are_fresh_after_an_edit_of_the_graph() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 10))
    program = RemoveChannels(round_to=1)(capture(model, torch.randn(5, 6))).program
    before = program.macs
    (last,) = (n for n in program.graph.nodes if n.name == "linear_1")
    last.replace_all_uses_with(last.args[0])
    program.graph.erase_node(last)
    assert program.macs == before - 5 * 8 * 10


def test_a_linear_layer_with_one_row_and_attention_with_one_query_for_all() -> None:
    program = capture(Calls(nn.functional.linear, (6,)), torch.randn(2, 6))
    assert program.macs == 12
    attend = Calls(lambda q, k: nn.functional.scaled_dot_product_attention(q, k, k))
    program = capture(attend, (torch.randn(1, 8, 5, 6), torch.randn(2, 8, 7, 6)))
    assert program.macs == 2 * (2 * 8 * 5 * 7 * 6) == counted(attend, *program.args)
