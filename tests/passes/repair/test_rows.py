"""Rows of inputs and outputs: which samples and positions they are of."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphcomb
from graphcomb.graph.nodes import op_name
from graphcomb.passes.repair.consumers import Pair, consumer_of
from graphcomb.passes.repair.rows import MANY, parts, rows_of_inputs, rows_of_outputs, some_positions


@given(st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=12), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_parts_of_both_halves_are_every_sample_that_counts_once(half: list[int], step: int) -> None:
    halves, samples = torch.tensor(half), torch.arange(len(half))
    for which in (0, 1):
        found = [samples[part] for part in parts(halves, which, step)]
        assert all(1 <= len(part) <= step for part in found)
        assert [int(i) for part in found for i in part] == [i for i, h in enumerate(half) if h == which]


def test_every_sample_gives_positions_of_its_own_where_there_are_many_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    assert some_positions((4, 100), MANY, 9, generator) is None
    assert some_positions((4, 100), MANY + 1, MANY + 1, generator) is None
    chosen = some_positions((4, 1000), 4 * MANY, MANY, generator)
    assert chosen is not None
    assert chosen.shape == (4, 250)
    assert all(len(row.unique()) == 250 for row in chosen)
    assert not torch.equal(chosen[0].sort().values, chosen[1].sort().values)
    fewer = some_positions((4, 1000), 4 * MANY, MANY // 4, generator)
    assert fewer is not None
    assert fewer.shape == (4, 62)


def test_rows_of_inputs_times_weights_are_rows_of_outputs_at_all_positions_and_at_some() -> None:
    torch.manual_seed(0)
    layers = {
        "grouped": nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4), "dilated": nn.Conv2d(8, 5, (3, 2), dilation=2),
        "one": nn.Conv1d(8, 5, 1), "linear": nn.Linear(8, 5),
    }  # fmt: skip
    for name, layer in layers.items():
        x = torch.randn(3, 9, 8) if name == "linear" else torch.randn(3, 8, 9, 7)[..., : 7 if name != "one" else 1]
        x = (x.squeeze(-1) if name == "one" else x).double()
        program = graphcomb.capture(layer.double().eval(), x)
        module = program.module()
        node = next(n for n in program.graph.nodes if op_name(n).startswith(("conv", "linear")))
        consumer = consumer_of(node, node, Pair(program, module, {}, {}, set(), 4608))
        y = layer(x).detach()
        groups = consumer.groups
        weight = layer.weight.detach().flatten(1).unflatten(0, (groups, -1))
        count = rows_of_inputs(consumer, x[:1]).shape[1]
        for chosen in (None, torch.rand(3, count).argsort(1)[:, :4]):
            rows = rows_of_inputs(consumer, x, chosen)
            assert rows.shape[1] == 3 * (count if chosen is None else 4), name
            ours = rows @ weight.mT + layer.bias.detach().reshape(groups, 1, -1)
            torch.testing.assert_close(ours, rows_of_outputs(consumer, y, chosen), msg=name)
            kept = dataclasses.replace(consumer, outputs=consumer.outputs[1::2], groups=1)
            of_kept = rows_of_outputs(kept, y, chosen)
            torch.testing.assert_close(ours.transpose(0, 1).flatten(1)[:, 1::2], of_kept[0], msg=name)
