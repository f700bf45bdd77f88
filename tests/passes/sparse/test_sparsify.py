"""Sparsify: which weights, how many, how good, and what is refused."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import graphcomb.graph as g
from graphcomb.data import digits
from graphcomb.graph import sparse as masks
from graphcomb.graph.errors import BadInput, Refused
from graphcomb.passes import Distill, Sparsify
from graphcomb.passes.base import Context
from graphcomb.passes.common.scoring import evaluate
from graphcomb.passes.common.weights import layers
from graphcomb.passes.sparse import cap
from graphcomb.passes.sparse.gradients import Gradients
from graphcomb.passes.sparse.moments import input_moments

from ..depth.toys import Tied

METHODS = ("cap", "fastcap", "woodfisher", "sparsegpt", "wanda", "magnitude")


class Attention(nn.Module):
    """A fused projection, a residual and a grouped convolution in front."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 4, 4)
        self.conv = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.qkv, self.proj, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.norm(self.conv(self.stem(x)).relu())
        x = (x + self.deep(x)).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


def batches(count=4, size=8, labels=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [
        (torch.randn(size, 1, 16, 16, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(count)
    ]
    return made if labels else [x for x, _ in made]


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return g.capture(Attention(), torch.randn(2, 1, 16, 16), dynamic_shapes="batch")


@pytest.fixture(scope="module")
def trained():
    """A small network that recognises digits, and its data."""
    torch.manual_seed(0)
    train, val = digits(augment=False)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
        nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    captured = g.capture(net, next(iter(train))[0], dynamic_shapes="batch")
    return Distill(epochs=4, alpha=0)(captured, data=train).program, train, val


def weights(program):
    return {n: p.detach() for n, p in program.module().named_parameters() if p.dim() > 1}


def zero_counts(program):
    return {n: int((w == 0).sum()) for n, w in weights(program).items()}


# ------------------------------------------------------------------------------------------------------------- counts
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
    monkeypatch.setattr(cap, "lowest_of_groups", lambda scores, pattern: torch.zeros_like(scores, dtype=torch.bool))
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


# -------------------------------------------------------------------------------------------------------- how good it is
def loss_of(program, data):
    return -evaluate(program, data, lambda out, y: -F.cross_entropy(out, y, reduction="none"))


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
                expected += float(cap.to_blocks(x * change, 48).sum(1).square().sum()) / 32 / 2
        assert result.record["stages"][0]["steps"][0]["predicted_loss"] == pytest.approx(expected, rel=1e-4)


def test_zeros_shared_out_by_increments_lose_less_than_by_cumulated_losses(trained):
    dense, train, _ = trained
    options = {"sparsity": 0.75, "gradients": 256, "block": 32}
    losses = {}
    for allocation in ("increments", "cumulated"):
        result = Sparsify(allocation=allocation, **options)(dense, data=train)
        losses[allocation] = result.record["stages"][0]["steps"][0]["predicted_loss"]
    assert losses["increments"] < losses["cumulated"]


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
    found = cap.Fisher(6, 48, 32, 1e-4, torch.float64)
    for part in Gradients(32, "sample", "labels").stream(program.copy(), ["proj.weight"], Context(data=data), 10**9):
        found.add(torch.stack([cap.to_blocks(x, 48) for x in part["proj.weight"]]))
    pull = torch.einsum("bij,bj->bi", found.matrix(slice(0, 6)), cap.to_blocks(new - old, 48).double())
    kept = cap.to_blocks(new, 48) != 0
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

    class Counted(cap.Fisher):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)
            most.append(sum(f.sums.numel() * f.sums.itemsize for f in alive))

    monkeypatch.setattr(cap, "Fisher", Counted)
    Sparsify(sparsity=0.5, method=method, memory=1e6, gradients=32, block=32, dtype="fp64")(program, data=batches())
    assert sum(most) > 1e6
    assert max(most) <= 1e6 / 4


def test_memory_is_cut_into_batches_of_blocks(program):
    from graphcomb.passes.sparse.solver import Method, Solver

    method = Method("cap", 0.5, True, 32, Gradients(1000, "sample", "labels"), None, "fp32", 1e6)
    solver = Solver(method, program.copy(), layers(program)[0], Context())
    found = solver._batches()
    assert len(found) > 1
    for batch in found:
        assert sum(cap.Fisher.numbers(p.count * p.size, p.size, 1000) * 4 for p in batch) <= 1e6
    pieces = [(p.layer.name, i) for batch in found for p in batch for i in range(p.start, p.stop)]
    assert len(set(pieces)) == len(pieces) == sum(-(-x.size // min(32, x.size)) for x in layers(program)[0])


# ----------------------------------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize("largest", [1, 10**9])
def test_gradients_of_samples_are_those_of_each_sample_alone(program, largest):
    data = batches(2)
    names = [layer.name for layer in layers(program)[0]]
    found = list(Gradients(12, "sample", "labels").stream(program.copy(), names, Context(data=data), largest))
    found = {n: torch.cat([f[n] for f in found]) for n in names}
    assert all(len(f) == 12 for f in found.values())
    module = program.copy().module()
    x, y = (torch.cat(t) for t in zip(*data, strict=True))
    for i in (0, 7, 11):  # among others: alone, torch's batch normalisation has a wrong gradient here
        module.zero_grad()
        F.cross_entropy(module(x)[i : i + 1], y[i : i + 1]).backward()
        for n in names:
            torch.testing.assert_close(found[n][i], module.get_parameter(n).grad, rtol=1e-4, atol=1e-6)


class TokensFirst(nn.Module):
    """Samples in the second dimension of the layer's input, and in blocks of windows."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.a(x.transpose(0, 1)).tanh().transpose(0, 1)
        windows = self.b(x.reshape(-1, 2, 4)).tanh()
        return self.head(windows.reshape(x.shape[0], -1, 4).mean(1))


class Mixing(nn.Module):
    """Samples end up in other places."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x.mean(1)).tanh().flip(0)).flip(0)


@pytest.mark.parametrize("dynamic", ["batch", None])
@pytest.mark.parametrize("model", [TokensFirst, Mixing])
def test_samples_are_followed_through_other_layouts_or_taken_one_by_one(model, dynamic):
    torch.manual_seed(0)
    program = g.capture(model(), torch.randn(5, 4, 3), dynamic_shapes=dynamic)
    names = [layer.name for layer in layers(program)[0]]
    x, y = torch.randn(5, 4, 3), torch.randint(2, (5,))
    stream = Gradients(4, "sample", "labels").stream(program.copy(), names, Context(data=[(x, y)]), 10**9)
    if dynamic is None:
        with pytest.raises(BadInput, match='set per to "batch"'):
            list(stream)
        return
    parts = list(stream)
    assert len(parts) == (1 if model is TokensFirst else 4)
    module = program.module()
    for i in range(4):
        module.zero_grad()
        F.cross_entropy(module(x[i : i + 1]), y[i : i + 1]).backward()
        for n in names:
            expected = module.get_parameter(n).grad
            torch.testing.assert_close(torch.cat([p[n] for p in parts])[i], expected, rtol=1e-4, atol=1e-6)


def test_a_fixed_batch_has_gradients_of_samples_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    fixed, free = g.capture(net, x), g.capture(net, x, dynamic_shapes="batch")
    options = Sparsify(block=16, gradients=3)
    one, two = (options(p, data=[(x, y)]).program for p in (fixed, free))
    assert (weights(one)["1.weight"] == 0).sum() == 8
    torch.testing.assert_close(weights(one)["1.weight"], weights(two)["1.weight"])


def test_frozen_parameters_stay_frozen(program):
    copied = program.copy()
    copied.module().requires_grad_(False)
    result = Sparsify(gradients=8, block=32)(copied, data=batches())
    assert not any(p.requires_grad for p in result.program.module().parameters())


def test_gradients_of_batches(program):
    data = batches(3)
    found = list(Gradients(2, "batch", "labels").stream(program.copy(), ["proj.weight"], Context(data=data), 1))
    assert [len(f["proj.weight"]) for f in found] == [1, 1]
    module = program.copy().module()
    F.cross_entropy(module(data[1][0]), data[1][1]).backward()
    torch.testing.assert_close(found[1]["proj.weight"][0], module.get_parameter("proj.weight").grad)


def test_labels_from_the_teacher_need_no_labels_and_repeat(program):
    data = batches(labels=False)
    options = Gradients(16, "sample", "teacher")
    one, two = (
        torch.cat(
            [f["proj.weight"] for f in options.stream(program.copy(), ["proj.weight"], Context(data=data), 10**9)]
        )
        for _ in range(2)
    )
    assert torch.equal(one, two)
    assert one.abs().max() > 0
    result = Sparsify(against="teacher", gradients=16, block=32)(program, data=data, teacher=program)
    assert result.record["stages"][0]["steps"][0]["gradients"] == 16


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(4, 6, 3, 2, 1, groups=2), (4, 9, 8)),
        (nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2), (4, 7, 8)),
        (nn.Conv1d(4, 6, 3, padding=2), (4, 9)),
        (nn.Conv3d(2, 4, 2, (1, 2, 1)), (2, 4, 5, 3)),
        (nn.Linear(4, 6), (5, 4)),
    ],
)
def test_second_moments_of_inputs_give_the_output_energy(layer, size):
    """`sum |W x|^2` over the outputs is `tr(W (X X^T) W^T)`."""
    torch.manual_seed(0)
    layer.bias = None
    program = g.capture(nn.Sequential(layer, nn.ReLU()), torch.randn(2, *size), dynamic_shapes="batch")
    [found], _ = layers(program)
    x = torch.randn(6, *size)
    every, seen = input_moments(program.copy(), [found.name], Context(data=x.split(2)), 9)
    assert seen == 6
    moments = every[found.name].double()
    rows = layer.weight.detach().double().flatten(1).view(found.groups, -1, moments.shape[1])
    energy = torch.einsum("gri,gij,grj->", rows, moments, rows)
    out = layer(x).detach().double()
    positions = out.numel() / out.shape[-1 if layer.__class__ is nn.Linear else 1]
    torch.testing.assert_close(energy, out.square().sum() / positions, rtol=1e-5, atol=0)
    squares, _ = input_moments(program.copy(), [found.name], Context(data=x.split(2)), 6, full=False)
    diagonal = squares[found.name]
    torch.testing.assert_close(diagonal.double(), moments.diagonal(dim1=1, dim2=2), rtol=1e-5, atol=1e-7)


