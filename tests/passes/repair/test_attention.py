"""Queries and keys whose heads lost channels: mixes against least squares on the logits, and what is left alone."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphcomb
from graphcomb.graph.nodes import fetch
from graphcomb.passes import RemoveChannels, Repair, Sparsify

WIDTH, HEADS, TOKENS = 24, 2, 7


class Attention(nn.Module):
    """Attention in several spellings, over `(n, tokens, channels)`."""

    def __init__(self, form: str):
        super().__init__()
        groups = 1 if form.startswith("grouped") else HEADS
        self.form, self.size = form, 8
        self.q, self.k = nn.Linear(WIDTH, HEADS * 8), nn.Linear(WIDTH, groups * 8)
        self.v, self.out = nn.Linear(WIDTH, groups * 8), nn.Linear(HEADS * 8, WIDTH)
        if form == "fused":
            self.qkv = nn.Linear(WIDTH, 3 * HEADS * 8)
        self.norm = nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x):
        n, t, _ = x.shape
        form = self.form
        if form == "fused":
            q, k, v = self.qkv(x).reshape(n, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if form == "tied":
            k = q
        if form == "norm":
            q = F.normalize(q, dim=-1)
        if form == "rope":
            angle = torch.arange(t, dtype=x.dtype)[:, None]
            q = torch.cat([q[..., :4] * angle.cos() - q[..., 4:] * angle.sin(), q[..., 4:] + q[..., :4]], -1)
        if form == "grouped repeat":
            k, v = (a.repeat_interleave(HEADS, 1) for a in (k, v))
        if form == "matmul":
            y = ((q * 8**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        elif form == "grouped":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Network(nn.Module):
    def __init__(self, form: str):
        super().__init__()
        self.up, self.attention, self.head = nn.Linear(5, WIDTH), Attention(form), nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.up(x)
        return self.head((x + self.attention(x)).mean(1))


def network(form: str, dependent: bool = False) -> graphcomb.Program:
    torch.manual_seed(0)
    model = Network(form).double().eval()
    a = model.attention
    with torch.no_grad():
        for layer in (a.q, a.k, *([a.qkv] if form == "fused" else [])):
            layer.weight *= 3  # so that attention is not uniform
            if dependent:  # in each head, each second channel is a multiple of the one before it
                layer.weight[1::2], layer.bias[1::2] = 0.25 * layer.weight[::2], 0.25 * layer.bias[::2]
    return graphcomb.capture(model, torch.zeros(2, TOKENS, 5).double(), dynamic_shapes="batch")


def data(count: int = 60, seed: int = 0) -> list[torch.Tensor]:
    x = torch.randn(count, TOKENS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return list(x.split(20))


def pruned(program: graphcomb.Program, repair: bool = False, **options) -> graphcomb.passes.PassResult:
    options = {"ratio": 0.5, "round_to": 1, "kinds": ("head width",), "exclude": ("attention.v.*",), **options}
    return RemoveChannels(**options, repair=repair)(program, data=data())


def error(dense: graphcomb.Program, other: graphcomb.Program) -> float:
    x = torch.cat(data(80, 3))
    with torch.no_grad():
        wanted = dense.module()(x)
        return float((other.module()(x) - wanted).square().mean() / wanted.var()) ** 0.5


FORMS = ["plain", "fused", "matmul", "grouped", "grouped repeat"]


@pytest.mark.parametrize("form", FORMS)
def test_queries_and_keys_that_depend_on_one_another_come_back_whole(form: str) -> None:
    dense = network(form, dependent=True)
    options = {"exclude": ()} if form == "fused" else {}
    assert error(dense, pruned(dense, **options).program) > 1e-4
    result = pruned(dense, repair=True, **options)
    name = "attention.qkv.weight" if form == "fused" else "attention.q.weight"
    assert set(result.removed[name][0]) >= set(range(1, HEADS * 8, 2))
    row = next(row for row in result.record["repair"]["repaired"] if row["what"] == name)
    assert row["before"] > 1e-3
    assert row["after"] < 1e-20
    assert error(dense, result.program) < 1e-10
    assert graphcomb.verify.surgery(dense, result) < 1e-10


@pytest.mark.parametrize("form", ["plain", "matmul", "grouped"])
def test_mixes_are_least_squares_on_the_logits(form: str) -> None:
    dense = network(form)
    cut = pruned(dense)
    result = Repair(ridge=0.0, include=("attention.q.*",))(cut.program, data=data(), teacher=dense)
    (row,) = result.record["repaired"]
    x, losses, powers = torch.cat(data()), 0.0, 0.0

    def heads(program: graphcomb.Program, name: str, width: int) -> torch.Tensor:
        module = program.module()
        hidden = F.linear(x, fetch(module, "up.weight"), fetch(module, "up.bias"))
        y = F.linear(hidden, fetch(module, f"attention.{name}.weight"), fetch(module, f"attention.{name}.bias"))
        return y.detach().unflatten(-1, (-1, width)).transpose(1, 2)

    q, k, whole_q, whole_k = (heads(p, n, w) for p, w in ((cut.program, 4), (dense, 8)) for n in ("q", "k"))
    after = heads(result.program, "q", 4)
    for head in range(HEADS):
        of = 0 if form == "grouped" else head
        goal = (whole_q[:, head] @ whole_k[:, of].mT).flatten()
        rows = torch.einsum("bni,bmj->bnmij", q[:, head], k[:, of]).flatten(3).flatten(0, 2)
        mix = torch.linalg.lstsq(rows, goal[:, None]).solution.reshape(4, 4)
        torch.testing.assert_close(after[:, head], q[:, head] @ mix, rtol=1e-9, atol=1e-9)
        losses += float(((after[:, head] @ k[:, of].mT).flatten() - goal).square().sum())
        powers += float(goal.square().sum())
    assert row["predicted"] == pytest.approx(losses / powers, rel=1e-9)
    assert row["after"] == pytest.approx(losses / powers, rel=1e-9)
    assert row["predicted"] < row["before"]
    assert row["rows"] == HEADS * len(x) * TOKENS**2


@pytest.mark.parametrize("form", FORMS)
def test_what_is_left_is_nearer_to_the_dense_network(form: str) -> None:
    dense = network(form)
    options = {"exclude": ()} if form == "fused" else {}
    assert error(dense, pruned(dense, repair=True, **options).program) < 0.8 * error(
        dense, pruned(dense, **options).program
    )


def test_heads_that_are_gone_are_no_matter() -> None:
    dense = network("plain")
    once = RemoveChannels(ratio=0.5, round_to=1, kinds=("head",))(dense)
    twice = pruned(once.program)
    result = Repair(include=("attention.q.*",))(twice.program, data=data(), teacher=dense)
    (row,) = result.record["repaired"]
    assert row["after"] == pytest.approx(row["predicted"], rel=1e-9)
    assert row["predicted"] < row["before"]


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ("norm", r"^div\w* stands between the queries and their projection$"),
        ("rope", r"^cat\w* stands between the queries and their projection$"),
        ("tied", r"^scaled_dot_product_attention reads its queries elsewhere, too$"),
    ],
)
def test_queries_that_cannot_be_mixed_are_named_with_the_reason(form: str, why: str) -> None:
    result = pruned(
        network(form), repair=True, kinds=("head width", "multiplier", "channel"), include=("attention.q.*",)
    )
    (reason,) = [r["why"] for r in result.record["repair"]["refused"] if not r["what"].startswith("attention.v")]
    assert re.search(why, reason)


def test_wide_heads_and_sparse_queries_stay_as_they_are() -> None:
    dense = network("plain")
    result = Repair(unknowns=15)(pruned(dense).program, data=data(), teacher=dense)
    assert {"what": "attention.q.weight", "why": "16 unknowns for each head, and 15 are the most"} in result.record[
        "refused"
    ]
    sparse = Sparsify(sparsity=0.3, method="magnitude", include=("attention.q.*",))(dense).program
    cut = pruned(sparse)
    result = Repair()(cut.program, data=data(), teacher=sparse)
    (row,) = [r for r in result.record["refused"] if r["what"] == "attention.q.weight"]
    assert row["why"].startswith("Sparsify made the weight of the queries sparse")
    assert torch.equal(
        fetch(result.program.module(), "attention.q.weight"), fetch(cut.program.module(), "attention.q.weight")
    )
