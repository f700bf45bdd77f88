"""The tables: times are those of the networks that the passes build, losses those of what is replaced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import graphcomb
from graphcomb import BadInput, Context
from graphcomb.graph.comb.solve import Comb
from graphcomb.graph.verify import equivalence
from graphcomb.graph.workload.layers import Layers
from graphcomb.passes import PruneDepth, RemoveChannels, Repair
from graphcomb.passes.channels.sizes.knapsack import Predictor, knapsack
from graphcomb.passes.common.divergence import Divergence
from graphcomb.passes.common.feed import Feed
from graphcomb.passes.joint.carry_out import Decision, decision, passes
from graphcomb.passes.joint.losses import Curve, Losses, take
from graphcomb.passes.joint.solver.problem import Axis, Choice, Problem, Removal
from graphcomb.passes.joint.solver.solve import solve
from graphcomb.passes.joint.space import Space
from graphcomb.passes.joint.tables import Fixed, Tables, check_fixed
from graphcomb.passes.joint.times import Times

from .toys import Heads, PerMac, chain, images, program, trunk


def problem_of(space: Space, times: Times, loss: float = 1.0) -> Problem:
    """Losses that grow with the square of what goes."""
    axes = tuple(
        Axis(
            g.name,
            space.sizes[g.name],
            tuple((1 - n / g.size) ** 2 for n in space.sizes[g.name]),
            space.inner.get(g.name),
        )
        for g in space.groups
    )
    return Problem(axes, tuple(Removal(b.name, loss) for b in space.blocks), tuple(times.terms), times.constant)


def measured(program, latency) -> float:
    """Seconds of a program, layer by layer."""
    return latency.per_run + sum(latency.seconds(layer) for _, layer in Layers(Comb(program)).at({}))


def test_times_of_choices_are_those_of_the_networks_that_the_passes_build():
    """Every choice of one block at most, with random widths: the table's time is the built network's, layer by layer."""
    dense = program(trunk(width=6, inner=8, blocks=2), 2, 6, 6)
    space, latency = Space(dense, alignment=2, count=3), PerMac()
    problem = problem_of(space, Times(space, latency))
    assert [b.name for b in space.blocks] == ["2", "3"]
    assert sorted(space.inner.items()) == [("2.one.weight:0", 0), ("3.one.weight:0", 1)]
    assert problem.seconds(problem.whole()) == pytest.approx(measured(dense, latency), rel=1e-9)
    draw, context = np.random.default_rng(0), Context(data=images(2, 6, 6), teacher=dense)
    for gone in ((False, False), (True, False), (False, True)):
        sizes = tuple(
            -1 if axis.block is not None and gone[axis.block] else int(draw.integers(len(axis.sizes)))
            for axis in problem.axes
        )
        choice, built = Choice(sizes, gone), dense
        for pass_ in passes(space, decision(problem, choice), "magnitude", 8):
            built = pass_(built, context).program
        assert problem.seconds(choice) == pytest.approx(measured(built, latency), rel=1e-9)


class Parallel(nn.Module):
    """A sum of parallel convolutions, which merges into the larger one and then has its name, and a block."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(2, 8, 1), nn.Conv2d(2, 8, 3, padding=1)
        self.rest = trunk(width=8, inner=8, blocks=1)[2:]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(torch.relu(self.small(x) + self.large(x)))


@pytest.mark.parametrize("gone", [False, True])
def test_parallel_layers_keep_their_name_unless_blocks_go(gone: bool):
    dense = program(Parallel(), 2, 6, 6)
    space, latency = Space(dense, alignment=2, count=3), PerMac()
    decided = Decision((space.blocks[0].name,) if gone else (), {"small.weight:0": 4})
    built, context = dense, Context(data=images(2, 6, 6), teacher=dense)
    for pass_ in passes(space, decided, "magnitude", 8):
        built = pass_(built, context).program
    widths = {name: len(tensor) for name, tensor in built.module().named_parameters()}
    assert widths["large.weight"] == 4
    assert ("small.weight" in widths) == (not gone)
    problem = Tables(space, Times(space, latency), Losses(space, context, importance="magnitude", samples=16))
    assert problem.seconds(decided) == pytest.approx(measured(built, latency), rel=1e-9)