# -------------------------------------------------------------------------------------------------------------- the data
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


def test_a_gradual_run_goes_on_with_the_same_order_of_the_data(program, tmp_path):
    x, y = (torch.cat(t) for t in zip(*batches(8), strict=True))
    loader = DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    options = {"schedule": ((0, 0.3), (1, 0.5)), "train": Distill(epochs=2, lr=1e-2), "gradients": 16, "block": 32}
    pass_ = Sparsify(snapshots=str(tmp_path), **options)
    whole = pass_(program, data=loader, teacher=program)
    next(tmp_path.glob("*0.5000*.pt2")).unlink()
    again = pass_(program, data=loader, teacher=program)
    for name, w in weights(whole.program).items():
        assert torch.equal(weights(again.program)[name], w)


class Table(nn.Module):
    """Scores of images against a table of classes, an input without a batch dimension."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x, table):
        return self.c(self.b(self.a(x).relu()).relu()) @ table.T


def test_an_input_that_is_as_long_as_the_batch_is_not_cut():
    torch.manual_seed(0)
    x, table, y = torch.randn(60, 16), torch.randn(10, 8), torch.randint(10, (60,))
    program = g.capture(Table(), (x[:7], table), dynamic_shapes={"x": {0: torch.export.Dim("b")}, "table": {}})
    found = []
    for size in (12, 10):
        data = [((x[i : i + size], table), y[i : i + size]) for i in range(0, 60, size)]
        for gradients in (60, 55):
            found.append(Sparsify(sparsity=0.5, gradients=gradients, block=32)(program, data=data))
    for a, b in (found[0], found[2]), (found[1], found[3]):
        torch.testing.assert_close(weights(a.program)["b.weight"], weights(b.program)["b.weight"])


def test_a_fixed_batch_of_images_of_any_size():
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    sizes = {"input": {2: torch.export.Dim("h", min=8), 3: torch.export.Dim("w", min=8)}}
    fixed = g.capture(net, torch.randn(8, 1, 16, 16), dynamic_shapes=sizes)
    free = g.capture(net, torch.randn(8, 1, 16, 16), dynamic_shapes="batch")
    found = [Sparsify(sparsity=0.5, gradients=16)(p, data=batches()) for p in (fixed, free)]
    torch.testing.assert_close(*(weights(f.program)["2.weight"] for f in found))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.logits, self.boxes = nn.Linear(16, 5), nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        return {"logits": self.logits(self.a(x).relu()), "boxes": self.boxes(self.b(x).relu())}


@pytest.mark.parametrize("method", ["cap", "woodfisher", "fastcap"])
def test_weights_that_the_loss_does_not_see_are_refused(method):
    torch.manual_seed(0)
    program = g.capture(TwoHeads(), torch.randn(7, 16), dynamic_shapes="batch")
    data = [(torch.randn(8, 16), torch.randint(5, (8,))) for _ in range(4)]
    result = Sparsify(sparsity=0.75, method=method, gradients=32, block=32)(program, data=data)
    why = {r["what"]: r["why"] for r in result.record["refused"]}
    assert why["b.weight"].startswith("no gradient of the loss reaches it")
    assert set(result.record["sparse"]) == {"a.weight"}
    assert int((weights(result.program)["a.weight"] == 0).sum()) == 192

    def both(out, labels):
        return F.cross_entropy(out["logits"], labels) + out["boxes"].square().mean()

    result = Sparsify(sparsity=0.75, method=method, gradients=32, block=32)(program, data=data, loss=both)
    assert set(result.record["sparse"]) == {"a.weight", "b.weight"}
    with pytest.raises(BadInput, match=r"all gradients of .* are zero; check the loss"):
        Sparsify(method=method, include="a*")(program, data=data, loss=lambda out, y: out["boxes"].square().mean())
    with pytest.raises(BadInput, match="loss: has no gradient"):
        Sparsify(method=method)(program, data=data, loss=lambda out, y: (out["logits"].argmax(1) != y).float().mean())


def test_a_teacher_whose_scores_are_not_finite_is_refused(program):
    broken = program.copy()
    broken.module().get_parameter("head.bias").data.fill_(float("nan"))
    with pytest.raises(BadInput, match="the teacher's scores are not finite"):
        Sparsify(against="teacher")(program, data=batches(), teacher=broken)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_narrow_numbers_are_summed_in_wide_ones(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)).to(dtype)
    data = [(30 * torch.randn(8, 16).to(dtype), torch.randint(5, (8,))) for _ in range(64)]
    program = g.capture(net, data[0][0], dynamic_shapes="batch")
    moments = input_moments(program.copy(), ["2.weight"], Context(data=data), 512)[0]["2.weight"][0]
    inputs = torch.cat([net[:2](x).float() for x, _ in data])
    torch.testing.assert_close(moments, inputs.T @ inputs / 512, rtol=1e-3, atol=1e-3)
    result = Sparsify(method="fastcap", gradients=64)(
        program, data=data, loss=lambda out, y: 3e-3 * F.cross_entropy(out.float(), y)
    )
    assert int((weights(result.program)["2.weight"] == 0).sum()) == 128


# --------------------------------------------------------------------------------------------------- which layers, and why
ORIN = SimpleNamespace(name="agx-orin", compute_capability=(8, 7))


def test_what_stays_dense_and_why(program):
    result = Sparsify(method="magnitude")(program)
    why = {r["what"]: r["why"] for r in result.record["refused"]}
    assert why == {
        "stem.weight": "the first layer",
        "deep.weight": "depthwise, too few weights each",
        "head.weight": "the last layer",
    }
    everything = Sparsify(method="magnitude", include="*", exclude=["head*"])(program)
    assert set(everything.record["sparse"]) == {f"{n}.weight" for n in ("stem", "conv", "deep", "qkv", "proj")}
    assert not any(c["accelerated"] for c in result.record["changed"])
    assert "outside the 2:4 pattern" in result.record["changed"][0]["why_not"]


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


def test_transposed_and_computed_weights_are_refused():
    class Standardised(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.first = nn.ConvTranspose2d(4, 4, 2), nn.Conv2d(4, 4, 1)
            self.weight, self.last = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.up(self.first(x))
            return self.last(F.conv2d(x, self.weight - self.weight.mean(1, keepdim=True)))

    result = Sparsify(method="magnitude")(g.capture(Standardised(), torch.randn(2, 4, 5, 5)))
    why = {r["what"]: r["why"] for r in result.record["refused"]}
    assert "the other way round" in why["up.weight"]
    assert "computed" in why["conv2d_1"]
    assert result.record["changed"] == []


# ------------------------------------------------------------------------------------------------------------- gradual
def gradual(train, **options):
    return Sparsify(
        schedule=((1, 0.5), (2, 0.8)), train=Distill(epochs=3, lr=3e-3, schedule="linear", alpha=0.0), gradients=64,
        block=32, **options,
    )  # fmt: skip


def test_a_gradual_run_yields_every_sparsity_and_resumes(trained, tmp_path, monkeypatch):
    program, train, val = trained
    pass_ = gradual(train, snapshots=str(tmp_path))
    whole = pass_(program, data=train, val=val)
    assert [s["sparsity"] for s in whole.record["stages"]] == [0.0, 0.5, 0.8]
    assert [len(s["training"]["epochs"]) for s in whole.record["stages"]] == [1, 1, 1]
    assert all(s["val"] > 0.9 for s in whole.record["stages"])
    files = sorted(tmp_path.glob("*.pt2"))
    assert len(files) == 3
    for file, share in zip(files, (0.0, 0.5, 0.8), strict=True):
        snapshot = g.load(file)
        counts = zero_counts(snapshot)
        names = list(whole.record["sparse"])
        total = sum(weights(snapshot)[n].numel() for n in names)
        assert sum(counts[n] for n in names) == round(share * total)
    assert set(masks.sparse_weights(g.load(files[2]))) == set(names)
    files[2].unlink()
    again = pass_(program, data=train, val=val)
    for name, w in weights(whole.program).items():
        assert torch.equal(weights(again.program)[name], w), "taken up after the second stage, the same end"
    assert len(again.record["stages"]) == 3
    assert len(again.program.history) == len(program.history) + 1


def test_snapshots_of_another_run_are_not_taken(program, tmp_path):
    pass_ = Sparsify(schedule=((0, 0.5),), train=Distill(epochs=1), method="magnitude", snapshots=str(tmp_path))
    own = torch.Generator().manual_seed(3)
    x, y = (torch.cat(t) for t in zip(*batches(), strict=True))
    loader = DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=own)
    other = program.copy()
    other.module().get_parameter("head.bias").data.add_(1)

    def files(data, **context):
        pass_(program, **({"data": data, "teacher": program} | context))
        return len(list(tmp_path.glob("*.pt2")))

    states = torch.get_rng_state(), own.get_state()
    code = pass_._run_code(program, Context(data=loader))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(own.get_state(), states[1])
    assert pass_._run_code(program, Context(data=loader, seed=1)) != code
    assert [files(loader), files(loader)] == [1, 1], "the same run"
    assert files(loader, teacher=other) == 2
    assert files(batches()) == 3, "other batches"
    assert files(batches(3)) == 4, "another length"
    assert files(batches(), target=ORIN) == 5
    assert files(batches(), dtype="fp32") == 6
    assert files(batches(), loss=lambda out, y: 2 * F.cross_entropy(out, y)) == 7
    assert files(batches()) == 7
    again = pass_(program, data=batches(), teacher=program, val=batches())
    assert 0 <= again.record["stages"][0]["val"] <= 1, "a taken stage is scored, too"


def test_without_a_folder_a_gradual_run_leaves_nothing_behind(trained):
    program, train, _ = trained
    result = Sparsify(schedule=((0, 0.5),), train=Distill(epochs=1, alpha=0), method="magnitude")(program, data=train)
    assert [s["sparsity"] for s in result.record["stages"]] == [0.5]
    assert masks.sparse_weights(result.program) == dict.fromkeys(result.record["sparse"])


# -------------------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "Sparsify.sparsity: a share above 0 and under 1, not 1.0"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "give one of sparsity, pattern and schedule"),
        ({"pattern": "4:2"}, 'Sparsify.pattern: "N:M" with N less than M'),
        ({"pattern": "half"}, 'Sparsify.pattern: "N:M" with N less than M'),
        ({"pattern": "2:4", "block": 30}, "Sparsify.block: a multiple of the pattern's 4, not 30"),
        ({"pattern": "4:8", "permute": True}, "Sparsify.permute: false for groups of more than 4"),
        ({"method": "best"}, "Sparsify.method: cap, fastcap"),
        ({"method": "wanda", "scope": "global"}, "Sparsify.scope: uniform"),
        ({"block": 0}, "Sparsify.block: a whole number"),
        ({"damping": 0.0}, "Sparsify.damping: a number above 0"),
        ({"schedule": ((5, 0.5),)}, "Sparsify.train: a gradual run needs one with more than 5 epochs"),
        ({"schedule": ((5, 0.5), (3, 0.6)), "train": Distill(epochs=9)}, "Sparsify.schedule: rising epochs"),
        ({"schedule": ((1, 0.5), (3, 0.4)), "train": Distill(epochs=9)}, "Sparsify.schedule: rising sparsities"),
        ({"train": Distill()}, "only a gradual run trains"),
        ({"sparsity": "a"}, "Sparsify.sparsity: a number, not 'a'"),
        ({"sparsity": float("nan")}, "Sparsify.sparsity: a finite number, not nan"),
        ({"pattern": 24}, "Sparsify.pattern: text, not 24"),
        ({"pattern": "2:4", "block": "8"}, "Sparsify.block: a whole number, not '8'"),
        ({"block": True}, "Sparsify.block: a whole number, not True"),
        ({"gradients": 1.5}, "Sparsify.gradients: a whole number"),
        ({"damping": "low"}, "Sparsify.damping: a number, not 'low'"),
        ({"memory": None}, "Sparsify.memory: a number, not None"),
        ({"memory": 1e5}, "Sparsify.memory: bytes"),
        ({"permute": "yes"}, "Sparsify.permute: true or false, not 'yes'"),
        ({"include": 3}, "Sparsify.include: a list of texts, not 3"),
        ({"exclude": (None,)}, "Sparsify.exclude: a list of texts, not (None,)"),
        ({"schedule": 0.5}, "Sparsify.schedule: a list, each [a whole number, a number], not 0.5"),
        ({"schedule": (1, 0.5)}, "Sparsify.schedule: a list, each [a whole number, a number], not (1, 0.5)"),
        ({"schedule": ((1, 0.5, 2),)}, "Sparsify.schedule: a list, each [a whole number, a number]"),
        ({"schedule": ((0, "x"),), "train": Distill()}, "Sparsify.schedule: a list, each [a whole number, a number]"),
        ({"schedule": ((0, 1.5),), "train": Distill()}, "Sparsify.schedule: shares above 0 and under 1"),
        (
            {"schedule": ((True, 0.5),), "train": Distill()},
            "Sparsify.schedule: a list, each [a whole number, a number]",
        ),
        ({"schedule": ((-1, 0.5),), "train": Distill()}, "Sparsify.schedule: whole epochs, from 0"),
        ({"schedule": ((0, 0.5),), "train": {}}, "Sparsify.train: a Distill, not {}"),
        ({"schedule": ((0, 0.5),), "train": Distill(), "snapshots": 3}, "Sparsify.snapshots: text, not 3"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(BadInput) as error:
        Sparsify(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_patterns_that_match_nothing_are_named(program):
    with pytest.raises(BadInput, match=r'Sparsify.include: "porj\*" matches no weight; there are stem.weight, conv'):
        Sparsify(method="magnitude", include=("qkv*", "porj*"))(program)


def test_missing_data_and_labels_are_named(program):
    for method in ("cap", "sparsegpt"):
        with pytest.raises(BadInput, match="needs data"):
            Sparsify(method=method)(program)
    with pytest.raises(BadInput, match='set it to "teacher"'):
        Sparsify()(program, data=batches(labels=False))
    bad = [(torch.full((4, 1, 16, 16), torch.nan), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(BadInput, match="not finite"):
        Sparsify(block=32)(program, data=bad)


class Once:
    """An iterable that yields its batches once, as one around a generator does."""

    def __init__(self, items):
        self.items = iter(items)

    def __iter__(self):
        return self.items


@pytest.mark.parametrize("method", [m for m in METHODS if m != "magnitude"])
def test_data_without_batches_is_refused(program, method):
    pass_ = Sparsify(method=method, block=32)
    with pytest.raises(BadInput, match="data: yields no batch; it must be iterable again"):
        pass_(program, data=[])
    with pytest.raises(BadInput, match="data: an iterator yields its batches once"):
        pass_(program, data=iter(batches()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recomputations": 2}, "yields no batch"),
        ({"recomputations": 2, "method": "fastcap"}, "yields no batch"),
        ({"recomputations": 2, "gradients": 24, "method": "sparsegpt"}, "yields 8 samples, and 24 the time before"),
        ({"recomputations": 2, "gradients": 24, "method": "wanda"}, "yields 8 samples, and 24 the time before"),
        ({"recomputations": 2, "gradients": 24}, "yields 8 samples, and 24 the time before"),
        ({"memory": 1e6, "gradients": 24, "dtype": "fp64"}, "yields 8 samples, and 24 the time before"),
    ],
)
def test_data_that_is_gone_the_second_time_is_refused(program, options, message):
    with pytest.raises(BadInput, match=f"data: {message}; it must be iterable again"):
        Sparsify(block=32, **options)(program, data=Once(batches()))


@pytest.mark.parametrize("value", [torch.nan, 1e30])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "magnitude"])
def test_statistics_that_are_not_finite_are_refused(program, method, value):
    data = batches()
    data[1][0][3, 0, 7, 7] = value
    with pytest.raises(BadInput, match=r"Sparsify: .* of \w+\.weight (is|are) not finite; check the data and the loss"):
        Sparsify(method=method, include="*", gradients=32, block=32)(program, data=data)


def test_layers_name_their_kinds(program):
    kinds = {layer.name: layer.kind for layer in layers(program)[0]}
    assert (kinds["deep.weight"], kinds["conv.weight"], kinds["qkv.weight"]) == ("depthwise", "conv", "linear")
