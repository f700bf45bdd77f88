"""Blocks found in the graph, and their relaxation: exactly dense at l = 1, exactly mergeable at l = 0."""

import pytest
import torch
from torch import nn

import graphcomb.graph as g
from graphcomb.graph.errors import BadInput
from graphcomb.graph.verify.evaluate import relative_error
from graphcomb.passes.common.feed import Batch
from graphcomb.passes.depth.price import find_blocks
from graphcomb.passes.depth.relax import relax, set_switches, settle
from graphcomb.passes.depth.start_norms import start_norms
from graphcomb.passes.fuse.fuse import Fuse

from .toys import NETWORKS, Add, Attention, Gate, Move, Tokens, captured, conv, head, mlp


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


class Scaled(nn.Module):
    """A scale in front of all layers of a branch, given as the first factor."""

    def __init__(self, *layers):
        super().__init__()
        self.gamma, self.body = nn.Parameter(torch.rand(8, 1, 1)), nn.Sequential(*layers)

    def forward(self, x):
        return x + self.body(self.gamma.exp() * x)


def last(*layers):
    """Layers of which the channels come last, in an image network."""
    return head(Move(0, 2, 3, 1), *layers, Move(0, 3, 1, 2))


def conv3(**options):
    return nn.Conv2d(8, 8, 3, **{"padding": 1, **options})


TO_LAST, TO_FIRST, POOL = Move(0, 2, 3, 1), Move(0, 3, 1, 2), nn.MaxPool2d(2)
PADDINGS = {
    "by a word": lambda: head(Add(nn.Sequential(conv(8, 8, 1), conv3(padding="same"), nn.ReLU(), conv3(padding="same")))),
    "by a word, unevenly": lambda: head(POOL, conv(8, 16, 1), nn.Conv2d(16, 8, 4, padding="same"), nn.BatchNorm2d(8)),
    "by a layer": lambda: head(POOL, conv(8, 16, 1), nn.ZeroPad2d((0, 1, 2, 1)), nn.Conv2d(16, 8, 3, 2), nn.BatchNorm2d(8)),
    "twice": lambda: head(conv(8, 8, 1), nn.ZeroPad2d(1), conv(8, 8, 1), nn.Conv2d(8, 4, 5, padding=1), nn.Conv2d(4, 8, 1)),
    "behind a scale": lambda: head(Scaled(nn.BatchNorm2d(8), conv(8, 8), nn.Conv2d(8, 8, 1))),
    "behind a group norm": lambda: head(Add(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), conv(8, 8), conv3()))),
    "behind a transposed convolution": lambda: head(
        POOL, nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU(), conv(8, 8), nn.Conv2d(8, 8, 1)
    ),
    "behind a norm over the last axis": lambda: head(
        Add(nn.Sequential(conv(8, 8, 1), TO_LAST, nn.LayerNorm(8), TO_FIRST, nn.GELU(), conv(8, 8), nn.Conv2d(8, 8, 1)))
    ),
    "in another layout": lambda: last(
        Add(nn.Sequential(TO_FIRST, nn.BatchNorm2d(8), conv(8, 8), nn.Conv2d(8, 8, 1), TO_LAST))
    ),
    "between layouts": lambda: last(
        Add(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), TO_FIRST, conv(8, 8), TO_LAST, nn.Linear(8, 8), nn.Linear(8, 8)))
    ),
    "behind layers over the width": lambda: head(
        Add(nn.Sequential(conv(8, 8, 1), nn.Linear(12, 12), nn.LayerNorm(12), nn.ReLU(), conv(8, 8), nn.Conv2d(8, 8, 1)))
    ),
    "transposed": lambda: head(
        Add(nn.Sequential(Move(0, 1, 3, 2), conv(8, 8, 1), Move(0, 1, 3, 2), conv(8, 8), nn.Conv2d(8, 8, 1)))
    ),
}  # fmt: skip
OTHERS = {
    "slopes of channels": lambda: head(Add(nn.Sequential(nn.Conv2d(8, 16, 1), nn.PReLU(16), nn.Conv2d(16, 8, 1)))),
    "rms norm": lambda: last(Add(nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))),
    "no bias": lambda: head(
        Add(
            nn.Sequential(
                nn.Conv2d(8, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 2, 1, bias=False), nn.ReLU(),
                nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(2, 8, 1, bias=False),
            )
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", [*PADDINGS.values(), *OTHERS.values()], ids=[*PADDINGS, *OTHERS])
def test_unusual_blocks_are_exact_at_both_ends(make):
    program = captured(make())
    blocks = [b for b in find_blocks(program) if b.prunable]
    assert blocks
    x = torch.randn(3, 3, 16, 12, dtype=torch.float64)
    with torch.no_grad():
        relaxed = relax(program, blocks, fitted=True)
        start_norms(relaxed, [Batch((x,), {}, None, 3)])
        assert relative_error(relaxed.module()(x), program.module()(x)) <= 1e-14
        set_switches(relaxed.module(), [0.0] * len(blocks))
        pruned, settled = relaxed.module()(x), settle(program, blocks, relaxed, fitted=True)
        assert relative_error(settled.module()(x), pruned) <= 1e-13
        fused = Fuse()(settled).program
        assert relative_error(fused.module()(x), pruned) <= 1e-10
    assert fused.macs <= program.macs - sum(b.saves for b in blocks)  # more where a neighbour merges too


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


def test_a_block_saves_no_less_alone_than_it_is_said_to():
    """All of these merge into one layer, none of which may be counted twice."""

    def block():
        return Add(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 8)))

    program = captured(last(block(), block(), block()))
    blocks = find_blocks(program)
    for some in ([b] for b in blocks):
        merged = Fuse()(relax(program, some, settled=True)).program
        assert merged.macs == program.macs - some[0].saves
    assert Fuse()(relax(program, blocks, settled=True)).program.macs <= program.macs - sum(b.saves for b in blocks)


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
            program = settle(program, [block], relaxed, fitted=fitted)
            assert relative_error(program.module()(x), relaxed.module()(x)) <= 1e-14
    with pytest.raises(BadInput, match="relaxed already"):
        relax(relaxed, [])


def test_kinds_tell_groups_from_depthwise_layers():
    grouped = nn.Sequential(conv(8, 16, 1, groups=2), conv(16, 16, groups=4), conv(16, 8, 1, act=False))
    pooled = Add(nn.Sequential(nn.GroupNorm(1, 8), nn.AvgPool2d(3, 1, 1)))
    assert [b.kind for b in find_blocks(captured(head(Add(grouped), pooled)))] == ["residual", "residual"]


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
        (lambda: head(Add(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Hardshrink(), nn.Conv2d(8, 8, 1)))), "hardshrink"),
        (lambda: head(Add(nn.Sequential(conv(8, 2, 1), conv(2, 8, 3)))), "would take"),
        (lambda: head(Add(nn.Sequential(conv(8, 8), nn.Conv2d(8, 8, 2, padding="same")))), "no centre"),
        (lambda: head(Add(nn.Sequential(nn.GroupNorm(2, 8), conv(8, 8)))), "save none of its"),
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
