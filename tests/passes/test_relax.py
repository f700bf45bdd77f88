"""Blocks found in the graph, and their relaxation: exactly dense at l = 1, exactly mergeable at l = 0."""

import pytest
import torch
from depth_networks import NETWORKS, Add, Gate, captured, conv, head, mlp
from torch import nn

import graphcomb.graph as g
from graphcomb.graph.verify.evaluate import relative_error
from graphcomb.passes.batches import Batch
from graphcomb.passes.blocks import find_blocks
from graphcomb.passes.fuse import Fuse
from graphcomb.passes.relax import relax, set_switches, settle
from graphcomb.passes.start_norms import start_norms


@pytest.fixture(params=NETWORKS)
def network(request):
    model, kinds = NETWORKS[request.param]
    return captured(model()), kinds


def test_blocks_are_found_with_their_costs(network):
    program, kinds = network
    blocks = find_blocks(program)
    assert [b.kind for b in blocks] == kinds
    assert all(b.prunable for b in blocks), [b.why for b in blocks]
    assert all(0 < b.saves <= b.macs and b.kernels > 0 and b.params > 0 for b in blocks)
    assert [b.dropped for b in blocks] == [k == "attention" for k in kinds]
    assert len({b.name for b in blocks}) == len(blocks)


@pytest.mark.parametrize("fitted", [False, True], ids=["identity", "fitted"])
def test_one_is_dense_and_zero_is_mergeable(network, fitted):
    program, _ = network
    blocks = find_blocks(program)
    x = torch.randn(3, 3, 16, 12, dtype=torch.float64)
    with torch.no_grad():
        relaxed, settled = relax(program, blocks, fitted=fitted), relax(program, blocks, settled=True, fitted=fitted)
        if fitted:
            start_norms(relaxed, [Batch((x,), {}, None, 3)])
            settled = settle(program, blocks, relaxed, fitted=True)
        dense = program.module()(x)
        assert relative_error(relaxed.module()(x), dense) <= 1e-15
        set_switches(relaxed.module(), [0.0] * len(blocks))
        pruned = relaxed.module()(x)
        assert relative_error(pruned, dense) > 1e-4  # it is another function
        assert relative_error(settled.module()(x), pruned) <= 1e-14
        set_switches(relaxed.module(), [0.5] * len(blocks))
        assert relative_error(relaxed.module()(x), pruned) > 1e-5
        fused = Fuse()(settled)
        assert relative_error(fused.program.module()(x), pruned) <= 1e-10
    assert fused.program.macs == program.macs - sum(b.saves for b in blocks)  # as predicted
    for found in (relaxed, settled, fused.program):
        found.graph.lint()
        image = next(n for n in found.graph.nodes if n.op == "placeholder")
        assert not isinstance(image.meta["val"].shape[0], int)  # the batch is still dynamic


def test_single_blocks_can_be_switched(network):
    program, _ = network
    blocks = find_blocks(program)
    x = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    with torch.no_grad():
        all_of_them = relax(program, blocks)
        for i, block in enumerate(blocks):
            alone = relax(program, [block], settled=True)
            set_switches(all_of_them.module(), [float(j != i) for j in range(len(blocks))])
            assert relative_error(all_of_them.module()(x), alone.module()(x)) <= 1e-14


def test_trained_weights_settle_and_a_relaxed_program_is_stored(network, tmp_path):
    program, _ = network
    blocks = find_blocks(program)
    relaxed = relax(program, blocks)
    module = relaxed.module().train()
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    for left in (0.6, 0.0):
        set_switches(module, [left] * len(blocks))
        optimizer.zero_grad()
        module(torch.randn(6, 3, 16, 12, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    module.eval()
    x = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)
        assert relative_error(settle(program, blocks, relaxed).module()(x), expected) <= 1e-12
        loaded = g.load(relaxed.save(tmp_path / "relaxed.pt2"))
        assert relative_error(loaded.module()(x), expected) <= 1e-14


def test_without_a_tail_a_block_ends_linear():
    program = captured(NETWORKS["convnext"][0]())
    blocks = find_blocks(program)
    settled = relax(program, blocks, settled=True, tail=False)
    names = [str(n.target) for n in settled.graph.nodes]
    assert not any("gelu" in n for n in names)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: head(Add(nn.Sequential(conv(8, 8), Gate(8)))), "is no affine map"),
        (lambda: head(Add(nn.Sequential(conv(8, 8), nn.MaxPool2d(3, 1, 1)))), "is no affine map"),
        (lambda: head(Add(nn.Sequential(conv(8, 2, 1), conv(2, 8, 3)))), "would take"),
        (lambda: head(Add(nn.Sequential(conv(8, 8), nn.Conv2d(8, 8, 2, padding="same")))), "no centre"),
        (lambda: head(Add(nn.Sequential(nn.GroupNorm(2, 8), conv(8, 8)))), "average over it"),
        (lambda: head(Add(nn.Sequential(nn.LayerNorm((8, 16, 12)), conv(8, 8)))), "does not normalise over channels"),
    ],
)
def test_a_block_that_cannot_be_pruned_says_why(model, why):
    blocks = find_blocks(captured(model()))
    (found,) = [b for b in blocks if b.kind != "chain"]
    assert not found.prunable
    assert why in found.why
    assert found.saves is None


def test_a_value_used_outside_is_no_block():
    class Leak(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = conv(3, 8), conv(8, 8), conv(8, 8, act=False)

        def forward(self, x):
            x = self.stem(x)
            y = self.one(x)
            return (self.two(y) + x).mean((2, 3)) + y.mean((2, 3))

    assert not [b for b in find_blocks(captured(Leak())) if b.prunable]


def test_linear_branches_are_no_blocks():
    """A reparameterisable sum has nothing to relax; that is Fuse's."""
    assert [
        b.kind for b in find_blocks(captured(head(Add(conv(8, 8, act=False), conv(8, 8, 1, act=False), act=True))))
    ] == []


def test_blocks_behind_a_class_token():
    """The value that a tail follows is not made by a layer alone, and its size is no constant."""

    class Classed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
            self.block, self.head = mlp(8), nn.Linear(8, 4)

        def forward(self, x):
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], 1)
            return self.head(self.block(tokens)[:, 0])

    program = captured(Classed())
    (block,) = find_blocks(program)
    assert (block.kind, block.kernels) == ("mlp", 2)
    x = torch.randn(3, 3, 16, 12, dtype=torch.float64)
    with torch.no_grad():
        settled = relax(program, [block], settled=True)
        assert relative_error(Fuse()(settled).program.module()(x), settled.module()(x)) <= 1e-12
