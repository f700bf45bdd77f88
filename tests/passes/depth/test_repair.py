"""Blocks that go at once, without training: what is left is repaired from unlabelled images."""

import contextlib
import itertools

import pytest
import torch
from torch import nn

from graphcomb.graph.errors import BadInput, GraphcombError
from graphcomb.graph.nodes import fetch
from graphcomb.passes import Distill, Fuse, PruneDepth, Repair
from graphcomb.passes.depth import prune_depth
from graphcomb.passes.depth.price import find_blocks

from .toys import NETWORKS, Add, captured


def images(count=96, seed=0):
    x = torch.randn(count, 3, 16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return list(x.split(32))


def error(dense, other):
    x = torch.cat(images(seed=7))
    with torch.no_grad():
        wanted = dense.module()(x)
        return float((other.module()(x) - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize(("network", "names", "gain"), [
    ("resnet", ("1.body",), 20), ("mobilenet", ("1.body", "2"), 10), ("convnext", ("1.body",), 1),
    ("transformer", ("blocks.0.body", "blocks.3.body"), 5), ("plain", ("batch_norm_1",), 1.5),
])  # fmt: skip
def test_what_is_left_is_nearer_to_the_dense_network(network, names, gain, monkeypatch):
    program = captured(NETWORKS[network][0]())
    before = {k: v.clone() for k, v in program.module().state_dict().items()}
    result = PruneDepth(names=names, repair=True)(program, data=images())
    monkeypatch.setattr(Repair, "apply", lambda *rest: {})
    plain = PruneDepth(names=names, repair=True)(program, data=images()).program
    assert error(program, result.program) * gain < error(program, plain)
    assert {row["what"] for row in result.record["changed"]} == set(names)
    assert result.record["repair"]["repaired"]
    assert result.program.macs == plain.macs
    assert all(torch.equal(before[k], v) for k, v in program.module().state_dict().items()), "the input is untouched"


def test_a_merged_block_is_least_squares_on_what_it_gave(monkeypatch):
    """Two linear layers with an activation become one; it is fitted to the block's output in the dense network."""
    monkeypatch.setattr(prune_depth, "Repair", lambda: Repair(ridge=0.0))
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6))
    model = nn.Sequential(nn.Flatten(2), nn.Linear(192, 6), nn.GELU(), Add(body), nn.GELU(), nn.Linear(6, 4))
    program = captured(model)
    result = PruneDepth(names=("3.body",), repair=True)(program, data=images())
    (row,) = [r for r in result.record["repair"]["repaired"] if r["what"] == "3.body.0.weight"]
    x = torch.cat(images()).flatten(2)
    module, dense = result.program.module(), program.module()
    hidden = nn.functional.linear(x, fetch(dense, "1.weight"), fetch(dense, "1.bias")).detach()
    hidden = nn.functional.gelu(hidden).flatten(0, 1)
    goal = hidden + nn.functional.linear(
        nn.functional.gelu(nn.functional.linear(hidden, fetch(dense, "3.body.0.weight"), fetch(dense, "3.body.0.bias"))),
        fetch(dense, "3.body.2.weight"), fetch(dense, "3.body.2.bias"),
    ).detach()  # fmt: skip
    full = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)
    best = (full @ torch.linalg.lstsq(full, goal).solution - goal).square().sum() / (goal - goal.mean(0)).square().sum()
    assert row["after"] == pytest.approx(float(best), rel=1e-9)
    assert row["after"] == pytest.approx(row["predicted"], rel=1e-6)
    assert fetch(module, "3.body.0.weight").shape == (6, 6)


def test_what_a_layer_adds_makes_up_for_a_block_that_is_gone():
    """The last layer of the block behind is fitted to the dense sum less what the trunk still is."""
    program = captured(NETWORKS["transformer"][0]())
    pruned = PruneDepth(names=("blocks.0.body",), repair=True)(program, data=images())
    rows = {row["what"]: row for row in pruned.record["repair"]["repaired"]}
    assert rows["blocks.1.body.3.weight"]["sum"] == "add_1"
    assert rows["blocks.1.body.3.weight"]["after"] == pytest.approx(
        rows["blocks.1.body.3.weight"]["predicted"], rel=1e-6
    )
    assert "sum" not in rows["blocks.1.body.1.weight"]


def test_an_exact_merge_leaves_nothing_to_repair():
    """`Fuse` gives layers other meanings under old names; what they are compared with is what they stand for."""
    for network in ("resnet", "plain"):
        program = captured(NETWORKS[network][0]())
        fused = Fuse()(program).program
        result = Repair()(fused, data=images(), teacher=program)
        assert error(program, result.program) < 1e-20
        assert {row["kept"] for row in result.record["repaired"]} == {"nothing is lost here"}
        after = result.program.module().state_dict()
        assert all(torch.equal(after[name], value) for name, value in fused.module().state_dict().items())


def test_mistakes_are_one_line_each():
    program = captured(nn.Sequential(NETWORKS["resnet"][0]()))
    with pytest.raises(BadInput, match=r"^PruneDepth\.repair: false with `train`, in which blocks fade"):
        PruneDepth(names=("0.1.body",), repair=True, train=Distill(steps=1))
    with pytest.raises(BadInput, match=r"^PruneDepth\.repair: needs images \(labels are not needed\); pass data="):
        PruneDepth(names=("0.1.body",), repair=True)(program)


@pytest.mark.parametrize("target", [{"blocks": 2}, {"macs": 0.6}])
def test_a_target_needs_no_labels_and_takes_what_stays_nearest(target):
    program = captured(NETWORKS["resnet"][0]())
    with torch.no_grad():
        for name in [b.name for b in find_blocks(program) if b.prunable][:2]:  # what these add is next to nothing
            for key, tensor in program.module().state_dict().items():
                if key.startswith(name) and key.endswith("weight") and tensor.dim() > 1:
                    tensor.mul_(1e-3)
    before = {k: v.clone() for k, v in program.module().state_dict().items()}
    result = PruneDepth(repair=True, population=6, generations=2, **target)(program, data=images())
    assert result.record["train"] == {}
    assert result.record["search"]["supernet"] == {}
    assert result.record["search"]["score"] <= 0
    assert result.record["repair"]["repaired"]
    chosen = tuple(row["what"] for row in result.record["changed"])
    assert len(chosen) == target.get("blocks", len(chosen))
    assert result.program.macs <= target.get("macs", 1) * program.macs
    errors = {}
    for names in itertools.combinations([b.name for b in find_blocks(program) if b.prunable], len(chosen)):
        with contextlib.suppress(GraphcombError):  # such as for a choice that cuts the outputs off
            errors[names] = error(program, PruneDepth(names=names, repair=True)(program, data=images()).program)
    assert errors[chosen] <= 2 * min(errors.values())
    assert all(torch.equal(before[k], v) for k, v in program.module().state_dict().items()), "the input is untouched"
