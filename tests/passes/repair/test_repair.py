"""Repair against the dense network: exact where it can be, better where not, and what is left alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import graphcomb
from graphcomb import BadInput, Context
from graphcomb.graph.nodes import fetch
from graphcomb.passes import Fuse, PruneDepth, Recalibrate, RemoveChannels, Repair, Sparsify
from graphcomb.passes.repair import repair
from graphcomb.passes.repair.least_squares import fit

from ...graph.toys import CASES


def images(count: int = 48, seed: int = 0, size: int = 10, batch: int = 16) -> list[torch.Tensor]:
    return list(
        torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).split(
            batch
        )
    )


def capture(model: nn.Module, size: int = 10) -> graphcomb.Program:
    return graphcomb.capture(model.double().eval(), torch.zeros(2, 3, size, size).double(), dynamic_shapes="batch")


def run(program: graphcomb.Program, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return program.module().eval()(x)


def error(dense: graphcomb.Program, other: graphcomb.Program, seed: int = 9) -> float:
    x = torch.cat(images(64, seed))
    wanted = run(dense, x)
    return float((run(other, x) - wanted).square().mean() / wanted.var())


class Mixed(nn.Module):
    """Every kind of reader: 3 x 3 with padding and stride, grouped, depthwise, behind a concatenation, behind a sum, linear
    after flattening, and one transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=2)
        self.deep = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.after, self.last = nn.BatchNorm2d(24), nn.Conv2d(40, 16, 1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Linear(8 * 9, 5)

    def forward(self, x):
        a = self.norm(self.stem(x)).relu()
        b = self.after(self.deep(self.grouped(a).relu())).relu()
        c = self.last(torch.cat([a, b], 1))
        c = c + self.body(c.relu())
        return self.head(nn.functional.adaptive_avg_pool2d(self.up(c.relu()), 3).flatten(1))


@pytest.fixture(scope="module")
def mixed() -> graphcomb.Program:
    torch.manual_seed(0)
    model = Mixed()
    with torch.no_grad():
        model.train()
        for _ in range(20):
            model(torch.randn(32, 3, 10, 10))  # statistics that fit
    return capture(model)


@pytest.mark.parametrize("importance", ["magnitude", "repair", "fisher-unlabelled"])
def test_a_repaired_network_is_nearer_to_the_dense_one_on_images_it_has_not_seen(mixed, importance: str) -> None:
    options = {"macs": 0.6, "scope": "global", "round_to": 2, "importance": importance}
    plain = RemoveChannels(**options)(mixed, data=images(), seed=3)
    repaired = RemoveChannels(**options, repair=True)(mixed, data=images(), seed=3)
    assert repaired.removed == plain.removed
    assert error(mixed, repaired.program) < 0.5 * error(mixed, plain.program)
    assert graphcomb.verify.surgery(mixed, repaired) < 1e-10
    assert repaired.record["verified"]["error"] < 1e-10


def test_what_is_predicted_is_what_is_measured(mixed) -> None:
    result = RemoveChannels(ratio=0.5, round_to=2, repair=True)(mixed, data=images())
    rows = [row for row in result.record["repair"]["repaired"] if row["predicted"] is not None and "kept" not in row]
    assert len(rows) >= 3
    for row in rows:
        assert row["after"] == pytest.approx(row["predicted"], rel=1e-6, abs=1e-12)
        assert row["predicted"] <= row["before"]


def test_the_last_layer_is_least_squares_on_what_reaches_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(300, 24), nn.ReLU(), nn.Linear(24, 5))
    dense, x = capture(model), images(200, 1)
    pruned = RemoveChannels(ratio=0.5, round_to=1)(dense)
    result = Repair(ridge=0.0)(pruned.program, data=x, teacher=dense)
    stacked = torch.cat(x)
    weight = fetch(pruned.program.module(), "1.weight")
    hidden = (stacked.flatten(1) @ weight.T + fetch(pruned.program.module(), "1.bias")).relu()
    full = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)
    expected = torch.linalg.lstsq(full, run(dense, stacked)).solution.T
    torch.testing.assert_close(fetch(result.program.module(), "3.weight").data, expected[:, :-1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fetch(result.program.module(), "3.bias").data, expected[:, -1], rtol=1e-9, atol=1e-9)


def test_a_sum_behind_a_batchnorm_is_what_its_last_operand_is_fitted_to() -> None:
    """The block makes up for what the shortcut lacks: least squares on the dense sum less the shortcut, through the norm."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.shortcut = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)
            self.wide, self.last, self.norm = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(self.norm.weight, -2, -0.5)
            nn.init.normal_(self.norm.bias)

        def forward(self, x):
            x = self.stem(x).relu()
            short = self.shortcut(x)
            return short + self.norm(self.last(self.wide(x).relu()))

    torch.manual_seed(0)
    dense, data = capture(Residual()), images()
    pruned = RemoveChannels(ratio=0.5, round_to=1, include=("stem*",))(dense).program
    result = Repair(ridge=0.0, include=("last*",))(pruned, data=data, teacher=dense)
    rows = {row["what"]: row for row in result.record["repaired"]}
    assert rows["last.weight"]["sum"] == "add"
    assert rows["last.weight"]["after"] == pytest.approx(rows["last.weight"]["predicted"], rel=1e-6)
    module, x = result.program.module(), torch.cat(data)
    part = {n: fetch(module, n).detach() for n in ("stem.weight", "stem.bias", "shortcut.weight", "shortcut.bias")}
    wide = (fetch(module, "wide.weight").detach(), fetch(module, "wide.bias").detach())
    stem = nn.functional.conv2d(x, part["stem.weight"], part["stem.bias"]).relu()
    short = nn.functional.conv2d(stem, part["shortcut.weight"], part["shortcut.bias"])
    hidden = nn.functional.conv2d(stem, *wide).relu().movedim(1, -1).flatten(0, 2)
    goal = run(dense, x).movedim(1, -1).flatten(0, 2) - short.movedim(1, -1).flatten(0, 2)
    full = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)
    expected = full @ torch.linalg.lstsq(full, goal).solution
    ours = (run(result.program, x) - short).movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_samples_may_lie_behind_the_positions() -> None:
    """PyTorch's own attention computes with positions first, and with both in one dimension behind the softmax."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attend = nn.Linear(6, 16), nn.MultiheadAttention(16, 4, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            return self.head(x + self.attend(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model = Attention().double().train()  # in eval mode it is one fused operator
    data = list(torch.randn(64, 5, 6, dtype=torch.float64).split(16))
    dense = graphcomb.capture(model, (data[0][:2],), dynamic_shapes="batch")
    removed = RemoveChannels(ratio=0.5, round_to=1)(dense).program
    repaired = Repair()(removed, data=data, teacher=dense)
    x = torch.randn(64, 5, 6, dtype=torch.float64)
    wanted = run(dense, x)
    before, after = (float((run(p, x) - wanted).square().mean()) for p in (removed, repaired.program))
    assert {row["what"] for row in repaired.record["repaired"]} >= {"attend.out_proj.weight", "head.weight"}
    assert after < 0.6 * before


@pytest.mark.parametrize("kernel", [1, 3])
def test_channels_that_others_repeat_come_back_whole(kernel: int) -> None:
    """Every second channel is a multiple of the one before it; without these, the network can compute the same."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, kernel, padding=kernel // 2)
    with torch.no_grad():
        first.weight[1::2] = 0.25 * first.weight[::2]
        first.bias[1::2] = 0.25 * first.bias[::2]
    dense = capture(
        nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    )
    options = {"ratio": 0.5, "round_to": 1, "include": ("0.*",)}
    plain, repaired = (RemoveChannels(**options, repair=r)(dense, data=images()) for r in (False, True))
    assert plain.removed["0.weight"][0] == [1, 3, 5, 7]
    assert error(dense, plain.program) > 1e-4
    assert error(dense, repaired.program) ** 0.5 < 1e-10


def test_nothing_changes_where_nothing_was_removed(mixed) -> None:
    result = Repair()(mixed, data=images(), teacher=mixed)
    assert result.record["repaired"] == []
    before, after = mixed.module().state_dict(), result.program.module().state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    pruned = RemoveChannels(ratio=0.5, include=("body*", "last*"), round_to=2)(mixed)
    result = Repair()(pruned.program, data=images(), teacher=mixed)
    for name in ("stem.weight", "norm.running_mean", "grouped.weight", "deep.weight", "after.running_mean"):
        assert torch.equal(fetch(result.program.module(), name), fetch(pruned.program.module(), name))


def test_the_input_and_the_dense_program_are_never_changed(mixed) -> None:
    pruned = RemoveChannels(ratio=0.5, round_to=2)(mixed).program
    before = [{k: v.clone() for k, v in p.module().state_dict().items()} for p in (pruned, mixed)]
    Repair()(pruned, data=images(), teacher=mixed)
    for program, state in zip((pruned, mixed), before, strict=True):
        assert all(torch.equal(state[k], v) for k, v in program.module().state_dict().items())


def test_activations_that_do_not_fit_in_memory_go_through_files(mixed) -> None:
    pruned = RemoveChannels(ratio=0.5, round_to=2)(mixed).program
    ample, none = (Repair(memory=m)(pruned, data=images(), teacher=mixed).program for m in (4.0, 0.0))
    for (name, a), b in zip(ample.module().state_dict().items(), none.module().state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_large_kernels_share_one_map_and_still_come_nearer(mixed) -> None:
    pruned = RemoveChannels(ratio=0.5, round_to=2, exclude=("grouped*",))(mixed).program
    result = Repair(unknowns=8)(pruned, data=images(), teacher=mixed)
    assert error(mixed, result.program) < 0.7 * error(mixed, pruned)
    rows = {row["what"]: row for row in result.record["repaired"]}
    shared = {name for name, row in rows.items() if "inputs" in row}
    assert shared
    assert all(fetch(pruned.module(), name).dim() == 4 for name in shared)


def test_a_shared_map_is_judged_by_the_layer_and_not_by_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record has the layer's own error on the images, before and after; a map that makes it worse is not taken."""
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(12, 3, 2, stride=2))
        with torch.no_grad():
            model[2].weight[6:] *= torch.logspace(-2, 2, 6).view(-1, 1, 1, 1)
        dense, data = capture(model), images(4, batch=4)
        pruned = RemoveChannels(ratio=0.5, round_to=1, importance="random")(dense, seed=seed).program
        result = Repair()(pruned, data=data, teacher=dense)
        (row,) = result.record["repaired"]
        wanted = run(dense, data[0])
        variance = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum()
        before, after = (float((run(p, data[0]) - wanted).square().sum() / variance) for p in (pruned, result.program))
        assert (row["before"], row["after"]) == pytest.approx((before, after), rel=1e-9)
        assert after < before
    monkeypatch.setattr(repair, "fit", lambda *args: replace(fitted := fit(*args), weight=fitted.weight + 1))
    (row,) = (result := Repair()(pruned, data=data, teacher=dense)).record["repaired"]
    assert row["kept"] == "the layer is no better with the map that is best for its inputs"
    assert row["before"] == row["after"]
    assert torch.equal(fetch(result.program.module(), "2.weight"), fetch(pruned.module(), "2.weight"))


