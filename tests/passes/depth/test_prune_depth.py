"""Depth pruning: its four stages, together, alone and interrupted."""

import dataclasses
import random

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import graphcomb.graph as g
from graphcomb import Pipeline
from graphcomb.graph import sparse as masks
from graphcomb.graph.errors import BadInput, Refused, Unreachable
from graphcomb.graph.verify.evaluate import relative_error
from graphcomb.passes import Context, Distill, Fuse, PruneDepth, RemoveChannels, Sparsify
from graphcomb.passes.depth.budget import Predictor
from graphcomb.passes.depth.price import find_blocks
from graphcomb.passes.depth.prune_depth import ablated
from graphcomb.passes.depth.relax import SWITCHES, relax
from graphcomb.passes.depth.search import Judge
from graphcomb.passes.depth.training import Fading
from graphcomb.recipe import parse_passes

from .toys import NETWORKS, Add, Attention, captured, conv, inverted, mlp


def digits(part, batch=32):
    data = load_digits()
    images, labels = torch.tensor(data.images[part], dtype=torch.float32)[:, None] / 16, torch.tensor(data.target[part])
    shuffle = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(images, labels), batch, shuffle=part.start is None, generator=shuffle)


class Digits(nn.Module):
    """Residual and inverted blocks, one of them useless, and an MLP half."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            conv(1, 8), inverted(8, 8), Add(nn.Sequential(conv(8, 8), conv(8, 8, act=False)), act=True)
        )
        self.useless = Add(nn.Sequential(conv(8, 8), conv(8, 8, act=False)))
        self.useless.body[1][1].weight.data.zero_()
        self.mlp, self.head = mlp(8), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.mlp(self.useless(self.body(x)).mean((2, 3))))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    dense = g.capture(Digits().eval(), torch.randn(2, 1, 8, 8), dynamic_shapes="batch")
    return Distill(steps=120, lr=3e-3)(dense, data=digits(slice(None, 1200))).program


QUICK = {"supernet_steps": 6, "population": 4, "generations": 1, "train": Distill(steps=40, lr=2e-3)}


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


def fading(program, how, kind=PruneDepth):
    return kind(blocks=2, progress=how, share=4 / 6)._fading(program, find_blocks(program)[:2], 6, 0)


def test_the_schedule_moves_l_and_ends_with_the_pruned_forms(program):
    relaxed = relax(program, find_blocks(program)[:2], fitted=True)
    own, seen, surgeries = fading(program, "cosine"), [], []
    assert own.begin(relaxed.module()) is None
    for step in range(6):
        seen.append(relaxed.module().get_buffer(SWITCHES).tolist())
        surgeries.append(own.after_step(step, relaxed.module()))
    assert [round(a, 3) for a, _ in seen] == [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    assert [s is not None for s in surgeries] == [False, False, False, True, False, False]
    assert SWITCHES not in surgeries[3].module.state_dict()
    assert own.error <= 1e-12
    assert own.identity != fading(program, "linear").identity
    assert fading(program, "linear", ablated(fading=False)).begin(relaxed.module()) is not None


def test_training_goes_on_alike_in_the_pruned_forms(program, monkeypatch):
    """At `l = 0` the relaxed network and the pruned one give the same gradients."""
    options = PruneDepth(blocks=2, **{**QUICK, "supernet_steps": 0}, share=0.3, merged=False)
    pruned = options(program, data=digits(slice(None, 320))).program.module().state_dict()
    monkeypatch.setattr(Fading, "stays", property(lambda self: True, lambda self, value: None), raising=False)
    relaxed = options(program, data=digits(slice(None, 320))).program.module().state_dict()
    assert pruned.keys() == relaxed.keys()
    for key, tensor in pruned.items():
        torch.testing.assert_close(tensor, relaxed[key], rtol=1e-3, atol=1e-4)


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


def test_a_supernet_answers_without_its_blocks(program):
    """The loss of the pruned paths falls, and the dense path stays what it was."""
    blocks = [b for b in find_blocks(program) if b.prunable]
    options = PruneDepth(blocks=2, **{**QUICK, "supernet_steps": 60})
    context = Context(data=digits(slice(None, 1200)), val=digits(slice(1200, None)))
    budget = options.budget(program, blocks, context)
    bits = tuple(i < 2 for i in range(len(blocks)))
    raw, _ = dataclasses.replace(options, supernet_steps=0).supernet(program, blocks, context, budget)
    trained, record = options.supernet(program, blocks, context, budget)
    scores = [Judge(p, context, 4, 20)([bits])[0] for p in (raw, trained)]
    assert scores[1] > scores[0]
    assert record["steps"] == 60
    assert Judge(trained, context, 4, 20)([(False,) * len(blocks)])[0] > 0.6


def test_a_budget_of_macs_is_met_by_what_is_needed_and_no_more(program):
    options = PruneDepth(macs=0.8, **QUICK)
    prunable = [b for b in find_blocks(program) if b.prunable]
    budget = options.budget(program, prunable, Context())
    generator = random.Random(1)
    for _ in range(20):
        bits = budget.draw(generator)
        chosen = [b.saves for b, bit in zip(prunable, bits, strict=True) if bit]
        assert program.macs - sum(chosen) <= 0.8 * program.macs
        assert program.macs - sum(chosen) + min(chosen) > 0.8 * program.macs
        child = budget.child(bits, budget.draw(generator), generator)
        assert program.macs - sum(b.saves for b, bit in zip(prunable, child, strict=True) if bit) <= 0.8 * program.macs
    exactly = PruneDepth(blocks=3).budget(program, prunable, Context())
    assert all(sum(exactly.draw(generator)) == 3 for _ in range(9))


class PerMac:
    """A device that takes a nanosecond per multiply-accumulate, and a microsecond per run."""

    per_run = 1e-6

    def prepare(self, layers, progress=False):
        self.known = set(layers)

    def seconds(self, layer):
        assert layer in self.known
        return 1e-9 * layer.macs()


def test_a_budget_of_predicted_latency(program):
    options = ablated(search=False)(latency=0.85, **{**QUICK, "train": Distill(steps=2)})
    result = options(program, data=digits(slice(None, 1200)), latency=PerMac())
    seconds = [Predictor(Context(latency=PerMac()), p)(p) for p in (Fuse()(program).program, result.program)]
    assert seconds[1] <= 0.85 * seconds[0]
    with pytest.raises(BadInput, match="nothing predicts latencies"):
        options(program, data=digits(slice(None, 64)))


class Sheet(PerMac):
    """A device of which nothing was measured, and whose time is that of a few blocks."""

    measured = False

    def __str__(self):
        return "a data sheet"

    def seconds(self, layer):
        return 1e-6


def test_a_latency_leaves_the_least_macs_of_every_choice(program):
    options = PruneDepth(latency=0.7, **{**QUICK, "train": Distill(steps=2)})
    prunable = [b for b in find_blocks(program) if b.prunable]
    shares = {}
    for least in (0.0, 0.7):
        budget = dataclasses.replace(options, least_macs=least).budget(program, prunable, Context(latency=Sheet()))
        draws = [budget.draw(random.Random(seed)) for seed in range(30)]
        draws += [budget.child(draws[i], draws[i + 1], random.Random(i)) for i in range(20)]
        draws.append(budget.greedy([0.0] * len(prunable)))
        assert all(budget.met(bits) for bits in draws)
        shares[least] = [
            1 - sum(b.saves for b, bit in zip(prunable, bits, strict=True) if bit) / program.macs for bits in draws
        ]
    assert min(shares[0.0]) < 0.7 <= min(shares[0.7])
    with pytest.raises(
        Unreachable, match=r"PruneDepth.latency: .* as a data sheet predicts, leaves .*least_macs is 99%"
    ):
        dataclasses.replace(options, least_macs=0.99).budget(program, prunable, Context(latency=Sheet()))


def test_a_prediction_without_measurements_leaves_a_quarter_of_the_macs(program):
    prunable = [b for b in find_blocks(program) if b.prunable]
    budget = PruneDepth(latency=0.7).budget(program, prunable, Context(latency=Sheet()))
    assert budget.spare == 0.75 * program.macs
    measured = PruneDepth(latency=0.7).budget(program, prunable, Context(latency=PerMac()))
    assert measured.spare == float("inf")
    for wrong in ({"latency": 0.5, "least_macs": 1.5}, {"macs": 0.5, "least_macs": 0.1}):
        with pytest.raises(BadInput, match=r"PruneDepth\.least_macs"):
            PruneDepth(**wrong)


class Killed(Exception):
    pass


def dying(data, after):
    """A loader that stops the process, as it were, after so many batches in all."""
    left = [after]

    class Loader:
        generator, batch_size = data.generator, data.batch_size

        def __len__(self):
            return len(data)

        def __iter__(self):
            for batch in data:
                if not left[0]:
                    raise Killed
                left[0] -= 1
                yield batch

    return Loader()


@pytest.mark.parametrize("after", [3, 12, 35])
def test_an_interrupted_run_ends_where_the_uninterrupted_one_does(program, tmp_path, after):
    options = PruneDepth(blocks=2, **{**QUICK, "train": Distill(steps=30, lr=2e-3, checkpoint_every=5)})
    whole = options(program, data=digits(slice(None, 1200)), val=digits(slice(1200, 1400)), out=tmp_path / "whole")
    with pytest.raises(Killed):
        options(
            program, data=dying(digits(slice(None, 1200)), after), val=digits(slice(1200, 1400)), out=tmp_path / "cut"
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


def test_targets_that_cannot_be_met(program):
    data = digits(slice(None, 64))
    with pytest.raises(Unreachable, match="prunable blocks"):
        PruneDepth(blocks=99)(program, data=data)
    with pytest.raises(Unreachable, match="cannot be reached"):
        PruneDepth(macs=0.01)(program, data=data)
    with pytest.raises(BadInput, match="no block 'nobody'"):
        PruneDepth(names=("nobody",))(program, data=data)
    with pytest.raises(BadInput, match="needs data"):
        PruneDepth(blocks=1, supernet_steps=0)(program)


def test_merging_undone_is_the_same_function(program):
    names = (find_blocks(program)[0].name,)
    train = Distill(steps=5)
    fused = PruneDepth(names=names, train=train)(program, data=digits(slice(None, 320))).program
    plain = PruneDepth(names=names, train=train, merged=False)(program, data=digits(slice(None, 320))).program
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert relative_error(fused.module()(x), plain.module()(x)) <= 1e-4
    assert fused.macs < plain.macs


class ClassToken(nn.Module):
    """A small ViT that answers from its class token alone, or from all tokens."""

    def __init__(self, pooled=False, depth=3, dim=16):
        super().__init__()
        self.patch, self.pooled = nn.Conv2d(1, dim, 2, 2), pooled
        self.token, self.place = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 17, dim))
        layers = [layer for _ in range(depth) for layer in (Add(Attention(dim)), Add(Mlp(dim)))]
        self.blocks, self.norm, self.head = nn.Sequential(*layers), nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place)
        return self.head(self.norm(x.mean(1) if self.pooled else x[:, 0]))


class Mlp(nn.Sequential):
    def __init__(self, dim):
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


def vit(pooled=False):
    torch.manual_seed(0)
    return g.capture(ClassToken(pooled).eval(), torch.randn(2, 1, 8, 8), dynamic_shapes="batch")


def test_attention_that_alone_connects_outputs_with_inputs_is_not_left_out_whole():
    network = vit()
    found = [b for b in find_blocks(network) if b.prunable]
    attention = tuple(b.name for b in found if b.dropped)
    assert len(attention) == 3
    with pytest.raises(Refused, match="no longer depend on the inputs; keep one of "):
        PruneDepth(names=attention, merged=False)(network, data=digits(slice(None, 64)))
    with pytest.raises(Unreachable, match=r"PruneDepth.blocks: without all attention"):
        PruneDepth(blocks=len(found), supernet_steps=0)(network, data=digits(slice(None, 64)))
    least = (network.macs - sum(b.saves for b in found)) / network.macs
    with pytest.raises(Unreachable, match=r"PruneDepth.macs: without all attention"):
        PruneDepth(macs=least * 1.001, supernet_steps=0)(network, data=digits(slice(None, 64)))


def test_every_choice_of_the_search_answers_to_its_inputs():
    network = vit()
    found = [b for b in find_blocks(network) if b.prunable]
    options = PruneDepth(blocks=len(found) - 1)
    budget = options.budget(network, found, Context())
    generator = random.Random(0)
    draws = [budget.draw(generator) for _ in range(30)]
    draws += [budget.child(draws[0], draws[1], generator) for _ in range(10)] + [budget.greedy([0.0] * len(found))]
    for bits in {*draws, budget.widest()}:
        assert sum(bits) == len(found) - 1
        small = relax(network, [b for b, bit in zip(found, bits, strict=True) if bit], settled=True).module().eval()
        answers = small(torch.randn(4, 1, 8, 8))
        assert (answers[0] - answers[1]).abs().max() > 1e-6


def test_attention_may_all_go_where_the_outputs_read_every_token():
    network = vit(pooled=True)
    found = [b for b in find_blocks(network) if b.prunable]
    bits = PruneDepth(blocks=len(found)).budget(network, found, Context()).widest()
    assert all(bits)