class Scaled(nn.Module):
    """A block with a layer scale, which is merged into its convolution where any block goes."""

    def __init__(self, width: int):
        super().__init__()
        self.one, self.two = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.scale * self.two(torch.relu(self.one(x))))


def test_what_merging_saves_once_no_block_saves_again():
    """Without a block the scales of all others are merged. Their time once counted for each block that goes, so that a
    network without several blocks took less than nothing."""
    stages = [nn.Conv2d(2, 6, 3, padding=1), *(Scaled(6) for _ in range(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    dense = program(nn.Sequential(*stages, nn.Linear(6, 4)), 2, 6, 6)
    space, latency = Space(dense, alignment=2, count=3), PerMac()
    problem = problem_of(space, Times(space, latency))
    once = measured(dense, latency) - measured(space.form([]).comb.program, latency)
    assert len(space.blocks) == 4
    assert once > 1e-8
    for count in range(1, 5):
        gone = tuple(i < count for i in range(4))
        sizes = tuple(-1 if a.block is not None and gone[a.block] else len(a.sizes) - 1 for a in problem.axes)
        built = space.form(i for i in range(count)).comb.program
        assert -1e-15 < problem.seconds(Choice(sizes, gone)) - measured(built, latency) < once


def test_a_chain_has_the_answer_of_the_knapsack():
    """Of sizes whose losses are sums of scores, the knapsack tries all combinations."""
    dense = program(chain(5, 12, 8, 12, 3), 5)
    space, latency = Space(dense, alignment=2, count=4), PerMac()
    times, draw = Times(space, latency), np.random.default_rng(0)
    scores = {g.atom: np.sort(draw.exponential(size=g.size)) for g in space.groups}
    axes = tuple(
        Axis(g.name, space.sizes[g.name], tuple(float(scores[g.atom][: g.size - n].sum()) for n in space.sizes[g.name]))
        for g in space.groups
    )
    blocks = tuple(Removal(b.name, 1.0, False) for b in space.blocks)
    problem = Problem(axes, blocks, tuple(times.terms), times.constant)
    predictor = Predictor(space.comb, latency)
    for share in (0.5, 0.7, 0.9):
        options = {g.atom: space.sizes[g.name] for g in space.groups}
        sizes = knapsack(predictor, options, scores, share * times.whole)
        answer = solve(problem, seconds=share * times.whole)
        best = sum(float(scores[g.atom][: g.size - sizes[g.atom]].sum()) for g in space.groups)
        assert answer.loss == pytest.approx(best, abs=1e-9)


class Dense(nn.Module):
    """Seven layers whose outputs are concatenated for one that reads them all."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(3, 6) for _ in range(7))
        self.last, self.head = nn.Linear(42, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(torch.cat([part(x).relu() for part in self.parts], 1)).relu())


def test_a_long_concatenation_is_a_sum_over_pairs_and_exact_where_it_is_arithmetic():
    space, latency = Space(program(Dense(), 3), alignment=1, count=6), PerMac()
    times = Times(space, latency)
    assert max(term.seconds.ndim for term in times.terms) == 2
    problem = problem_of(space, times)
    predictor, draw = Predictor(space.comb, latency), np.random.default_rng(0)
    for _ in range(20):
        sizes = tuple(int(draw.integers(len(axis.sizes))) for axis in problem.axes)
        atoms = {g.atom: space.sizes[g.name][k] for g, k in zip(space.groups, sizes, strict=True)}
        assert problem.seconds(Choice(sizes, (False,) * len(space.blocks))) == pytest.approx(
            predictor.total(atoms), rel=1e-9
        )


def test_one_group_may_outweigh_all():
    dense = program(chain(4, 512, 8, 3), 4)
    space = Space(dense, alignment=8)
    problem = problem_of(space, Times(space, PerMac()))
    whole = problem.seconds(problem.whole())
    answer = solve(problem.only("widths"), seconds=0.6 * whole)
    assert answer.seconds <= 0.6 * whole * (1 + 1e-6)
    kept = dict(zip((a.name for a in problem.axes), answer.choice.sizes, strict=True))
    assert kept["0.weight:0"] < len(space.sizes["0.weight:0"]) - 1


def test_losses_are_what_replacing_one_thing_costs():
    """A width's and a block's loss, against the passes and the divergence written out again."""
    dense, data = program(trunk(width=6, inner=8), 2, 6, 6), images(2, 6, 6)
    space = Space(dense, alignment=2, count=3)
    losses = Losses(space, Context(data=data), importance="magnitude", samples=32)
    group, block = space.group("2.one.weight:0"), space.blocks[1]
    repair, judge = data[::2], torch.cat(data[1::2])

    def divergence(other) -> float:
        p, q = (m.module()(judge).double().log_softmax(1) for m in (dense, other))
        return float((p.exp() * (p - q)).sum(1).mean().detach())

    cut = RemoveChannels(keep={group.name: 4}, importance="magnitude", round_to=1)(dense).program
    readers = tuple(name for name, _ in group.members if name.endswith("weight"))
    narrow = Repair(samples=32, include=readers)(cut, data=repair, teacher=dense).program
    assert losses.width(group, 4) == pytest.approx(divergence(narrow), rel=1e-4)
    pruned = PruneDepth(names=(block.name,), repair=True)(dense, data=repair).program
    assert losses.block(block) == pytest.approx(divergence(pruned), rel=1e-4)
    assert losses.at(group, space.sizes[group.name])[-1] == 0
    assert equivalence(dense, program(trunk(width=6, inner=8), 2, 6, 6)) == 0  # untouched


def test_losses_are_kept_and_not_measured_again(tmp_path, monkeypatch):
    dense = program(chain(5, 8, 8, 3), 5)
    space, context = Space(dense, alignment=2, count=3), Context(data=images(5))
    first = Losses(space, context, samples=32, folder=tmp_path)
    first.measure()
    monkeypatch.setattr(Losses, "_replaced", lambda *a: pytest.fail("measured again"))
    again = Losses(space, context, samples=32, folder=tmp_path)
    again.measure()
    assert again.known == first.known
    other = Losses(space, Context(data=images(5, batches=3)), samples=32, folder=tmp_path)
    assert not any(key.startswith("width") for key in other.known)


def test_curves_pass_through_what_was_measured():
    sums = np.cumsum([0.0, 1, 2, 3, 4])
    curve = Curve(4, sums, {2: 6.0, 4: 0.0})
    assert [curve(n) for n in (1, 2, 3, 4)] == [pytest.approx(12), 6.0, pytest.approx(2), 0.0]
    between = Curve(4, sums, {1: 24.0, 3: 1.0, 4: 0.0})
    assert between(2) == pytest.approx(3 * 2)  # scales 4 and 1, the mean of their logarithms


def test_outputs_add_up_and_images_without_variety_are_an_error():
    dense, data = program(Heads(), 6), images(6)
    divergence = Divergence(dense, data)
    assert divergence(dense) == 0
    smaller = RemoveChannels(ratio=0.5, round_to=1)(dense).program
    (p, a), (q, b) = (m.module()(torch.cat(data)) for m in (dense, smaller))
    p, q = p.double().log_softmax(1), q.double().log_softmax(1)
    variance = a.double().var()
    expected = (p.exp() * (p - q)).sum(1).mean() + (a.double() - b.double()).square().mean() / (2 * variance)
    assert divergence(smaller) == pytest.approx(float(expected.detach()), rel=1e-5)
    one, same = torch.randn(1, 6), r"^data: all calibration images give the same outputs"
    for judge, others in (([torch.ones(4, 6)] * 2, []), ([one], [one]), ([torch.ones(2, 6)], data)):
        with pytest.raises(BadInput, match=same):
            Divergence(dense, judge, others)
    assert Divergence(dense, [one], [-one])(dense) == 0
    with pytest.raises(BadInput, match=same):
        Losses(Space(dense), Context(data=[one, one]))


class Outputs(nn.Module):
    """Scores of three classes, made into outputs by a function."""

    def __init__(self, of):
        super().__init__()
        self.head, self.bias, self.of = nn.Linear(6, 3), nn.Parameter(torch.ones(())), of

    def forward(self, x: torch.Tensor):
        return self.of(self.head(x), self.bias)


def test_probabilities_diverge_like_the_logits_that_they_are_made_of():
    data, values = images(6), []
    for of in (
        lambda x, b: x, lambda x, b: x.softmax(1), lambda x, b: x.log_softmax(-1),
        lambda x, b: x.softmax(-1, torch.float64).float(),
    ):  # fmt: skip
        torch.manual_seed(0)
        dense, other = (program(Outputs(of), 6) for _ in range(2))
        other.module().get_parameter("head.weight").data *= 1.5
        values.append(Divergence(dense, data)(other))
    assert values == pytest.approx(values[:1] * 4, rel=1e-4)
    assert values[0] > 0.01


def test_outputs_of_every_kind():
    """Integers before the scores do not shift them, scalars count as one row, and what cannot be compared says why."""
    data = images(6)
    maps = program(Outputs(lambda x, b: {"mask": x.argmax(1), "out": x[..., None].expand(-1, -1, 2) * 1}), 6)
    assert Divergence(maps, data).scores == 0
    scalar = program(Outputs(lambda x, b: (b.exp(), x)), 6)
    divergence = Divergence(scalar, data)
    assert divergence(scalar) == 0
    assert divergence.images == 64
    other = scalar.copy()
    other.module().get_parameter("head.weight").data *= 1.5
    assert 0 < divergence(other) < 10
    with pytest.raises(BadInput, match=r"^program: no output is floating point"):
        Divergence(program(Outputs(lambda x, b: x.argmax(1)), 6), data)
    with pytest.raises(BadInput, match=r"^data: the network's outputs are not finite on it"):
        Divergence(program(Outputs(lambda x, b: x * float("nan")), 6), data)


def test_images_that_judge_are_held_out_from_large_batches_too():
    """A loader that goes through its data in order is sampled; a list is taken from its start."""
    data = torch.arange(256.0).view(128, 2)
    loader = DataLoader(data, batch_size=32)
    dense = graphcomb.capture(nn.Linear(2, 3), data[:2], dynamic_shapes="batch")
    for found in (take(dense, Context(data=list(data.split(32))), 8), take(dense, Context(data=loader), 8)):
        assert found.held_out
        assert [len(b) for b in (*found.repair, *found.judge)] == [32, 32]
        assert not {*found.repair[0][:, 0].tolist()} & {*found.judge[0][:, 0].tolist()}
    labelled = {"input": data, "labels": torch.zeros(128, dtype=torch.int64)}
    adapted = Context(data=[labelled], inputs=lambda raw: raw["input"], labels=lambda raw: raw["labels"])
    for context in (Context(data=[data]), Context(data=[(data, labelled["labels"])]), adapted):
        found = take(dense, context.replaced("tune"), 8)
        assert found.held_out
        repair, judge = (next(iter(Feed(dense).batches(batches))).args[0] for batches in (found.repair, found.judge))
        assert torch.equal(torch.stack([repair, judge], 1).flatten(0, 1), data)
    fixed = graphcomb.capture(nn.Linear(2, 3), data)
    for taken, context in ((fixed, Context(data=[data])), (dense, Context(data=[data[:1]]))):
        assert not take(taken, context, 8).held_out


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        (Fixed({"nowhere:0": 2}), r"^plan: no group 'nowhere:0'"),
        (Fixed({"0.weight:0": 99}), r"^plan: 0.weight:0: keep must be from 1 to 6"),
        (Fixed({"6.weight:0": 2}), r"^plan: 6.weight:0 keeps 2 of 4 and cannot shrink: .*an output of the program"),
        (Fixed({}, {"9": True}), r"^plan: no block '9'"),
        (Fixed({"2.one.weight:0": 4}, {"2": True}), r"^plan: 2.one.weight:0 keeps 4, and its block 2 goes"),
    ],
)
def test_decisions_by_hand_that_cannot_be_are_named(fixed, message):
    space = Space(program(trunk(width=6, inner=8), 2, 6, 6), alignment=2, count=3)
    with pytest.raises(BadInput, match=message):
        check_fixed(space, fixed)


def test_decisions_by_hand_stand():
    dense = program(trunk(width=6, inner=8), 2, 6, 6)
    space = Space(dense, alignment=2, count=3, more={"3.one.weight:0": [5]})
    times = Times(space, PerMac())
    losses = Losses(space, Context(data=images(2, 6, 6)), importance="magnitude", samples=16)
    tables = Tables(space, times, losses, Fixed({"3.one.weight:0": 5}, {"2": False}))
    problem = tables.problem
    for share in (0.9, 0.8):
        answer = solve(problem, seconds=share * times.whole)
        decided = decision(problem, answer.choice)
        assert decided.widths.get("3.one.weight:0") == 5 or "3" in decided.blocks
        assert "2" not in decided.blocks