def test_sparse_kernels_that_would_share_a_map_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1))
    sparse = Sparsify(sparsity=0.5, method="magnitude", include=("2.weight",))(capture(model)).program
    pruned = RemoveChannels(ratio=0.25, round_to=1)(sparse).program
    record = Repair(unknowns=50)(pruned, data=images(), teacher=sparse).record
    assert [row["why"] for row in record["refused"]] == [
        "all kernel positions would share one map, which would fill its zeros"
    ]
    assert Repair()(pruned, data=images(), teacher=sparse).record["repaired"]


def test_a_teacher_with_other_inputs_is_refused(mixed) -> None:
    pruned = RemoveChannels(ratio=0.5, round_to=2)(mixed).program
    other = graphcomb.capture(nn.Conv2d(3, 4, 1).eval(), torch.zeros(2, 3, 10, 10), dynamic_shapes="batch")
    for make in (Repair(), Recalibrate()):
        with pytest.raises(BadInput, match=r"^teacher: an input is torch.float32"):
            make(pruned, data=images(), teacher=other)


def test_a_dense_network_with_a_history_of_its_own_is_compared_with_all_that_was_removed(mixed) -> None:
    """Such as one that was trained further after the program was pruned from it."""
    once = RemoveChannels(ratio=0.25, round_to=2)(mixed).program
    twice = RemoveChannels(ratio=0.25, round_to=2)(once).program
    wanted = Repair()(twice, data=images(), teacher=mixed)
    trained = mixed.copy()
    trained.history.append({"pass": "Distill"})
    result = Repair()(twice, data=images(), teacher=trained)
    assert not result.record["refused"]
    assert result.record["repaired"] == wanted.record["repaired"]
    with pytest.raises(BadInput, match=r"^teacher: it lost channels that the program still has"):
        Repair()(RemoveChannels(ratio=0.5, round_to=2)(mixed).program, data=images(), teacher=once)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))
        self.norm_a, self.norm_b = nn.BatchNorm2d(16), nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.norm_b(self.b(self.norm_a(self.a(x)).relu()))).relu()


