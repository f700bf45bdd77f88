"""Orders of channels: exact, better for a pattern, and only where the comb says they are free."""

import itertools

import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb import verify
from graphcomb.graph import sparse as masks
from graphcomb.graph.errors import BadInput
from graphcomb.passes import Sparsify
from graphcomb.passes.sparse.permute import best_order, kept, permuted


class Network(nn.Module):
    """A residual stream of 16, a hidden width of 32, a concatenation, and a convolution in groups."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.wide, self.mid, self.narrow = nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.Conv2d(32, 16, 3, padding=1)
        self.one, self.two = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.join, self.last = nn.Conv2d(16, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.narrow(self.mid(self.wide(x)).relu())
        x = self.join(torch.cat([self.one(x), self.two(x)], 1).relu()).relu()
        return self.last(x.mean((2, 3)))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    model = Network()
    model(torch.randn(16, 3, 8, 8))
    return g.capture(model.eval(), torch.randn(2, 3, 8, 8), dynamic_shapes="batch")


NAMES = [f"{n}.weight" for n in ("wide", "narrow", "one", "two", "join")]


def test_the_function_stays_and_more_is_kept(program):
    result, rows = permuted(program, NAMES, (2, 4), 0)
    assert verify.equivalence(program, result) < 1e-12
    assert {n for r in rows for n in r["what"]} == {"narrow.weight"}, "not the residual stream, not a concatenation"
    assert all(r["kept_after"] > r["kept_before"] for r in rows)
    before, after = (p.module().get_parameter("narrow.weight") for p in (program, result))
    assert not torch.equal(before, after)
    assert torch.equal(before.detach().flatten().sort().values, after.detach().flatten().sort().values)
    assert torch.equal(program.module().get_parameter("stem.weight"), result.module().get_parameter("stem.weight"))


def test_a_wrong_order_of_one_tensor_would_show(program, monkeypatch):
    import graphcomb.passes.sparse.permute as module

    real = module.positions
    calls = itertools.count()
    monkeypatch.setattr(module, "positions", lambda a, o: real(a, o) if next(calls) else real(a, o)[::-1].copy())
    same, rows = permuted(program, NAMES, (2, 4), 0)
    assert same is program
    assert rows == []


def test_hill_climbing_finds_the_best_order_of_two_groups():
    squares = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    best = max(
        float(kept(squares[:, list(first) + [i for i in range(8) if i not in first]], (2, 4)))
        for first in itertools.combinations(range(8), 4)
    )
    order = best_order(squares, (2, 4), torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(8))
    assert float(kept(squares[:, order], (2, 4))) == pytest.approx(best)


def test_sparsify_loses_less_after_it(program):
    plain = Sparsify(pattern="2:4", where="all", method="magnitude")(program)
    better = Sparsify(pattern="2:4", where="all", method="magnitude", permute=True)(program)
    sums = [float(r.program.module().get_parameter("narrow.weight").detach().square().sum()) for r in (plain, better)]
    assert sums[1] > sums[0]
    assert better.record["permuted"][0]["what"] == ["narrow.weight"]
    assert all(masks.legal(masks.weight(better.program, n), "2:4") for n in better.record["sparse"])
    again = Sparsify(pattern="2:4", where="all", method="magnitude", permute=True)(better.program)
    assert any(r["what"] == "permute" for r in again.record["refused"])
    with pytest.raises(BadInput, match=r"Sparsify\.permute: only with a pattern"):
        Sparsify(sparsity=0.5, permute=True)
