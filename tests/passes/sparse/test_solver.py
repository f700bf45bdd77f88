"""The solver: what it predicts, how it is damped, and what it does with little memory."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphcomb as g
from graphcomb.graph.errors import Refused
from graphcomb.passes import Sparsify
from graphcomb.passes.base import Context
from graphcomb.passes.common.weights import layers
from graphcomb.passes.sparse import cap
from graphcomb.passes.sparse.layout import to_blocks
from graphcomb.passes.sparse.solver import Method, Solver
from graphcomb.passes.sparse.statistics import fisher
from graphcomb.passes.sparse.statistics.gradients import Gradients

from .toys import batches, weights


@pytest.mark.parametrize("method", ["cap", "woodfisher"])
def test_the_predicted_loss_is_what_the_gradients_say_whatever_the_damping(program, method):
    data, options = batches(), {"sparsity": 0.5, "gradients": 32, "block": 48, "dtype": "fp64", "include": "proj*"}
    for damping in (1e-6, 1e-2, 1.0):
        result = Sparsify(method=method, damping=damping, **options)(program, data=data)
        change = (weights(result.program)["proj.weight"] - weights(program)["proj.weight"]).double()
        expected = 0.0
        for part in Gradients(32, "sample", "labels").stream(
            program.copy(), ["proj.weight"], Context(data=data), 10**9
        ):
            for x in part["proj.weight"].double():
                expected += float(to_blocks(x * change, 48).sum(1).square().sum()) / 32 / 2
        assert result.record["stages"][0]["steps"][0]["predicted_loss"] == pytest.approx(expected, rel=1e-4)


def test_zeros_shared_out_by_increments_lose_less_than_by_cumulated_losses(trained):
    dense, train, _ = trained
    options = {"sparsity": 0.75, "gradients": 256, "block": 32}
    losses = {}
    for by_increments in (True, False):
        kind = type("Sparsify", (Sparsify,), {"by_increments": by_increments})
        result = kind(**options)(dense, data=train)
        losses[by_increments] = result.record["stages"][0]["steps"][0]["predicted_loss"]
    assert losses[True] < losses[False]


def test_nearly_empty_outputs_are_finished_where_that_is_asked_for(trained):
    dense, train, _ = trained
    empty, zeros, losses = {}, {}, {}
    for discount in (0.0, 0.9, 0.995):
        result = Sparsify(sparsity=0.8, gradients=256, block=32, finish_rows=discount)(dense, data=train)
        found = [weights(result.program)[row["what"]] for row in result.record["changed"]]
        empty[discount] = sum(int((w.flatten(1) == 0).all(1).sum()) for w in found)
        zeros[discount] = sum(int((w == 0).sum()) for w in found)
        losses[discount] = result.record["stages"][0]["steps"][0]["predicted_loss"]
    assert zeros[0.0] == zeros[0.9] == zeros[0.995]
    assert empty[0.0] <= empty[0.9] <= empty[0.995]
    assert empty[0.0] < empty[0.995]
    assert losses[0.0] <= losses[0.995]  # what it costs


@pytest.mark.parametrize("options", [{"method": "magnitude"}, {"pattern": "2:4"}])
def test_outputs_are_finished_by_cap_alone_and_without_a_pattern(options):
    with pytest.raises(g.BadInput, match=r"^Sparsify\.finish_rows: 0 without method cap"):
        Sparsify(finish_rows=0.5, **options)


def test_a_block_that_float32_cannot_eliminate_is_eliminated_in_float64_and_no_weight_is_missed(program, monkeypatch):
    right, seen = cap.eliminate, []

    def narrow(weights, inverse, *more):
        seen.append(weights.dtype)
        if weights.dtype == torch.float32:
            raise cap.Imprecise("planted")
        return right(weights, inverse, *more)

    monkeypatch.setattr(cap, "eliminate", narrow)
    result = Sparsify(sparsity=0.6, gradients=32, block=16)(program, data=batches())
    assert {torch.float32, torch.float64} == set(seen)
    names = [row["what"] for row in result.record["changed"]]
    before, after = weights(program), weights(result.program)
    zeros = sum(int((after[n] == 0).sum()) for n in names)
    assert zeros == round(0.6 * sum(before[n].numel() for n in names))


def test_a_matrix_that_float64_cannot_eliminate_either_is_refused(program, monkeypatch):
    def narrow(*args):
        raise cap.Imprecise("the elimination lost all digits in torch.float64")

    monkeypatch.setattr(cap, "eliminate", narrow)
    with pytest.raises(Refused, match=r"conv.weight: .*give a larger Sparsify.damping"):
        Sparsify(sparsity=0.6, gradients=32, block=16)(program, data=batches())


def test_the_update_leaves_no_gradient_step_to_take(program):
    """On the quadratic model the kept weights are where its gradient vanishes: `F (w' - w)` is zero on them."""
    data = batches()
    result = Sparsify(sparsity=0.5, gradients=32, block=48, dtype="fp64", damping=1e-4, include="proj*")(
        program, data=data
    )
    old, new = weights(program)["proj.weight"], weights(result.program)["proj.weight"]
    found = fisher.Fisher(6, 48, 32, 1e-4, torch.float64)
    for part in Gradients(32, "sample", "labels").stream(program.copy(), ["proj.weight"], Context(data=data), 10**9):
        found.add(torch.stack([to_blocks(x, 48) for x in part["proj.weight"]]))
    pull = torch.einsum("bij,bj->bi", found.matrix(slice(0, 6)), to_blocks(new - old, 48).double())
    kept = to_blocks(new, 48) != 0
    kept[-1, 256 - 5 * 48 :] = False
    assert pull[kept].abs().max() < 1e-4 * pull[~kept].abs().max()


@pytest.mark.parametrize("method", ["cap", "woodfisher"])
def test_the_damping_is_in_proportion_to_the_gradients(program, method):
    """So that the scale of the loss decides nothing."""
    data, options = batches(), {"sparsity": 0.5, "gradients": 24, "block": 32, "dtype": "fp64", "method": method}
    names = ["conv.weight", "qkv.weight", "proj.weight"]
    made = list(Gradients(24, "sample", "labels").stream(program.copy(), names, Context(data=data), 10**9))
    squares = torch.cat([g[name].double().square().flatten() for g in made for name in names])
    found = [
        Sparsify(**options)(program, data=data, loss=lambda out, y, k=k: k * F.cross_entropy(out, y))
        for k in (1.0, 16.0)
    ]
    steps = [f.record["stages"][0]["steps"][0] for f in found]
    assert steps[0]["damping"] == pytest.approx(1e-2 * float(squares.mean()), rel=1e-5)
    assert steps[1]["damping"] == pytest.approx(256 * steps[0]["damping"], rel=1e-5)
    for name, w in weights(found[0].program).items():
        torch.testing.assert_close(weights(found[1].program)[name], w, rtol=1e-4, atol=1e-6)
    given = Sparsify(damping=1e-8, **options)(program, data=data)
    assert given.record["stages"][0]["steps"][0]["damping"] == 1e-8


def test_a_small_memory_gives_the_same_result(program):
    data = batches()
    options = {"sparsity": 0.6, "gradients": 24, "block": 32, "dtype": "fp64"}
    whole = Sparsify(memory=1e9, **options)(program, data=data)
    for memory in (1e6, 2e6):
        split = Sparsify(memory=memory, **options)(program, data=data)
        for name, w in weights(whole.program).items():
            torch.testing.assert_close(weights(split.program)[name], w, rtol=1e-5, atol=1e-6)
    assert split.record["stages"][0]["steps"][0]["gradients"] == 24


@pytest.mark.parametrize("method", ["cap", "woodfisher"])
def test_sums_of_two_batches_are_never_there_together(program, monkeypatch, method):
    alive, most = weakref.WeakSet(), []

    class Counted(fisher.Fisher):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)
            most.append(sum(f.sums.numel() * f.sums.itemsize for f in alive))

    monkeypatch.setattr(fisher, "Fisher", Counted)
    Sparsify(sparsity=0.5, method=method, memory=1e6, gradients=32, block=32, dtype="fp64")(program, data=batches())
    assert sum(most) > 1e6
    assert max(most) <= 1e6 / 4


def test_memory_is_cut_into_batches_of_blocks(program):
    method = Method("cap", 0.5, True, 32, Gradients(1000, "sample", "labels"), None, "fp32", 1e6)
    solver = Solver(method, program.copy(), layers(program)[0], Context())
    found = solver._batches()
    assert len(found) > 1
    for batch in found:
        assert sum(fisher.Fisher.numbers(p.count * p.size, p.size, 1000) * 4 for p in batch) <= 1e6
    pieces = [(p.layer.name, i) for batch in found for p in batch for i in range(p.start, p.stop)]
    assert len(set(pieces)) == len(pieces) == sum(-(-x.size // min(32, x.size)) for x in layers(program)[0])


@pytest.mark.parametrize("method", ["sparsegpt", "fastcap", "cap"])
def test_zeros_that_lie_unevenly_count_in_full(method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 300), nn.ReLU(), nn.Linear(300, 40), nn.ReLU(), nn.Linear(40, 5))
    net[2].weight.data[:, :100] = 0
    program = g.capture(net, torch.randn(8, 16), dynamic_shapes="batch")
    data = [(torch.randn(8, 16), torch.randint(5, (8,))) for _ in range(4)]
    for share in (0.5, 0.25):
        result = Sparsify(sparsity=share, method=method, gradients=32, block=64)(program, data=data)
        assert int((weights(result.program)["2.weight"] == 0).sum()) == max(share, 1 / 3) * 12000


def test_wanda_counts_zeros_before_weights_of_dead_inputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 5))
    net[0].weight.data[:8], net[0].bias.data[:8] = 0, -1
    net[2].weight.data[:, 16:24] = 0
    program = g.capture(net, torch.randn(8, 16), dynamic_shapes="batch")
    result = Sparsify(sparsity=0.5, method="wanda")(program, data=[torch.randn(8, 16) for _ in range(4)])
    assert (weights(result.program)["2.weight"] == 0).sum(1).eq(16).all()