@pytest.fixture(scope="module")
def blocks() -> graphcomb.Program:
    torch.manual_seed(0)
    stem, head = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()], [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    model = nn.Sequential(*stem, Block(), Block(), Block(), *head).train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(32, 3, 10, 10))  # statistics that fit
    return capture(model)


@pytest.mark.parametrize("first", [Fuse(), PruneDepth(names=("3",), repair=True)], ids=["fused", "merged"])
def test_channels_are_removed_from_layers_that_an_earlier_pass_made(blocks, first) -> None:
    """The biases of layers that took up a BatchNorm, and the layer of a merged block, are not in the dense network."""
    made = first(blocks, data=images()).program
    plain = RemoveChannels(ratio=0.25, round_to=1)(made).program
    result = Repair()(plain, data=images(), teacher=blocks)
    assert not result.record["refused"]
    assert {"3.a.weight", "4.b.weight", "7.weight"} <= {r["what"] for r in result.record["repaired"] if "kept" not in r}
    assert error(blocks, result.program) < 0.1 * error(blocks, plain)


def test_a_layer_merged_of_narrowed_ones_is_not_taken_for_the_one_whose_name_it_has(blocks) -> None:
    """`3.a` lost four channels between the two layers of the block. The merged layer lost four others, of the sum."""
    plain = RemoveChannels(ratio=0.25, round_to=1)(blocks).program
    merged = PruneDepth(names=("3",), repair=True)(plain, data=images()).program
    result = Repair()(merged, data=images(), teacher=blocks)
    assert result.record["refused"] == [{"what": "3.a.weight", "why": "what was removed from its weight is not known"}]
    assert error(blocks, result.program) < 0.1 * error(blocks, merged)


