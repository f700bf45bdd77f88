"""What pruning a block saves, in MACs and in kernels of engines, or why it cannot be pruned."""

import pytest
import torch
from torch import nn

import graphcomb
from graphcomb.passes import Fuse
from graphcomb.passes.depth.price import find_blocks
from graphcomb.passes.depth.relax import relax

from .toys import NETWORKS, Add, Gate, captured, conv, head, kernels, last


@pytest.mark.parametrize(("network", "exactly"), [("resnet", True), ("transformer", False)])
def test_an_engine_without_the_blocks_has_so_many_kernels_fewer(network, exactly, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    torch.manual_seed(0)
    program = graphcomb.capture(NETWORKS[network][0]().eval(), torch.randn(2, 3, 16, 12), dynamic_shapes="batch")
    blocks = [b for b in find_blocks(program) if b.prunable]
    dense, pruned = Fuse()(program).program, Fuse()(relax(program, blocks, settled=True)).program
    saved = kernels(dense, tmp_path) - kernels(pruned, tmp_path)
    predicted = sum(b.kernels for b in blocks)
    assert predicted > 0
    # around attention the library also moves heads in kernels of its own, which go with it
    assert saved == predicted if exactly else saved >= predicted


def test_what_counts_as_a_kernel():
    """A layer, a normalisation over features, an attention: one each, after merging; nothing else."""
    torch.manual_seed(0)
    counts = {}
    for network, (make, _) in NETWORKS.items():
        program = graphcomb.capture(make().eval(), torch.randn(2, 3, 16, 12), dynamic_shapes="batch")
        counts[network] = [b.kernels for b in find_blocks(program) if b.prunable]
    assert counts["resnet"] == [1, 2], "two convolutions to one; with a convolution in the skip, three to one"
    assert counts["mobilenet"] == [2, 2, 2], "three layers to one"
    assert counts["convnext"] == [2, 2], "of depthwise, norm and two pointwise layers two are left"
    assert counts["transformer"] == [4, 2, 4, 2], "norm, projections and attention; norm and two layers to one"


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
