"""Relaxation of blocks: exactly dense at l = 1, exactly mergeable at l = 0."""

import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.graph.errors import BadInput
from graphcomb.graph.verify.evaluate import relative_error
from graphcomb.passes import Fuse
from graphcomb.passes.common.feed import Batch
from graphcomb.passes.depth.price import find_blocks
from graphcomb.passes.depth.relax import relax, set_switches, settle
from graphcomb.passes.depth.start_norms import start_norms

from .toys import NETWORKS, Add, Attention, Tokens, captured, conv, head


@pytest.mark.parametrize("fitted", [False, True], ids=["identity", "fitted"])
def test_one_is_dense_and_zero_is_mergeable(network, fitted):
    program, _ = network
    blocks = find_blocks(program)
    x = torch.randn(3, 3, 16, 12, dtype=torch.float64)
    with torch.no_grad():
        relaxed, settled = relax(program, blocks, fitted=fitted), relax(program, blocks, settled=True, fitted=fitted)
        if fitted:
            start_norms(relaxed, [Batch((x,), {}, None, 3)])
            settled = settle(relax(program, blocks, True, fitted=True), relaxed)
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


class Parallel(nn.Module):
    """Attention and an MLP read the same tokens; how their results are added is given."""

    def __init__(self, total):
        super().__init__()
        mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.attention, self.mlp, self.total = Attention(8), mlp, total

    def forward(self, x):
        return self.total(x, self.attention(x), self.mlp(x))


@pytest.mark.parametrize(
    ("total", "left"),
    [
        (lambda x, a, m: x + a + m, lambda x, m: x + m),
        (lambda x, a, m: x + (a + m), lambda x, m: x),
        (lambda x, a, m: x + (m + a), lambda x, m: x),
        (lambda x, a, m: torch.add(a, x, alpha=2), lambda x, m: 2 * x),
        (lambda x, a, m: a + 3 * x, lambda x, m: 3 * x),
    ],
)
def test_attention_is_left_out_of_the_sum_with_its_input(total, left):
    model = Tokens(Parallel(total))
    program = captured(model)
    (block,) = [b for b in find_blocks(program) if b.dropped]
    settled = relax(program, [block], settled=True)
    assert settled.macs == program.macs - block.saves
    x = torch.randn(3, 3, 16, 12, dtype=torch.float64)
    with torch.no_grad():
        tokens = model.embed(x).flatten(2).transpose(1, 2)
        expected = left(tokens, model.blocks[0].mlp(tokens)).mean(1)
        assert relative_error(settled.module()(x), expected) <= 1e-12
        relaxed = relax(program, [block])
        set_switches(relaxed.module(), [0.0])
        assert relative_error(relaxed.module()(x), expected) <= 1e-12


@pytest.mark.parametrize("fitted", [False, True], ids=["identity", "fitted"])
def test_blocks_can_be_pruned_in_two_goes(fitted):
    """The normalisations of the first one are still there if it was not merged, and keep their values."""
    program = captured(head(*(Add(nn.Sequential(conv(8, 8), conv(8, 8, act=False))) for _ in range(2))))
    x = torch.randn(3, 3, 16, 12, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):
            block = next(b for b in find_blocks(program) if b.prunable)
            expected = program.module()(x)
            relaxed = relax(program, [block], fitted=fitted)
            if fitted:
                start_norms(relaxed, [Batch((x,), {}, None, 3)])
            assert relative_error(relaxed.module()(x), expected) <= 1e-15
            set_switches(relaxed.module(), [0.0])
            program = settle(relax(program, [block], True, fitted=fitted), relaxed)
            assert relative_error(program.module()(x), relaxed.module()(x)) <= 1e-14
    with pytest.raises(BadInput, match="relaxed already"):
        relax(relaxed, [])


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
        assert relative_error(settle(relax(program, blocks, True), relaxed).module()(x), expected) <= 1e-12
        loaded = g.load(relaxed.save(tmp_path / "relaxed.pt2"))
        assert relative_error(loaded.module()(x), expected) <= 1e-14


class TwoAnswers(nn.Module):
    """One head under two names, read twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(conv(3, 8), Add(nn.Sequential(conv(8, 8), conv(8, 8, act=False)), act=True))
        self.head = self.again = nn.Linear(8, 4)

    def forward(self, x):
        x = self.body(x).mean((2, 3))
        return self.head(x), self.again(2 * x)


def test_tied_weights_settle_tied():
    program = captured(TwoAnswers())
    blocks = find_blocks(program)
    settled = settle(relax(program, blocks, True), relax(program, blocks))
    assert settled.module().head.weight is settled.module().again.weight
    assert settled.params == relax(program, blocks, settled=True).params


def test_without_a_tail_a_block_ends_linear():
    program = captured(NETWORKS["convnext"][0]())
    blocks = find_blocks(program)
    settled = relax(program, blocks, settled=True, tail=False)
    names = [str(n.target) for n in settled.graph.nodes]
    assert not any("gelu" in n for n in names)