def test_zeros_of_sparsify_stay_zero_and_the_others_make_up_for_what_is_gone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1)
    )
    sparse = Sparsify(sparsity=0.5, method="magnitude")(capture(model)).program
    result = RemoveChannels(ratio=0.25, round_to=1, repair=True)(sparse, data=images())
    plain = RemoveChannels(ratio=0.25, round_to=1)(sparse)
    assert error(sparse, result.program) < 0.9 * error(sparse, plain.program)
    zeros = fetch(plain.program.module(), "2.weight") == 0
    assert zeros.any()
    assert not fetch(result.program.module(), "2.weight")[zeros].any()


def test_patterns_choose_what_may_change(mixed) -> None:
    pruned = RemoveChannels(ratio=0.5, round_to=2)(mixed).program
    result = Repair(include=("body*", "head*"), exclude=("*.bias", "head*"))(pruned, data=images(), teacher=mixed)
    assert [row["what"] for row in result.record["repaired"]] == ["body.weight"]
    before, after = pruned.module().state_dict(), result.program.module().state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"body.weight", "body.bias"}


def test_a_layer_with_more_inputs_than_rows_needs_no_matrix_of_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the first linear layer of a VGG, which reads every channel at every position."""
    torch.manual_seed(0)
    body, wide = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 64, 40)
    dense = capture(nn.Sequential(body, nn.ReLU(), nn.Flatten(), wide, nn.ReLU(), nn.Linear(40, 5)), 8)
    plain = RemoveChannels(ratio=0.25, round_to=1, include=("0.weight",))(dense).program
    data = images(32, size=8)
    zeros = repair.Sums.zeros

    def make(groups: int, inputs: int, outputs: int, device: torch.device):
        assert inputs < 100, "a matrix of all inputs"
        return zeros(groups, inputs, outputs, device)

    with monkeypatch.context() as patch:
        patch.setattr(repair.Sums, "zeros", make)
        repaired = Repair()(plain, data=data, teacher=dense)
    (row,) = (row for row in repaired.record["repaired"] if row["what"] == "3.weight")
    assert row["unknowns"] == 12 * 64
    assert row["rows"] == 32
    assert row["after"] == pytest.approx(row["predicted"], rel=1e-6)
    monkeypatch.setattr(repair, "Stack", zeros)
    sums = Repair()(plain, data=data, teacher=dense)
    (expected,) = (row for row in sums.record["repaired"] if row["what"] == "3.weight")
    assert row["ridge"] == expected["ridge"]
    assert row["held_out"] == pytest.approx(expected["held_out"], rel=1e-6)
    for name, value in fetched(sums.program).items():
        torch.testing.assert_close(fetched(repaired.program)[name], value, rtol=1e-6, atol=1e-8)
    x = torch.cat(images(64, 9, size=8))
    wanted = run(dense, x)
    apart = [float((run(p, x) - wanted).square().mean()) for p in (plain, repaired.program)]
    assert apart[1] < apart[0]


def test_rows_are_counted_where_positions_lie_beside_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as in attentions and windows: 8 images of 64 positions are 512 rows, which are more than 48 inputs."""

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
            self.into, self.out, self.head = nn.Linear(3, 64), nn.Linear(64, 48), nn.Linear(48, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.into(x.flatten(2).mT)
            tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
            rows = torch.relu(self.out(tokens.flatten(0, 1)))
            return self.head(rows).unflatten(0, (x.shape[0], -1)).mean(1)

    torch.manual_seed(0)
    dense = capture(Folded(), 8)
    plain = RemoveChannels(ratio=0.25, round_to=1)(dense).program
    monkeypatch.setattr(repair, "Stack", None)
    result = Repair()(plain, data=images(8, size=8), teacher=dense)
    rows = {row["what"]: row["rows"] for row in result.record["repaired"]}
    assert {rows[name] for name in ("attention.out_proj.weight", "out.weight", "head.weight")} == {8 * 64}


def fetched(program: graphcomb.Program) -> dict[str, torch.Tensor]:
    return dict(program.module().named_parameters())


def test_few_images_are_said_and_the_ridge_decides() -> None:
    torch.manual_seed(0)
    dense = capture(nn.Sequential(nn.Flatten(), nn.Linear(300, 64), nn.ReLU(), nn.Linear(64, 5)))
    for count in (1, 6):
        result = RemoveChannels(ratio=0.5, round_to=1, repair=True)(dense, data=images(count, batch=2))
        (row,) = result.record["repair"]["repaired"]
        said = (
            "one image: nothing is held out" if count == 1 else "6 rows for 32 unknowns: the ridge decides; 32 images"
        )
        assert row["few"].startswith(said)
        assert result.record["repair"]["samples"] == count
        assert error(dense, result.program) < 10


def test_layers_that_cannot_be_repaired_are_named_with_the_reason() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.both, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
            self.scale = nn.Parameter(torch.ones(4, 1, 1, 1))

        def forward(self, x):
            x = self.first(x).relu()
            x = self.both(self.both(x).relu()).relu()
            return nn.functional.conv2d(x, self.last.weight * self.scale)

    torch.manual_seed(0)
    result = RemoveChannels(ratio=0.5, round_to=1, repair=True)(capture(Twice()), data=images())
    why = {row["what"]: row["why"] for row in result.record["repair"]["refused"]}
    assert why["both.weight"] == "its weight is used more than once"
    assert any("computed" in reason for reason in why.values())


def test_inputs_that_are_not_finite_leave_a_layer_as_it_is() -> None:
    torch.manual_seed(0)
    dense = capture(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    data = images()
    data[0][0, 0, 0, 0] = float("nan")
    result = RemoveChannels(ratio=0.5, round_to=1, repair=True)(dense, data=data)
    assert result.record["repair"]["refused"] == [
        {"what": "2.weight", "why": "its inputs or outputs are not finite numbers"}
    ]
    assert all(p.isfinite().all() for p in result.program.module().parameters())


def test_mistakes_are_one_line_each(mixed) -> None:
    with pytest.raises(BadInput, match=r"^Repair: needs the dense program to compare with; pass teacher="):
        Repair()(mixed, data=images())
    with pytest.raises(BadInput, match=r"^Repair: needs images \(labels are not needed\); pass data="):
        Repair()(mixed, teacher=mixed)
    with pytest.raises(BadInput, match=r"importance repair needs images"):
        RemoveChannels(importance="repair")(mixed, Context())
    with pytest.raises(BadInput, match=r"Repair\.samples"):
        Repair(samples=0)
    with pytest.raises(BadInput, match=r'^Repair\.include: "heat\*" matches no weight; there are stem\.weight, '):
        Repair(include=("head*", "heat*"))(mixed, data=images(), teacher=mixed)


class Chosen(nn.Module):
    """Takes the positions with the highest scores, as a detector takes its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 12)
        self.score, self.last = nn.Linear(12, 1), nn.Linear(12, 4)

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        at = self.score(x).squeeze(-1).topk(5, dim=1).indices
        return self.last(x.gather(1, at.unsqueeze(-1).repeat(1, 1, 12)))


def test_rows_that_the_network_chooses_itself_are_those_of_the_dense_network() -> None:
    torch.manual_seed(0)
    dense = graphcomb.capture(Chosen().double().eval(), torch.zeros(2, 9, 6).double(), dynamic_shapes="batch")
    x = torch.randn(256, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    smaller = RemoveChannels(ratio=0.5, round_to=1)(dense).program
    found = Repair(samples=256, ridge=0.0)(smaller, data=[x], teacher=dense)
    (kept,) = (row for row in found.record["repaired"] if row["what"] == "last.weight")
    assert "kept" not in kept
    # The least-squares solution for the rows that the dense network chooses.
    state, repaired = dense.module().state_dict(), found.program.module().state_dict()
    wide, narrow = (
        ((x @ s["first.weight"].T + s["first.bias"]).relu() @ s["second.weight"].T + s["second.bias"]).relu()
        for s in (state, repaired)
    )
    chosen, other = (
        (y @ s["score.weight"].T)[..., 0].topk(5, dim=1).indices for y, s in ((wide, state), (narrow, repaired))
    )
    assert (chosen != other).any()  # by itself the smaller network takes other rows
    rows, goals = (y.gather(1, chosen[..., None].expand(-1, -1, 12)).flatten(0, 1) for y in (narrow, wide))
    goals = goals @ state["last.weight"].T + state["last.bias"]
    centred, wanted = rows - rows.mean(0), goals - goals.mean(0)
    best = (
        centred @ torch.linalg.lstsq(centred, wanted, driver="gelsd").solution
    )  # a dead neuron makes it rank-deficient
    assert torch.allclose(centred @ repaired["last.weight"].T, best, atol=1e-6)


def test_recurrences_stay_as_they_are_and_what_reads_them_is_repaired() -> None:
    torch.manual_seed(0)
    model = CASES["UnrolledCells"].model().double().eval()
    data = [torch.randn(16, 4, 3, dtype=torch.float64) for _ in range(4)]
    dense = graphcomb.capture(model, data[0], dynamic_shapes="batch")
    smaller = RemoveChannels(ratio=0.5, round_to=1, importance="repair", samples=64)(dense, data=data).program
    result = Repair(samples=64)(smaller, data=data, teacher=dense)
    assert [row["what"] for row in result.record["repaired"]] == ["fc.weight"]
    refused = {row["what"]: row["why"] for row in result.record["refused"]}
    assert refused.keys() == {"first.weight_ih", "second.weight_ih", "third.weight_ih"}
    assert len(result.record["refused"]) == 3  # once, though the cells are called for every step
    assert all(why == "a recurrence is not linear; its weights stay as they are" for why in refused.values())
    x = torch.randn(64, 4, 3, dtype=torch.float64)
    wanted = run(dense, x)
    before, after = (float((run(program, x) - wanted).square().mean()) for program in (smaller, result.program))
    assert after < before


def test_images_that_are_all_the_same_are_refused() -> None:
    """A layer at the borders of blank images has rows enough, and both halves the same ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
    program = graphcomb.capture(model, torch.zeros(2, 3, 8, 8), dynamic_shapes="batch")
    for blank in (torch.zeros(8, 3, 8, 8), torch.randn(1, 3, 8, 8).expand(8, -1, -1, -1)):
        with pytest.raises(BadInput, match=r"^data: all images are the same"):
            RemoveChannels(ratio=0.5, round_to=1, repair=True)(program, data=[blank, blank])
    one = RemoveChannels(ratio=0.5, round_to=1, repair=True)(program, data=[torch.randn(1, 3, 8, 8)])
    assert one.record["repair"]["repaired"]
