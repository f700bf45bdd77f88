"""Depth pruning: its four stages, together, alone and interrupted."""

import pytest
import torch

from graphcomb import Pipeline
from graphcomb.graph import sparse as masks
from graphcomb.graph.errors import BadInput
from graphcomb.graph.verify.evaluate import relative_error
from graphcomb.passes import Context, Distill, Fuse, PruneDepth, RemoveChannels, Sparsify
from graphcomb.passes.depth.price import find_blocks
from graphcomb.passes.depth.prune_depth import ablated
from graphcomb.passes.depth.relax import SWITCHES
from graphcomb.recipe import parse_passes

from ..toys import Cut, Stop
from .toys import NETWORKS, QUICK, captured, digits


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (PruneDepth, {"progress": "linear"}),
        (PruneDepth, {"progress": "cosine", "share": 0.6}),
        (ablated(fading=False), {}),
    ],
)
def test_chosen_blocks_fade_and_merge_exactly(program, kind, options):
    names = [b.name for b in find_blocks(program)][:2]
    before = {k: v.clone() for k, v in program.module().state_dict().items()}
    result = kind(names=tuple(names), **{**QUICK, **options})(
        program, data=digits(slice(None, 1200)), val=digits(slice(1200, None))
    )
    assert [c["what"] for c in result.record["changed"]] == names
    assert result.record["merge"]["error"] <= 1e-10
    assert result.record["train"]["val_teacher"] > 0.7
    assert not [n for n in result.program.module().state_dict() if n == SWITCHES]
    saved = sum(c["saves_macs"] for c in result.record["changed"])
    assert result.program.macs == program.macs - saved
    assert all(torch.equal(program.module().state_dict()[k], v) for k, v in before.items())
    accuracy = result.record["train"]["epochs"][-1]["val"]
    assert accuracy > 0.4


def test_the_search_finds_the_block_that_does_nothing(program):
    options = PruneDepth(blocks=1, **{**QUICK, "supernet_steps": 0})
    context = Context(data=digits(slice(None, 1200)), val=digits(slice(1200, None)))
    found = find_blocks(program)
    chosen, record = options.choose(program, found, context)
    prunable = [b for b in found if b.prunable]
    assert record["evaluated"] == len(prunable)
    best = prunable[record["alone"].index(max(record["alone"]))]
    assert chosen == [best]
    assert "useless" in best.name


@pytest.mark.parametrize("after", [3, 12, 35])
def test_an_interrupted_run_ends_where_the_uninterrupted_one_does(program, tmp_path, after):
    options = PruneDepth(blocks=2, **{**QUICK, "train": Distill(steps=30, lr=2e-3, checkpoint_every=5)})
    whole = options(program, data=digits(slice(None, 1200)), val=digits(slice(1200, 1400)), out=tmp_path / "whole")
    with pytest.raises(Stop):
        options(
            program, data=Cut(digits(slice(None, 1200)), after), val=digits(slice(1200, 1400)), out=tmp_path / "cut"
        )
    resumed = options(program, data=digits(slice(None, 1200)), val=digits(slice(1200, 1400)), out=tmp_path / "cut")
    assert resumed.record["changed"] == whole.record["changed"]
    ours, theirs = resumed.program.module().state_dict(), whole.program.module().state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_one_recipe_with_channels_depth_fusion_and_distillation(program):
    """Exact at each step: the surgery against the oracle, the merges against the trained relaxed network."""
    steps = [
        RemoveChannels(ratio=0.25, round_to=1),
        Distill(steps=30, lr=2e-3),
        PruneDepth(blocks=1, **QUICK, merged=False),
        Fuse(),
        Distill(steps=20, lr=1e-3),
    ]
    result = Pipeline(steps).run(program, data=digits(slice(None, 1200)), val=digits(slice(1200, None)))
    surgery, _, depth, fuse, _ = result.records
    assert surgery["verified"]["error"] <= 1e-10
    assert max(depth["train"]["error"], depth["merge"]["error"]) <= 1e-10
    assert fuse["verified"]["error"] <= 1e-5
    assert fuse["error"] <= 1e-10
    assert result.program.macs < 0.8 * program.macs
    assert result.accuracy_after > 0.6


def test_attention_is_left_out_whole():
    program = captured(NETWORKS["transformer"][0]())
    names = tuple(b.name for b in find_blocks(program) if b.kind == "attention")
    data = [(torch.randn(4, 3, 16, 12, dtype=torch.float64), torch.randint(8, (4,))) for _ in range(3)]
    result = PruneDepth(names=names, train=Distill(epochs=1))(program, data=data)
    ops = [str(n.target) for n in result.program.graph.nodes]
    assert not any("attention" in o for o in ops)
    assert [c["form"] for c in result.record["changed"]] == ["left out", "left out"]
    assert result.record["merge"]["error"] <= 1e-12


def test_zeros_of_an_attention_that_is_left_out_are_forgotten():
    program = captured(NETWORKS["transformer"][0]())
    names = tuple(b.name for b in find_blocks(program) if b.kind == "attention")[:1]
    data = [(torch.randn(4, 3, 16, 12, dtype=torch.float64), torch.randint(8, (4,))) for _ in range(3)]
    sparse = Sparsify(sparsity=0.5, method="magnitude")(program, data=data).program
    result = PruneDepth(names=names, train=Distill(epochs=1))(sparse, data=data).program
    left = masks.sparse_weights(result)
    assert 0 < len(left) < len(masks.sparse_weights(sparse))
    for name in left:
        assert (masks.weight(result, name) == 0).double().mean() >= 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of blocks, macs, latency and names"),
        ({"blocks": 1, "macs": 0.5}, "not blocks and macs"),
        ({"blocks": 0}, "PruneDepth.blocks: at least 1"),
        ({"macs": -1.0}, "PruneDepth.macs"),
        ({"latency": "soon"}, "PruneDepth.latency"),
        ({"blocks": 1, "share": 0.0}, "PruneDepth.share"),
        ({"blocks": 1, "progress": "sine"}, "PruneDepth.progress"),
        ({"blocks": 1, "progress": "at once"}, "PruneDepth.progress"),
        ({"blocks": 1, "population": 0}, "PruneDepth.population"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(BadInput, match=message.replace(".", r"\.")):
        PruneDepth(**options)


@pytest.mark.parametrize("name", ["select", "tail", "fitted", "ablation"])
def test_ablations_are_no_options(name):
    with pytest.raises(BadInput, match=name):
        parse_passes([{"PruneDepth": {"blocks": 1, name: True}}])


def test_merging_undone_is_the_same_function(program):
    names = (find_blocks(program)[0].name,)
    train = Distill(steps=5)
    fused = PruneDepth(names=names, train=train)(program, data=digits(slice(None, 320))).program
    plain = PruneDepth(names=names, train=train, merged=False)(program, data=digits(slice(None, 320))).program
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert relative_error(fused.module()(x), plain.module()(x)) <= 1e-4
    assert fused.macs < plain.macs
