"""Variants of layers: regions in INT8 and 2:4 sparse weights as axes of the problem, and what carries them out."""

from __future__ import annotations

import pytest

from graphcomb import BadInput, Context
from graphcomb.passes.joint.carry_out import decision, passes
from graphcomb.passes.joint.losses import Losses
from graphcomb.passes.joint.ranges import overflows, ranges
from graphcomb.passes.joint.solver.problem import Choice
from graphcomb.passes.joint.space import Space
from graphcomb.passes.joint.tables import Fixed, Tables
from graphcomb.passes.joint.times import Times
from graphcomb.passes.joint.tuning_rounds import Time, Tuner, builder
from graphcomb.passes.joint.variants import (
    find_variants,
    no_sparse_kernels,
    seconds_of_variants,
)
from graphcomb.passes.quantize.regions import quantised_layers
from graphcomb.runtime import get_target

from .test_tables import measured
from .toys import PerMac, images, program, trunk


class Faster(PerMac):
    """The same device for INT8: a quarter of the time of arithmetic, and copies for conversions."""

    def seconds(self, layer) -> float:
        return super().seconds(layer) / (1 if layer.op == "copy" else 4) + (1e-9 if layer.op == "copy" else 0)


def tables(fixed: Fixed | None = None) -> Tables:
    dense, latency = program(trunk(width=8, inner=12, blocks=2), 2, 6, 6), PerMac()
    space = Space(dense, alignment=2, count=3)
    losses = Losses(space, Context(data=images(2, 6, 6)), importance="magnitude", samples=32)
    variants = find_variants(space, losses, Faster(), "this device has no kernels for it")
    return Tables(space, Times(space, latency, variants=variants), losses, fixed)


@pytest.fixture(scope="module")
def shared() -> Tables:
    return tables()


def test_a_network_with_int8_regions_takes_what_the_table_says(shared):
    """Against a prediction of the quantised program itself, layer by layer, with every region alone and with a narrower
    group."""
    problem, context = shared.problem, shared.losses.context
    whole = problem.whole()
    variants = shared.times.variants
    assert [v.weights for v in variants.offered] == [
        ("2.one.weight", "2.two.weight"),
        ("3.one.weight", "3.two.weight"),
    ]
    assert [v.block for v in variants.offered] == [0, 1]
    places = [i for i, axis in enumerate(problem.axes) if axis.kind == "precision"]
    narrow = next(i for i, axis in enumerate(problem.axes) if axis.name == "2.one.weight:0")
    for changed in ([places[0]], places, [places[0], narrow]):
        choice = Choice(tuple(0 if i in changed else k for i, k in enumerate(whole.sizes)), whole.gone)
        built = shared.space.program
        for pass_ in passes(shared.space, decision(problem, choice), "magnitude", 32):
            built = pass_(built, context).program
        assert problem.seconds(choice) == pytest.approx(
            seconds_of_variants(built, variants, shared.times.latency), rel=1e-9
        )
        assert problem.seconds(problem.plain(choice)) > problem.seconds(choice)
        names = {name for _, name in quantised_layers(built)}
        assert names == {n for i in changed for n in problem.axes[i].members}


def test_the_loss_of_a_region_is_that_of_the_network_with_it_alone_in_int8(shared):
    problem = shared.problem
    for axis in problem.axes:
        if axis.kind == "precision":
            assert 0 < axis.losses[0] < 0.1
            assert axis.losses[1] == 0


def test_stored_losses_in_int8_are_those_of_one_placement(tmp_path):
    """Libraries quantise different values; a CPU's losses once served TensorRT from the same folder."""
    space = Space(program(trunk(width=8, inner=12, blocks=2), 2, 6, 6), alignment=2, count=1)

    def found(target: str, folder: str) -> list[float]:
        context = Context(data=images(2, 6, 6), target=get_target(target))
        losses = Losses(space, context, importance="magnitude", samples=32, folder=tmp_path / folder)
        return [v.loss for v in find_variants(space, losses, Faster()).offered]

    cpu, shared, alone = found("cpu", "shared"), found("rtx-sm86", "shared"), found("rtx-sm86", "alone")
    assert shared == alone != cpu
    assert found("cpu", "shared") == cpu


def test_a_budget_is_reached_by_int8_where_widths_lose_more(shared):
    build = builder(shared, "magnitude", 32, shared.losses.context)

    def time(p) -> Time:
        quantised = any(True for _ in quantised_layers(p))
        seconds = (
            seconds_of_variants(p, shared.times.variants, shared.times.latency)
            if quantised
            else measured(p, shared.times.latency)
        )
        return Time(seconds, seconds, seconds)

    tuner = Tuner(shared, build, time)
    budget = 0.7 * tuner.dense
    joint = tuner.within(budget)
    assert joint.seconds <= 1.02 * budget
    assert any(p == "int8" for p in joint.decided.precisions.values())
    alone = Tuner(shared, build, time).within(budget, "widths")
    assert not alone.decided.precisions
    assert joint.loss <= alone.loss


def test_decisions_by_hand_hold_and_contradictions_are_one_line(shared):
    space, times, losses = shared.space, shared.times, shared.losses
    kept = Tables(space, times, losses, Fixed(precisions={"2.one.weight": "fp32"})).problem
    axis = next(a for a in kept.axes if a.name == "int8 2.one.weight")
    assert axis.choices == (1,)
    changed = Tables(space, times, losses, Fixed(precisions={"2.one.weight": "int8"})).problem
    assert next(a for a in changed.axes if a.name == "int8 2.one.weight").choices == (0,)
    both = Fixed(precisions={"2.one.weight": "int8", "2.two.weight": "fp32"})
    with pytest.raises(BadInput, match=r"^plan: 2.one.weight and 2.two.weight exchange INT8 values; give both one"):
        _ = Tables(space, times, losses, both).problem
    with pytest.raises(BadInput, match=r"^plan: no linear layer or convolution with a weight 'x'"):
        Tables(space, times, losses, Fixed(precisions={"x": "int8"}))
    with pytest.raises(BadInput, match=r"^plan: 2.one.weight cannot be 2:4: this device has no kernels"):
        times.variants.check([("2:4", "2.one.weight")])
    with pytest.raises(BadInput, match=r"^plan: 0.weight cannot be int8: it reads the network's inputs"):
        times.variants.check([("int8", "0.weight")])


def test_ranges_are_those_of_inputs_and_outputs(shared):
    space = shared.space
    found = ranges(space.program, shared.losses.divergence)
    seen = max(float(x.abs().max()) for x in shared.losses.images.judge)
    assert found["0.weight"] >= seen
    assert set(found) == {"0.weight", "2.one.weight", "2.two.weight", "3.one.weight", "3.two.weight", "6.weight"}
    assert overflows(16_400.0)
    assert overflows(float("nan"))
    assert not overflows(16_000.0)


def test_sparse_kernels_are_a_matter_of_the_target():
    assert no_sparse_kernels("cpu", None) == "cpu has no kernels for sparse weights"
    assert "SM80" in no_sparse_kernels("rtx-sm75", (7, 5))
    assert no_sparse_kernels("rtx-sm86", (8, 6)) is None
