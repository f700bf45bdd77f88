"""Sparsify: which weights, how many, how good, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import graphcomb as g
from graphcomb.graph import sparse as masks
from graphcomb.graph.errors import Refused
from graphcomb.passes import Sparsify
from graphcomb.passes.common.weights import layers
from graphcomb.passes.sparse import ranking

from ..depth.toys import Tied
from .toys import METHODS, ORIN, batches, loss_of, weights, zero_counts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", [{"sparsity": 0.6}, {"pattern": "2:4", "where": "all"}])
def test_every_method_reaches_its_target_exactly(program, method, target):
    before = {n: w.clone() for n, w in weights(program).items()}
    result = Sparsify(method=method, gradients=24, block=32, **target)(program, data=batches())
    assert all(torch.equal(w, before[n]) for n, w in weights(program).items()), "the input program is untouched"
    after, counts = weights(result.program), zero_counts(result.program)
    chosen = {"conv.weight", "qkv.weight", "proj.weight"}
    assert {c["what"] for c in result.record["changed"]} == chosen == set(result.record["sparse"])
    assert all(counts[n] == 0 and torch.equal(after[n], before[n]) for n in after if n not in chosen)
    total = sum(after[n].numel() for n in chosen)
    if "pattern" in target:
        assert all(counts[n] == after[n].numel() // 2 and masks.legal(after[n], "2:4") for n in chosen)
    elif method == "wanda":
        assert all(counts[n] == round(0.6 * after[n].numel()) for n in chosen)
        assert all(
            set((after[n].flatten(1) == 0).sum(1).sub(int(0.6 * after[n][0].numel())).tolist()) <= {0, 1}
            for n in chosen
        )
    elif method in ("fastcap", "sparsegpt"):
        assert abs(sum(counts[n] for n in chosen) / total - 0.6) < 0.01
    else:
        assert sum(counts[n] for n in chosen) == round(0.6 * total)
    moved = any(not torch.equal(after[n], before[n].masked_fill(after[n] == 0, 0)) for n in chosen)
    assert moved == (method not in ("wanda", "magnitude")), "only these leave the other weights alone"
    out = result.program.module()(torch.randn(3, 1, 16, 16))
    assert out.shape == (3, 5)
    assert out.isfinite().all()


def test_uniform_gives_every_layer_its_share_and_global_does_not(program):
    uniform = Sparsify(sparsity=0.5, scope="uniform", gradients=16, block=32)(program, data=batches())
    assert {round(c["sparsity"], 3) for c in uniform.record["changed"]} == {0.5}
    everywhere = Sparsify(sparsity=0.5, gradients=16, block=32)(program, data=batches())
    assert len({round(c["sparsity"], 2) for c in everywhere.record["changed"]}) > 1


def test_global_magnitude_is_one_threshold(program):
    result = Sparsify(sparsity=0.5, method="magnitude")(program)
    before, after = weights(program), weights(result.program)
    chosen = result.record["sparse"]
    gone = torch.cat([before[n][after[n] == 0].abs() for n in chosen])
    kept = torch.cat([before[n][after[n] != 0].abs() for n in chosen])
    assert gone.max() <= kept.min()


def test_groups_of_four_run_along_the_input_channels():
    torch.manual_seed(0)
    program = g.capture(
        nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, (3, 4)), nn.Conv2d(8, 2, 1)), torch.randn(2, 4, 9, 9)
    )
    for method in ("cap", "magnitude"):
        data = [(torch.randn(2, 4, 9, 9), torch.randint(2, (2, 7, 6)))]
        result = Sparsify(pattern="2:4", where="all", method=method, per="batch", block=16)(program, data=data)
        weight = weights(result.program)["1.weight"]
        assert (weight.view(8, 2, 4, 3, 4) == 0).sum(2).eq(2).all()
        assert not (weight == 0).view(8, 8, 3, 4).sum(3).eq(2).all(), "not along the kernel width"


@pytest.mark.parametrize("pattern", ["1:3", "3:6", "2:5"])
@pytest.mark.parametrize("method", METHODS)
def test_patterns_that_do_not_divide_a_block_of_columns(method, pattern):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 150), nn.ReLU(), nn.Linear(150, 4), nn.ReLU(), nn.Linear(4, 2))
    program = g.capture(net, torch.randn(2, 3), dynamic_shapes="batch")
    data = [(torch.randn(8, 3), torch.randint(2, (8,)))]
    result = Sparsify(pattern=pattern, method=method, include="2.*", block=30, gradients=8)(program, data=data)
    n, m = masks.read_pattern(pattern)
    assert ((weights(result.program)["2.weight"] == 0).view(4, -1, m).sum(2) == m - n).all()


def test_a_method_that_misses_the_pattern_is_found_out(program, monkeypatch):
    monkeypatch.setattr(ranking, "lowest_of_groups", lambda scores, pattern: torch.zeros_like(scores, dtype=torch.bool))
    with pytest.raises(Refused, match=r"magnitude left conv\.weight without the pattern 2:4; this is a bug"):
        Sparsify(pattern="2:4", where="all", method="magnitude")(program)


def test_recomputations_go_in_equal_steps_and_keep_earlier_zeros(program):
    result = Sparsify(sparsity=0.6, recomputations=3, gradients=16, block=32)(program, data=batches())
    steps = result.record["stages"][0]["steps"]
    assert [round(s["goal"], 3) for s in steps] == [0.2, 0.4, 0.6]
    first = Sparsify(sparsity=0.2, gradients=16, block=32)(program, data=batches())
    early, late = weights(first.program), weights(result.program)
    assert all(((early[n] == 0) <= (late[n] == 0)).all() for n in early)
    pattern = Sparsify(pattern="1:4", where="all", recomputations=3, gradients=16, block=32)(program, data=batches())
    assert [s["goal"] for s in pattern.record["stages"][0]["steps"]] == [(3, 4), (2, 4), (1, 4)]
    assert all(masks.legal(weights(pattern.program)[n], "1:4") for n in pattern.record["sparse"])


@pytest.mark.parametrize("method", METHODS)
def test_zeros_that_are_there_count_and_stay(program, method):
    half = Sparsify(sparsity=0.3, method="magnitude", scope="uniform")(program)
    result = Sparsify(sparsity=0.6, method=method, gradients=16, block=32)(half.program, data=batches())
    early, late = weights(half.program), weights(result.program)
    assert all(((early[n] == 0) <= (late[n] == 0)).all() for n in early)
    total = sum(late[n].numel() for n in result.record["sparse"])
    assert abs(sum(zero_counts(result.program)[n] for n in result.record["sparse"]) / total - 0.6) < 0.03


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("target", [{"sparsity": 0.5, "scope": "uniform"}, {"pattern": "2:4", "where": "all"}])
@pytest.mark.parametrize("method", METHODS)
def test_more_zeros_than_the_target_has_all_stay(program, method, target, recorded):
    early = Sparsify(sparsity=0.75, method="magnitude")(program).program
    if not recorded:
        early.history = []
    result = Sparsify(method=method, gradients=16, block=32, **target)(early, data=batches())
    before, after = weights(early), weights(result.program)
    for name in result.record["sparse"]:
        assert (after[name][before[name] == 0] == 0).all()
        assert "pattern" not in target or masks.legal(after[name], "2:4")


@pytest.mark.parametrize("name", ["a.weight", "b.weight"])
def test_tied_weights_go_by_all_their_names(name):
    torch.manual_seed(0)
    program = g.capture(Tied(), torch.randn(2, 3), dynamic_shapes="batch")
    taken = Sparsify(method="magnitude", include=name)(program)
    assert (weights(taken.program)["a.weight"] == 0).sum() == 32
    left = Sparsify(method="magnitude", exclude=name)(program)
    assert left.record["changed"] == []


def test_tied_weights_are_pruned_as_one():
    torch.manual_seed(0)
    program = g.capture(Tied(), torch.randn(2, 3), dynamic_shapes="batch")
    data = [(torch.randn(8, 3), torch.randint(2, (8,)))]
    for method in METHODS:
        result = Sparsify(sparsity=0.5, method=method, block=16)(program, data=data)
        assert len(result.record["sparse"]) == 1
        module = result.program.module()
        assert module.get_parameter("a.weight") is module.get_parameter("b.weight")
        assert (module.get_parameter("a.weight") == 0).sum() == 32


def test_cap_loses_less_than_woodfisher_and_that_less_than_magnitude(trained):
    program, train, val = trained
    losses = {}
    for method in ("cap", "woodfisher", "magnitude"):
        result = Sparsify(sparsity=0.8, method=method, gradients=256, block=64)(program, data=train)
        losses[method] = loss_of(result.program, val)
    assert losses["cap"] < 0.9 * losses["woodfisher"] < 0.9 * losses["magnitude"]


@pytest.mark.parametrize(
    ("better", "worse"), [("cap", "woodfisher"), ("fastcap", "magnitude"), ("sparsegpt", "magnitude")]
)
def test_two_of_four(trained, better, worse):
    program, train, val = trained
    options = {"pattern": "2:4", "where": "all", "gradients": 256, "block": 64}
    found = [Sparsify(method=m, **options)(program, data=train) for m in (better, worse)]
    assert loss_of(found[0].program, val) < loss_of(found[1].program, val)


@pytest.mark.parametrize("method", ["cap", "sparsegpt"])
def test_a_loader_with_a_generator_of_its_own_gives_the_same_samples_every_time(program, method):
    """In each run over the data within a pass, in each call, and before as after an interruption."""
    x, y = (torch.cat(t) for t in zip(*batches(8), strict=True))
    loader = DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    state = loader.generator.get_state()
    found = [
        Sparsify(sparsity=0.5, method=method, gradients=16, block=32, memory=memory, dtype="fp64")(program, data=loader)
        for memory in (1e9, 1e6, 1e9)
    ]
    assert torch.equal(loader.generator.get_state(), state)
    for name, w in weights(found[0].program).items():
        torch.testing.assert_close(weights(found[1].program)[name], w, rtol=1e-5, atol=1e-6)
        assert torch.equal(weights(found[2].program)[name], w)


@pytest.mark.parametrize(
    ("target", "dtype", "chosen"),
    [
        (ORIN, "fp16", {"1.weight"}),
        (None, "fp16", {"1.weight"}),
        (SimpleNamespace(name="rtx-sm75", compute_capability=(7, 5)), "fp16", set()),
        (SimpleNamespace(name="cpu", compute_capability=None), "fp16", set()),
        (ORIN, "fp32", set()),
    ],
)
def test_two_of_four_goes_where_it_pays(target, dtype, chosen):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 256, 1), nn.Conv2d(256, 256, 3, padding=1), nn.Conv2d(256, 256, 1, groups=4),
        nn.Conv2d(256, 64, 1), nn.Conv2d(64, 66, 1), nn.Conv2d(66, 256, 1), nn.Conv2d(256, 2, 1),
    )  # fmt: skip
    program = g.capture(net, torch.randn(2, 4, 5, 5))
    result = Sparsify(pattern="2:4", method="magnitude")(program, target=target, dtype=dtype)
    assert set(result.record["sparse"]) == chosen
    why = {r["what"]: r["why"] for r in result.record["refused"]}
    if chosen:
        assert "grouped" in why["2.weight"]
        assert why["3.weight"].startswith("256 -> 64 channels")
        assert [c["accelerated"] for c in result.record["changed"]] == [True]
    elif target is ORIN:
        assert "not in fp32" in why["1.weight"]
    else:
        assert why["1.weight"] == f"target {target.name} has no sparse tensor cores"
    assert why["5.weight"] == "2:4 does not divide its 66 input channels per group"
    everywhere = Sparsify(pattern="2:4", method="magnitude", where="all")(program, target=target, dtype=dtype)
    assert set(everywhere.record["sparse"]) == {f"{i}.weight" for i in (1, 2, 3, 4)}
    assert {c["what"] for c in everywhere.record["changed"] if c["accelerated"]} == chosen


def test_a_layer_that_has_the_pattern_gains_with_more_zeros():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
    early = Sparsify(pattern="2:4", method="magnitude")(g.capture(net, torch.randn(2, 4)))
    late = Sparsify(sparsity=0.7, method="magnitude")(early.program)
    assert [(r["what"], r["accelerated"]) for r in late.record["changed"]] == [("2.weight", True)]


@pytest.mark.parametrize("pattern", ["1:4", "1:2", "2:8", "02:04"])
def test_patterns_that_have_two_of_four_gain_like_it(pattern):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
    program = g.capture(net, torch.randn(2, 8))
    result = Sparsify(pattern=pattern, method="magnitude")(program)
    assert [(r["what"], r["accelerated"]) for r in result.record["changed"]] == [("2.weight", True)]
    assert masks.legal(weights(result.program)["2.weight"], "2:4")
    assert set(result.record["sparse"].values()) == {pattern.replace("0", "")}
    both = Sparsify(pattern="4:8", method="magnitude", where="all")(result.program)
    assert masks.sparse_weights(both.program) == masks.sparse_weights(result.program), "says more than 4:8"


def test_pays_is_kept_with_names_given(program):
    result = Sparsify(pattern="2:4", method="magnitude", where="pays", include="qkv*")(program)
    assert not result.record["sparse"]
    assert "sparse kernels win from" in {r["what"]: r["why"] for r in result.record["refused"]}["qkv.weight"]


def test_the_ends_are_where_no_other_layer_lies_beyond():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(8, 8)
            self.up, self.down = (nn.ModuleList(nn.Linear(8, 8) for _ in range(3)) for _ in range(2))

        def forward(self, x):
            x = self.stem(x)
            for up, down in zip(self.up, self.down, strict=True):
                x = x + down(up(x).relu())
            return x

    result = Sparsify(sparsity=0.5, method="magnitude")(g.capture(Backbone(), torch.randn(2, 8)))
    why = {r["what"]: r["why"] for r in result.record["refused"]}
    assert why == {"stem.weight": "the first layer", "down.2.weight": "the last layer"}


def test_layers_name_their_kinds(program):
    kinds = {layer.name: layer.kind for layer in layers(program)[0]}
    assert (kinds["deep.weight"], kinds["conv.weight"], kinds["qkv.weight"]) == ("depthwise", "conv", "linear")
